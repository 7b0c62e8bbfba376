/* small.h: dense algebra on g x g blocks in double, g <= 32 (small.c). */
#ifndef AQLM_CORE_SMALL_H
#define AQLM_CORE_SMALL_H

#include <stdbool.h>
#include <stdint.h>

bool aqlm_cholesky_small(double *l, const double *a, int64_t g); /* a = l l^T, l lower; false if not positive */
void aqlm_solve_small(double *x, const double *l, const double *b, int64_t g);
double aqlm_forward_square(const double *l, const double *b, int64_t g); /* b^T (l l^T)^-1 b */

#endif
