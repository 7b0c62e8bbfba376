/* gather.c: y = x W^T + b for few rows, without W: the entries that codes name are multiplied where they lie, which
 * serves codebooks too large for tables. Sums run in 32 partial sums an output, whatever the ISA and the threads. */
#include "core.h"

enum {
    MOST_ROWS = 16, /* more are cheaper decoded (measured) */
    AT_ONCE = 8,    /* outputs whose sums are scaled and stored together */
    AHEAD = 2048    /* bytes: the distance at which codes are prefetched, past the caches that codebooks fill */
};

typedef struct gather_job {
    const aqlm_weight *w;
    int64_t n_rows;
    const float *x, *scales, *bias;
    void *y;
    aqlm_dtype dtype;
} gather_job;

typedef struct layout {
    int64_t scales, bias, total; /* in floats, after x */
} layout;

static layout plan(const aqlm_shape *s, int64_t n_rows) {
    layout l = {.scales = aqlm_round_up(n_rows * s->in_features, 16)};
    l.bias = l.scales + aqlm_round_up(s->out_features, 16);
    l.total = l.bias + aqlm_round_up(s->out_features, 16);
    return l;
}

bool aqlm_gather_fits(const aqlm_weight *w, int64_t n_rows) { return n_rows >= 1 && n_rows <= MOST_ROWS && !w->packed; }

size_t aqlm_gather_workspace(const aqlm_weight *w, int64_t n_rows) {
    return (size_t)plan(&w->shape, n_rows).total * sizeof(float);
}

static void gather_range(int64_t begin, int64_t end, void *ctx) {
    const gather_job *job = ctx;
    const aqlm_kernels *isa = aqlm_isa();
    const aqlm_shape *s = &job->w->shape;
    const int64_t rows = job->n_rows, out = s->out_features, og = s->out_group_size;
    const int64_t groups = s->in_features / s->in_group_size;
    const int64_t row_bytes = groups * s->num_codebooks * (s->nbits_per_codebook <= 8 ? 1 : 2);
    const size_t size = aqlm_dtype_size(job->dtype);
    for (int64_t first = begin; first < end && !aqlm_cancelled(); first += AT_ONCE) {
        const int64_t n = aqlm_min(AT_ONCE, end - first);
        float sums[AT_ONCE][MOST_ROWS], y[AT_ONCE];
        for (int64_t i = 0; i < n; i++) {
            const int64_t o = (first + i) / og;
            const aqlm_entries entries = aqlm_entries_of(job->w, (first + i) % og, groups);
            isa->gather_sums(sums[i], &entries, (const char *)job->w->codes + o * row_bytes, AHEAD, job->x,
                             s->in_features, rows);
            for (int64_t r = 0; r < rows; r++)
                sums[i][r] = sums[i][r] * job->scales[o] + (job->bias ? job->bias[first + i] : 0.0f);
        }
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t i = 0; i < n; i++) y[i] = sums[i][r];
            aqlm_from_f32((char *)job->y + (size_t)(r * out + first) * size, job->dtype, y, n);
        }
    }
}

aqlm_status aqlm_gather_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size) {
    const aqlm_shape *s = &w->shape;
    if (workspace_size < aqlm_gather_workspace(w, n_rows)) return AQLM_BAD_ARGUMENT;
    const layout l = plan(s, n_rows);
    float *f = workspace;
    if (dtype != AQLM_F32) aqlm_to_f32(f, x, dtype, n_rows * s->in_features);
    aqlm_to_f32(f + l.scales, w->scales, w->dtype, s->out_features / s->out_group_size);
    if (bias) aqlm_to_f32(f + l.bias, bias, dtype, s->out_features);
    gather_job job = {w, n_rows, dtype == AQLM_F32 ? x : f, f + l.scales, bias ? f + l.bias : NULL, y, dtype};
    aqlm_parallel(0, s->out_features, aqlm_even_grain(s->out_features, AT_ONCE), gather_range, &job);
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
