/* quantizer.h: from a weight and H to codes, codebooks and scales (core/quantizer); out_group_size must be 1. */
#ifndef AQLM_QUANTIZER_H
#define AQLM_QUANTIZER_H

#include <stdbool.h>
#include <stdint.h>

#include "aqlm/shape.h"
#include "aqlm/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* sum[in, in] += X^T X, X [n, in]; both triangles are written. */
aqlm_status aqlm_accumulate_hessian(double *sum, const float *x, int64_t n, int64_t in_features);

/* sum[rows, columns] += X^T Y, X [n, rows], Y [n, columns]. */
aqlm_status aqlm_accumulate_product(double *sum, const float *x, const float *y, int64_t n, int64_t rows,
                                    int64_t columns);

/* corrected = W + alpha W C (H + damp I)^-1, damp = relative_damp * mean(diag H): at alpha 1 and without damping the
 * weight whose outputs for inputs X^ come nearest those of W for inputs X, C = (X - X^)^T X^ / n, H = X^^T X^ / n. */
aqlm_status aqlm_correct_weight(float *corrected /* [out, in] */, const float *weight /* [out, in] */,
                                const float *cross /* C [in, in] */, const float *H /* [in, in] */,
                                int64_t out_features, int64_t in_features, double alpha, double relative_damp);

/* Block factor of H for sequential error feedback (docs/method.md; GPTQ and LDLQ with g x g blocks).
 * Groups are ordered by falling trace of their g x g block of H; with P H P^T + damp I = R R^T, R upper
 * triangular: metric_j = R_jj R_jj^T and feedback_ij = R_ij R_jj^-1 for i < j (in `order`). */
aqlm_status aqlm_factor_hessian(int32_t *order /* [J] */, float *feedback /* [in, in] */, float *metric /* [J, g, g] */,
                                const float *H /* [in, in] */, int64_t in_features, int64_t in_group_size,
                                double relative_damp);

/* Residual k-means of the scaled groups, K times (AQLM section 3.1). column_weight [in] weighs each
 * input's squared distance, or NULL. Empty clusters are re-seeded at the worst-served points.
 * Stops after init_max_iter rounds or when the error falls by less than `tolerance` of itself. */
aqlm_status aqlm_residual_kmeans(uint16_t *codes /* [out, J, K] */, float *codebooks /* [K, E, g] */,
                                 const float *weight /* [out, in] */, const float *scales /* [out] */,
                                 const float *column_weight, const aqlm_shape *shape, int64_t init_max_iter,
                                 double tolerance, uint64_t seed);

#define AQLM_PAIR_BEAM 4
typedef struct aqlm_search {
    const float *weight;    /* [out, in] */
    const float *codebooks; /* [K, E, g] */
    const float *scales;    /* [out] */
    aqlm_shape shape;
    int64_t beam_size; /* 1..64; 0: pairs, with a beam of AQLM_PAIR_BEAM */
    bool pairs;        /* K >= 2, B <= 8: the last two codebooks by exact joint search after each state of the beam */
    uint64_t seed;     /* of the order of the groups in a sweep */
} aqlm_search;

/* One coordinate sweep over all groups, each at its best given the others; codes in and out. */
aqlm_status aqlm_search_sweep(uint16_t *codes, const aqlm_search *s, const float *H /* [in, in] */);

/* One pass of sequential error feedback; codes out (in: ignored). */
aqlm_status aqlm_search_ldl(uint16_t *codes, const aqlm_search *s, const int32_t *order, const float *feedback,
                            const float *metric);

/* Codebooks by preconditioned conjugate gradients on the normal equations, codes and scales fixed.
 * The error never rises. */
aqlm_status aqlm_update_codebooks(float *codebooks /* in and out */, const float *weight, const float *H,
                                  const uint16_t *codes, const float *scales, const aqlm_shape *shape,
                                  int64_t cg_steps);

/* scale_o = (w_o H q_o) / (q_o H q_o), q_o decoded without its scale; kept where q_o is zero. */
aqlm_status aqlm_update_scales(float *scales /* in and out */, const float *weight, const float *H,
                               const uint16_t *codes, const float *codebooks, const aqlm_shape *shape);

/* The paper's update (AQLM section 3.3): `steps` steps of Adam on codebooks and scales for the loss tr(D H D^T) / out,
 * betas (0, AQLM_ADAM_BETA2), AMSGrad. moments: second moments, then their largest, of codebooks and then scales;
 * zero before the first of steps_before + steps. In and out: codebooks, scales, moments. */
#define AQLM_ADAM_BETA2 0.95
#define AQLM_ADAM_EPS 1e-8
aqlm_status aqlm_update_adam(float *codebooks, float *scales, double *moments /* [2, K * E * g + out] */,
                             const float *weight, const float *H, const uint16_t *codes, const aqlm_shape *shape,
                             int64_t steps, double learning_rate, int64_t steps_before);

/* A step of Adam for a buffer of PV-Tuning (arXiv 2405.14852), gradients and moments in one pass: with t = step, from 1
 * on, first = beta1 first + (1 - beta1) G, second = beta2 second + (1 - beta2) G^2, G = gradient / divisor, buffer -=
 * learning_rate first / (1 - beta1^t) / (sqrt(second / (1 - beta2^t)) + AQLM_BUFFER_EPS). Moments are float, or bytes
 * where there are scales: of AQLM_MOMENTS_BLOCK values that follow each other first = scale byte (signed), second =
 * (scale byte)^4. No first moments are kept for beta1 = 0: first is NULL then. */
#define AQLM_BUFFER_EPS 1e-12 /* gradients to single weights are small */
#define AQLM_MOMENTS_BLOCK 256
typedef struct aqlm_buffer_moments {
    void *first, *second; /* [n] float; or int8, and uint8 */
    float *scales;        /* [2, blocks]: of the first and of the second, or NULL */
} aqlm_buffer_moments;
typedef struct aqlm_buffer_options {
    double divisor, learning_rate, beta1, beta2;
    int64_t step;
} aqlm_buffer_options;
aqlm_status aqlm_buffer_step(float *buffer /* [n] */, const aqlm_buffer_moments *moments,
                             const void *gradient /* [n] */, aqlm_dtype gradient_dtype, int64_t n,
                             const aqlm_buffer_options *options);

/* *error = tr(D H D^T), D = W - Wq; codes NULL means Wq = 0. */
aqlm_status aqlm_quantization_error(double *error, const float *weight, const float *H, const uint16_t *codes,
                                    const float *codebooks, const float *scales, const aqlm_shape *shape);

/* *error = D* of reverse water-filling at `rate` bits per weight for Gaussian weights of variance 1
 * per weight: sum_i min(theta, lambda_i) / sum_i lambda_i, so it is relative to the signal. */
aqlm_status aqlm_gaussian_reference(double *error, const double *eigenvalues, int64_t n, double rate);

#ifdef __cplusplus
}
#endif
#endif
