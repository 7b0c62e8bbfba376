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

/* y[n_rows, out] = x[n_rows, in] W^T + bias; x, y and bias of dtype. Codes are read once for up to 8 rows (fp16 and
 * bf16 of the codebooks' dtype, g = 8, og = 1, K <= 4), else once for each. */
cudaError_t aqlm_cuda_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w,
                             const void *bias /* [out] or NULL */, int64_t n_rows, cudaStream_t stream);

/* rows[outs, groups * g] = W[first_out : first_out + outs, first_group * g : (first_group + groups) * g], of row_dtype.
 */
cudaError_t aqlm_cuda_decode_rows(void *rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t first_out,
                                  int64_t outs, int64_t first_group, int64_t groups, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
