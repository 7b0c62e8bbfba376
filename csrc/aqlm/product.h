/* product.h: the stored weight: its rows, products with it and their gradients (core/product). */
#ifndef AQLM_PRODUCT_H
#define AQLM_PRODUCT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "aqlm/shape.h"
#include "aqlm/status.h"

#ifdef __cplusplus
extern "C" {
#endif

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
 * multiplied by the CPU's bf16 instructions, if it has them, with W rounded to bf16 (bf16.c; g = 8, og = 1). See
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

#ifdef __cplusplus
}
#endif
#endif
