/* tables.c: y = x W^T + b for few rows, without W: y_o = scale_o * sum_j sum_k T_jk[codes[o, j, k]] with tables
 * T_jk[e] = <codebooks[k, e], x_j>. Code t = j K + k of an output looks into table t.
 *
 * Tables hold integers of 16 bits (2 planes) or 23 (3 planes); AQLM_TABLE_BLOCK of them share a step,
 * |x_j| max_e |codebooks[k, e]| / aqlm_table_largest at its largest (Cauchy-Schwarz: nothing is clipped). Each rounding
 * is half a step at most, and independent of the others: a block's sum is off by step * sqrt(32 / 12), 2e-4 of it
 * (3 planes: 2e-6) where one group outweighs the rest, and far less elsewhere. With 2 planes x and the codebooks are
 * integers of 16 bits as well, which makes that 3e-4. A block's integers are summed exactly, the blocks of a chunk in
 * order by fma, and the chunks in order: the same bits on every ISA, for any threads and any number of rows.
 *
 * A thread makes the tables of its own chunks of codes and looks them up while they are in its first cache. When
 * threads shared all tables and cut the outputs, tables came back from the third cache: 8x8g8 at 4096x11008 took 2.1 ms
 * instead of 1.65. */
#include "core/product/paths.h"
#include "core/product/stored.h"
#include "core/runtime/convert.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

#include <assert.h>
#include <math.h>
#include <stdatomic.h>

enum {
    PASS = 8,         /* rows whose codes are read once */
    CHUNKS = 8,       /* of a row, each with sums of its own */
    GROUP = 4,        /* even: blocks of codes in the disk layout that are taken at a time */
    MOST_PIECES = 64, /* pieces that can run at once, each with its own tables */
    MOST_ITEMS = CHUNKS * MOST_PIECES,
    LEAST_CODES = 1 << 18, /* worth a thread: about 10 microseconds of lookups */
    LEAD = 1024            /* outputs: how far ahead of lookups packed codes are fetched (measured) */
};

/* Longest groups of x and longest entries of codebooks, as integers: their products, rounded and shifted, fit 16 bits.
 */
enum { SHORT_RADIUS = 32760 };

typedef struct tables_job {
    const aqlm_weight *w;
    const aqlm_kernels *isa; /* one for the whole call: each lays tables out in its own way */
    int planes;
    int64_t n_rows, per_row, blocks, padded; /* rows in this pass; codes of an output; blocks of them; outputs */
    int64_t chunks, parts, group;            /* items of work: chunks of blocks, by parts of the outputs */
    int64_t n_pieces, scratch_size;          /* in bytes */
    const float *x, *ct, *scales, *bias;
    const int16_t *short_ct;
    double radius;    /* of the codebooks' longest entry */
    float *sums;      /* [chunks, n_rows, padded] */
    uint8_t *scratch; /* each: tables [group, n_rows, AQLM_TABLE_BLOCK, planes, AQLM_PLANE] */
    _Atomic bool begun[MOST_ITEMS];
    void *y;
    aqlm_dtype dtype;
} tables_job;

/* Where the workspace keeps what, in floats. */
typedef struct layout {
    int64_t ct, scales, bias, x, sums, scratch, total;
} layout;

static layout lay_out(tables_job *job, const aqlm_weight *w, int64_t n_rows) {
    const aqlm_shape *s = &w->shape;
    const int64_t K = s->num_codebooks, rows = aqlm_min(n_rows, PASS);
    job->per_row = s->in_features / s->in_group_size * K;
    job->blocks = (job->per_row + AQLM_TABLE_BLOCK - 1) / AQLM_TABLE_BLOCK;
    job->padded = aqlm_round_up(s->out_features, AQLM_PANEL);
    job->chunks = aqlm_min(CHUNKS, job->blocks);
    job->group = w->packed ? 1 : GROUP;
    const int64_t worth = 1 + job->per_row * job->padded * rows / LEAST_CODES;
    const int64_t threads = aqlm_min(aqlm_get_num_threads(), aqlm_min(worth, MOST_PIECES));
    job->parts = aqlm_max(1, aqlm_min(threads / (job->chunks / 2 + 1), job->padded / AQLM_TABLE_OUTPUTS));
    job->n_pieces = aqlm_min(threads, job->chunks * job->parts);
    job->scratch_size = job->group * rows * AQLM_TABLE_BLOCK * job->planes * AQLM_PLANE;
    layout l = {0};
    l.ct = aqlm_round_up((K << s->nbits_per_codebook) * s->in_group_size, 16); /* after the codebooks in fp32 */
    l.scales = l.ct + K * s->in_group_size * 256;
    l.bias = l.scales + job->padded;
    l.x = l.bias + job->padded;
    l.sums = l.x + aqlm_round_up(rows * s->in_features, 16);
    l.scratch = l.sums + job->chunks * rows * job->padded;
    l.total = l.scratch + job->n_pieces * job->scratch_size / 4;
    return l;
}

bool aqlm_tables_fit(const aqlm_weight *w) {
    const aqlm_shape *s = &w->shape; /* of fewer outputs the tables cost more than they save */
    return s->nbits_per_codebook <= 8 && s->out_group_size == 1 && s->out_features >= AQLM_PANEL;
}

static int planes_of(int bits) { return bits == 16 ? 2 : 3; }

size_t aqlm_tables_workspace(const aqlm_weight *w, int bits, int64_t n_rows) {
    tables_job job = {.planes = planes_of(bits)};
    return (size_t)lay_out(&job, w, n_rows).total * sizeof(float);
}

static double square_of(const float *v, int64_t g) {
    double sum[4] = {0.0}; /* g is a multiple of 4 */
    for (int64_t d = 0; d < g; d += 4)
        for (int i = 0; i < 4; i++) sum[i] += (double)v[d + i] * v[d + i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* The length of the longest of n vectors v [n, g], or NaN. */
static double longest_of(const float *v, int64_t n, int64_t g) {
    double largest = 0.0;
    for (int64_t i = 0; i < n; i++) {
        const double square = square_of(v + i * g, g);
        if (square > largest || isnan(square)) largest = square; /* NaN stays */
    }
    return sqrt(largest);
}

static int16_t round_short(float x) { return (int16_t)(aqlm_bits_of(x + AQLM_ROUND) & 0xffff); }

/* Codebooks as make_tables wants them, or make_short_tables with their radius at SHORT_RADIUS; beyond E entries they
 * recur, so that codes need no mask. */
static void transpose_codebooks(float *ct, const float *codebooks, const aqlm_shape *s) {
    const int64_t g = s->in_group_size, E = INT64_C(1) << s->nbits_per_codebook;
    for (int64_t k = 0; k < s->num_codebooks; k++, ct += g * 256, codebooks += E * g)
        for (int64_t e = 0; e < 256; e++)
            for (int64_t d = 0; d < g; d++) ct[d * 256 + e] = codebooks[e % E * g + d];
}

static void transpose_short(int16_t *ct, const float *codebooks, const aqlm_shape *s, double radius) {
    const int64_t g = s->in_group_size, E = INT64_C(1) << s->nbits_per_codebook;
    assert(g >= 4);
    const float inverse = radius > 1e-30 && radius < 1e38 ? (float)(SHORT_RADIUS / radius) : 0.0f;
    for (int64_t k = 0; k < s->num_codebooks; k++, ct += g * 256, codebooks += E * g)
        for (int64_t e = 0; e < 256; e++) {
            const float *entry = codebooks + e % E * g;
            int16_t rounded[32];
            for (int64_t d = 0; d < g; d++) rounded[d] = round_short(entry[d] * inverse);
            for (int64_t p = 0; p < g / 2; p++) memcpy(ct + (p * 256 + e) * 2, rounded + 2 * p, 4);
        }
}

/* The order in which a piece reads packed codes: tiles of AQLM_TABLE_BLOCK tables and AQLM_TABLE_OUTPUTS outputs. */
typedef struct cursor {
    const tables_job *job;
    int64_t block, last_block, output, first, last; /* outputs first..last of each block */
    int64_t lead;                                   /* outputs that it is ahead of the lookups, over all blocks */
} cursor;

/* Goes on by `width` outputs, unless that is too far. */
static aqlm_ahead advance(cursor *c, int64_t width) {
    const int64_t out = c->job->w->shape.out_features;
    if (c->block >= c->last_block || c->lead > LEAD) return (aqlm_ahead){(const uint8_t *)c->job->w->codes, 0};
    const aqlm_ahead ahead = {(const uint8_t *)c->job->w->codes + c->block * AQLM_TABLE_BLOCK * out + c->output, out};
    c->output += width;
    c->lead += width;
    if (c->output >= c->last) {
        c->lead -= c->output - c->last;
        c->output = c->first;
        c->block++;
    }
    return ahead;
}

/* The tables of one block for one row of x; returns their step. */
static float make_block(cursor *c, uint8_t *tables, int64_t block, int64_t row) {
    const tables_job *job = c->job;
    const aqlm_shape *s = &job->w->shape;
    const int64_t g = s->in_group_size, K = s->num_codebooks;
    const int64_t first = block * AQLM_TABLE_BLOCK, n = aqlm_min(AQLM_TABLE_BLOCK, job->per_row - first);
    const int64_t groups = (first + n - 1) / K - first / K + 1;
    const float *x = job->x + row * s->in_features + first / K * g;
    const double longest = longest_of(x, groups, g), bound = longest * job->radius;
    const bool usable = bound > 1e-30 && bound < 1e38; /* else nothing in fp32, or beyond it */
    const aqlm_ahead ahead = advance(c, 2 * AQLM_TABLE_OUTPUTS);
    double step;
    if (job->planes == 2) {
        int16_t scaled[AQLM_TABLE_BLOCK * 32];
        const float inverse = usable ? (float)(SHORT_RADIUS / longest) : 0.0f;
        for (int64_t v = 0; v < groups * g; v++) scaled[v] = usable ? round_short(x[v] * inverse) : 0;
        job->isa->make_short_tables(tables, scaled, job->short_ct, K, g, first % K, n, ahead);
        step = bound * (1 << AQLM_TABLE_SHIFT) / ((double)SHORT_RADIUS * SHORT_RADIUS);
    } else {
        float scaled[AQLM_TABLE_BLOCK * 32];
        const double most = aqlm_table_largest(job->planes) - 1; /* 1 below, for rounding */
        const float inverse = usable ? (float)(most / bound) : 0.0f;
        for (int64_t v = 0; v < groups * g; v++) scaled[v] = usable ? x[v] * inverse : 0.0f;
        job->isa->make_tables(tables, scaled, job->ct, K, g, first % K, n, ahead);
        step = bound / most;
    }
    return usable ? (float)step : bound <= 1e-30 ? 0.0f : NAN;
}

/* Blocks begin..end of a row (at most GROUP) for the cursor's outputs: their tables, looked up and added to sums.
 * Packed codes are looked up where they lie; others are transposed, two blocks at a time. */
static void look_up(cursor *c, float *sums, uint8_t *tables, int64_t begin, int64_t end) {
    const tables_job *job = c->job;
    const aqlm_kernels *isa = job->isa;
    const bool packed = job->w->packed;
    const int64_t out = job->w->shape.out_features, step = job->per_row, rows = job->n_rows;
    const int64_t table_bytes = AQLM_TABLE_BLOCK * job->planes * AQLM_PLANE;
    uint8_t scratch[2 * AQLM_TABLE_BLOCK * AQLM_TABLE_OUTPUTS];
    float steps[GROUP][PASS];
    for (int64_t b = begin; b < end; b++)
        for (int64_t r = 0; r < rows; r++)
            steps[b - begin][r] = make_block(c, tables + ((b - begin) * rows + r) * table_bytes, b, r);
    for (int64_t o = c->first; o < c->last; o += AQLM_TABLE_OUTPUTS)
        for (int64_t b = begin; b < end; b++) {
            const int64_t t = b * AQLM_TABLE_BLOCK;
            aqlm_codes_block block = {.outputs = aqlm_min(AQLM_TABLE_OUTPUTS, c->last - o),
                                      .n = aqlm_min(AQLM_TABLE_BLOCK, step - t)};
            if (packed) {
                block.codes = (const uint8_t *)job->w->codes + t * out + o;
                block.step = out;
                c->lead -= block.outputs;
                block.ahead = advance(c, AQLM_TABLE_OUTPUTS);
            } else {
                const uint8_t *codes = (const uint8_t *)job->w->codes + o * step + t;
                block.codes = scratch + (b - begin) % 2 * AQLM_TABLE_BLOCK * AQLM_TABLE_OUTPUTS;
                block.step = AQLM_TABLE_OUTPUTS;
                block.ahead.at = block.codes;
                for (int64_t r = 0; (b - begin) % 2 == 0 && r < block.outputs; r += 64)
                    isa->transpose(scratch + r, AQLM_TABLE_OUTPUTS, codes + r * step, step,
                                   aqlm_min(64, block.outputs - r), aqlm_min(2 * AQLM_TABLE_BLOCK, step - t));
            }
            isa->table_sums(sums + o, job->padded, &block, tables + (b - begin) * rows * table_bytes, steps[b - begin],
                            rows, job->planes);
        }
}

/* Items first..last of work, in order, unless another piece has begun them. */
static void run_items(tables_job *job, int64_t first, int64_t last, uint8_t *tables) {
    cursor c = {.job = job, .block = -1};
    for (int64_t item = first; item < last && !aqlm_cancelled(); item++) {
        if (atomic_exchange(&job->begun[item], true)) continue;
        const int64_t chunk = item % job->chunks, part = item / job->chunks, panels = job->padded / AQLM_PANEL;
        const int64_t begin = job->blocks * chunk / job->chunks, end = job->blocks * (chunk + 1) / job->chunks;
        const int64_t to = aqlm_min(panels * (part + 1) / job->parts * AQLM_PANEL, job->w->shape.out_features);
        const int64_t from = panels * part / job->parts * AQLM_PANEL;
        if (c.block < begin || c.first != from) {
            c.block = begin, c.output = c.first = from, c.last = to, c.lead = 0;
            c.last_block = job->blocks * aqlm_min(job->chunks, chunk + last - item) / job->chunks;
        }
        float *sums = job->sums + chunk * job->n_rows * job->padded;
        for (int64_t r = 0; r < job->n_rows; r++)
            memset(sums + r * job->padded + from, 0, (size_t)(aqlm_round_up(to, AQLM_PANEL) - from) * sizeof *sums);
        for (int64_t b = begin; b < end; b += job->group) look_up(&c, sums, tables, b, aqlm_min(b + job->group, end));
    }
}

/* A piece does its own items and then what is left of the others'. */
static void run_pieces(int64_t begin, int64_t end, void *ctx) {
    tables_job *job = ctx;
    const int64_t items = job->chunks * job->parts, pieces = job->n_pieces;
    for (int64_t piece = begin; piece < end; piece++) {
        uint8_t *tables = job->scratch + piece * job->scratch_size;
        run_items(job, items * piece / pieces, items * (piece + 1) / pieces, tables);
        for (int64_t item = items - 1; item >= 0; item--) run_items(job, item, item + 1, tables);
    }
}

/* y of panels begin..end from the sums of the chunks, in order. */
static void finish(int64_t begin, int64_t end, void *ctx) {
    const tables_job *job = ctx;
    const int64_t out = job->w->shape.out_features, first = begin * AQLM_PANEL, last = aqlm_min(end * AQLM_PANEL, out);
    for (int64_t r = 0; r < job->n_rows; r++) {
        float *y = job->sums + r * job->padded;
        for (int64_t c = 1; c < job->chunks; c++) {
            const float *more = y + c * job->n_rows * job->padded;
            for (int64_t o = first; o < last; o++) y[o] += more[o];
        }
        for (int64_t o = first; o < last; o++) y[o] = y[o] * job->scales[o] + (job->bias ? job->bias[o] : 0.0f);
        aqlm_from_f32((char *)job->y + (size_t)(r * out + first) * aqlm_dtype_size(job->dtype), job->dtype, y + first,
                      last - first);
    }
}

aqlm_status aqlm_tables_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int bits, int64_t n_rows, void *workspace, size_t workspace_size) {
    if (!aqlm_tables_fit(w)) return AQLM_BAD_ARGUMENT;
    const aqlm_shape *s = &w->shape;
    tables_job job = {.w = w, .isa = aqlm_isa(), .dtype = dtype, .planes = planes_of(bits)};
    const layout l = lay_out(&job, w, n_rows);
    const int64_t left = (int64_t)workspace_size - l.scratch * (int64_t)sizeof(float);
    job.n_pieces = aqlm_min(job.n_pieces, left / job.scratch_size);
    if (left < 0 || job.n_pieces < 1) return AQLM_BAD_ARGUMENT;
    const size_t size = aqlm_dtype_size(dtype);
    float *f = workspace;
    aqlm_to_f32(f, w->codebooks, w->dtype, (s->num_codebooks << s->nbits_per_codebook) * s->in_group_size);
    job.radius = longest_of(f, s->num_codebooks << s->nbits_per_codebook, s->in_group_size);
    job.ct = f + l.ct;
    job.short_ct = (int16_t *)(f + l.ct);
    if (job.planes == 2) transpose_short((int16_t *)(f + l.ct), f, s, job.radius);
    else transpose_codebooks(f + l.ct, f, s);
    aqlm_to_f32(f + l.scales, w->scales, w->dtype, s->out_features);
    if (bias) aqlm_to_f32(f + l.bias, bias, dtype, s->out_features);
    job.scales = f + l.scales;
    job.bias = bias ? f + l.bias : NULL;
    job.sums = f + l.sums;
    job.scratch = (uint8_t *)(f + l.scratch);
    for (int64_t r = 0; r < n_rows; r += PASS) {
        const char *rows = (const char *)x + (size_t)(r * s->in_features) * size;
        job.n_rows = aqlm_min(PASS, n_rows - r);
        if (dtype != AQLM_F32) aqlm_to_f32(f + l.x, rows, dtype, job.n_rows * s->in_features);
        job.x = dtype == AQLM_F32 ? (const float *)(const void *)rows : f + l.x;
        job.y = (char *)y + (size_t)(r * s->out_features) * size;
        for (int64_t i = 0; i < job.chunks * job.parts; i++) job.begun[i] = false;
        aqlm_parallel(0, job.n_pieces, 1, run_pieces, &job);
        const int64_t panels = job.padded / AQLM_PANEL;
        aqlm_parallel(0, panels, aqlm_max((panels + job.n_pieces - 1) / job.n_pieces, 1), finish, &job);
    }
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
