/* small.c: dense algebra on g x g blocks, in double. */
#include "core/quantizer/small.h"
#include <math.h>

bool aqlm_cholesky_small(double *l, const double *a, int64_t g) {
    for (int64_t i = 0; i < g; i++)
        for (int64_t j = 0; j <= i; j++) {
            double sum = a[i * g + j];
            for (int64_t p = 0; p < j; p++) sum -= l[i * g + p] * l[j * g + p];
            if (i == j) {
                if (!(sum > 0.0) || isinf(sum)) return false;
                l[i * g + i] = sqrt(sum);
            } else {
                l[i * g + j] = sum / l[j * g + j];
                l[j * g + i] = 0.0;
            }
        }
    return true;
}

static void forward(double *y, const double *l, const double *b, int64_t g) {
    for (int64_t i = 0; i < g; i++) {
        double sum = b[i];
        for (int64_t p = 0; p < i; p++) sum -= l[i * g + p] * y[p];
        y[i] = sum / l[i * g + i];
    }
}

void aqlm_solve_small(double *x, const double *l, const double *b, int64_t g) {
    forward(x, l, b, g);
    for (int64_t i = g - 1; i >= 0; i--) {
        double sum = x[i];
        for (int64_t p = i + 1; p < g; p++) sum -= l[p * g + i] * x[p];
        x[i] = sum / l[i * g + i];
    }
}

double aqlm_forward_square(const double *l, const double *b, int64_t g) {
    double y[32], square = 0.0;
    forward(y, l, b, g);
    for (int64_t i = 0; i < g; i++) square += y[i] * y[i];
    return square;
}
