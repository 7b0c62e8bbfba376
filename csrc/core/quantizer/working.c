/* working.c: what valid working codes are, and the rows they stand for. */
#include "core/quantizer/working.h"

#include <string.h>

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
