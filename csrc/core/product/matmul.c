/* matmul.c: y = x W^T + b and its gradient to x. Which path a product takes is decided here and nowhere else: the
 * bindings ask for a plan and obey it. */
#include "aqlm/product.h"
#include "core/product/paths.h"
#include "core/product/stored.h"
#include "core/runtime/isa.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    MOST_ROWS_BY_CODES = 16, /* more are cheaper decoded than looked up or gathered */
    /* Fewer rows of bf16 are cheaper by tables of one or two codebooks, by those of more, or gathered. */
    LEAST_BF16_ROWS_FEW_TABLES = 17,
    LEAST_BF16_ROWS_TABLES = 12,
    LEAST_BF16_ROWS_GATHERED = 3,
    LEAST_CALLER_ROWS = 32 /* fewer are cheaper in fp32 than by a product of the caller's */
};

enum { NOT_ASKED = -2 };
static _Atomic int exact = NOT_ASKED;

void aqlm_set_exact(int choice) { exact = choice < 0 ? -1 : choice != 0; }

int aqlm_get_exact(void) {
    int choice = exact;
    if (choice == NOT_ASKED) { /* unless another thread chooses meanwhile */
        const char *wish = getenv("AQLM_C_EXACT");
        const int asked = wish && *wish ? strcmp(wish, "0") != 0 : -1;
        if (atomic_compare_exchange_strong(&exact, &choice, asked)) choice = asked;
    }
    return choice;
}

/* The instruction set chosen for the core has no say in this, so that results do not depend on it. */
static bool caller_is_faster(aqlm_dtype dtype, int64_t n_rows, bool caller_has_bf16) {
    return caller_has_bf16 && dtype == AQLM_BF16 && n_rows >= LEAST_CALLER_ROWS && aqlm_bf16_isa();
}

static int64_t least_bf16_rows(const aqlm_weight *w) {
    if (!aqlm_tables_fit(w)) return LEAST_BF16_ROWS_GATHERED;
    return w->shape.num_codebooks <= 2 ? LEAST_BF16_ROWS_FEW_TABLES : LEAST_BF16_ROWS_TABLES;
}

static aqlm_path path_of(const aqlm_weight *w, aqlm_dtype dtype, int64_t n_rows, bool caller_has_bf16) {
    if (aqlm_check_weight(w) || n_rows < 1) return AQLM_PATH_NONE;
    const int choice = aqlm_get_exact();
    if (choice > 0) return AQLM_PATH_TILES;
    if (aqlm_bf16_fits(w, dtype)) {
        if (n_rows >= least_bf16_rows(w)) return AQLM_PATH_BF16;
    } else if (caller_is_faster(dtype, n_rows, caller_has_bf16)) return AQLM_PATH_CALLER;
    if (n_rows > MOST_ROWS_BY_CODES) return AQLM_PATH_TILES;
    if (aqlm_tables_fit(w)) return dtype == AQLM_F32 && choice < 0 ? AQLM_PATH_TABLES_23BIT : AQLM_PATH_TABLES_16BIT;
    return aqlm_gather_fits(w) ? AQLM_PATH_GATHER : AQLM_PATH_TILES;
}

aqlm_plan aqlm_matmul_plan(const aqlm_weight *w, aqlm_dtype dtype, int64_t n_rows, bool caller_has_bf16) {
    aqlm_plan plan = {path_of(w, dtype, n_rows, caller_has_bf16), 0};
    switch (plan.path) {
    case AQLM_PATH_TILES: plan.workspace = aqlm_tiles_workspace(w, n_rows, false); break;
    case AQLM_PATH_TABLES_23BIT: plan.workspace = aqlm_tables_workspace(w, 23, n_rows); break;
    case AQLM_PATH_TABLES_16BIT: plan.workspace = aqlm_tables_workspace(w, 16, n_rows); break;
    case AQLM_PATH_GATHER: plan.workspace = aqlm_gather_workspace(w, n_rows); break;
    case AQLM_PATH_BF16: plan.workspace = aqlm_bf16_workspace(w, n_rows); break;
    case AQLM_PATH_CALLER:
    case AQLM_PATH_NONE: break;
    }
    return plan;
}

aqlm_plan aqlm_matmul_backward_plan(const aqlm_weight *w, aqlm_dtype dtype, int64_t n_rows, bool caller_has_bf16) {
    if (aqlm_check_weight(w) || n_rows < 1) return (aqlm_plan){AQLM_PATH_NONE, 0};
    if (aqlm_get_exact() <= 0 && caller_is_faster(dtype, n_rows, caller_has_bf16))
        return (aqlm_plan){AQLM_PATH_CALLER, 0};
    return (aqlm_plan){AQLM_PATH_TILES, aqlm_tiles_workspace(w, n_rows, true)};
}

aqlm_status aqlm_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                        int64_t n_rows, const aqlm_plan *plan, void *workspace) {
    if (aqlm_check_weight(w) || n_rows < 0) return AQLM_BAD_ARGUMENT;
    if (n_rows == 0) return AQLM_OK;
    const size_t size = plan->workspace;
    switch (plan->path) {
    case AQLM_PATH_TILES: return aqlm_tiles_matmul(y, x, dtype, w, bias, n_rows, false, workspace, size);
    case AQLM_PATH_TABLES_23BIT: return aqlm_tables_matmul(y, x, dtype, w, bias, 23, n_rows, workspace, size);
    case AQLM_PATH_TABLES_16BIT: return aqlm_tables_matmul(y, x, dtype, w, bias, 16, n_rows, workspace, size);
    case AQLM_PATH_GATHER: return aqlm_gather_matmul(y, x, dtype, w, bias, n_rows, workspace, size);
    case AQLM_PATH_BF16:
        if (!aqlm_bf16_fits(w, dtype)) return AQLM_BAD_ARGUMENT;
        return aqlm_bf16_matmul(y, x, w, bias, n_rows, workspace, size);
    case AQLM_PATH_CALLER:
    case AQLM_PATH_NONE: break;
    }
    return AQLM_BAD_ARGUMENT;
}

aqlm_status aqlm_matmul_backward(void *grad_x, const void *grad_y, aqlm_dtype dtype, const aqlm_weight *w,
                                 int64_t n_rows, const aqlm_plan *plan, void *workspace) {
    if (aqlm_check_weight(w) || n_rows < 0) return AQLM_BAD_ARGUMENT;
    if (n_rows == 0) return AQLM_OK;
    if (plan->path != AQLM_PATH_TILES) return AQLM_BAD_ARGUMENT;
    return aqlm_tiles_matmul(grad_x, grad_y, dtype, w, NULL, n_rows, true, workspace, plan->workspace);
}
