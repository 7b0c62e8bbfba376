/* gather.c: y = x W^T + b for few rows, without W: the entries that codes name are multiplied where they lie, which
 * serves codebooks too large for tables. Sums run in AQLM_GATHER partial sums, whatever the ISA and the threads. */
#include "core/product/paths.h"
#include "core/product/stored.h"
#include "core/runtime/convert.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

enum {
    PASS = 8,  /* rows taken at once */
    PIECE = 64 /* outputs that are worth a thread */
};

typedef struct gather_job {
    const aqlm_weight *w;
    int64_t n_rows;
    const float *x, *scales, *bias; /* x as gather_sums wants it */
    float *sums;                    /* [out, n_rows] */
    void *y;
    aqlm_dtype dtype;
} gather_job;

typedef struct layout {
    int64_t row, scales, bias, sums, total; /* in floats, after the blocks of x */
} layout;

static layout lay_out(const aqlm_shape *s, int64_t n_rows) {
    const int64_t rows = aqlm_min(n_rows, PASS);
    layout l = {.row = rows * aqlm_round_up(s->in_features, AQLM_GATHER)};
    l.scales = l.row + aqlm_round_up(s->in_features, AQLM_GATHER);
    l.bias = l.scales + aqlm_round_up(s->out_features, 16);
    l.sums = l.bias + aqlm_round_up(s->out_features, 16);
    l.total = l.sums + s->out_features * rows;
    return l;
}

bool aqlm_gather_fits(const aqlm_weight *w) { return !w->packed; }

size_t aqlm_gather_workspace(const aqlm_weight *w, int64_t n_rows) {
    return (size_t)lay_out(&w->shape, n_rows).total * sizeof(float);
}

/* Fetches the codebooks in the order of memory, each thread from another place on: entries one by one would come late.
 */
static void fetch_codebooks(const aqlm_weight *w, int64_t begin, int64_t n_codes) {
    const aqlm_shape *s = &w->shape;
    const int64_t line = 64, lines = (s->num_codebooks << s->nbits_per_codebook) * s->out_group_size *
                                     s->in_group_size * (int64_t)aqlm_dtype_size(w->dtype) / line;
    const int64_t from = lines * begin / s->out_features;
    if (n_codes < lines) return; /* most entries are not wanted */
    const char *codebooks = w->codebooks;
    for (int64_t i = from; i < lines; i++) __builtin_prefetch(codebooks + i * line, 0, 2);
    for (int64_t i = 0; i < from; i++) __builtin_prefetch(codebooks + i * line, 0, 2);
}

static void gather_range(int64_t begin, int64_t end, void *ctx) {
    const gather_job *job = ctx;
    const aqlm_kernels *isa = aqlm_isa();
    const aqlm_shape *s = &job->w->shape;
    const int64_t rows = job->n_rows, out = s->out_features, og = s->out_group_size;
    const int64_t groups = s->in_features / s->in_group_size;
    const int64_t row_bytes = groups * s->num_codebooks * (s->nbits_per_codebook <= 8 ? 1 : 2);
    fetch_codebooks(job->w, begin, (end - begin) * groups * s->num_codebooks);
    const int64_t at_once = og == 1 ? PIECE : 1;
    for (int64_t o = begin; o < end && !aqlm_cancelled(); o += at_once) {
        const aqlm_entries entries = aqlm_entries_of(job->w, o % og, groups);
        isa->gather_sums(job->sums + o * rows, &entries, (const char *)job->w->codes + o / og * row_bytes, row_bytes,
                         aqlm_min(at_once, end - o), job->x, rows);
    }
    for (int64_t o = begin; o < end; o += PIECE)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t n = aqlm_min(PIECE, end - o);
            float y[PIECE];
            for (int64_t i = 0; i < n; i++)
                y[i] =
                    job->sums[(o + i) * rows + r] * job->scales[(o + i) / og] + (job->bias ? job->bias[o + i] : 0.0f);
            aqlm_from_f32((char *)job->y + (size_t)(r * out + o) * aqlm_dtype_size(job->dtype), job->dtype, y, n);
        }
}

aqlm_status aqlm_gather_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size) {
    const aqlm_shape *s = &w->shape;
    if (!aqlm_gather_fits(w) || workspace_size < aqlm_gather_workspace(w, n_rows)) return AQLM_BAD_ARGUMENT;
    const layout l = lay_out(s, n_rows);
    const int64_t in = s->in_features, padded = aqlm_round_up(in, AQLM_GATHER);
    const size_t size = aqlm_dtype_size(dtype);
    float *blocks = workspace, *row = blocks + l.row, *scales = blocks + l.scales;
    aqlm_to_f32(scales, w->scales, w->dtype, s->out_features / s->out_group_size);
    if (bias) aqlm_to_f32(blocks + l.bias, bias, dtype, s->out_features);
    gather_job job = {.w = w, .x = blocks, .scales = scales, .bias = bias ? blocks + l.bias : NULL, .dtype = dtype};
    job.sums = blocks + l.sums;
    for (int64_t first = 0; first < n_rows; first += job.n_rows) {
        const int64_t left = n_rows - first; /* as many rows as there is a kernel for */
        job.n_rows = left >= PASS ? PASS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        for (int64_t r = 0; r < job.n_rows; r++) {
            aqlm_to_f32(row, (const char *)x + (size_t)((first + r) * in) * size, dtype, in);
            memset(row + in, 0, (size_t)(padded - in) * sizeof *row);
            for (int64_t i = 0; i < padded; i += AQLM_GATHER)
                memcpy(blocks + i * job.n_rows + r * AQLM_GATHER, row + i, AQLM_GATHER * sizeof *row);
        }
        job.y = (char *)y + (size_t)(first * s->out_features) * size;
        aqlm_parallel(0, s->out_features, aqlm_even_grain(s->out_features, PIECE), gather_range, &job);
    }
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
