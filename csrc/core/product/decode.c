/* decode.c: codes -> rows of W. This file defines the format. */
#include "core/product/stored.h"
#include "core/runtime/convert.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

int64_t aqlm_codes_scratch(const aqlm_weight *w, int64_t groups) {
    return w->packed ? AQLM_ROWS * groups * w->shape.num_codebooks : 0;
}

const void *aqlm_codes_of(const aqlm_weight *w, int64_t first, int64_t last, int64_t begin, int64_t end,
                          uint8_t *scratch, int64_t *step) {
    const aqlm_shape *s = &w->shape;
    const int64_t K = s->num_codebooks, J = s->in_features / s->in_group_size, O = s->out_features / s->out_group_size;
    const int64_t n = (end - begin) * K, size = s->nbits_per_codebook <= 8 ? 1 : 2;
    *step = w->packed ? n : J * K * size;
    if (!w->packed) return (const char *)w->codes + (first * J + begin) * K * size;
    const uint8_t *codes = (const uint8_t *)w->codes + begin * K * O + first;
    for (int64_t t = 0; t < n; t += 64)
        aqlm_isa()->transpose(scratch + t, n, codes + t * O, O, aqlm_min(64, n - t), last - first);
    return scratch;
}

typedef struct decode_job {
    void *rows;
    aqlm_dtype dtype;
    const aqlm_weight *w;
    const float *scales;
    int64_t first, begin; /* group of outputs scales starts with; row that rows does */
    aqlm_shared_status status;
} decode_job;

static void decode_range(int64_t begin, int64_t end, void *ctx) {
    decode_job *job = ctx;
    const aqlm_shape *s = &job->w->shape;
    const int64_t in = s->in_features, og = s->out_group_size, groups = in / s->in_group_size;
    const size_t row_bytes = (size_t)in * aqlm_dtype_size(job->dtype);
    float *row = aqlm_alloc(in * (int64_t)sizeof *row + aqlm_codes_scratch(job->w, groups), 1);
    if (!row) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    for (int64_t first = begin / og, r = begin; r < end; first += AQLM_ROWS) {
        const int64_t last = aqlm_min(first + AQLM_ROWS, (end - 1) / og + 1);
        int64_t step;
        const void *codes = aqlm_codes_of(job->w, first, last, 0, groups, (uint8_t *)(row + in), &step);
        for (; r < aqlm_min(end, last * og) && !aqlm_cancelled(); r++) {
            const int64_t o = r / og;
            const aqlm_entries entries = aqlm_entries_of(job->w, r % og, groups);
            aqlm_isa()->decode_row(row, &entries, (const char *)codes + (o - first) * step,
                                   job->scales[o - job->first]);
            aqlm_from_f32((char *)job->rows + (size_t)(r - job->begin) * row_bytes, job->dtype, row, in);
        }
        if (aqlm_cancelled()) break;
    }
    free(row);
}

aqlm_status aqlm_decode_rows(void *rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t begin, int64_t end) {
    const aqlm_shape *s = &w->shape;
    if (aqlm_check_weight(w) || begin < 0 || begin > end || end > s->out_features) return AQLM_BAD_ARGUMENT;
    if (begin == end) return AQLM_OK;
    const int64_t first = begin / s->out_group_size, n = (end - 1) / s->out_group_size + 1 - first;
    float *scales = aqlm_alloc(n, sizeof *scales);
    if (!scales) return AQLM_NO_MEMORY;
    aqlm_to_f32(scales, (const char *)w->scales + (size_t)first * aqlm_dtype_size(w->dtype), w->dtype, n);
    decode_job job = {rows, row_dtype, w, scales, first, begin, {AQLM_OK}};
    aqlm_parallel(begin, end, w->packed ? AQLM_ROWS : 16, decode_range, &job);
    free(scales);
    return aqlm_get_status(&job.status);
}
