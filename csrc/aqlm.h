/* aqlm.h: the public interface of the C core. Plain C11; no Python, no torch.
 *
 * Letters used in every shape comment:
 *   out, in   out_features, in_features of the linear layer, W is [out, in]
 *   g, og     in_group_size, out_group_size; J = in / g groups along a row, O = out / og
 *   K, B, E   num_codebooks, nbits_per_codebook, E = 2^B entries in a codebook
 * Group (o, j) of W is scales[o] * sum_k codebooks[k, codes[o, j, k]]  (arXiv 2401.06118, section 3).
 *
 * Matrices are dense and row-major. Every function checks its sizes and returns a status; none of
 * them prints, exits, or keeps state. The process holds three pieces of state: the ISA table (dispatch.c), the
 * loop runner with its threads and poll function (parallel.c), on neither of which a result depends, and
 * aqlm_set_exact's choice (tables.c).
 */
#ifndef AQLM_H
#define AQLM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum aqlm_status {
    AQLM_OK = 0,
    AQLM_BAD_ARGUMENT, /* a size, flag or code is outside its documented range */
    AQLM_NO_MEMORY,
    AQLM_NOT_POSITIVE, /* H is not positive definite after damping, or holds NaN or Inf */
    AQLM_CANCELLED     /* the loop runner's poll function asked to stop */
} aqlm_status;

const char *aqlm_status_text(aqlm_status status);

typedef enum aqlm_dtype { AQLM_F32 = 0, AQLM_F16 = 1, AQLM_BF16 = 2 } aqlm_dtype;

typedef struct aqlm_shape {
    int64_t out_features, in_features;
    int64_t num_codebooks;      /* K, 1..8 */
    int64_t nbits_per_codebook; /* B, 1..16 */
    int64_t in_group_size;      /* g, 4, 8, 16 or 32; divides in_features */
    int64_t out_group_size;     /* og, >= 1; divides out_features */
} aqlm_shape;

/* NULL if the shape is valid, else one line that names the field and what was expected. */
const char *aqlm_check_shape(const aqlm_shape *shape);

/* ---- loop runner and ISA table (parallel.c, dispatch.c) ---------------------------------- */

typedef void (*aqlm_range_fn)(int64_t begin, int64_t end, void *ctx);

/* Cuts [begin, end) into pieces of at least `grain` and runs fn on each, perhaps on many threads. */
typedef void (*aqlm_parallel_fn)(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx);

/* NULL restores the built-in runner (threads of its own, aqlm_set_num_threads of them). */
void aqlm_set_parallel(aqlm_parallel_fn runner);
void aqlm_set_num_threads(int n); /* n < 1: as many as the process may use */
int aqlm_get_num_threads(void);

/* poll() is called now and then from the thread that called into the core, while the built-in runner runs its
 * loops; non-zero means stop, and the call returns AQLM_CANCELLED. */
void aqlm_set_poll(int (*poll)(void));

/* Names of ISAs: "scalar", "avx2", "avx512", "neon". NULL ends the list of those this CPU runs. */
const char *aqlm_get_isa(void);
const char *const *aqlm_available_isas(void);
aqlm_status aqlm_set_isa(const char *name); /* AQLM_BAD_ARGUMENT if this CPU cannot run it */

/* ---- the stored weight: decode, matmul and gradients (decode.c, matmul.c, gradient.c, pack.c) */

/* A quantized weight in the published AQLM layout, as it lies on disk, or packed. */
typedef struct aqlm_weight {
    aqlm_shape shape;
    const void *codes;     /* [O, J, K] int8_t if B <= 8 else int16_t; the low B bits are the code */
    const void *codebooks; /* [K, E, og, g] of dtype */
    const void *scales;    /* [O] of dtype */
    aqlm_dtype dtype;
    bool packed; /* codes [J, K, O] instead, which aqlm_matmul of few rows reads fastest; B <= 8 alone */
} aqlm_weight;

/* rows[end - begin, in] = W[begin:end], of row_dtype. */
aqlm_status aqlm_decode_rows(void *rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t begin, int64_t end);

/* y[n_rows, out] = x[n_rows, in] W^T + bias; x, y and bias of dtype; W is decoded tile by tile, never whole. Up to 16
 * rows do not decode it: with B <= 8, og = 1 and out >= 64 products of x with the codebooks are rounded, to 23 bits for
 * fp32 (an error below 1e-5 of |y| over the outputs) and to 16 bits for 16-bit floats (1e-4, 1e-3 at most), and looked
 * up (tables.c); otherwise entries are multiplied where they lie (gather.c). From 3 to 17 rows on, those of bf16 are
 * multiplied by the CPU's bf16 instructions, if it has them, with W rounded to bf16 (bfloat.c; g = 8, og = 1). See
 * aqlm_set_exact. workspace: 64-byte aligned, of workspace_size = aqlm_matmul_workspace(w, dtype, n_rows) bytes, which
 * depends on aqlm_set_exact and grows with the number of threads (a smaller one is used by fewer of them). */
size_t aqlm_matmul_workspace(const aqlm_weight *w, aqlm_dtype dtype, int64_t n_rows);
aqlm_status aqlm_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w,
                        const void *bias /* [out] or NULL */, int64_t n_rows, void *workspace, size_t workspace_size);

/* 1: W is decoded for any number of rows and sums run in order, so that no result depends on the split of a batch;
 * 0: tables of 16 bits for fp32 too; -1: of 23. At first -1, unless the environment variable AQLM_C_EXACT is set: "0"
 * is 0, anything else 1. */
void aqlm_set_exact(int choice);
int aqlm_get_exact(void);

/* The gradient of aqlm_matmul to x: grad_x[n_rows, in] = grad_y[n_rows, out] W, both of dtype; all else as there. */
size_t aqlm_matmul_backward_workspace(const aqlm_weight *w, int64_t n_rows);
aqlm_status aqlm_matmul_backward(void *grad_x, const void *grad_y, aqlm_dtype dtype, const aqlm_weight *w,
                                 int64_t n_rows, void *workspace, size_t workspace_size);

/* The gradients of aqlm_decode_rows from that to W, grad_rows[out, in] of row_dtype, codes held:
 * grad_codebooks[k, e] = sum of scales[o] * grad_rows(o, j) over the groups with codes[o, j, k] = e, and
 * grad_scales[o] = sum_j <grad_rows(o, j), sum_k codebooks[k, codes[o, j, k]]>. */
aqlm_status aqlm_decode_rows_backward(void *grad_codebooks /* [K, E, og, g] of w->dtype, or NULL */,
                                      void *grad_scales /* [O] of w->dtype, or NULL */, const void *grad_rows,
                                      aqlm_dtype row_dtype, const aqlm_weight *w);

/* Working codes are uint16_t [O, J, K] in 0..E-1; stored codes are the disk layout above.
 * Both return AQLM_BAD_ARGUMENT on the first code outside 0..E-1 (its flat index in *where). */
aqlm_status aqlm_pack_codes(void *stored, const uint16_t *codes, const aqlm_shape *shape, int64_t *where);
aqlm_status aqlm_unpack_codes(uint16_t *codes, const void *stored, const aqlm_shape *shape, int64_t *where);

/* ---- the quantizer (hessian.c, kmeans.c, search.c, update.c); og must be 1 ---------------- */

/* sum[in, in] += X^T X, X [n, in]; both triangles are written. */
aqlm_status aqlm_accumulate_hessian(double *sum, const float *x, int64_t n, int64_t in_features);

/* Block factor of H for sequential error feedback (method.md; GPTQ and LDLQ with g x g blocks).
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
