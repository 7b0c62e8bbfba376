/* transform.c: orthogonal transforms that make a weight incoherent: Hadamard matrices (QuIP#, arXiv 2402.04396, section
 * 3), and random orthogonal matrices (QuIP, 2307.13304, section 4). */
#include "aqlm/rounding.h"
#include "core/runtime/gemm.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"
#include "core/runtime/rng.h"

#include <math.h>

typedef struct hadamard_job {
    float *y;
    const float *x;
    int64_t order, factors[AQLM_HADAMARD_FACTORS], power;
    const int8_t *signs[AQLM_HADAMARD_FACTORS];
    int n_factors;
    bool inverse;
    aqlm_shared_status status;
} hadamard_job;

static void butterflies(float *y, int64_t n, int64_t power) {
    for (int64_t stride = 1; stride < power; stride *= 2)
        for (int64_t base = 0; base < n; base += 2 * stride)
            for (int64_t i = base; i < base + stride; i++) {
                const float a = y[i], b = y[i + stride];
                y[i] = a + b;
                y[i + stride] = a - b;
            }
}

static void multiply(float *to, const float *from, const int8_t *signs, int64_t n, int64_t p, int64_t stride,
                     bool inverse) {
    for (int64_t base = 0; base < n; base += p * stride)
        for (int64_t j = 0; j < p; j++) {
            float *out = to + base + j * stride;
            memset(out, 0, (size_t)stride * sizeof *out);
            for (int64_t k = 0; k < p; k++) {
                const float *in = from + base + k * stride;
                const float sign = signs[inverse ? k * p + j : j * p + k];
                for (int64_t i = 0; i < stride; i++) out[i] += sign * in[i];
            }
        }
}

static void hadamard_runs(int64_t begin, int64_t end, void *ctx) {
    hadamard_job *job = ctx;
    const int64_t n = job->order;
    float *scratch = aqlm_alloc(n, sizeof *scratch);
    if (!scratch) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    const float scale = (float)(1.0 / sqrt((double)n));
    for (int64_t run = begin; run < end && !aqlm_cancelled(); run++) {
        float *y = job->y + run * n;
        memcpy(y, job->x + run * n, (size_t)n * sizeof *y);
        butterflies(y, n, job->power);
        int64_t stride = job->power;
        for (int f = 0; f < job->n_factors; stride *= job->factors[f++]) {
            multiply(scratch, y, job->signs[f], n, job->factors[f], stride, job->inverse);
            memcpy(y, scratch, (size_t)n * sizeof *y);
        }
        for (int64_t i = 0; i < n; i++) y[i] *= scale;
    }
    free(scratch);
}

aqlm_status aqlm_hadamard(float *y, const float *x, int64_t rows, int64_t n, bool inverse) {
    if (rows < 1 || n < 1) return AQLM_BAD_ARGUMENT;
    hadamard_job job = {.y = y, .x = x, .order = aqlm_hadamard_order(n), .inverse = inverse, .status = {AQLM_OK}};
    job.n_factors = aqlm_hadamard_factors(job.order, job.factors);
    job.power = job.order;
    int8_t *signs[AQLM_HADAMARD_FACTORS] = {NULL};
    aqlm_status status = AQLM_OK;
    for (int f = 0; f < job.n_factors; f++) {
        const int64_t p = job.factors[f];
        job.power /= p;
        job.signs[f] = signs[f] = aqlm_alloc(p * p, 1);
        if (!status) status = signs[f] ? aqlm_paley(signs[f], p) : AQLM_NO_MEMORY;
    }
    if (!status) {
        aqlm_parallel(0, rows * (n / job.order), 4, hadamard_runs, &job);
        status = aqlm_get_status(&job.status);
    }
    for (int f = 0; f < job.n_factors; f++) free(signs[f]);
    return status;
}

/* ---- random orthogonal matrices ----------------------------------------------------------- */

/* Near a normal number: a sum of 12 uniform ones, which is the same on every machine. */
static double normal(aqlm_rng *rng) {
    double sum = -6.0;
    for (int i = 0; i < 12; i++) sum += (double)(aqlm_rng_next(rng) >> 11) * 0x1p-53;
    return sum;
}

static double dot(const double *a, const double *b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

aqlm_status aqlm_random_orthogonal(float *q, int64_t n, uint64_t seed) {
    if (n < 1 || n > 4096) return AQLM_BAD_ARGUMENT;
    double *a = aqlm_alloc(n * n, sizeof *a);
    if (!a) return AQLM_NO_MEMORY;
    aqlm_rng rng = aqlm_rng_seed(seed);
    for (int64_t i = 0; i < n; i++) {
        double *row = a + i * n, norm = 0.0;
        while (!(norm > 1e-3)) { /* a vector that the earlier ones span, almost never */
            for (int64_t k = 0; k < n; k++) row[k] = normal(&rng);
            for (int twice = 0; twice < 2; twice++)
                for (int64_t j = 0; j < i; j++) {
                    const double along = dot(row, a + j * n, n);
                    for (int64_t k = 0; k < n; k++) row[k] -= along * a[j * n + k];
                }
            norm = sqrt(dot(row, row, n));
        }
        for (int64_t k = 0; k < n; k++) row[k] /= norm;
    }
    for (int64_t i = 0; i < n * n; i++) q[i] = (float)a[i];
    free(a);
    return AQLM_OK;
}

typedef struct rotate_job {
    float *y;
    const float *x, *left, *right;
    int64_t p, q;
    aqlm_shared_status status;
} rotate_job;

static void rotate_rows(int64_t begin, int64_t end, void *ctx) {
    rotate_job *job = ctx;
    const int64_t p = job->p, q = job->q;
    float *half = aqlm_alloc(p * q + aqlm_gemm_workspace(), sizeof *half);
    if (!half) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    for (int64_t row = begin; row < end && !aqlm_cancelled(); row++) {
        const float *x = job->x + row * p * q;
        aqlm_gemm(half, q, (aqlm_operand){x, q, 1}, (aqlm_operand){job->right, q, 1}, p, q, q, half + p * q);
        aqlm_gemm(job->y + row * p * q, q, (aqlm_operand){job->left, 1, p}, (aqlm_operand){half, q, 1}, p, q, p,
                  half + p * q);
    }
    free(half);
}

aqlm_status aqlm_rotate(float *y, const float *x, const float *left, const float *right, int64_t rows, int64_t p,
                        int64_t q) {
    if (rows < 1 || p < 1 || q < 1) return AQLM_BAD_ARGUMENT;
    rotate_job job = {y, x, left, right, p, q, {AQLM_OK}};
    aqlm_parallel(0, rows, 1, rotate_rows, &job);
    return aqlm_get_status(&job.status);
}
