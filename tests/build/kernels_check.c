/* kernels_check.c: aqlm_matmul, aqlm_matmul_backward and aqlm_decode_rows on every ISA of this CPU against sums in
 * double, and bit for bit against the first ISA, `scalar`, on one thread. Linked with csrc/core and csrc/simd.
 *
 *     kernels_check [n]      the first n shapes alone
 *
 * One line for each check that fails, then a hash of all results, which is the same on every machine. */
#include "aqlm.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 16, MOST_THREADS = 4 };

/* out, in, K, B, g, og: outputs around the panel of 64 and the 256 of one call, codes around the block of 64; two have
 * no tables. Small ones first. */
static const aqlm_shape shapes[] = {
    {65, 264, 2, 8, 8, 1},  {257, 96, 3, 8, 8, 1},  {60, 96, 2, 10, 8, 2},    {64, 64, 1, 8, 8, 1},
    {255, 520, 2, 8, 8, 1}, {333, 264, 4, 8, 4, 1}, {257, 1032, 3, 8, 8, 1},  {700, 192, 8, 8, 8, 1},
    {90, 320, 5, 3, 32, 1}, {576, 768, 2, 8, 8, 1}, {100, 1024, 1, 8, 16, 1}, {200, 96, 2, 1, 8, 1},
    {66, 128, 2, 8, 16, 3},
};
static const int row_counts[] = {1, 3, ROWS};
static const char *const dtype_names[] = {"float32", "float16", "bfloat16"};
static const double roundings[] = {0x1p-24, 0x1p-11, 0x1p-8}; /* half a step, of 1 */

static uint64_t state, hash = 0xcbf29ce484222325;
static int failures;

static uint64_t next(void) { /* splitmix64 */
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static void add_to_hash(const void *data, size_t size) { /* FNV-1a */
    for (size_t i = 0; i < size; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3;
}

static void *take(size_t size, size_t alignment) {
    void *memory = aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    if (!memory) exit(2);
    return memory;
}

/* Exactly `size` bytes, so that a sanitizer sees what is read beyond them. */
static void *take_bytes(size_t size) {
    void *memory = malloc(size);
    if (!memory) exit(2);
    return memory;
}

static size_t size_of(aqlm_dtype dtype) { return dtype == AQLM_F32 ? 4 : 2; }

static double get(const void *from, aqlm_dtype dtype, int64_t i) {
    if (dtype == AQLM_F32) return ((const float *)from)[i];
    const uint32_t h = ((const uint16_t *)from)[i];
    if (dtype == AQLM_BF16) {
        const uint32_t bits = h << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = h >> 10 & 31;
    const double magnitude = exponent ? ldexp((h & 1023) | 1024, exponent - 25) : ldexp(h & 1023, -24);
    return h & 0x8000 ? -magnitude : magnitude;
}

/* Of 7 bits and a sign, so that it is exact in every dtype: a sum of four uniform numbers, in -2 .. 2. */
static void put_random(void *to, aqlm_dtype dtype, int64_t n, bool positive) {
    for (int64_t i = 0; i < n; i++) {
        int sum = 0;
        for (int j = 0; j < 4; j++) sum += (int)(next() >> 59) - 16;
        const float x = positive ? 0.5f + (float)abs(sum) / 64 : (float)sum / 32;
        uint32_t bits;
        memcpy(&bits, &x, 4);
        if (dtype == AQLM_F32) ((float *)to)[i] = x;
        else if (dtype == AQLM_BF16) ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
        else
            ((uint16_t *)to)[i] =
                (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)(x == 0.0f ? 0 : (bits & 0x7fffffff) / 0x2000 - 0x1c000);
    }
}

/* A weight, the same one packed (or no packed.codes), and W [out, in]. */
typedef struct layer {
    aqlm_weight plain, packed;
    double *dense;
} layer;

static layer make_layer(const aqlm_shape *s, aqlm_dtype dtype) {
    const int64_t g = s->in_group_size, og = s->out_group_size, K = s->num_codebooks, J = s->in_features / g;
    const int64_t O = s->out_features / og, B = s->nbits_per_codebook, entry = og * g, wide = B > 8;
    uint8_t *codes = take_bytes((size_t)(O * J * K) << wide), *packed = wide ? NULL : take_bytes((size_t)(O * J * K));
    void *codebooks = take_bytes((size_t)((K << B) * entry) * size_of(dtype));
    void *scales = take_bytes((size_t)O * size_of(dtype));
    double *dense = calloc((size_t)(s->out_features * s->in_features), sizeof *dense);
    if (!dense) exit(2);
    put_random(codebooks, dtype, (K << B) * entry, false);
    put_random(scales, dtype, O, true);
    for (int64_t i = 0; i < (O * J * K) << wide; i++) codes[i] = (uint8_t)(next() >> 56); /* bits beyond B are noise */
    for (int64_t o = 0; o < O; o++)
        for (int64_t t = 0; t < J * K; t++) {
            const int64_t i = o * J * K + t, code = wide ? codes[2 * i] | codes[2 * i + 1] << 8 : codes[i];
            const int64_t from = ((t % K << B) + (code & ((1 << B) - 1))) * entry;
            if (packed) packed[t * O + o] = codes[i];
            for (int64_t v = 0; v < entry; v++)
                dense[(o * og + v / g) * s->in_features + t / K * g + v % g] +=
                    get(scales, dtype, o) * get(codebooks, dtype, from + v);
        }
    return (layer){{*s, codes, codebooks, scales, dtype, false}, {*s, packed, codebooks, scales, dtype, true}, dense};
}

static void free_layer(layer *l) {
    free((void *)l->plain.codes);
    free((void *)l->packed.codes);
    free((void *)l->plain.codebooks);
    free((void *)l->plain.scales);
    free(l->dense);
}

typedef struct piece {
    int64_t begin, end;
    aqlm_range_fn fn;
    void *ctx;
} piece;

static void *run_piece(void *arg) {
    const piece *p = arg;
    p->fn(p->begin, p->end, p->ctx);
    return NULL;
}

/* A loop runner with 8 pieces, each on a thread of its own and however short: nothing orders one after another, so that
 * a sanitizer sees every race. */
static void run_pieces(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx) {
    (void)grain;
    enum { MOST = 8 };
    piece pieces[MOST];
    pthread_t threads[MOST];
    const int64_t size = (end - begin + MOST - 1) / MOST;
    int n = 0;
    for (; begin < end; begin += size, n++) {
        pieces[n] = (piece){begin, end - begin < size ? end : begin + size, fn, ctx};
        if (pthread_create(&threads[n], NULL, run_piece, &pieces[n])) exit(2);
    }
    while (n > 0) pthread_join(threads[--n], NULL);
}

/* What is computed, and with what. */
typedef struct call {
    const layer *l;
    const char *what; /* "matmul", "matmul_backward" or "decode_rows" (of all but the first and last 3 rows) */
    aqlm_dtype dtype;
    int exact, n_rows;
    bool packed, bias;
    const void *x, *b;
    int64_t n; /* numbers in the result */
} call;

static bool fail(const call *c, const char *isa, int threads, const char *how) {
    const aqlm_shape *s = &c->l->plain.shape;
    printf("%s of %s, %dx%dg%d og%d %dx%d, %d rows%s%s, exact %d, on %s with %d threads: %s\n", c->what,
           dtype_names[c->dtype], (int)s->num_codebooks, (int)s->nbits_per_codebook, (int)s->in_group_size,
           (int)s->out_group_size, (int)s->out_features, (int)s->in_features, c->n_rows, c->packed ? ", packed" : "",
           c->bias ? ", bias" : "", c->exact, isa, threads, how);
    failures++;
    return false;
}

/* The result, to be freed; NULL if it failed. */
static void *run(const call *c, const char *isa, int threads) {
    const aqlm_weight *w = c->packed ? &c->l->packed : &c->l->plain;
    const bool forward = !strcmp(c->what, "matmul"), decode = !strcmp(c->what, "decode_rows");
    if (aqlm_set_isa(isa) != AQLM_OK) exit(2);
    aqlm_set_num_threads(threads);
    aqlm_set_parallel(threads == MOST_THREADS ? run_pieces : NULL);
    aqlm_set_exact(c->exact);
    const aqlm_plan plan = (forward ? aqlm_matmul_plan : aqlm_matmul_backward_plan)(w, c->dtype, c->n_rows, false);
    void *y = take_bytes((size_t)c->n * size_of(c->dtype)), *workspace = take(plan.workspace + !plan.workspace, 64);
    const aqlm_status status =
        decode    ? aqlm_decode_rows(y, c->dtype, w, 3, w->shape.out_features - 3)
        : forward ? aqlm_matmul(y, c->x, c->dtype, w, c->bias ? c->b : NULL, c->n_rows, &plan, workspace)
                  : aqlm_matmul_backward(y, c->x, c->dtype, w, c->n_rows, &plan, workspace);
    free(workspace);
    if (status == AQLM_OK) return y;
    fail(c, isa, threads, aqlm_status_text(status));
    free(y);
    return NULL;
}

/* |y - truth| / |truth| of each row, norms over the outputs. */
static void check_error(const call *c, const double *truth, int64_t width, double most, const void *y) {
    for (int64_t r = 0; r < c->n / width; r++) {
        double error = 0.0, square = 0.0;
        for (int64_t o = r * width; o < (r + 1) * width; o++) {
            const double difference = get(y, c->dtype, o) - truth[o];
            error += difference * difference;
            square += truth[o] * truth[o];
        }
        if (error <= most * most * square) continue;
        char line[100];
        snprintf(line, sizeof line, "error %.2e in row %d, expected at most %.2e", sqrt(error / square), (int)r, most);
        fail(c, "scalar", 1, line);
    }
}

/* The call on `scalar` against the truth, then on every ISA, with 1 to 4 threads, plain and packed against that. */
static void check(call c, const double *truth, int64_t width, double most) {
    const size_t size = (size_t)c.n * size_of(c.dtype);
    const bool packs = c.l->packed.codes;
    void *y = run(&c, "scalar", 1);
    if (!y) return;
    check_error(&c, truth, width, most, y);
    /* Last bits of what the CPU's bfloat16 instructions may do depend on whether it has them. */
    if (c.dtype != AQLM_BF16 || strcmp(c.what, "matmul") || c.exact > 0 || c.n_rows < 3) add_to_hash(y, size);
    for (int packed = 0; packed <= packs; packed++)
        for (const char *const *isa = aqlm_available_isas(); *isa; isa++)
            for (int threads = 1; threads <= MOST_THREADS; threads++) {
                if (!strcmp(*isa, "scalar") && (packed != packs || threads != 3)) continue; /* it is slow */
                c.packed = packed;
                void *other = run(&c, *isa, threads);
                if (other && memcmp(y, other, size)) fail(&c, *isa, threads, "other bits than scalar with 1 thread");
                free(other);
            }
    free(y);
}

/* truth [ROWS, out] = x W^T + b, or [ROWS, in] = x W. */
static void multiply(double *truth, const layer *l, const void *x, const void *b, aqlm_dtype dtype, bool forward) {
    const int64_t out = l->plain.shape.out_features, in = l->plain.shape.in_features, depth = forward ? in : out;
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t o = 0; o < (forward ? out : in); o++, truth++) {
            *truth = b ? get(b, dtype, o) : 0.0;
            for (int64_t i = 0; i < depth; i++)
                *truth += get(x, dtype, r * depth + i) * l->dense[forward ? o * in + i : i * in + o];
        }
}

static void check_layer(const aqlm_shape *s, aqlm_dtype dtype) {
    layer l = make_layer(s, dtype);
    const int64_t out = s->out_features, in = s->in_features, most = out > in ? out : in;
    void *x = take_bytes((size_t)(ROWS * most) * size_of(dtype)), *b = take_bytes((size_t)out * size_of(dtype));
    double *truth = take_bytes((size_t)(ROWS * most) * sizeof *truth);
    put_random(x, dtype, ROWS * most, false);
    put_random(b, dtype, out, false);
    call c = {.l = &l, .what = "decode_rows", .dtype = dtype, .exact = -1, .n = (out - 6) * in};
    check(c, l.dense + 3 * in, in, 1e-6 + roundings[dtype]);

    c.what = "matmul_backward";
    c.x = x;
    c.n_rows = 5;
    c.n = c.n_rows * in;
    multiply(truth, &l, x, NULL, dtype, false);
    check(c, truth, in, 1e-5 + roundings[dtype]);

    c.what = "matmul";
    c.b = b;
    for (int bias = 0; bias < 2; bias++) {
        c.bias = bias;
        multiply(truth, &l, x, bias ? b : NULL, dtype, true);
        for (c.exact = -1; c.exact <= 1; c.exact++)
            for (int i = bias; i < 3 - bias; i++) {
                c.n_rows = row_counts[i];
                c.n = c.n_rows * out;
                const bool rounded = c.exact == 0 || (c.exact < 0 && dtype != AQLM_F32);
                check(c, truth, out, (rounded ? 2e-4 : 1e-5) + roundings[dtype]);
            }
    }
    free(truth);
    free(b);
    free(x);
    free_layer(&l);
}

static void expect(bool ok, const char *what) {
    if (ok) return;
    printf("plan: %s\n", what);
    failures++;
}

/* What is asked of plans beside results: a smaller workspace is enough for fewer threads, none for none, and paths that
 * are not the core's, or not this weight's, are refused. */
static void check_plans(void) {
    const aqlm_shape s = {128, 64, 2, 8, 16, 1}, wide = {128, 64, 1, 12, 16, 1};
    layer l = make_layer(&s, AQLM_F32), other = make_layer(&wide, AQLM_BF16);
    enum { N = 40 };
    float *x = take_bytes(N * 64 * sizeof *x), *y = take_bytes(N * 128 * sizeof *y);
    put_random(x, AQLM_F32, N * 64, false);
    aqlm_set_exact(-1);
    for (int n_rows = 1; n_rows <= N; n_rows += N - 1) { /* tables; tiles */
        aqlm_set_num_threads(1);
        const aqlm_plan one = aqlm_matmul_plan(&l.plain, AQLM_F32, n_rows, true);
        aqlm_set_num_threads(MOST_THREADS);
        const aqlm_plan many = aqlm_matmul_plan(&l.plain, AQLM_F32, n_rows, true);
        void *workspace = take(many.workspace, 64);
        const aqlm_plan less = {one.path, one.workspace - 64}, none = {AQLM_PATH_NONE, 0};
        expect(one.path == many.path && one.path == (n_rows == 1 ? AQLM_PATH_TABLES_23BIT : AQLM_PATH_TILES), "path");
        expect(aqlm_matmul(y, x, AQLM_F32, &l.plain, NULL, n_rows, &one, workspace) == AQLM_OK, "one thread's bytes");
        expect(aqlm_matmul(y, x, AQLM_F32, &l.plain, NULL, n_rows, &less, workspace) != AQLM_OK, "too few bytes");
        expect(aqlm_matmul(y, x, AQLM_F32, &l.plain, NULL, n_rows, &none, workspace) != AQLM_OK, "no path");
        expect(aqlm_matmul(y, x, AQLM_F32, &l.plain, NULL, 0, &none, workspace) == AQLM_OK, "no rows");
        free(workspace);
    }
    const aqlm_plan tables = {AQLM_PATH_TABLES_16BIT, SIZE_MAX / 4}, gather = {AQLM_PATH_GATHER, SIZE_MAX / 4};
    const aqlm_plan caller = aqlm_matmul_plan(&other.plain, AQLM_BF16, N, true);
    const aqlm_plan own = aqlm_matmul_plan(&other.plain, AQLM_BF16, N, false);
    expect(caller.path == AQLM_PATH_CALLER || caller.path == AQLM_PATH_TILES, "bf16"); /* where the CPU has none */
    expect(own.path == AQLM_PATH_TILES, "bf16 by the core");
    expect(caller.path == aqlm_matmul_backward_plan(&l.plain, AQLM_BF16, N, true).path, "bf16 of a gradient");
    expect(aqlm_matmul_plan(&other.plain, AQLM_F32, N, true).path == AQLM_PATH_TILES, "fp32 of a caller with bf16");
    if (caller.path == AQLM_PATH_CALLER)
        expect(aqlm_matmul(y, x, AQLM_BF16, &other.plain, NULL, N, &caller, NULL) != AQLM_OK, "the caller's path");
    expect(aqlm_matmul(y, x, AQLM_BF16, &other.plain, NULL, 1, &tables, NULL) != AQLM_OK, "tables of 12 bits");
    expect(aqlm_matmul(y, x, AQLM_F32, &l.packed, NULL, 1, &gather, NULL) != AQLM_OK, "packed codes gathered");
    aqlm_set_exact(1);
    expect(aqlm_matmul_plan(&l.plain, AQLM_F32, 1, true).path == AQLM_PATH_TILES, "exact");
    expect(aqlm_matmul_plan(&other.plain, AQLM_BF16, N, true).path == AQLM_PATH_TILES, "exact bf16");
    aqlm_set_exact(0);
    expect(aqlm_matmul_plan(&l.plain, AQLM_F32, 1, true).path == AQLM_PATH_TABLES_16BIT, "16 bits");
    free(x);
    free(y);
    free_layer(&l);
    free_layer(&other);
}

int main(int argc, char **argv) {
    const int all = sizeof shapes / sizeof *shapes, wanted = argc > 1 ? atoi(argv[1]) : all;
    for (int i = 0; i < wanted && i < all; i++)
        for (int dtype = AQLM_F32; dtype <= AQLM_BF16; dtype++) {
            state = (uint64_t)(3 * i + dtype);
            check_layer(&shapes[i], (aqlm_dtype)dtype);
        }
    check_plans();
    for (const char *const *isa = aqlm_available_isas(); *isa; isa++) printf("%s ", *isa);
    printf("%016llx\n", (unsigned long long)hash);
    return failures != 0;
}
