/* tiles.c: y = x W^T + b, or y = x W, with tiles of W decoded and multiplied in fp32. Sums run in order: the same on
 * every ISA, for any threads and any number of rows. */
#include "core/product/paths.h"
#include "core/product/stored.h"
#include "core/runtime/convert.h"
#include "core/runtime/gemm.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

enum {
    TILE = 128,      /* columns of y whose weights are decoded at once; a multiple of every g */
    BLOCK = 512,     /* rows of x a tile is used for */
    MOST_PIECES = 64 /* pieces that can run at once, each with its own scratch */
};

typedef struct matmul_job {
    const aqlm_weight *w;
    const float *scales, *bias, *x;
    void *y;
    aqlm_dtype dtype;
    bool transposed;                      /* y = x W: x [n_rows, out], y [n_rows, in] */
    int64_t n_rows, depth, width;         /* x [n_rows, depth], y [n_rows, width] */
    int64_t unit, n_pieces, scratch_size; /* columns of y that stay together; pieces; floats of scratch in each */
    int64_t codes_at;                     /* where in it unpacked codes lie */
    float *scratch;
} matmul_job;

/* Where the workspace keeps what, in floats. */
typedef struct layout {
    int64_t scales, bias, x, scratch, total;
} layout;

/* Fills the sizes of the job; n_pieces is what the threads could use. */
static layout lay_out(matmul_job *job, const aqlm_weight *w, int64_t n_rows, bool transposed) {
    const aqlm_shape *s = &w->shape;
    const int64_t width = transposed ? s->in_features : s->out_features;
    const int64_t depth = transposed ? s->out_features : s->in_features;
    job->w = w;
    job->transposed = transposed;
    job->n_rows = n_rows;
    job->depth = depth;
    job->width = width;
    job->unit = transposed ? s->in_group_size : 1;
    job->n_pieces = aqlm_min(aqlm_min(aqlm_get_num_threads(), MOST_PIECES), (width + TILE - 1) / TILE);
    const int64_t codes = aqlm_codes_scratch(w, transposed ? TILE / s->in_group_size : depth / s->in_group_size);
    job->codes_at = TILE * depth + aqlm_min(n_rows, BLOCK) * TILE + aqlm_gemm_workspace();
    job->scratch_size = aqlm_round_up(job->codes_at + (codes + 3) / 4, 16);
    layout l = {0};
    l.bias = aqlm_round_up(s->out_features / s->out_group_size, 16);
    l.x = l.bias + (transposed ? 0 : aqlm_round_up(width, 16));
    l.scratch = l.x + aqlm_round_up(n_rows * depth, 16);
    l.total = l.scratch + job->n_pieces * job->scratch_size;
    return l;
}

size_t aqlm_tiles_workspace(const aqlm_weight *w, int64_t n_rows, bool transposed) {
    matmul_job job;
    return (size_t)lay_out(&job, w, n_rows, transposed).total * sizeof(float);
}

static void store(const matmul_job *job, int64_t row, int64_t first, const float *y, int64_t n) {
    const size_t size = aqlm_dtype_size(job->dtype);
    aqlm_from_f32((char *)job->y + (size_t)(row * job->width + first) * size, job->dtype, y, n);
}

/* Groups begin..end of rows first..last of W: row r to to[(r - first) * step...]. */
static void decode_rows(const matmul_job *job, float *to, int64_t step, int64_t first, int64_t last, int64_t begin,
                        int64_t end, float *scratch) {
    const aqlm_shape *s = &job->w->shape;
    const int64_t og = s->out_group_size;
    for (int64_t o = first / og, r = first; r < last; o += AQLM_ROWS) {
        const int64_t ready = aqlm_min(o + AQLM_ROWS, (last - 1) / og + 1);
        int64_t codes_step;
        const void *codes =
            aqlm_codes_of(job->w, o, ready, begin, end, (uint8_t *)(scratch + job->codes_at), &codes_step);
        for (; r < aqlm_min(last, ready * og); r++, to += step) {
            const aqlm_entries entries = aqlm_entries_of(job->w, r % og, end - begin);
            aqlm_isa()->decode_row(to, &entries, (const char *)codes + (r / og - o) * codes_step, job->scales[r / og]);
        }
    }
}

/* The weights of columns first..first + width of y: tile[width, in], or tile[out, width] if transposed. */
static aqlm_operand decode_tile(const matmul_job *job, float *scratch, int64_t first, int64_t width) {
    const int64_t g = job->w->shape.in_group_size, depth = job->depth;
    if (job->transposed) decode_rows(job, scratch, width, 0, depth, first / g, (first + width) / g, scratch);
    else decode_rows(job, scratch, depth, first, first + width, 0, depth / g, scratch);
    return job->transposed ? (aqlm_operand){scratch, width, 1} : (aqlm_operand){scratch, 1, depth};
}

static void many_rows(const matmul_job *job, int64_t begin, int64_t end, float *scratch) {
    const int64_t depth = job->depth;
    float *y = scratch + TILE * depth, *workspace = y + aqlm_min(job->n_rows, BLOCK) * TILE;
    for (int64_t first = begin; first < end; first += TILE) {
        const int64_t width = aqlm_min(TILE, end - first);
        const aqlm_operand weights = decode_tile(job, scratch, first, width);
        for (int64_t r = 0; r < job->n_rows; r += BLOCK) {
            const int64_t rows = aqlm_min(BLOCK, job->n_rows - r);
            aqlm_gemm(y, TILE, (aqlm_operand){job->x + r * depth, depth, 1}, weights, rows, width, depth, workspace);
            for (int64_t i = 0; i < rows; i++) {
                if (job->bias)
                    for (int64_t j = 0; j < width; j++) y[i * TILE + j] += job->bias[first + j];
                store(job, r + i, first, y + i * TILE, width);
            }
        }
    }
}

/* The range is over pieces, so that no two share scratch whatever the runner does. */
static void matmul_pieces(int64_t begin, int64_t end, void *ctx) {
    const matmul_job *job = ctx;
    const int64_t units = job->width / job->unit;
    for (int64_t piece = begin; piece < end && !aqlm_cancelled(); piece++) {
        const int64_t first = units * piece / job->n_pieces * job->unit;
        const int64_t last = units * (piece + 1) / job->n_pieces * job->unit;
        float *scratch = job->scratch + piece * job->scratch_size;
        many_rows(job, first, last, scratch);
    }
}

aqlm_status aqlm_tiles_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                              int64_t n_rows, bool transposed, void *workspace, size_t workspace_size) {
    const aqlm_shape *s = &w->shape;
    matmul_job job;
    const layout l = lay_out(&job, w, n_rows, transposed);
    job.n_pieces = ((int64_t)(workspace_size / sizeof(float)) - l.scratch) / job.scratch_size;
    if (job.n_pieces < 1) return AQLM_BAD_ARGUMENT;
    float *f = workspace;
    aqlm_to_f32(f + l.scales, w->scales, w->dtype, s->out_features / s->out_group_size);
    if (bias) aqlm_to_f32(f + l.bias, bias, dtype, job.width);
    if (dtype != AQLM_F32) aqlm_to_f32(f + l.x, x, dtype, n_rows * job.depth);
    job.scales = f + l.scales;
    job.bias = bias ? f + l.bias : NULL;
    job.x = dtype == AQLM_F32 ? x : f + l.x;
    job.y = y;
    job.dtype = dtype;
    job.scratch = f + l.scratch;
    aqlm_parallel(0, job.n_pieces, 1, matmul_pieces, &job);
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
