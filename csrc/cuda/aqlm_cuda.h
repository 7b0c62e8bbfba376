/* aqlm_cuda.h: the verbs of aqlm.h on a GPU. Raw device pointers and a stream; no torch.
 *
 * Plans check sizes. Launchers enqueue on `stream` of the current device and return at once; none allocates, waits or
 * keeps state but what it asked the driver about a device. Sums are fp32 in a fixed order: the same bits in
 * every run. Letters as in aqlm.h; all pointers of an aqlm_weight are device pointers, codes 16-byte aligned. */
#ifndef AQLM_CUDA_H
#define AQLM_CUDA_H

#include <cuda_runtime_api.h>

#include "aqlm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y[n_rows, out] = x[n_rows, in] W^T + bias, with an x that is given apart. */
typedef struct aqlm_product {
    void *y;
    aqlm_weight w;
    const void *bias; /* [out] or NULL */
} aqlm_product;

typedef enum aqlm_cuda_path {
    AQLM_CUDA_PLAIN,  /* every format and mix of dtypes */
    AQLM_CUDA_TABLES, /* products of x with the codebooks, looked up; codes are read for each row (B <= 8, og = 1) */
    AQLM_CUDA_GATHER, /* gathered entries; codes are read once for up to 8 rows (fp16 and bf16 of the codebooks' dtype,
                       * g = 8, og = 1, K <= 4) */
    AQLM_CUDA_SHARDS, /* the same for one row and a codebook that is cut among blocks (K = 1, B > 13) */
    AQLM_CUDA_TILES, /* many rows on Hopper GPUs: weights are decoded once into operands of matrix instructions, for all
                      * rows of a tile (fp16 and bf16 of the codebooks' dtype, og = 1); where AQLM_C_TILES is 1 */
    AQLM_CUDA_DENSE, /* many rows: the caller's, who decodes W slice by slice for dense products */
    AQLM_CUDA_SEPARATE /* several products that are no one launch: the caller's, who plans each by itself */
} aqlm_cuda_path;

typedef struct aqlm_cuda_cut {
    int32_t parts, slices_of_part; /* of a row; the last may have fewer slices */
    int32_t cluster_size, share;   /* blocks of a cluster; outputs that each finishes */
} aqlm_cuda_cut;

typedef struct aqlm_cuda_plan {
    aqlm_cuda_path path;      /* of 8 rows at a time, or of all if there are fewer */
    aqlm_cuda_path last_path; /* of the n_rows % 8 behind them: one row may go by tables where 8 are gathered */
    aqlm_cuda_cut cut;        /* of the work by tables (product/tables.cu) */
    int64_t slice_size;       /* dense: outputs of a slice of W; for aqlm_cuda_matmul_backward_plan groups */
    int32_t tile_rows;        /* tiles: rows of x of a tile */
    size_t workspace;         /* bytes that aqlm_cuda_matmul takes */
} aqlm_cuda_plan;

/* The plan of `count` products with one x of dtype, on the current device; no pointer is looked at. Callers and
 * launchers obey it and decide nothing. Two or three products of one row are one launch if they go by tables and their
 * weights differ in `out` alone and have 64M codes at most. */
cudaError_t aqlm_cuda_matmul_plan(aqlm_cuda_plan *plan, const aqlm_product *products, int64_t count, aqlm_dtype dtype,
                                  int64_t n_rows);

/* What is planned, unless it is the caller's; x, y and bias of dtype. */
cudaError_t aqlm_cuda_matmul(const aqlm_product *products, int64_t count, const void *x, aqlm_dtype dtype,
                             int64_t n_rows, const aqlm_cuda_plan *plan, void *workspace, cudaStream_t stream);

/* The plan of grad_x[n_rows, in] = grad_y[n_rows, out] W, for any number of rows. */
cudaError_t aqlm_cuda_matmul_backward_plan(aqlm_cuda_plan *plan, const aqlm_weight *w);

/* rows[outs, groups * g] = W[first_out : first_out + outs, first_group * g : (first_group + groups) * g], of row_dtype.
 */
cudaError_t aqlm_cuda_decode_rows(void *rows, aqlm_dtype row_dtype, const aqlm_weight *w, int64_t first_out,
                                  int64_t outs, int64_t first_group, int64_t groups, cudaStream_t stream);

/* How the gradients of that are summed: `pass` codebooks at a time in the shared memory of `warps` warps of `blocks`
 * blocks; pass 0: they are too large, and an index of the codes is needed. */
typedef struct aqlm_cuda_gradient_plan {
    int32_t pass, warps, blocks;
    size_t workspace; /* bytes that aqlm_cuda_decode_rows_backward takes */
} aqlm_cuda_gradient_plan;

cudaError_t aqlm_cuda_decode_rows_backward_plan(aqlm_cuda_gradient_plan *plan, const aqlm_weight *w);

/* The index of codes, [K, E + 1 + O * J], a codebook at a time: keys[O * J] are its codes; from these sorted, and
 * order[O * J], the places they come from, of equal keys in rising order. It holds for a code's groups until codes
 * change. */
cudaError_t aqlm_cuda_code_keys(int16_t *keys, const aqlm_weight *w, int64_t k, cudaStream_t stream);
cudaError_t aqlm_cuda_index_codes(int32_t *index, const int16_t *sorted, const int64_t *order, const aqlm_weight *w,
                                  int64_t k, cudaStream_t stream);

/* The gradients from those to W, grad_rows[out, in] of row_dtype, codes held (aqlm_decode_rows_backward):
 * grad_codebooks[K, E, og, g] and grad_scales[O] of w->dtype, each or NULL. index: NULL where the plan needs none. */
cudaError_t aqlm_cuda_decode_rows_backward(void *grad_codebooks, void *grad_scales, const void *grad_rows,
                                           aqlm_dtype row_dtype, const aqlm_weight *w, const int32_t *index,
                                           const aqlm_cuda_gradient_plan *plan, void *workspace, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
