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

/* How a product with W is made. The choice is aqlm_matmul_plan's (core/product/matmul.c has what was measured). */
typedef enum aqlm_path {
    AQLM_PATH_NONE = 0,     /* no rows, or no valid weight */
    AQLM_PATH_TILES,        /* tiles of W are decoded; fp32 sums in order, the same bits for any split of a batch */
    AQLM_PATH_TABLES_23BIT, /* codes look up products of x with the codebooks, rounded to 23 bits: below 1e-5 of |y| */
    AQLM_PATH_TABLES_16BIT, /* to 16 bits: 1e-4, 1e-3 at most */
    AQLM_PATH_GATHER,       /* the entries that codes name are multiplied where they lie */
    AQLM_PATH_BF16,         /* tiles of W rounded to bf16, multiplied by the CPU's bf16 instructions */
    AQLM_PATH_CALLER        /* the same by a product of the caller's: aqlm_matmul refuses it */
} aqlm_path;

typedef struct aqlm_plan {
    aqlm_path path;
    size_t workspace; /* bytes; with fewer, fewer threads are used, and below one thread's the plan is refused */
} aqlm_plan;

/* The plan for y[n_rows, out] = x[n_rows, in] W^T + bias, x of dtype, and for its gradient to x. It depends on
 * aqlm_set_exact and, in its bytes alone, on the number of threads. caller_has_bf16: the caller has a product of bf16
 * matrices that uses the CPU's bf16 instructions, as torch has, and multiplies by it where AQLM_PATH_CALLER says so. */
aqlm_plan aqlm_matmul_plan(const aqlm_weight *w, aqlm_dtype dtype, int64_t n_rows, bool caller_has_bf16);
aqlm_plan aqlm_matmul_backward_plan(const aqlm_weight *w, aqlm_dtype dtype, int64_t n_rows, bool caller_has_bf16);

/* y = x W^T + bias, all of dtype, by the plan of this weight, dtype and n_rows; W is never whole in memory.
 * workspace: plan->workspace bytes, 64-byte aligned. */
aqlm_status aqlm_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w,
                        const void *bias /* [out] or NULL */, int64_t n_rows, const aqlm_plan *plan, void *workspace);

/* Its gradient to x: grad_x[n_rows, in] = grad_y[n_rows, out] W, both of dtype. */
aqlm_status aqlm_matmul_backward(void *grad_x, const void *grad_y, aqlm_dtype dtype, const aqlm_weight *w,
                                 int64_t n_rows, const aqlm_plan *plan, void *workspace);

/* What plans allow. 1: AQLM_PATH_TILES alone; 0: tables of 16 bits for fp32 too; -1: of 23. At first -1, unless the
 * environment variable AQLM_C_EXACT is set: "0" is 0, anything else 1. */
void aqlm_set_exact(int choice);
int aqlm_get_exact(void);

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
