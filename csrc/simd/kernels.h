/* kernels.h: the hot loops, written once in the words of vec_*.h. Included by kernels_*.c, once per ISA. */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

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

#ifndef AQLM_OWN_TABLES
static void make_tables(uint8_t *tables, const float *x, const float *ct, int64_t K, int64_t g, int64_t first,
                        int64_t n) {
    const vf magic = vf_set1(0x1.8p23f); /* leaves the rounded integer in the low bits of the sum */
    for (int64_t t = 0; t < n; t++) {
        const float *group = x + (first + t) / K * g, *c = ct + (first + t) % K * g * 256;
        int16_t *table = (int16_t *)(void *)(tables + t * AQLM_TABLE_BYTES);
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
        for (int e = 0; e < 256; e++) table[e] = (int16_t)(uint16_t)bits[e];
    }
}

static void table_sums(float *y, int64_t ldy, const uint8_t *codes, int64_t step, int64_t ahead, const uint8_t *tables,
                       const float *scales, int64_t rows, int64_t outputs, int64_t n) {
    const bool little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
    for (int64_t r = 0; r < rows; r++) {
        int32_t sums[AQLM_TABLE_OUTPUTS];
        for (int64_t o = 0; o < outputs; o++) {
            const int16_t *T = (const int16_t *)(const void *)tables + r * AQLM_TABLE_BLOCK * 256;
            const uint8_t *code = codes + o * step;
            int32_t s0 = 0, s1 = 0;
            int64_t t = 0;
            if (r == 0) __builtin_prefetch(code + ahead);
            for (; little_endian && t + 8 <= n; t += 8, T += 8 * 256) { /* one load of codes for eight */
                uint64_t c;
                memcpy(&c, code + t, 8);
                s0 += T[c & 255];
                s1 += T[256 + (c >> 8 & 255)];
                s0 += T[512 + (c >> 16 & 255)];
                s1 += T[768 + (c >> 24 & 255)];
                s0 += T[1024 + (c >> 32 & 255)];
                s1 += T[1280 + (c >> 40 & 255)];
                s0 += T[1536 + (c >> 48 & 255)];
                s1 += T[1792 + (c >> 56)];
            }
            for (; t < n; t++, T += 256) s0 += T[code[t]];
            sums[o] = s0 + s1;
        }
        for (int64_t o = 0; o < outputs; o++) y[r * ldy + o] = fmaf(scales[r], (float)sums[o], y[r * ldy + o]);
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
    .make_tables = make_tables,
    .table_sums = table_sums,
};
