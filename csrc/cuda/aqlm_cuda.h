/* aqlm_cuda.h: the verbs of aqlm.h on a GPU. Raw device pointers and a stream; no torch.
 *
 * Every launcher checks its sizes, enqueues on `stream` of the current device and returns at once; none allocates,
 * waits or keeps state but what it asked the driver about a device. Sums are fp32 in a fixed order: the same bits in
 * every run. Letters as in aqlm.h; all pointers of an aqlm_weight are device pointers, codes 16-byte aligned. */
#ifndef AQLM_CUDA_H
#define AQLM_CUDA_H

#include <cuda_runtime_api.h>

#include "aqlm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[n_rows, out] = x[n_rows, in] W^T + bias. */
typedef struct {
    void *y;
    aqlm_weight w;
    const void *bias; /* [out] or NULL */
} aqlm_product;

/* `count` products with one x; x, y and bias of dtype. Codes are read once for up to 8 rows (fp16 and bf16 of the
 * codebooks' dtype, g = 8, og = 1, K <= 4), else once for each. Two or three products are one launch if they go by
 * tables (one row, or the codes not read once; B <= 8) and their weights differ in `out` alone and have 64M codes at
 * most. workspace: of aqlm_cuda_matmul_workspace bytes, for which no pointer is looked at. */
cudaError_t aqlm_cuda_matmul(const aqlm_product *products, int64_t count, const void *x, aqlm_dtype dtype,
                             int64_t n_rows, void *workspace, cudaStream_t stream);
size_t aqlm_cuda_matmul_workspace(const aqlm_product *products, int64_t count, aqlm_dtype dtype, int64_t n_rows);

/* The most rows for which that is faster than decoding W and a dense product. */
int64_t aqlm_cuda_matmul_rows(const aqlm_weight *w, aqlm_dtype dtype);

/* rows[outs, groups * g] = W[first_out : first_out + outs, first_group * g : (first_group + groups) * g], of row_dtype.
 */
cudaError_t aqlm_cuda_decode_rows(void *rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t first_out,
                                  int64_t outs, int64_t first_group, int64_t groups, cudaStream_t stream);

/* The gradients of that from those to W, grad_rows[out, in] of row_dtype, codes held (aqlm_decode_rows_backward):
 * keys[O * J] = the codes of codebook k; with them sorted, and order[O * J] the places they come from,
 * grad_codebooks[k], of grad_codebooks[K, E, og, g]; grad_scales[O]. Both of w->dtype. */
cudaError_t aqlm_cuda_codes_of(int32_t *keys, const aqlm_weight *w, int64_t k, cudaStream_t stream);
cudaError_t aqlm_cuda_codebook_gradient(void *grad_codebooks, const int32_t *sorted, const int64_t *order,
                                        const void *grad_rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t k,
                                        cudaStream_t stream);
cudaError_t aqlm_cuda_scale_gradient(void *grad_scales, const void *grad_rows, aqlm_dtype row_dtype,
                                     const aqlm_weight *w, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
