/* simd.h: the table of hot loops. One table per ISA, filled by kernels.h, picked once by core/runtime/dispatch.c.
 *
 * All ISAs give the same bits: products are summed by fma in one fixed order, sums over lanes are cut into
 * AQLM_LANES virtual lanes whatever the register width, and minima are exact with ties to the lowest index. The scalar
 * table does all that too, so a result can be reproduced on another machine.
 */
#ifndef AQLM_SIMD_H
#define AQLM_SIMD_H

#include <stdint.h>
#include <string.h>

#define AQLM_LANES 16 /* virtual lanes; code arrays scanned by kernels are padded to a multiple of it */

enum {
    AQLM_TABLE_BLOCK = 32,    /* tables with a common scale */
    AQLM_TABLE_OUTPUTS = 256, /* outputs of one table_sums */
    AQLM_PANEL = 64,          /* outputs looked up together */
    AQLM_PLANE = 256,         /* bytes of a plane of a table */
    AQLM_TABLE_SHIFT = 15,    /* from products of integers to entries of a table of 2 planes */
    AQLM_GATHER = 32,         /* inputs that gather_sums takes at once */
    AQLM_MOMENTS = 256        /* moments of 8 bits that share a scale */
};

static inline uint32_t aqlm_bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float aqlm_float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float aqlm_half_to_float(uint16_t h) {
    /* Shifting the half into place leaves an exponent 112 too small; the product restores it, denormals too. */
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7fff) << 13;
    float x = aqlm_float_of(magnitude) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u; /* Inf and NaN keep their mantissa */
    return aqlm_float_of(sign | aqlm_bits_of(x) | special);
}

/* Entries of g values, `size` apart, of codebooks of an aqlm_dtype, and how codes [groups, K] name them. */
typedef struct aqlm_entries {
    const void *codebooks; /* [K, 2^nbits, size] */
    int dtype;
    int64_t size, g, groups, num_codebooks, nbits; /* codes are of 1 byte for nbits <= 8, else of 2 */
} aqlm_entries;

/* An entry v of a table of 2 or 3 planes is stored as the bytes of v + aqlm_table_offset, the lowest plane first. */
static inline int32_t aqlm_table_largest(int planes) { return planes == 2 ? 32767 : 4194303; } /* |v| at most */
static inline int32_t aqlm_table_offset(int planes) { return aqlm_table_largest(planes) + 1; }

/* x + this is a float whose low 23 bits are x rounded + 2^22, the offset of 3 planes; its low 16 bits are those of x.
 */
#define AQLM_ROUND 0x1.8p23f

/* Sums of integer products start here: then bits AQLM_TABLE_SHIFT.. are v + the offset of 2 planes. */
#define AQLM_SHORT_START ((1 << 30) + (1 << (AQLM_TABLE_SHIFT - 1)))

/* What a kernel fetches to the second level for those after it: `width` bytes at at + t * step as it looks up table t.
 */
typedef struct aqlm_ahead {
    const uint8_t *at;
    int64_t step;
} aqlm_ahead;

/* What table_sums looks up: codes[t * step + o] for tables t < n and outputs o < outputs. */
typedef struct aqlm_codes_block {
    const uint8_t *codes;
    int64_t step, outputs, n; /* outputs <= AQLM_TABLE_OUTPUTS, n <= AQLM_TABLE_BLOCK */
    aqlm_ahead ahead;         /* AQLM_TABLE_OUTPUTS wide */
} aqlm_codes_block;

/* One group's joint search over a pair of codebooks, see aqlm_kernels.pair_min. */
typedef struct aqlm_pair {
    const float *m;     /* [n, n]  2 c1_a S c2_b */
    int64_t n;          /* entries, padded to a multiple of AQLM_LANES */
    float inner_radius; /* max_b |c2_b| in the metric S */
    float slack;        /* added to the bound so that rounding never prunes the best pair */
    float worth;        /* only a pair cheaper than this need be found */
} aqlm_pair;

/* A step of Adam: gradients are divided by `divisor`; rest = 1 - beta; rate and root hold the corrections of the bias.
 */
typedef struct aqlm_adam {
    float divisor, rest1, beta2, rest2, rate, root, eps;
} aqlm_adam;

typedef struct aqlm_kernels {
    const char *name;
    int64_t tile_rows, tile_cols; /* of gemm_tile */

    /* c[tile_rows, tile_cols] += a^T b;  a [k, tile_rows] and b [k, tile_cols] packed. Sums run over k in order. */
    void (*gemm_tile)(float *c, int64_t ldc, const float *a, const float *b, int64_t k);

    /* c[rows, cols] += a[rows, k] b[k, cols]; cols is rounded up to AQLM_LANES: c and b must have space for it. */
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

    /* row[j] = scale * sum_k codebooks[k, codes[j, k]], the codebooks in order, for all groups j; row [groups, g] */
    void (*decode_row)(float *row, const aqlm_entries *from, const void *codes, float scale);

    /* sums[o, r] = sum_j <x[r, j], sum_k codebooks[k, codes[o, j, k]]> for rows r < rows (1..8): the products with each
     * of AQLM_GATHER inputs in a partial sum of its own, these added as a tree. Codes of an output lie `step` bytes
     * after those of the one before. x: inputs in blocks of AQLM_GATHER, each [rows, AQLM_GATHER], the last one filled
     * up with zeros. */
    void (*gather_sums)(float *sums, const aqlm_entries *from, const void *codes, int64_t step, int64_t outputs,
                        const float *x, int64_t rows);

    /* Between float and an aqlm_dtype, to nearest even. */
    void (*to_f32)(float *to, const void *from, int dtype, int64_t n);
    void (*from_f32)(void *to, int dtype, const float *from, int64_t n);

    /* to[c * to_step + r] = from[r * from_step + c] for r < rows, c < columns, both at most 64. */
    void (*transpose)(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t from_step, int64_t rows,
                      int64_t columns);

    /* tables [n, 2 or 3 planes, AQLM_PLANE], table t: the products of group (first + t) / K of x [J, g] with the
     * entries of codebook (first + t) % K. Three planes: of floats, ct [K, g, 256], rounded. Two: of integers, x [J, g]
     * and ct [K, g / 2, 256, 2], divided by 2^AQLM_TABLE_SHIFT and rounded. None exceeds aqlm_table_largest. ahead is
     * 2 * AQLM_TABLE_OUTPUTS wide. */
    void (*make_tables)(uint8_t *tables, const float *x, const float *ct, int64_t K, int64_t g, int64_t first,
                        int64_t n, aqlm_ahead ahead);
    void (*make_short_tables)(uint8_t *tables, const int16_t *x, const int16_t *ct, int64_t K, int64_t g, int64_t first,
                              int64_t n, aqlm_ahead ahead);

    /* y[r, o] += scales[r] * sum_t tables[r, t][codes(t, o)] for r < rows: an exact sum of integers and one fma.
     * tables [rows, AQLM_TABLE_BLOCK, planes, AQLM_PLANE]; y must have space for outputs rounded up to 64. */
    void (*table_sums)(float *y, int64_t ldy, const aqlm_codes_block *block, const uint8_t *tables, const float *scales,
                       int64_t rows, int planes);

    /* A step for n values x: first += rest1 (gradient - first), second = beta2 second + rest2 gradient^2,
     * x -= rate first / (sqrt(second) / root + eps). first NULL: the gradient itself. */
    void (*adam)(float *x, float *first, float *second, const float *gradient, int64_t n, const aqlm_adam *a);

    /* Moments of bytes, for n <= AQLM_MOMENTS: first = +-(scale byte)^4, second = (scale byte)^8; and back: the nearest
     * of these roots, with the scale at which the largest just fits; of second moments none but zero becomes zero. */
    void (*load_first)(float *first, const int8_t *bytes, float scale, int64_t n);
    void (*load_second)(float *second, const uint8_t *bytes, float scale, int64_t n);
    float (*store_first)(int8_t *bytes, const float *first, int64_t n);
    float (*store_second)(uint8_t *bytes, const float *second, int64_t n);
} aqlm_kernels;

extern const aqlm_kernels aqlm_kernels_scalar;
extern const aqlm_kernels aqlm_kernels_avx2;
extern const aqlm_kernels aqlm_kernels_avx512;
extern const aqlm_kernels aqlm_kernels_neon;

#endif
