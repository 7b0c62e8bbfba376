/* aqlm_cuda_quantizer.h: the quantizer's verbs (aqlm/quantizer.h) on a GPU. Raw device pointers and a stream; no torch.
 *
 * The same meaning as on a CPU and the same results up to rounding; the same bits in every run on one kind of GPU.
 * Launchers enqueue on `stream` of the current device; none allocates on the device or waits for it. Arguments are
 * checked by callers as the C core checks them; workspaces are 256-byte aligned. Letters as in aqlm.h. */
#ifndef AQLM_CUDA_QUANTIZER_H
#define AQLM_CUDA_QUANTIZER_H

#include <cuda_runtime_api.h>

#include "aqlm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- k-means */

/* aqlm_residual_kmeans: codes [out, J, K], codebooks [K, E, g]; column_weight [in] or NULL. The groups that start the
 * codebooks are drawn on the host, the same as on a CPU. cudaErrorInvalidValue where that says AQLM_BAD_ARGUMENT. */
size_t aqlm_cuda_kmeans_workspace(const aqlm_shape *shape);
cudaError_t aqlm_cuda_residual_kmeans(uint16_t *codes, float *codebooks, const float *weight, const float *scales,
                                      const float *column_weight, const aqlm_shape *shape, int64_t init_max_iter,
                                      double tolerance, uint64_t seed, void *workspace, cudaStream_t stream);

/* ---- hessian */

/* sum[in, in] += square, a product X^T X of fp32 of which the upper triangle is read; both triangles are written. */
cudaError_t aqlm_cuda_add_square(double *sum, const float *square /* [in, in] */, int64_t in_features,
                                 cudaStream_t stream);

/* sum[i] += product[i] of fp32, for i < n. */
cudaError_t aqlm_cuda_add_product(double *sum, const float *product, int64_t n, cudaStream_t stream);

/* aqlm_correct_weight in three steps, between which the caller factors and solves: damped[in, in] = H + relative_damp *
 * mean(diag H) I; turned[in, out] = product^T; corrected = weight + alpha solved^T, solved(i, o) at
 * solved[i * row_stride + o * column_stride]. */
cudaError_t aqlm_cuda_damp_hessian(double *damped, const float *H, double relative_damp, int64_t in_features,
                                   cudaStream_t stream);
cudaError_t aqlm_cuda_turn(double *turned, const float *product /* [out, in] */, int64_t out_features,
                           int64_t in_features, cudaStream_t stream);
cudaError_t aqlm_cuda_add_turned(float *corrected /* [out, in] */, const float *weight, const double *solved,
                                 int64_t row_stride, int64_t column_stride, double alpha, int64_t out_features,
                                 int64_t in_features, cudaStream_t stream);

/* aqlm_factor_hessian in three steps, with a Cholesky factorization of the caller's between the second and the third.
 * Groups by falling trace; *mean of the diagonal, which the caller must find positive and finite. */
size_t aqlm_cuda_order_groups_workspace(int64_t in_features, int64_t in_group_size);
cudaError_t aqlm_cuda_order_groups(int32_t *order /* [J] */, double *mean, const float *H /* [in, in] */,
                                   int64_t in_features, int64_t in_group_size, void *workspace, cudaStream_t stream);

/* permuted[in, in] = H with groups in reverse of `order`, + relative_damp * *mean on its diagonal; zero above it. */
cudaError_t aqlm_cuda_permute_hessian(double *permuted, const float *H, const int32_t *order, const double *mean,
                                      double relative_damp, int64_t in_features, int64_t in_group_size,
                                      cudaStream_t stream);

/* From the lower factor L of that, L(i, k) at lower[i * row_stride + k * column_stride], of which one is 1. */
cudaError_t aqlm_cuda_factor_blocks(float *feedback /* [in, in] */, float *metric /* [J, g, g] */, const double *lower,
                                    int64_t row_stride, int64_t column_stride, int64_t in_features,
                                    int64_t in_group_size, cudaStream_t stream);

/* ---- search */

/* s->weight, codebooks and scales are device pointers. Where no block of threads has enough shared memory for the
 * format, cudaErrorInvalidConfiguration. */
size_t aqlm_cuda_search_workspace(const aqlm_search *s);

/* aqlm_search_sweep: codes in and out, groups in the order that it has on a CPU. */
cudaError_t aqlm_cuda_search_sweep(uint16_t *codes, const aqlm_search *s, const float *H, void *workspace,
                                   cudaStream_t stream);

/* aqlm_search_ldl: codes out. */
cudaError_t aqlm_cuda_search_ldl(uint16_t *codes, const aqlm_search *s, const int32_t *order, const float *feedback,
                                 const float *metric, void *workspace, cudaStream_t stream);

/* ---- updates */

/* For any of the verbs below. */
size_t aqlm_cuda_update_workspace(const aqlm_shape *shape);

/* *outside = whether any working code is beyond its codebook. */
cudaError_t aqlm_cuda_check_codes(int32_t *outside, const uint16_t *codes, const aqlm_shape *shape,
                                  cudaStream_t stream);

cudaError_t aqlm_cuda_update_codebooks(float *codebooks, const float *weight, const float *H, const uint16_t *codes,
                                       const float *scales, const aqlm_shape *shape, int64_t cg_steps, void *workspace,
                                       cudaStream_t stream);
cudaError_t aqlm_cuda_update_scales(float *scales, const float *weight, const float *H, const uint16_t *codes,
                                    const float *codebooks, const aqlm_shape *shape, void *workspace,
                                    cudaStream_t stream);
cudaError_t aqlm_cuda_update_adam(float *codebooks, float *scales, double *moments, const float *weight, const float *H,
                                  const uint16_t *codes, const aqlm_shape *shape, int64_t steps, double learning_rate,
                                  int64_t steps_before, void *workspace, cudaStream_t stream);
/* aqlm_buffer_step, to the same bits; all pointers, those in `moments` too, are 16-byte aligned. */
cudaError_t aqlm_cuda_buffer_step(float *buffer, const aqlm_buffer_moments *moments, const void *gradient,
                                  aqlm_dtype gradient_dtype, int64_t n, const aqlm_buffer_options *options,
                                  cudaStream_t stream);

/* error: a device pointer */
cudaError_t aqlm_cuda_quantization_error(double *error, const float *weight, const float *H, const uint16_t *codes,
                                         const float *codebooks, const float *scales, const aqlm_shape *shape,
                                         void *workspace, cudaStream_t stream);

/* aqlm_pack_codes and aqlm_unpack_codes of n codes; *where, on the device: the first that is outside, or the largest
 * number. */
cudaError_t aqlm_cuda_pack_codes(void *stored, const uint16_t *codes, int64_t n, int64_t nbits_per_codebook,
                                 uint64_t *where, cudaStream_t stream);
cudaError_t aqlm_cuda_unpack_codes(uint16_t *codes, const void *stored, int64_t n, int64_t nbits_per_codebook,
                                   uint64_t *where, cudaStream_t stream);

/* ---- transforms */

/* aqlm_hadamard (aqlm/rounding.h). */
size_t aqlm_cuda_hadamard_workspace(int64_t rows, int64_t n);
cudaError_t aqlm_cuda_hadamard(float *y, const float *x, int64_t rows, int64_t n, bool inverse, void *workspace,
                               cudaStream_t stream);

/* square[in, in] = x^T x of floats x [n, in] */
cudaError_t aqlm_cuda_square(float *square, const float *x, int64_t n, int64_t in_features, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
