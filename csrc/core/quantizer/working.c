/* working.c: what valid working codes are, the rows they stand for, the order in which a sweep replaces them. */
#include "core/quantizer/working.h"

#include <string.h>

#include "core/runtime/rng.h"

aqlm_status aqlm_check_quantizer_shape(const aqlm_shape *s) {
    return aqlm_check_shape(s) || s->out_group_size != 1 ? AQLM_BAD_ARGUMENT : AQLM_OK;
}

aqlm_status aqlm_check_working_codes(const uint16_t *codes, const aqlm_shape *s) {
    const int64_t n = s->out_features * (s->in_features / s->in_group_size) * s->num_codebooks;
    uint16_t any = 0;
    for (int64_t i = 0; i < n; i++) any |= (uint16_t)(codes[i] >> (s->nbits_per_codebook - 1) >> 1);
    return any ? AQLM_BAD_ARGUMENT : AQLM_OK;
}

static void sum_entries(float *q, const uint16_t *codes, const float *codebooks, const aqlm_shape *s) {
    const int64_t g = s->in_group_size, stride = g << s->nbits_per_codebook;
    memcpy(q, codebooks + codes[0] * g, (size_t)g * sizeof *q);
    for (int64_t k = 1; k < s->num_codebooks; k++) {
        const float *entry = codebooks + k * stride + codes[k] * g;
        for (int64_t d = 0; d < g; d++) q[d] += entry[d];
    }
}

void aqlm_decode_working(float *q, const uint16_t *codes, const float *codebooks, const aqlm_shape *s, int64_t begin,
                         int64_t end) {
    const int64_t groups = s->in_features / s->in_group_size;
    for (int64_t i = begin * groups; i < end * groups; i++)
        sum_entries(q + (i - begin * groups) * s->in_group_size, codes + i * s->num_codebooks, codebooks, s);
}

/* 0..n-1 in a random order */
static void shuffle(int32_t *order, int64_t n, aqlm_rng *rng) {
    for (int64_t i = 0; i < n; i++) order[i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t pick = aqlm_rng_below(rng, i + 1);
        const int32_t t = order[i];
        order[i] = order[pick];
        order[pick] = t;
    }
}

void aqlm_sweep_order(int32_t *order, int64_t groups, int64_t num_codebooks, uint64_t seed) {
    aqlm_rng rng = aqlm_rng_seed(seed);
    shuffle(order, groups, &rng);
    for (int64_t i = 0; i < groups; i++) shuffle(order + groups + i * num_codebooks, num_codebooks, &rng);
}
