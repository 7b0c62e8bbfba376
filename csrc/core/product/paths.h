/* paths.h: aqlm_matmul by other means than decoded tiles in fp32: when each fits, what it needs, and itself. */
#ifndef AQLM_CORE_PATHS_H
#define AQLM_CORE_PATHS_H

#include "aqlm/product.h"

/* tables.c: few rows by tables of partial products, where that is allowed and pays */
bool aqlm_tables_fit(const aqlm_shape *shape, int64_t n_rows);
size_t aqlm_tables_workspace(const aqlm_weight *w, int64_t n_rows); /* 0 where they do not fit */
aqlm_status aqlm_tables_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size);

/* gather.c: few rows by the entries themselves */
bool aqlm_gather_fits(const aqlm_weight *w, int64_t n_rows);
size_t aqlm_gather_workspace(const aqlm_weight *w, int64_t n_rows);
aqlm_status aqlm_gather_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size);

/* bf16.c: rows of bf16, where the CPU has instructions for it */
bool aqlm_bf16_fits(const aqlm_weight *w, aqlm_dtype dtype, int64_t n_rows);
size_t aqlm_bf16_workspace(const aqlm_weight *w, int64_t n_rows);
aqlm_status aqlm_bf16_matmul(void *y, const void *x, const aqlm_weight *w, const void *bias, int64_t n_rows,
                             void *workspace, size_t workspace_size);

#endif
