/* gemm.h: c[m, n] = a b on one thread, every sum over k in order (gemm.c). */
#ifndef AQLM_CORE_GEMM_H
#define AQLM_CORE_GEMM_H

#include <stdint.h>

/* Element (i, p) is at[i * row_step + p * col_step]. */
typedef struct aqlm_operand {
    const float *at;
    int64_t row_step, col_step;
} aqlm_operand;

int64_t aqlm_gemm_workspace(void); /* in floats */
void aqlm_gemm(float *c, int64_t ldc, aqlm_operand a, aqlm_operand b, int64_t m, int64_t n, int64_t k,
               float *workspace);

#endif
