/* bf16.h: products of bfloat16 by the CPU's own instructions, apart from the table of simd.h: other instruction sets
 * have no counterpart with the same bits. */
#ifndef AQLM_BF16_H
#define AQLM_BF16_H

#include "simd.h"

enum {
    AQLM_BF16_PANEL = 16, /* outputs of a panel */
    AQLM_BF16_ROWS = 12   /* of x that are multiplied at once, at most */
};

/* Where the code of output o, group j and codebook k lies: at + o * output_step + (j * K + k) * code_step; `ahead`
 * bytes further, what this place among panels reads next. */
typedef struct aqlm_strided_codes {
    const uint8_t *at;
    int64_t output_step, code_step, ahead;
} aqlm_strided_codes;

typedef struct aqlm_bf16_kernels {
    /* panel [groups * 4, AQLM_BF16_PANEL, 2] = the sums of entries, rounded, of from->groups groups of g = 8 and
     * `outputs` outputs; beyond these it repeats the last. */
    void (*decode_panel)(uint16_t *panel, const aqlm_entries *from, const aqlm_strided_codes *codes, int64_t outputs);

    /* c[rows, 2 * AQLM_BF16_PANEL] = (if `more`, +=) x times two panels; x [pairs, rows, 2]. */
    void (*multiply)(float *c, int64_t ldc, const uint16_t *x, const uint16_t *panels, int64_t panel_step,
                     int64_t pairs, int64_t rows, int more);
} aqlm_bf16_kernels;

extern const aqlm_bf16_kernels aqlm_kernels_avx512bf16;

#endif
