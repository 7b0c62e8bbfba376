/* rounding.h: the steps of methods other than AQLM (core/rounding): weights to a grid or a lattice's codebook with
 * error feedback (GPTQ, arXiv 2210.17323; LDLQ, QuIP, 2307.13304), and transforms after which they are incoherent. */
#ifndef AQLM_ROUNDING_H
#define AQLM_ROUNDING_H

#include <stdbool.h>
#include <stdint.h>

#include "aqlm/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The factor of aqlm_factor_hessian for single columns, for which order is by falling diagonal, or, unless `sorted`,
 * as they are. The later columns of a row see the errors of the earlier ones through feedback. */
aqlm_status aqlm_factor_columns(int32_t *order /* [in] */, float *feedback /* [in, in] */,
                                const float *H /* [in, in] */, int64_t in_features, bool sorted, double relative_damp);

/* How aqlm_round_columns finds a grid of 2^bits values scale (c - zero), c = 0..2^bits - 1, for each row of a group. */
typedef enum aqlm_grid {
    AQLM_GRID_GIVEN = 0,     /* scales and zeros are inputs */
    AQLM_GRID_SYMMETRIC = 1, /* zero is the middle, (2^bits - 1) / 2 */
    AQLM_GRID_AFFINE = 2     /* zero is one of the codes */
} aqlm_grid;

typedef struct aqlm_columns {
    const float *weight;                                 /* [out, in] */
    const int32_t *order;                                /* [in], a permutation */
    const float *feedback;                               /* [in, in], or NULL: each column by itself */
    int64_t out_features, in_features, group_size, bits; /* group_size divides in_features; bits in 1..8 */
    aqlm_grid grid;
    bool at_start; /* grids are found from a group's columns when the first of them comes up, else from the weight */
} aqlm_columns;

/* Column after column in `order`, each to the nearest of its grid after the errors so far were fed back to it. A grid
 * is the one of least squared error among those shrunk from the group's extent; scales have 11 significant bits. */
aqlm_status aqlm_round_columns(uint8_t *codes /* [out, in] */, float *scales /* [out, in / group_size] */,
                               float *zeros /* as scales */, const aqlm_columns *c);

/* ---- E8P: the 2^16 vectors of QuIP#'s codebook (arXiv 2402.04396, section 4.2) --------------------------------
 * Code: bits 0..6 signs of coordinates 0..6 (1: negative), bit 7 the shift (1: +1/4, 0: -1/4), bits 8..15 one of 256
 * patterns of magnitudes. The sign of coordinate 7 makes the sum of the shifted half-integers even.
 *
 * `fitted`: the magnitudes of each kind of pattern and the shift are the means of the standard normal numbers that
 * they stand for (Lloyd's fixed point with E8P's signs), which lowers the squared error of these from .0916 to .0888.
 */

/* vectors[n, 8] of codes[n]. */
void aqlm_e8p_decode(float *vectors, const uint16_t *codes, int64_t n, bool fitted);

/* The nearest vector's code of each of x[n, 8], by plain distance; ties take the lower pattern. */
aqlm_status aqlm_e8p_nearest(uint16_t *codes, const float *x, int64_t n, bool fitted);

/* 256 vectors of E8, the codebook of one bit per weight: 0, the 240 shortest, and 15 of the next shell. */
void aqlm_e8_short(float *vectors /* [256, 8] */);

/* Groups of 8 columns in `order`, each to the nearest of scale times E8P, then what is left to the nearest of
 * scale residual_scale times plain E8P (second = 2 bits), of the 256 short vectors (second = 1) or not at all (0). */
typedef struct aqlm_lattice {
    const float *weight;   /* [out, in] */
    const int32_t *order;  /* [in / 8] */
    const float *feedback; /* [in, in], of aqlm_factor_hessian, or NULL */
    int64_t out_features, in_features, second;
    float scale, residual_scale;
    bool fitted;
} aqlm_lattice;
aqlm_status aqlm_round_lattice(float *decoded /* [out, in] */, uint16_t *codes /* [out, in / 8, second ? 2 : 1] */,
                               const aqlm_lattice *l);

/* ---- transforms ------------------------------------------------------------------------------------------------
 * The largest divisor of n of which a Hadamard matrix is known: 2^k times orders 4 m of Paley's constructions. */
int64_t aqlm_hadamard_order(int64_t n);

/* y = x H^T / sqrt(order), or x H / sqrt(order), its inverse, for each run of `order` values of a row. */
aqlm_status aqlm_hadamard(float *y, const float *x, int64_t rows, int64_t n, bool inverse);

/* What aqlm_hadamard does in steps, for other devices: orders of the factors beside 2^k, least stride first. */
#define AQLM_HADAMARD_FACTORS 8
int aqlm_hadamard_factors(int64_t order, int64_t factors[AQLM_HADAMARD_FACTORS]);
aqlm_status aqlm_paley(int8_t *signs /* [order, order] of 1 and -1 */, int64_t order);

/* A random orthogonal matrix, by Gram-Schmidt on normal vectors in double. */
aqlm_status aqlm_random_orthogonal(float *q /* [n, n] */, int64_t n, uint64_t seed);

/* Each row of x as a matrix X [p, q]: left^T X right, which is a product with the Kronecker product of the two. */
aqlm_status aqlm_rotate(float *y, const float *x, const float *left /* [p, p] */, const float *right /* [q, q] */,
                        int64_t rows, int64_t p, int64_t q);

#ifdef __cplusplus
}
#endif
#endif
