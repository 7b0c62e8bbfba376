/* decode.c: codes -> rows of W. This file defines the format. */
#include "core.h"

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

/* One body for every (code width, g): the switch below makes both constants. */
static inline void decode_row(float *restrict row, const void *codes, const float *restrict codebooks, float scale,
                              const aqlm_shape *s, int64_t row_index, bool wide, int64_t g) {
    const int64_t K = s->num_codebooks, og = s->out_group_size, groups = s->in_features / g;
    const int64_t entry_size = og * g, stride = entry_size << s->nbits_per_codebook;
    const uint32_t mask = (1u << s->nbits_per_codebook) - 1;
    const int64_t first = row_index / og * groups * K;
    const float *inner = codebooks + row_index % og * g;
    for (int64_t j = 0; j < groups; j++) {
        float sum[32] = {0};
        for (int64_t k = 0; k < K; k++) {
            const int64_t i = first + j * K + k;
            const uint32_t code = (wide ? ((const uint16_t *)codes)[i] : ((const uint8_t *)codes)[i]) & mask;
            const float *entry = inner + k * stride + code * entry_size;
            for (int64_t d = 0; d < g; d++) sum[d] += entry[d];
        }
        for (int64_t d = 0; d < g; d++) row[j * g + d] = scale * sum[d];
    }
}

void aqlm_decode_row_f32(float *row, const void *codes, const float *codebooks, const float *scales,
                         const aqlm_shape *s, int64_t r) {
    const float scale = scales[r / s->out_group_size];
    const bool wide = s->nbits_per_codebook > 8;
#define CASE(G)                                                                                                        \
    case G:                                                                                                            \
        if (wide) decode_row(row, codes, codebooks, scale, s, r, true, G);                                             \
        else decode_row(row, codes, codebooks, scale, s, r, false, G);                                                 \
        break
    switch (s->in_group_size) {
        CASE(4);
        CASE(8);
        CASE(16);
        CASE(32);
    }
#undef CASE
}

typedef struct decode_job {
    void *rows;
    aqlm_dtype dtype;
    const aqlm_weight *w;
    const float *codebooks, *scales;
    int64_t begin;
    aqlm_shared_status status;
} decode_job;

static void decode_range(int64_t begin, int64_t end, void *ctx) {
    decode_job *job = ctx;
    const int64_t in = job->w->shape.in_features;
    const size_t row_bytes = (size_t)in * aqlm_dtype_size(job->dtype);
    float *row = aqlm_alloc(in, sizeof *row);
    if (!row) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    for (int64_t r = begin; r < end && !aqlm_cancelled(); r++) {
        aqlm_decode_row_f32(row, job->w->codes, job->codebooks, job->scales, &job->w->shape, r);
        aqlm_from_f32((char *)job->rows + (size_t)(r - job->begin) * row_bytes, job->dtype, row, in);
    }
    free(row);
}

aqlm_status aqlm_decode_rows(void *rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t begin, int64_t end) {
    const aqlm_shape *s = &w->shape;
    if (aqlm_check_shape(s) || begin < 0 || begin > end || end > s->out_features) return AQLM_BAD_ARGUMENT;
    const int64_t n = (s->num_codebooks << s->nbits_per_codebook) * s->out_group_size * s->in_group_size;
    const int64_t n_scales = s->out_features / s->out_group_size;
    float *codebooks = aqlm_alloc(n + n_scales, sizeof *codebooks);
    if (!codebooks) return AQLM_NO_MEMORY;
    aqlm_to_f32(codebooks, w->codebooks, w->dtype, n);
    aqlm_to_f32(codebooks + n, w->scales, w->dtype, n_scales);
    decode_job job = {rows, row_dtype, w, codebooks, codebooks + n, begin, {AQLM_OK}};
    aqlm_parallel(begin, end, 16, decode_range, &job);
    free(codebooks);
    return aqlm_get_status(&job.status);
}
