/* simd.h: the table of hot loops. One table per ISA, filled by kernels.h, picked once by core/dispatch.c.
 *
 * All ISAs give the same bits: products are summed by fma in one fixed order, sums over lanes are cut into
 * AQLM_LANES virtual lanes whatever the register width, and minima are exact with ties to the lowest index.
 */
#ifndef AQLM_SIMD_H
#define AQLM_SIMD_H

#include <stdint.h>

#define AQLM_LANES 16 /* virtual lanes; code arrays scanned by kernels are padded to a multiple of it */

enum {
    AQLM_TABLE_BYTES = 512,  /* a table of 256 int16 */
    AQLM_TABLE_BLOCK = 64,   /* tables with a common scale */
    AQLM_TABLE_OUTPUTS = 256 /* outputs of one table_sums */
};

/* One group's joint search over a pair of codebooks, see aqlm_kernels.pair_min. */
typedef struct aqlm_pair {
    const float *m;     /* [n, n]  2 c1_a S c2_b */
    int64_t n;          /* entries, padded to a multiple of AQLM_LANES */
    float inner_radius; /* max_b |c2_b| in the metric S */
    float slack;        /* added to the bound so that rounding never prunes the best pair */
    float worth;        /* only a pair cheaper than this need be found */
} aqlm_pair;

typedef struct aqlm_kernels {
    const char *name;
    int64_t tile_rows, tile_cols; /* of gemm_tile */

    /* c[tile_rows, tile_cols] += a^T b;  a [k, tile_rows] and b [k, tile_cols] packed. Sums run over k in order. */
    void (*gemm_tile)(float *c, int64_t ldc, const float *a, const float *b, int64_t k);

    /* c[rows, cols] += a[rows, k] b[k, cols]; cols is rounded up to AQLM_LANES: c and b must have the room. */
    void (*rank_update)(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t rows,
                        int64_t k, int64_t cols);

    /* score[i] = norm[i] - sum_d target[d] ct[d, i], i < n (a multiple of AQLM_LANES). */
    void (*scores)(float *score, const float *norm, const float *ct, const float *target, int64_t g, int64_t n);

    /* For each row the index of its smallest score (lowest index among equals) and that score.
     * targets [rows, g]. */
    void (*nearest)(int32_t *index, float *best, const float *norm, const float *ct, const float *targets, int64_t rows,
                    int64_t g, int64_t n);

    /* The pair (a, b) with the smallest u[a] + (m[a, b] + v[b]); *a and *b hold a first guess on entry.
     * square is |t|^2 in the metric, so that u[a] + square = |t - c1_a|^2: entries a with
     * |t - c1_a| > inner_radius + sqrt(best) cannot win (triangle inequality) and are skipped. Returns its cost. */
    float (*pair_min)(int32_t *a, int32_t *b, const float *u, const float *v, float square, const aqlm_pair *pair);

    /* sum of x[i] y[i], in AQLM_LANES partial sums added as a tree. */
    float (*dot)(const float *x, const float *y, int64_t n);

    /* tables[t], t < n: 256 integers, the products of group (first + t) / K of x [J, g] with the entries of codebook
     * (first + t) % K, rounded; ct [K, g, 256]. No product exceeds 32767. A table's bytes are each ISA's own affair. */
    void (*make_tables)(uint8_t *tables, const float *x, const float *ct, int64_t K, int64_t g, int64_t first,
                        int64_t n);

    /* y[r, o] += scales[r] * sum_t tables[r, t][codes[o * step + t]] for r < rows, o < outputs, t < n: an exact sum of
     * integers and one fma. tables [rows, AQLM_TABLE_BLOCK]; outputs <= AQLM_TABLE_OUTPUTS, rounded up to 64: y must
     * have the room. What is read next lies `ahead` bytes from codes. */
    void (*table_sums)(float *y, int64_t ldy, const uint8_t *codes, int64_t step, int64_t ahead, const uint8_t *tables,
                       const float *scales, int64_t rows, int64_t outputs, int64_t n);
} aqlm_kernels;

extern const aqlm_kernels aqlm_kernels_scalar;
extern const aqlm_kernels aqlm_kernels_avx2;
extern const aqlm_kernels aqlm_kernels_avx512;
extern const aqlm_kernels aqlm_kernels_neon;

#endif
