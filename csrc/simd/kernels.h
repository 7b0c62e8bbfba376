/* kernels.h: the hot loops, written once in the words of vec_*.h. Included by kernels_*.c, once per ISA. */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define TILE_COLS (TILE_VECS * VF_LANES)
#define VM_ALL ((uint32_t)((UINT64_C(1) << VF_LANES) - 1))

static void gemm_tile(float *c, int64_t ldc, const float *a, const float *b, int64_t k) {
    vf acc[TILE_ROWS][TILE_VECS];
    for (int i = 0; i < TILE_ROWS; i++)
        for (int v = 0; v < TILE_VECS; v++) acc[i][v] = vf_load(c + i * ldc + v * VF_LANES);
    for (int64_t p = 0; p < k; p++, a += TILE_ROWS, b += TILE_COLS) {
        vf bv[TILE_VECS];
        for (int v = 0; v < TILE_VECS; v++) bv[v] = vf_load(b + v * VF_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < TILE_ROWS; i++) {
            vf ai = vf_set1(a[i]);
#pragma GCC unroll 4
            for (int v = 0; v < TILE_VECS; v++) acc[i][v] = vf_fma(ai, bv[v], acc[i][v]);
        }
    }
    for (int i = 0; i < TILE_ROWS; i++)
        for (int v = 0; v < TILE_VECS; v++) vf_store(c + i * ldc + v * VF_LANES, acc[i][v]);
}

static void rank_update(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t rows,
                        int64_t k, int64_t cols) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < cols; j += VF_LANES) {
            vf acc = vf_load(c + r * ldc + j);
            for (int64_t p = 0; p < k; p++) acc = vf_fma(vf_set1(a[r * lda + p]), vf_load(b + p * ldb + j), acc);
            vf_store(c + r * ldc + j, acc);
        }
}

static void scores(float *score, const float *norm, const float *ct, const float *target, int64_t g, int64_t n) {
    for (int64_t i = 0; i < n; i += VF_LANES) {
        vf acc = vf_load(norm + i);
        for (int64_t d = 0; d < g; d++) acc = vf_fnma(vf_set1(target[d]), vf_load(ct + d * n + i), acc);
        vf_store(score + i, acc);
    }
}

/* `rows` is a constant at both call sites, so the loops over it unroll. */
static inline void nearest_rows(int32_t *index, float *best, const float *norm, const float *ct, const float *targets,
                                int64_t g, int64_t n, const int rows) {
    float first[VF_LANES], low[VF_LANES], where[VF_LANES];
    for (int l = 0; l < VF_LANES; l++) first[l] = (float)l;
    vf least[NEAREST_ROWS], at[NEAREST_ROWS];
    for (int r = 0; r < rows; r++) {
        least[r] = vf_set1(INFINITY);
        at[r] = vf_set1(0.0f);
    }
    vf here = vf_load(first);
    const vf step = vf_set1((float)VF_LANES); /* indices stay below 2^24, exact in a float */
    for (int64_t i = 0; i < n; i += VF_LANES, here = vf_add(here, step)) {
        vf acc[NEAREST_ROWS];
        vf base = vf_load(norm + i);
        for (int r = 0; r < rows; r++) acc[r] = base;
        for (int64_t d = 0; d < g; d++) {
            vf cd = vf_load(ct + d * n + i);
            for (int r = 0; r < rows; r++) acc[r] = vf_fnma(vf_set1(targets[r * g + d]), cd, acc[r]);
        }
        for (int r = 0; r < rows; r++) {
            vm less = vf_lt(acc[r], least[r]);
            least[r] = vf_select(less, acc[r], least[r]);
            at[r] = vf_select(less, here, at[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        vf_store(low, least[r]);
        vf_store(where, at[r]);
        int w = 0;
        for (int l = 1; l < VF_LANES; l++)
            if (low[l] < low[w] || (low[l] == low[w] && where[l] < where[w])) w = l;
        index[r] = (int32_t)where[w];
        best[r] = low[w];
    }
}

static void nearest(int32_t *index, float *best, const float *norm, const float *ct, const float *targets, int64_t rows,
                    int64_t g, int64_t n) {
    int64_t r = 0;
    for (; r + NEAREST_ROWS <= rows; r += NEAREST_ROWS)
        nearest_rows(index + r, best + r, norm, ct, targets + r * g, g, n, NEAREST_ROWS);
    for (; r < rows; r++) nearest_rows(index + r, best + r, norm, ct, targets + r * g, g, n, 1);
}

/* Lanes of min_b m[b] + v[b]; two chains, because one waits on itself. */
static inline vf row_min(const float *m, const float *v, int64_t n) {
    vf low0 = vf_set1(INFINITY), low1 = low0;
    int64_t b = 0;
    for (; b + 2 * VF_LANES <= n; b += 2 * VF_LANES) {
        low0 = vf_min(low0, vf_add(vf_load(m + b), vf_load(v + b)));
        low1 = vf_min(low1, vf_add(vf_load(m + b + VF_LANES), vf_load(v + b + VF_LANES)));
    }
    if (b < n) low0 = vf_min(low0, vf_add(vf_load(m + b), vf_load(v + b)));
    return vf_min(low0, low1);
}

static inline float prune_above(float best, float square, const aqlm_pair *pair) {
    float distance = (best < pair->worth ? best : pair->worth) + square;
    float reach = pair->inner_radius + sqrtf(distance > 0.0f ? distance : 0.0f);
    return reach * reach - square + pair->slack;
}

static inline float pair_min_n(int32_t *a_out, int32_t *b_out, const float *u, const float *v, float square,
                               const aqlm_pair *pair, const int64_t n) {
    const float *m = pair->m;
    int32_t best_a = *a_out;
    float best = u[best_a] + (m[best_a * n + *b_out] + v[*b_out]);
    float limit = prune_above(best, square, pair);
    for (int64_t block = 0; block < n; block += VF_LANES) {
        uint32_t alive = vm_bits(vf_lt(vf_load(u + block), vf_set1(limit)));
        while (alive) {
            int32_t a = (int32_t)block + __builtin_ctz(alive);
            alive &= alive - 1;
            vf lanes = vf_add(vf_set1(u[a]), row_min(m + a * n, v, n));
            if (vm_bits(vf_lt(vf_set1(best), lanes)) == VM_ALL) continue; /* the usual case: no lane is as good */
            float low = vf_hmin(lanes);
            if (low < best || (low == best && a < best_a)) {
                best = low;
                best_a = a;
                limit = prune_above(best, square, pair);
            }
        }
    }
    const float *row = m + (int64_t)best_a * n;
    for (int64_t b = 0; b < n; b += VF_LANES) {
        vf cost = vf_add(vf_set1(u[best_a]), vf_add(vf_load(row + b), vf_load(v + b)));
        uint32_t above = vm_bits(vf_lt(vf_set1(best), cost));
        if (above == VM_ALL) continue;
        *a_out = best_a;
        *b_out = (int32_t)b + __builtin_ctz(~above);
        break;
    }
    return best;
}

static float pair_min(int32_t *a, int32_t *b, const float *u, const float *v, float square, const aqlm_pair *pair) {
    return pair->n == 256 ? pair_min_n(a, b, u, v, square, pair, 256) : pair_min_n(a, b, u, v, square, pair, pair->n);
}

static float dot(const float *x, const float *y, int64_t n) {
    float lane[AQLM_LANES];
    vf acc[AQLM_LANES / VF_LANES];
    for (int v = 0; v < AQLM_LANES / VF_LANES; v++) acc[v] = vf_set1(0.0f);
    int64_t i = 0;
    for (; i + AQLM_LANES <= n; i += AQLM_LANES)
        for (int v = 0; v < AQLM_LANES / VF_LANES; v++)
            acc[v] = vf_fma(vf_load(x + i + v * VF_LANES), vf_load(y + i + v * VF_LANES), acc[v]);
    for (int v = 0; v < AQLM_LANES / VF_LANES; v++) vf_store(lane + v * VF_LANES, acc[v]);
    for (int l = 0; i + l < n; l++) lane[l] = fmaf(x[i + l], y[i + l], lane[l]);
    for (int width = AQLM_LANES / 2; width > 0; width /= 2)
        for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    return lane[0];
}

/* Branch-free, so that the compiler vectorises the loops. */
static inline uint16_t float_to_half(float x) {
    uint32_t u = aqlm_bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    /* Below 2^-14 the result is denormal: adding 0.5 makes the FPU round at the right bit. */
    uint32_t small = aqlm_bits_of(aqlm_float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
    uint32_t result = magnitude < 0x38800000u ? small : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result; /* rounds to Inf from 65520 up */
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return (uint16_t)(sign | result);
}

static inline uint16_t float_to_bf16(float x) {
    uint32_t u = aqlm_bits_of(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000u ? (u >> 16) | 0x40 : rounded);
}

static void to_f32(float *to, const void *from, int dtype, int64_t n) {
    const uint16_t *half = from;
    if (dtype == 0) memcpy(to, from, (size_t)n * 4);
    else if (dtype == 1)
        for (int64_t i = 0; i < n; i++) to[i] = aqlm_half_to_float(half[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = aqlm_float_of((uint32_t)half[i] << 16);
}

static void from_f32(void *to, int dtype, const float *from, int64_t n) {
    uint16_t *half = to;
    if (dtype == 0) memcpy(to, from, (size_t)n * 4);
    else if (dtype == 1)
        for (int64_t i = 0; i < n; i++) half[i] = float_to_half(from[i]);
    else
        for (int64_t i = 0; i < n; i++) half[i] = float_to_bf16(from[i]);
}

/* AQLM_LANES values: eight from each of two entries of one of the dtypes. */
ALWAYS_INLINE void load_entries(vf *to, const void *a, const void *b, const int dtype) {
#if VF_LANES == 16
    *to = dtype == 0 ? vf_load8x2_f32(a, b) : dtype == 1 ? vf_load8x2_f16(a, b) : vf_load8x2_bf16(a, b);
#else
    enum { HALF = AQLM_LANES / 2 / VF_LANES };
    if (dtype == 0)
        for (int v = 0; v < HALF; v++) {
            to[v] = vf_load((const float *)a + v * VF_LANES);
            to[HALF + v] = vf_load((const float *)b + v * VF_LANES);
        }
    else if (dtype == 1) {
        vf_load8_f16(to, a);
        vf_load8_f16(to + HALF, b);
    } else {
        vf_load8_bf16(to, a);
        vf_load8_bf16(to + HALF, b);
    }
#endif
}

/* Entries of codebook k for AQLM_GATHER inputs, of which those from piece `pieces` on are zeros. */
ALWAYS_INLINE void gather_entries(vf *to, const aqlm_entries *from, int64_t k, const void *codes, int64_t piece,
                                  int64_t pieces, const int dtype, const int64_t K, const bool wide, const int64_t g,
                                  const int64_t entry) {
    static const float nothing[8];
    const int64_t size = dtype == 0 ? 4 : 2, stride = entry * size;
    const uint32_t mask = (1u << from->nbits) - 1;
    const char *book = (const char *)from->codebooks + (k << from->nbits) * stride, *at[4];
    char quarters[4][32];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        at[i] = (const char *)nothing;
        if (piece + i >= pieces) continue;
        for (int64_t h = 0; h < (g == 4 ? 2 : 1); h++) {
            const int64_t j = g == 4 ? 2 * (piece + i) + h : (piece + i) * 8 / g;
            if (g == 4 && j >= from->groups) {
                memcpy(quarters[i] + 4 * size, nothing, (size_t)(4 * size));
                continue;
            }
            const uint32_t code =
                (wide ? ((const uint16_t *)codes)[j * K + k] : ((const uint8_t *)codes)[j * K + k]) & mask;
            at[i] = book + code * stride + (g > 8 ? (piece + i) * 8 % g : 0) * size;
            if (g == 4) memcpy(quarters[i] + h * 4 * size, at[i], (size_t)(4 * size));
        }
        if (g == 4) at[i] = quarters[i];
    }
    load_entries(to, at[0], at[1], dtype);
    load_entries(to + AQLM_LANES / VF_LANES, at[2], at[3], dtype);
}

/* The same for AQLM_GATHER inputs of one codebook of 2-byte codes and g = 8 that are all there: codes in one load. */
ALWAYS_INLINE void gather_whole(vf *to, const aqlm_entries *from, const void *codes, int64_t piece, const int dtype) {
    const int64_t stride = 8 * (dtype == 0 ? 4 : 2);
    const uint64_t mask = ((UINT64_C(1) << from->nbits) - 1) * UINT64_C(0x0001000100010001);
    const char *book = from->codebooks;
    uint64_t four;
    memcpy(&four, (const uint16_t *)codes + piece, sizeof four);
    four &= mask;
    load_entries(to, book + (four & 0xffff) * stride, book + (four >> 16 & 0xffff) * stride, dtype);
    load_entries(to + AQLM_LANES / VF_LANES, book + (four >> 32 & 0xffff) * stride, book + (four >> 48) * stride,
                 dtype);
}

ALWAYS_INLINE void gather_step(vf *to, const aqlm_entries *from, const void *codes, int64_t piece, int64_t pieces,
                               const int dtype, const int64_t K, const bool wide, const int64_t g,
                               const int64_t entry) {
    gather_entries(to, from, 0, codes, piece, pieces, dtype, K, wide, g, entry);
    for (int64_t k = 1; k < K; k++) {
        vf more[AQLM_GATHER / VF_LANES];
        gather_entries(more, from, k, codes, piece, pieces, dtype, K, wide, g, entry);
        for (int v = 0; v < AQLM_GATHER / VF_LANES; v++) to[v] = vf_add(to[v], more[v]);
    }
}

/* Outputs that x is loaded for once, if it is one row. Gathered entries drive x out of the first cache, which then
 * costs half as many fills again as the entries, of 64 bytes and 2 cycles each: 1x16g8 at 4096x4096 took 1.2 ms with
 * one output and takes 1.0 with eight. */
enum { GATHER_OUTPUTS = VF_LANES == 16 ? 8 : 2 };

/* `outputs` outputs, whose codes are `step` bytes apart; what is not a parameter is constant at the usual call sites.
 */
ALWAYS_INLINE void gather_rows(float *sums, const aqlm_entries *from, const void *codes, int64_t step, const float *x,
                               const int outputs, const int rows, const int dtype, const int64_t K, const bool wide,
                               const int64_t g, const int64_t entry) {
    enum { VECS = AQLM_GATHER / VF_LANES, LINE = 64, AHEAD = 2 * LINE };
    const int64_t in = from->groups * g, pieces = (in + 7) / 8, whole = wide && K == 1 && g == 8 && entry == 8 ? in : 0;
    vf acc[8][VECS], entries[VECS], inputs[VECS];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int v = 0; v < VECS; v++) acc[i][v] = vf_set1(0.0f);
    for (int64_t i = 0; i < in; i += AQLM_GATHER) {
        const int64_t at = i / g * K * (wide ? 2 : 1);
        const bool fetches = at % LINE < AQLM_GATHER / g * K * (wide ? 2 : 1);
        const int64_t ahead = at + AHEAD + (i + AHEAD * 4 < in ? 0 : (outputs - 1) * step); /* on to the next ones */
#pragma GCC unroll 8
        for (int o = 0; o < outputs; o++) {
            const char *row = (const char *)codes + o * step;
            if (fetches) __builtin_prefetch(row + ahead, 0, 3);
            if (i + AQLM_GATHER <= whole) gather_whole(entries, from, row, i / 8, dtype);
            else gather_step(entries, from, row, i / 8, pieces, dtype, K, wide, g, entry);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < VECS; v++) {
                    if (o == 0 || rows > 1) inputs[v] = vf_load(x + i * rows + r * AQLM_GATHER + v * VF_LANES);
                    acc[o * rows + r][v] = vf_fma(inputs[v], entries[v], acc[o * rows + r][v]);
                }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < outputs * rows; i++) {
        float lane[AQLM_GATHER];
        for (int v = 0; v < VECS; v++) vf_store(lane + v * VF_LANES, acc[i][v]);
        for (int width = AQLM_GATHER / 2; width > 0; width /= 2)
            for (int l = 0; l < width; l++) lane[l] += lane[l + width];
        sums[i] = lane[0];
    }
}

ALWAYS_INLINE void decode_groups(float *row, const aqlm_entries *from, const void *codes, float scale, const int dtype,
                                 const int64_t K, const bool wide, const int64_t g, const int64_t entry) {
    const int64_t in = from->groups * g, pieces = (in + 7) / 8;
    for (int64_t i = 0; i < in; i += AQLM_GATHER) {
        vf entries[AQLM_GATHER / VF_LANES];
        float rest[AQLM_GATHER];
        float *to = i + AQLM_GATHER <= in ? row + i : rest;
        gather_step(entries, from, codes, i / 8, pieces, dtype, K, wide, g, entry);
        for (int v = 0; v < AQLM_GATHER / VF_LANES; v++)
            vf_store(to + v * VF_LANES, vf_mul(vf_set1(scale), entries[v]));
        if (to == rest) memcpy(row + i, rest, (size_t)(in - i) * sizeof *rest);
    }
}

/* Usual formats with constants in the place of their sizes. */
static void decode_row(float *row, const aqlm_entries *from, const void *codes, float scale) {
    const bool wide = from->nbits > 8;
    const int64_t K = from->num_codebooks;
    const int dtype = from->g == 8 && from->size == 8 ? from->dtype : -1;
    if (dtype == 0 && !wide) decode_groups(row, from, codes, scale, 0, K, false, 8, 8);
    else if (dtype == 1 && !wide) decode_groups(row, from, codes, scale, 1, K, false, 8, 8);
    else if (dtype == 2 && !wide) decode_groups(row, from, codes, scale, 2, K, false, 8, 8);
    else if (dtype == 0) decode_groups(row, from, codes, scale, 0, K, true, 8, 8);
    else if (dtype == 1) decode_groups(row, from, codes, scale, 1, K, true, 8, 8);
    else if (dtype == 2) decode_groups(row, from, codes, scale, 2, K, true, 8, 8);
    else decode_groups(row, from, codes, scale, from->dtype, K, wide, from->g, from->size);
}

#define USUAL_ROWS(ROWS, OUTPUTS)                                                                                      \
    case ROWS:                                                                                                         \
        for (; o + (OUTPUTS) <= outputs; o += (OUTPUTS))                                                               \
            if (from->dtype == 1)                                                                                      \
                gather_rows(sums + o * (ROWS), from, at + o * step, step, x, OUTPUTS, ROWS, 1, 1, true, 8, 8);         \
            else gather_rows(sums + o * (ROWS), from, at + o * step, step, x, OUTPUTS, ROWS, 2, 1, true, 8, 8);        \
        break;

static void gather_sums(float *sums, const aqlm_entries *from, const void *codes, int64_t step, int64_t outputs,
                        const float *x, int64_t rows) {
    const bool wide = from->nbits > 8;
    const bool usual = wide && from->g == 8 && from->size == 8 && from->num_codebooks == 1 && from->dtype != 0;
    const char *at = codes;
    int64_t o = 0;
    switch (usual ? rows : 0) {
        USUAL_ROWS(1, GATHER_OUTPUTS)
        USUAL_ROWS(2, GATHER_OUTPUTS / 2)
        USUAL_ROWS(4, GATHER_OUTPUTS > 4 ? GATHER_OUTPUTS / 4 : 1)
        USUAL_ROWS(8, 1)
    default: break;
    }
    for (; o < outputs; o++)
        gather_rows(sums + o * rows, from, at + o * step, step, x, 1, (int)rows, from->dtype, from->num_codebooks, wide,
                    from->g, from->size);
}

/* No word is needed here: the compiler vectorises these loops, whose operations are all rounded correctly. */
ALWAYS_INLINE void adam_each(float *restrict x, float *restrict first, float *restrict second,
                             const float *restrict gradient, int64_t n, const aqlm_adam *a, const bool keeps_first) {
    const aqlm_adam b = *a;
    for (int64_t i = 0; i < n; i++) {
        const float g = gradient[i] / b.divisor, m = keeps_first ? first[i] + (g - first[i]) * b.rest1 : g;
        const float v = second[i] * b.beta2 + g * g * b.rest2;
        if (keeps_first) first[i] = m;
        second[i] = v;
        x[i] -= b.rate * (m / (sqrtf(v) / b.root + b.eps));
    }
}

static void adam(float *x, float *first, float *second, const float *gradient, int64_t n, const aqlm_adam *a) {
    if (first) adam_each(x, first, second, gradient, n, a, true);
    else adam_each(x, NULL, second, gradient, n, a, false);
}

static void load_first(float *first, const int8_t *bytes, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float root = (float)bytes[i] * scale;
        first[i] = root * fabsf(root) * (root * root);
    }
}

static void load_second(float *second, const uint8_t *bytes, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float root = (float)bytes[i] * scale, square = root * root;
        second[i] = square * square * (square * square);
    }
}

/* The largest of n numbers that are not negative, compared as integers: NaN, which is above all, is not lost. */
static inline float largest(const float *x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = aqlm_bits_of(x[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    return aqlm_float_of(most);
}

static float store_first(int8_t *bytes, const float *first, int64_t n) {
    float root[AQLM_MOMENTS];
    for (int64_t i = 0; i < n; i++) root[i] = sqrtf(sqrtf(fabsf(first[i])));
    const float scale = largest(root, n) / 127.0f, divisor = scale == 0.0f ? 1.0f : scale;
    for (int64_t i = 0; i < n; i++) {
        float q = root[i] / divisor;
        q = first[i] < 0.0f ? -q : q;
        bytes[i] = (int8_t)(uint8_t)aqlm_bits_of(q + AQLM_ROUND);
    }
    return scale;
}

static float store_second(uint8_t *bytes, const float *second, int64_t n) {
    float root[AQLM_MOMENTS];
    for (int64_t i = 0; i < n; i++) root[i] = sqrtf(sqrtf(sqrtf(second[i])));
    const float scale = largest(root, n) / 255.0f, divisor = scale == 0.0f ? 1.0f : scale;
    for (int64_t i = 0; i < n; i++) {
        float q = root[i] / divisor;
        q = q > 1.0f || root[i] == 0.0f ? q : 1.0f;
        bytes[i] = (uint8_t)aqlm_bits_of(q + AQLM_ROUND);
    }
    return scale;
}

#ifndef AQLM_OWN_TABLES
/* In the words of tables_*.h: transpose_16 transposes 16 x 16 bytes; add_products adds x[0] c[e, 0] + x[1] c[e, 1] to
 * sum e < 256; finish_plane changes a plane of a table into what sum_planes looks up: sums[p][o] = sum_t plane p of
 * table t[codes(t, o)] for a full panel of outputs and p < planes, 2 at most. */
static void transpose(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t from_step, int64_t rows,
                      int64_t columns) {
    for (int64_t c = 0; c < columns; c += 16)
        for (int64_t r = 0; r < rows; r += 16) {
            const int64_t height = rows - r < 16 ? rows - r : 16, width = columns - c < 16 ? columns - c : 16;
            if (height == 16 && width == 16) {
                transpose_16(to + c * to_step + r, to_step, from + r * from_step + c, from_step);
                continue;
            }
            for (int64_t i = 0; i < width; i++)
                for (int64_t j = 0; j < height; j++) to[(c + i) * to_step + r + j] = from[(r + j) * from_step + c + i];
        }
}

static void make_tables(uint8_t *tables, const float *x, const float *ct, int64_t K, int64_t g, int64_t first,
                        int64_t n, aqlm_ahead ahead) {
    (void)ahead;
    const vf magic = vf_set1(AQLM_ROUND);
    for (int64_t t = 0; t < n; t++) {
        const float *group = x + (first + t) / K * g, *c = ct + (first + t) % K * g * 256;
        float sum[256];
        uint32_t bits[256];
        for (int64_t e = 0; e < 256; e += 2 * AQLM_LANES) {
            vf acc[2 * AQLM_LANES / VF_LANES];
            for (int v = 0; v < 2 * AQLM_LANES / VF_LANES; v++) acc[v] = vf_set1(0.0f);
            for (int64_t d = 0; d < g; d++)
                for (int v = 0; v < 2 * AQLM_LANES / VF_LANES; v++)
                    acc[v] = vf_fma(vf_set1(group[d]), vf_load(c + d * 256 + e + v * VF_LANES), acc[v]);
            for (int v = 0; v < 2 * AQLM_LANES / VF_LANES; v++) vf_store(sum + e + v * VF_LANES, vf_add(acc[v], magic));
        }
        memcpy(bits, sum, sizeof bits);
        for (int p = 0; p < 3; p++, tables += AQLM_PLANE) {
            for (int e = 0; e < 256; e++) tables[e] = (uint8_t)(bits[e] >> 8 * p);
            finish_plane(tables);
        }
    }
}

static void make_short_tables(uint8_t *tables, const int16_t *x, const int16_t *ct, int64_t K, int64_t g, int64_t first,
                              int64_t n, aqlm_ahead ahead) {
    (void)ahead;
    for (int64_t t = 0; t < n; t++) {
        const int16_t *group = x + (first + t) / K * g, *c = ct + (first + t) % K * g * 256;
        int32_t sum[256];
        for (int e = 0; e < 256; e++) sum[e] = AQLM_SHORT_START;
        for (int64_t p = 0; p < g / 2; p++) add_products(sum, group + 2 * p, c + p * 512);
        for (int p = 0; p < 2; p++, tables += AQLM_PLANE) {
            for (int e = 0; e < 256; e++) tables[e] = (uint8_t)((uint32_t)sum[e] >> (AQLM_TABLE_SHIFT + 8 * p));
            finish_plane(tables);
        }
    }
}

static void table_sums(float *y, int64_t ldy, const aqlm_codes_block *block, const uint8_t *tables, const float *scales,
                       int64_t rows, int planes) {
    const int32_t offset = aqlm_table_offset(planes) * (int32_t)block->n;
    const int64_t left = block->outputs % AQLM_PANEL, full = block->outputs - left;
    uint8_t last[AQLM_TABLE_BLOCK * AQLM_PANEL]; /* codes of a panel that is not full: none beyond them may be read */
    if (left) memset(last, 0, sizeof last);
    for (int64_t t = 0; left && t < block->n; t++)
        memcpy(last + t * AQLM_PANEL, block->codes + t * block->step + full, (size_t)left);
    for (int64_t r = 0; r < rows; r++, y += ldy, tables += AQLM_TABLE_BLOCK * planes * AQLM_PLANE)
        for (int64_t o = 0; o < block->outputs; o += AQLM_PANEL) {
            aqlm_codes_block panel = {last, AQLM_PANEL, left, block->n, {last, 0}};
            if (o < full) {
                panel = *block;
                panel.codes += o, panel.ahead.at += o, panel.outputs = AQLM_PANEL;
            }
            uint16_t sums[3][AQLM_PANEL] = {{0}};
            sum_planes(sums, &panel, tables, planes * AQLM_PLANE, 2);
            if (planes == 3) sum_planes(sums + 2, &panel, tables + 2 * AQLM_PLANE, planes * AQLM_PLANE, 1);
            for (int i = 0; i < AQLM_PANEL; i++) {
                const int32_t sum = sums[0][i] + (sums[1][i] << 8) + (sums[2][i] << 16) - offset;
                y[o + i] = fmaf(scales[r], (float)sum, y[o + i]);
            }
        }
}
#endif

const aqlm_kernels AQLM_TABLE = {
    .name = AQLM_NAME,
    .tile_rows = TILE_ROWS,
    .tile_cols = TILE_COLS,
    .gemm_tile = gemm_tile,
    .rank_update = rank_update,
    .scores = scores,
    .nearest = nearest,
    .pair_min = pair_min,
    .dot = dot,
    .decode_row = decode_row,
    .gather_sums = gather_sums,
    .to_f32 = to_f32,
    .from_f32 = from_f32,
    .transpose = transpose,
    .make_tables = make_tables,
    .make_short_tables = make_short_tables,
    .table_sums = table_sums,
    .adam = adam,
    .load_first = load_first,
    .load_second = load_second,
    .store_first = store_first,
    .store_second = store_second,
};
