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

static inline void decode_row(float *restrict row, const void *codes, const float *restrict codebooks, float scale,
                              const aqlm_shape *s, int64_t row_index, int64_t begin, int64_t end, bool wide,
                              int64_t g) {
    const int64_t K = s->num_codebooks, og = s->out_group_size;
    const int64_t entry_size = og * g, stride = entry_size << s->nbits_per_codebook;
    const int64_t first = row_index / og * (s->in_features / g) * K;
    const float *inner = codebooks + row_index % og * g;
    for (int64_t j = begin; j < end; j++, row += g) {
        float sum[32] = {0};
        for (int64_t k = 0; k < K; k++) {
            const float *entry = inner + k * stride + aqlm_stored_code(codes, first + j * K + k, s, wide) * entry_size;
            for (int64_t d = 0; d < g; d++) sum[d] += entry[d];
        }
        for (int64_t d = 0; d < g; d++) row[d] = scale * sum[d];
    }
}

void aqlm_decode_row_f32(float *row, const void *codes, const float *codebooks, const float *scales,
                         const aqlm_shape *s, int64_t r, int64_t begin, int64_t end) {
    const float scale = scales ? scales[r / s->out_group_size] : 1.0f;
    AQLM_WITH_FORMAT(s, decode_row, row, codes, codebooks, scale, s, r, begin, end)
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
    const aqlm_shape *s = &job->w->shape;
    const int64_t in = s->in_features, groups = in / s->in_group_size;
    const size_t row_bytes = (size_t)in * aqlm_dtype_size(job->dtype);
    float *row = aqlm_alloc(in, sizeof *row);
    if (!row) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    for (int64_t r = begin; r < end && !aqlm_cancelled(); r++) {
        aqlm_decode_row_f32(row, job->w->codes, job->codebooks, job->scales, s, r, 0, groups);
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
