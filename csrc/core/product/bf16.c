/* bf16.c: y = x W^T + b for rows of bfloat16 on CPUs that multiply these: tiles of W are decoded to bfloat16, scales
 * are applied to the sums. A product's last bits therefore depend on the CPU, but not on threads, which is why these
 * kernels are no instruction set of simd.h. 512 rows: 2.3 to 2.5 times as fast as torch in float32. Gradients to x, and
 * g other than 8, are left to torch's product on decoded tiles (AQLM_PATH_CALLER). */
#include "core/product/paths.h"
#include "core/product/stored.h"
#include "core/runtime/convert.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

enum {
    TILE = 64,        /* outputs whose weights are decoded at once, */
    DEPTH = 512,      /* and inputs: 64 KB */
    BLOCK = 1020,     /* rows that a tile is used for */
    MOST_PIECES = 64, /* pieces that can run at once, each with its own tile */
    PAIR = 2 * AQLM_BF16_PANEL
};

typedef struct bf16_job {
    const aqlm_weight *w;
    const aqlm_bf16_kernels *isa;
    int64_t n_rows, block_rows, row_blocks; /* of this pass; of a block of x; such blocks */
    int64_t n_pieces, scratch_size;         /* in floats */
    const uint16_t *from;                   /* x [n_rows, in] */
    uint16_t *x;                            /* for DEPTH inputs at a time [row_blocks] of [DEPTH / 2, rows, 2] */
    const float *scales, *bias;
    float *scratch; /* each: sums [n_rows, TILE], panels [TILE / PANEL, DEPTH / 2, PANEL, 2] */
    uint16_t *y;
} bf16_job;

typedef struct layout {
    int64_t scales, bias, scratch, total; /* in floats, after x */
} layout;

static layout lay_out(bf16_job *job, const aqlm_weight *w, int64_t n_rows) {
    const aqlm_shape *s = &w->shape;
    const int64_t rows = aqlm_min(n_rows, BLOCK);
    job->n_pieces = aqlm_min(aqlm_min(aqlm_get_num_threads(), MOST_PIECES), (s->out_features + TILE - 1) / TILE);
    job->scratch_size = aqlm_round_up(rows * TILE, 16) + TILE * DEPTH / 2;
    layout l = {.scales = aqlm_round_up(rows * s->in_features / 2, 16)};
    l.bias = l.scales + aqlm_round_up(s->out_features, 16);
    l.scratch = l.bias + aqlm_round_up(s->out_features, 16);
    l.total = l.scratch + job->n_pieces * job->scratch_size;
    return l;
}

bool aqlm_bf16_fits(const aqlm_weight *w, aqlm_dtype dtype) {
    return dtype == AQLM_BF16 && aqlm_bf16_isa() && w->shape.in_group_size == 8 && w->shape.out_group_size == 1;
}

size_t aqlm_bf16_workspace(const aqlm_weight *w, int64_t n_rows) {
    bf16_job job;
    return (size_t)lay_out(&job, w, n_rows).total * sizeof(float);
}

/* Blocks begin..end of rows of x, pairs of inputs together. */
static void pack_rows(int64_t begin, int64_t end, void *ctx) {
    const bf16_job *job = ctx;
    const int64_t in = job->w->shape.in_features;
    for (int64_t b = begin; b < end; b++) {
        const int64_t first = b * job->block_rows, rows = aqlm_min(job->block_rows, job->n_rows - first);
        for (int64_t i = 0; i < in; i += DEPTH) {
            const int64_t depth = aqlm_min(DEPTH, in - i);
            uint16_t *to = job->x + i * job->n_rows + first * depth;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t p = 0; p < depth / 2; p++)
                    memcpy(to + (p * rows + r) * 2, job->from + (first + r) * in + i + 2 * p, 4);
        }
    }
}

/* Outputs first..first + width of all rows. */
static void one_tile(const bf16_job *job, int64_t first, int64_t width, float *sums, uint16_t *panels) {
    const aqlm_shape *s = &job->w->shape;
    const int64_t in = s->in_features, K = s->num_codebooks, bytes = s->nbits_per_codebook <= 8 ? 1 : 2;
    const int64_t panel_size = DEPTH * AQLM_BF16_PANEL;
    const bool packed = job->w->packed;
    for (int64_t i = 0; i < in; i += DEPTH) {
        const int64_t depth = aqlm_min(DEPTH, in - i);
        const aqlm_entries entries = aqlm_entries_of(job->w, 0, depth / 8);
        for (int64_t p = 0; p < width; p += AQLM_BF16_PANEL) {
            aqlm_strided_codes codes = {.output_step = packed ? 1 : in / 8 * K * bytes,
                                        .code_step = packed ? s->out_features : bytes};
            codes.ahead = i + DEPTH < in ? DEPTH / 8 * K * codes.code_step
                                         : TILE * codes.output_step - i / 8 * K * codes.code_step;
            codes.at = (const uint8_t *)job->w->codes + (first + p) * codes.output_step + i / 8 * K * codes.code_step;
            job->isa->decode_panel(panels + p / AQLM_BF16_PANEL * panel_size, &entries, &codes,
                                   aqlm_min(AQLM_BF16_PANEL, width - p));
        }
        for (int64_t r = 0; r < job->n_rows; r += job->block_rows) {
            const int64_t rows = aqlm_min(job->block_rows, job->n_rows - r);
            for (int64_t p = 0; p < width; p += PAIR)
                job->isa->multiply(sums + r * TILE + p, TILE, job->x + i * job->n_rows + r * depth,
                                   panels + p / AQLM_BF16_PANEL * panel_size, panel_size, depth / 2, rows, i > 0);
        }
    }
    for (int64_t r = 0; r < job->n_rows; r++) {
        float *y = sums + r * TILE;
        for (int64_t o = 0; o < width; o++)
            y[o] = y[o] * job->scales[first + o] + (job->bias ? job->bias[first + o] : 0.0f);
        aqlm_from_f32(job->y + r * s->out_features + first, AQLM_BF16, y, width);
    }
}

/* The range is over pieces, so that no two share a tile whatever the runner does. */
static void run_pieces(int64_t begin, int64_t end, void *ctx) {
    const bf16_job *job = ctx;
    const int64_t out = job->w->shape.out_features, tiles = (out + TILE - 1) / TILE;
    for (int64_t piece = begin; piece < end; piece++) {
        float *sums = job->scratch + piece * job->scratch_size;
        uint16_t *panels = (uint16_t *)(sums + aqlm_round_up(job->n_rows * TILE, 16));
        for (int64_t t = tiles * piece / job->n_pieces; t < tiles * (piece + 1) / job->n_pieces && !aqlm_cancelled();
             t++)
            one_tile(job, t * TILE, aqlm_min(TILE, out - t * TILE), sums, panels);
    }
}

aqlm_status aqlm_bf16_matmul(void *y, const void *x, const aqlm_weight *w, const void *bias, int64_t n_rows,
                             void *workspace, size_t workspace_size) {
    const aqlm_shape *s = &w->shape;
    bf16_job job = {.w = w, .isa = aqlm_bf16_isa()};
    const layout l = lay_out(&job, w, n_rows);
    job.n_pieces = aqlm_min(job.n_pieces, ((int64_t)(workspace_size / sizeof(float)) - l.scratch) / job.scratch_size);
    if (job.n_pieces < 1) return AQLM_BAD_ARGUMENT;
    float *f = workspace;
    aqlm_to_f32(f + l.scales, w->scales, w->dtype, s->out_features);
    if (bias) aqlm_to_f32(f + l.bias, bias, AQLM_BF16, s->out_features);
    job.x = workspace;
    job.scales = f + l.scales;
    job.bias = bias ? f + l.bias : NULL;
    job.scratch = f + l.scratch;
    for (int64_t r = 0; r < n_rows; r += job.n_rows) {
        job.n_rows = aqlm_min(BLOCK, n_rows - r);
        job.row_blocks = (job.n_rows + AQLM_BF16_ROWS - 1) / AQLM_BF16_ROWS;
        job.block_rows = (job.n_rows + job.row_blocks - 1) / job.row_blocks;
        job.row_blocks = (job.n_rows + job.block_rows - 1) / job.block_rows;
        job.from = (const uint16_t *)x + r * s->in_features;
        job.y = (uint16_t *)y + r * s->out_features;
        aqlm_parallel(0, job.row_blocks, aqlm_even_grain(job.row_blocks, 4), pack_rows, &job);
        aqlm_parallel(0, job.n_pieces, 1, run_pieces, &job);
    }
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
