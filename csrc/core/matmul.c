/* matmul.c: y = x W^T + b, W decoded tile by tile. Sums run over the inputs in order for many rows and in
 * AQLM_LANES virtual lanes for few, in fp32, so the result is the same on every ISA and for any threads. */
#include "core.h"

enum {
    TILE = 128,     /* outputs decoded at once */
    FEW = 4,        /* rows below which a dot product an output is cheaper than packing */
    BLOCK = 512,    /* rows of x a tile is used for */
    MOST_SLOTS = 64 /* pieces that can run at once, each with its own scratch */
};

typedef struct matmul_job {
    const aqlm_weight *w;
    const float *codebooks, *scales, *bias, *x;
    void *y;
    aqlm_dtype dtype;
    int64_t n_rows, slot_size, n_slots;
    float *slots;
} matmul_job;

static int64_t slot_floats(const aqlm_shape *s, int64_t n_rows) {
    const int64_t in = s->in_features;
    if (n_rows < FEW) return aqlm_round_up(in, 16);
    return aqlm_round_up(TILE * in + aqlm_min(n_rows, BLOCK) * TILE + aqlm_gemm_workspace(), 16);
}

static int64_t slot_count(const aqlm_shape *s) {
    return aqlm_min(aqlm_min(aqlm_get_num_threads(), MOST_SLOTS), (s->out_features + TILE - 1) / TILE);
}

typedef struct layout {
    int64_t codebooks, scales, bias, x, slots, total, n_slots;
} layout;

static layout plan(const aqlm_weight *w, int64_t n_rows) {
    const aqlm_shape *s = &w->shape;
    layout l;
    l.codebooks = 0;
    l.scales = aqlm_round_up((s->num_codebooks << s->nbits_per_codebook) * s->out_group_size * s->in_group_size, 16);
    l.bias = l.scales + aqlm_round_up(s->out_features / s->out_group_size, 16);
    l.x = l.bias + aqlm_round_up(s->out_features, 16);
    l.slots = l.x + aqlm_round_up(n_rows * s->in_features, 16);
    l.n_slots = aqlm_max(slot_count(s), 1);
    l.total = l.slots + l.n_slots * slot_floats(s, n_rows);
    return l;
}

size_t aqlm_matmul_workspace(const aqlm_weight *w, int64_t n_rows) {
    if (aqlm_check_shape(&w->shape) || n_rows < 1) return 0;
    return (size_t)plan(w, n_rows).total * sizeof(float);
}

static void store(const matmul_job *job, int64_t row, int64_t first, const float *y, int64_t n) {
    const size_t size = aqlm_dtype_size(job->dtype);
    aqlm_from_f32((char *)job->y + (size_t)(row * job->w->shape.out_features + first) * size, job->dtype, y, n);
}

static void few_rows(const matmul_job *job, int64_t begin, int64_t end, float *row) {
    const aqlm_kernels *isa = aqlm_isa();
    const int64_t in = job->w->shape.in_features;
    for (int64_t o = begin; o < end; o++) {
        aqlm_decode_row_f32(row, job->w->codes, job->codebooks, job->scales, &job->w->shape, o);
        for (int64_t r = 0; r < job->n_rows; r++) {
            float y = isa->dot(job->x + r * in, row, in);
            if (job->bias) y += job->bias[o];
            store(job, r, o, &y, 1);
        }
    }
}

static void many_rows(const matmul_job *job, int64_t begin, int64_t end, float *scratch) {
    const int64_t in = job->w->shape.in_features;
    float *tile = scratch, *y = tile + TILE * in, *workspace = y + aqlm_min(job->n_rows, BLOCK) * TILE;
    for (int64_t o = begin; o < end; o += TILE) {
        const int64_t width = aqlm_min(TILE, end - o);
        for (int64_t i = 0; i < width; i++)
            aqlm_decode_row_f32(tile + i * in, job->w->codes, job->codebooks, job->scales, &job->w->shape, o + i);
        for (int64_t r = 0; r < job->n_rows; r += BLOCK) {
            const int64_t rows = aqlm_min(BLOCK, job->n_rows - r);
            aqlm_gemm(y, TILE, (aqlm_operand){job->x + r * in, in, 1}, (aqlm_operand){tile, 1, in}, rows, width, in,
                      workspace);
            for (int64_t i = 0; i < rows; i++) {
                if (job->bias)
                    for (int64_t j = 0; j < width; j++) y[i * TILE + j] += job->bias[o + j];
                store(job, r + i, o, y + i * TILE, width);
            }
        }
    }
}

/* The range runs over slots, so that two pieces never share scratch whatever the runner does. */
static void matmul_slots(int64_t begin, int64_t end, void *ctx) {
    const matmul_job *job = ctx;
    const int64_t out = job->w->shape.out_features;
    for (int64_t slot = begin; slot < end && !aqlm_cancelled(); slot++) {
        const int64_t first = out * slot / job->n_slots, last = out * (slot + 1) / job->n_slots;
        float *scratch = job->slots + slot * job->slot_size;
        if (job->n_rows < FEW) few_rows(job, first, last, scratch);
        else many_rows(job, first, last, scratch);
    }
}

aqlm_status aqlm_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                        int64_t n_rows, void *workspace, size_t workspace_size) {
    const aqlm_shape *s = &w->shape;
    if (aqlm_check_shape(s) || n_rows < 0) return AQLM_BAD_ARGUMENT;
    if (n_rows == 0) return AQLM_OK;
    layout l = plan(w, n_rows);
    l.n_slots = ((int64_t)(workspace_size / sizeof(float)) - l.slots) / slot_floats(s, n_rows);
    if (l.n_slots < 1) return AQLM_BAD_ARGUMENT;
    float *f = workspace;
    aqlm_to_f32(f + l.codebooks, w->codebooks, w->dtype,
                (s->num_codebooks << s->nbits_per_codebook) * s->out_group_size * s->in_group_size);
    aqlm_to_f32(f + l.scales, w->scales, w->dtype, s->out_features / s->out_group_size);
    if (bias) aqlm_to_f32(f + l.bias, bias, dtype, s->out_features);
    if (dtype != AQLM_F32) aqlm_to_f32(f + l.x, x, dtype, n_rows * s->in_features);
    matmul_job job = {
        w,          f + l.codebooks, f + l.scales, bias ? f + l.bias : NULL, dtype == AQLM_F32 ? x : f + l.x,
        y,          dtype,           n_rows,       slot_floats(s, n_rows),   l.n_slots,
        f + l.slots};
    aqlm_parallel(0, l.n_slots, 1, matmul_slots, &job);
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
