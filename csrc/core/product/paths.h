/* paths.h: what aqlm_matmul can do, one file a path: whether it can, the workspace it wants (less is used by fewer
 * threads), and the product itself. */
#ifndef AQLM_CORE_PATHS_H
#define AQLM_CORE_PATHS_H

#include "aqlm/product.h"

/* tiles.c: any weight. transposed: y = x W, without bias. */
size_t aqlm_tiles_workspace(const aqlm_weight *w, int64_t n_rows, bool transposed);
aqlm_status aqlm_tiles_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                              int64_t n_rows, bool transposed, void *workspace, size_t workspace_size);

/* tables.c: products of x with the codebooks rounded to 16 or 23 bits */
bool aqlm_tables_fit(const aqlm_weight *w);
size_t aqlm_tables_workspace(const aqlm_weight *w, int bits, int64_t n_rows);
aqlm_status aqlm_tables_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int bits, int64_t n_rows, void *workspace, size_t workspace_size);

/* gather.c: entries where they lie */
bool aqlm_gather_fits(const aqlm_weight *w);
size_t aqlm_gather_workspace(const aqlm_weight *w, int64_t n_rows);
aqlm_status aqlm_gather_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size);

/* bf16.c: rows of bf16, where the CPU has instructions for these */
bool aqlm_bf16_fits(const aqlm_weight *w, aqlm_dtype dtype);
size_t aqlm_bf16_workspace(const aqlm_weight *w, int64_t n_rows);
aqlm_status aqlm_bf16_matmul(void *y, const void *x, const aqlm_weight *w, const void *bias, int64_t n_rows,
                             void *workspace, size_t workspace_size);

#endif
