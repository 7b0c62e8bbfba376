/* tables.c: y = x W^T + b for few rows, without W: y_o = scale_o * sum_j sum_k T_jk[codes[o, j, k]] with tables
 * T_jk[e] = <codebooks[k, e], x_j>. Code t = j K + k of an output looks into table t.
 *
 * Tables hold integers of 16 bits (2 planes) or 23 (3 planes); AQLM_TABLE_BLOCK of them share a step,
 * |x_j| max_e |codebooks[k, e]| / aqlm_table_largest at its largest (Cauchy-Schwarz: nothing is clipped). Each rounding
 * is half a step at most, and independent of the others: a block's sum is off by step * sqrt(32 / 12), 2e-4 of it
 * (3 planes: 2e-6) where one group outweighs the rest, and far less elsewhere. A block's integers are summed exactly
 * and the blocks in order by fma: the same bits on every ISA, for any threads, and for any number of rows up to
 * AQLM_TABLE_ROWS. */
#include "core.h"

#include <math.h>
#include <stdatomic.h>

enum {
    AQLM_TABLE_ROWS = 16, /* more rows are cheaper decoded */
    PASS = 4,             /* rows whose tables are made at once: 512 or 768 bytes a code and row */
    CHUNK = 8,            /* even */
    LEAST_BLOCKS = 8,     /* worth a thread: about 10 microseconds of making tables, */
    LEAST_CODES = 4096,   /* and of looking up panels, in codes of a row */
    AHEAD = 1024          /* bytes: the distance at which packed codes are prefetched (measured) */
};

enum { NOT_ASKED = -2 };
static _Atomic int exact = NOT_ASKED;

void aqlm_set_exact(int choice) { exact = choice < 0 ? -1 : choice != 0; }

int aqlm_get_exact(void) {
    if (exact == NOT_ASKED) {
        const char *wish = getenv("AQLM_C_EXACT");
        aqlm_set_exact(wish && *wish ? strcmp(wish, "0") != 0 : -1);
    }
    return exact;
}

typedef struct tables_job {
    const aqlm_weight *w;
    int planes;
    int64_t n_rows, per_row, blocks, padded; /* rows in this pass; codes of an output; blocks of them; outputs */
    const float *x, *ct, *scales, *bias;
    double radius;       /* of the codebooks' longest entry */
    float *steps, *sums; /* [blocks, n_rows]; [n_rows, padded] */
    uint8_t *tables;     /* [blocks, n_rows, AQLM_TABLE_BLOCK, planes, AQLM_PLANE] */
    void *y;
    aqlm_dtype dtype;
} tables_job;

/* Where the workspace keeps what, in floats. */
typedef struct layout {
    int64_t ct, scales, bias, x, steps, sums, tables, total;
} layout;

static layout plan(tables_job *job, const aqlm_shape *s, int64_t n_rows) {
    const int64_t K = s->num_codebooks, rows = aqlm_min(n_rows, PASS);
    job->per_row = s->in_features / s->in_group_size * K;
    job->blocks = (job->per_row + AQLM_TABLE_BLOCK - 1) / AQLM_TABLE_BLOCK;
    job->padded = aqlm_round_up(s->out_features, AQLM_PANEL);
    layout l = {0};
    l.ct = aqlm_round_up((K << s->nbits_per_codebook) * s->in_group_size, 16); /* after the codebooks in fp32 */
    l.scales = l.ct + K * s->in_group_size * 256;
    l.bias = l.scales + job->padded;
    l.x = l.bias + job->padded;
    l.steps = l.x + aqlm_round_up(rows * s->in_features, 16);
    l.sums = l.steps + aqlm_round_up(job->blocks * PASS, 16);
    l.tables = l.sums + rows * job->padded;
    l.total = l.tables + job->blocks * rows * AQLM_TABLE_BLOCK * job->planes * AQLM_PLANE / 4;
    return l;
}

bool aqlm_tables_fit(const aqlm_shape *s, int64_t n_rows) {
    return n_rows >= 1 && n_rows <= AQLM_TABLE_ROWS && s->nbits_per_codebook <= 8 && s->out_group_size == 1 &&
           s->out_features >= AQLM_PANEL; /* with fewer the tables cost more than they save */
}

size_t aqlm_tables_workspace(const aqlm_shape *s, int64_t n_rows) {
    tables_job job = {.planes = 3};
    return aqlm_tables_fit(s, n_rows) ? (size_t)plan(&job, s, n_rows).total * sizeof(float) : 0;
}

/* ct[k, d, e] = codebooks[k, e % E, d], so that codes need no mask. Returns the largest |codebooks[k, e]|. */
static double transpose_codebooks(float *ct, const float *codebooks, const aqlm_shape *s) {
    const int64_t g = s->in_group_size, E = INT64_C(1) << s->nbits_per_codebook;
    double largest = 0.0;
    for (int64_t k = 0; k < s->num_codebooks; k++, ct += g * 256, codebooks += E * g) {
        for (int64_t e = 0; e < E; e++) {
            double square = 0.0;
            for (int64_t d = 0; d < g; d++) {
                const float c = codebooks[e * g + d];
                square += (double)c * c;
                ct[d * 256 + e] = c;
            }
            if (square > largest || isnan(square)) largest = square; /* NaN stays */
        }
        for (int64_t d = 0; d < g; d++)
            for (int64_t e = E; e < 256; e++) ct[d * 256 + e] = ct[d * 256 + e - E];
    }
    return sqrt(largest);
}

/* Items begin..end of [blocks, n_rows]: the tables of one block for one row, and their step. */
static void make_blocks(int64_t begin, int64_t end, void *ctx) {
    const tables_job *job = ctx;
    const aqlm_kernels *isa = aqlm_isa();
    const aqlm_shape *s = &job->w->shape;
    const int64_t g = s->in_group_size, K = s->num_codebooks;
    const double most = aqlm_table_largest(job->planes) - 1; /* 1 below, for rounding */
    for (int64_t i = begin; i < end && !aqlm_cancelled(); i++) {
        const int64_t first = i / job->n_rows * AQLM_TABLE_BLOCK;
        const int64_t n = aqlm_min(AQLM_TABLE_BLOCK, job->per_row - first);
        const int64_t groups = (first + n - 1) / K - first / K + 1;
        const float *x = job->x + i % job->n_rows * s->in_features + first / K * g;
        float scaled[AQLM_TABLE_BLOCK * 32];
        double largest = 0.0, square;
        for (int64_t j = 0; j < groups; j++) {
            square = 0.0;
            for (int64_t d = 0; d < g; d++) square += (double)x[j * g + d] * x[j * g + d];
            if (square > largest || isnan(square)) largest = square; /* NaN stays */
        }
        const double bound = sqrt(largest) * job->radius;
        const bool usable = bound > 1e-30 && bound < 1e38; /* else nothing in fp32, or beyond it */
        const float inverse = usable ? (float)(most / bound) : 0.0f;
        for (int64_t v = 0; v < groups * g; v++) scaled[v] = usable ? x[v] * inverse : 0.0f;
        job->steps[i] = usable ? (float)(bound / most) : bound <= 1e-30 ? 0.0f : NAN;
        isa->make_tables(job->tables + i * AQLM_TABLE_BLOCK * job->planes * AQLM_PLANE, scaled, job->ct, K, g,
                         first % K, n, job->planes);
    }
}

/* Panels begin..end of outputs. Packed codes are looked up where they lie, block by block; others are transposed, two
 * blocks at a time, and CHUNK blocks are taken of a row of codes before going on to the next. */
static void look_up(int64_t begin, int64_t end, void *ctx) {
    const tables_job *job = ctx;
    const aqlm_kernels *isa = aqlm_isa();
    const bool packed = job->w->packed;
    const int64_t out = job->w->shape.out_features, step = job->per_row, rows = job->n_rows, ldy = job->padded;
    const int64_t first = begin * AQLM_PANEL, last = aqlm_min(end * AQLM_PANEL, out), chunk = packed ? 1 : CHUNK;
    uint8_t scratch[2 * AQLM_TABLE_BLOCK * AQLM_TABLE_OUTPUTS];
    for (int64_t r = 0; r < rows; r++) memset(job->sums + r * ldy + first, 0, (size_t)((end - begin) * AQLM_PANEL) * 4);
    for (int64_t c = 0; c < job->blocks; c += chunk)
        for (int64_t o = first; o < last && !aqlm_cancelled(); o += AQLM_TABLE_OUTPUTS)
            for (int64_t b = c; b < aqlm_min(c + chunk, job->blocks); b++) {
                const int64_t t = b * AQLM_TABLE_BLOCK;
                aqlm_codes_block block = {.outputs = aqlm_min(AQLM_TABLE_OUTPUTS, last - o),
                                          .n = aqlm_min(AQLM_TABLE_BLOCK, step - t)};
                if (packed) {
                    block.codes = (const uint8_t *)job->w->codes + t * out + o;
                    block.step = out;
                    block.ahead = AHEAD; /* past the end of these outputs: on to the next block */
                    if (o + AHEAD >= last && b + 1 < job->blocks)
                        block.ahead += AQLM_TABLE_BLOCK * out - (last - first);
                } else {
                    const uint8_t *codes = (const uint8_t *)job->w->codes + o * step + t;
                    block.codes = scratch + b % 2 * AQLM_TABLE_BLOCK * AQLM_TABLE_OUTPUTS;
                    block.step = AQLM_TABLE_OUTPUTS;
                    for (int64_t r = 0; b % 2 == 0 && r < block.outputs; r += 64)
                        isa->transpose(scratch + r, AQLM_TABLE_OUTPUTS, codes + r * step, step,
                                       aqlm_min(64, block.outputs - r), aqlm_min(2 * AQLM_TABLE_BLOCK, step - t));
                }
                const uint8_t *tables = job->tables + b * rows * AQLM_TABLE_BLOCK * job->planes * AQLM_PLANE;
                isa->table_sums(job->sums + o, ldy, &block, tables, job->steps + b * rows, rows, job->planes);
            }
    for (int64_t r = 0; r < rows; r++) {
        float *y = job->sums + r * ldy;
        for (int64_t o = first; o < last; o++) y[o] = y[o] * job->scales[o] + (job->bias ? job->bias[o] : 0.0f);
        aqlm_from_f32((char *)job->y + (size_t)(r * out + first) * aqlm_dtype_size(job->dtype), job->dtype, y + first,
                      last - first);
    }
}

aqlm_status aqlm_tables_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size) {
    const aqlm_shape *s = &w->shape;
    if (workspace_size < aqlm_tables_workspace(s, n_rows)) return AQLM_BAD_ARGUMENT;
    tables_job job = {.w = w, .dtype = dtype, .planes = dtype == AQLM_F32 && aqlm_get_exact() ? 3 : 2};
    const layout l = plan(&job, s, n_rows);
    const size_t size = aqlm_dtype_size(dtype);
    float *f = workspace;
    aqlm_to_f32(f, w->codebooks, w->dtype, (s->num_codebooks << s->nbits_per_codebook) * s->in_group_size);
    job.radius = transpose_codebooks(f + l.ct, f, s);
    aqlm_to_f32(f + l.scales, w->scales, w->dtype, s->out_features);
    if (bias) aqlm_to_f32(f + l.bias, bias, dtype, s->out_features);
    job.ct = f + l.ct;
    job.scales = f + l.scales;
    job.bias = bias ? f + l.bias : NULL;
    job.steps = f + l.steps;
    job.sums = f + l.sums;
    job.tables = (uint8_t *)(f + l.tables);
    for (int64_t r = 0; r < n_rows; r += PASS) {
        const char *rows = (const char *)x + (size_t)(r * s->in_features) * size;
        job.n_rows = aqlm_min(PASS, n_rows - r);
        if (dtype != AQLM_F32) aqlm_to_f32(f + l.x, rows, dtype, job.n_rows * s->in_features);
        job.x = dtype == AQLM_F32 ? (const float *)(const void *)rows : f + l.x;
        job.y = (char *)y + (size_t)(r * s->out_features) * size;
        const int64_t items = job.blocks * job.n_rows, panels = job.padded / AQLM_PANEL;
        aqlm_parallel(0, items, aqlm_even_grain(items, LEAST_BLOCKS), make_blocks, &job);
        aqlm_parallel(0, panels, aqlm_even_grain(panels, aqlm_max(1, LEAST_CODES / (job.per_row * job.n_rows))),
                      look_up, &job);
    }
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
