/* hessian.c: H from activations, its block factor for error feedback, and the Gaussian reference. */
#include "aqlm/quantizer.h"
#include "aqlm/rounding.h"
#include "core/runtime/gemm.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

#include <math.h>

enum { PANEL = 96, CHUNK = 1024 }; /* fp32 sums run over one chunk of rows, then go into the double */

typedef struct sum_job {
    double *sum;
    const float *x;
    int64_t n, in;
    aqlm_shared_status status;
} sum_job;

/* Panels of rows of the upper triangle, mirrored as they are added. */
static void sum_panels(int64_t begin, int64_t end, void *ctx) {
    sum_job *job = ctx;
    const int64_t in = job->in;
    float *tile = aqlm_alloc(PANEL * in + aqlm_gemm_workspace(), sizeof *tile);
    if (!tile) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    for (int64_t panel = begin; panel < end && !aqlm_cancelled(); panel++) {
        const int64_t i0 = panel * PANEL, rows = aqlm_min(PANEL, in - i0), cols = in - i0;
        aqlm_gemm(tile, cols, (aqlm_operand){job->x + i0, 1, in}, (aqlm_operand){job->x + i0, in, 1}, rows, cols,
                  job->n, tile + PANEL * in);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = i; j < cols; j++) {
                double *at = job->sum + (i0 + i) * in + i0 + j;
                *at += tile[i * cols + j];
                job->sum[(i0 + j) * in + i0 + i] = *at;
            }
    }
    free(tile);
}

aqlm_status aqlm_accumulate_hessian(double *sum, const float *x, int64_t n, int64_t in) {
    if (n < 0 || in < 1) return AQLM_BAD_ARGUMENT;
    for (int64_t done = 0; done < n; done += CHUNK) {
        sum_job job = {sum, x + done * in, aqlm_min(CHUNK, n - done), in, {AQLM_OK}};
        aqlm_parallel(0, (in + PANEL - 1) / PANEL, 1, sum_panels, &job);
        aqlm_status status = aqlm_get_status(&job.status);
        if (status) return status;
    }
    return AQLM_OK;
}

typedef struct product_job {
    double *sum;
    const float *x, *y;
    int64_t n, rows, columns;
    aqlm_shared_status status;
} product_job;

static void product_panels(int64_t begin, int64_t end, void *ctx) {
    product_job *job = ctx;
    const int64_t columns = job->columns;
    float *tile = aqlm_alloc(PANEL * columns + aqlm_gemm_workspace(), sizeof *tile);
    if (!tile) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    for (int64_t panel = begin; panel < end && !aqlm_cancelled(); panel++) {
        const int64_t i0 = panel * PANEL, rows = aqlm_min(PANEL, job->rows - i0);
        aqlm_gemm(tile, columns, (aqlm_operand){job->x + i0, 1, job->rows}, (aqlm_operand){job->y, columns, 1}, rows,
                  columns, job->n, tile + PANEL * columns);
        double *to = job->sum + i0 * columns;
        for (int64_t i = 0; i < rows * columns; i++) to[i] += tile[i];
    }
    free(tile);
}

aqlm_status aqlm_accumulate_product(double *sum, const float *x, const float *y, int64_t n, int64_t rows,
                                    int64_t columns) {
    if (n < 0 || rows < 1 || columns < 1) return AQLM_BAD_ARGUMENT;
    for (int64_t done = 0; done < n; done += CHUNK) {
        product_job job = {sum,  x + done * rows, y + done * columns, aqlm_min(CHUNK, n - done),
                           rows, columns,         {AQLM_OK}};
        aqlm_parallel(0, (rows + PANEL - 1) / PANEL, 1, product_panels, &job);
        aqlm_status status = aqlm_get_status(&job.status);
        if (status) return status;
    }
    return AQLM_OK;
}

/* ---- block factor ------------------------------------------------------------------------ */

static void sort_groups(int32_t *order, const double *trace, int64_t n) {
    for (int64_t i = 0; i < n; i++) order[i] = (int32_t)i;
    for (int64_t gap = n / 2; gap > 0; gap /= 2) /* Shell sort; ties keep the lower index by comparing it */
        for (int64_t i = gap; i < n; i++) {
            const int32_t moved = order[i];
            int64_t j = i;
            for (; j >= gap; j -= gap) {
                const int32_t other = order[j - gap];
                if (trace[other] > trace[moved] || (trace[other] == trace[moved] && other < moved)) break;
                order[j] = other;
            }
            order[j] = moved;
        }
}

/* a (lower triangle, row-major) = L L^T in place, left-looking by blocks; rows below a block run in parallel. */
typedef struct cholesky_job {
    double *a;
    int64_t n, b0, b1;
} cholesky_job;

static double dot4(const double *x, const double *y, int64_t n) {
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        s0 += x[i] * y[i];
        s1 += x[i + 1] * y[i + 1];
        s2 += x[i + 2] * y[i + 2];
        s3 += x[i + 3] * y[i + 3];
    }
    for (; i < n; i++) s0 += x[i] * y[i];
    return (s0 + s1) + (s2 + s3);
}

static void cholesky_rows(int64_t begin, int64_t end, void *ctx) {
    const cholesky_job *job = ctx;
    for (int64_t i = begin; i < end; i++) {
        double *row = job->a + i * job->n;
        for (int64_t j = job->b0; j < job->b1; j++) {
            const double *other = job->a + j * job->n;
            row[j] = (row[j] - dot4(row, other, j)) / other[j];
        }
    }
}

static aqlm_status cholesky(double *a, int64_t n) {
    enum { BLOCK = 64 };
    for (int64_t b0 = 0; b0 < n; b0 += BLOCK) {
        const int64_t b1 = aqlm_min(b0 + BLOCK, n);
        for (int64_t i = b0; i < b1; i++) {
            double *row = a + i * n;
            for (int64_t j = b0; j < i; j++) row[j] = (row[j] - dot4(row, a + j * n, j)) / a[j * n + j];
            const double pivot = row[i] - dot4(row, row, i);
            if (!(pivot > 0.0) || isinf(pivot)) return AQLM_NOT_POSITIVE;
            row[i] = sqrt(pivot);
        }
        cholesky_job job = {a, n, b0, b1};
        aqlm_parallel(b1, n, 16, cholesky_rows, &job);
        aqlm_shared_status status = {AQLM_OK};
        if (aqlm_get_status(&status)) return AQLM_CANCELLED;
    }
    return AQLM_OK;
}

typedef struct factor_job {
    const double *l; /* of the reversed matrix: R(i, j) = l(n - 1 - i, n - 1 - j) */
    float *feedback, *metric;
    int64_t n, g;
} factor_job;

static void feedback_columns(int64_t begin, int64_t end, void *ctx) {
    const factor_job *job = ctx;
    const int64_t n = job->n, g = job->g;
    double r[32 * 32];
    for (int64_t j = begin; j < end; j++) {
        const int64_t j0 = j * g;
#define R(i, k) job->l[(n - 1 - (i)) * n + n - 1 - (k)]
        for (int64_t i = 0; i < g; i++)
            for (int64_t k = 0; k < g; k++) r[i * g + k] = i <= k ? R(j0 + i, j0 + k) : 0.0;
        for (int64_t i = 0; i < g; i++)
            for (int64_t k = 0; k < g; k++) {
                double sum = 0.0;
                for (int64_t p = aqlm_max(i, k); p < g; p++) sum += r[i * g + p] * r[k * g + p];
                if (job->metric) job->metric[(j * g + i) * g + k] = (float)sum;
            }
        for (int64_t i = 0; i < n; i++) {
            float *to = job->feedback + i * n + j0;
            double x[32]; /* x r = R(i, block): forward substitution over the columns of upper r */
            for (int64_t k = 0; k < g; k++) {
                double sum = i < j0 ? R(i, j0 + k) : 0.0;
                for (int64_t p = 0; p < k; p++) sum -= x[p] * r[p * g + k];
                x[k] = sum / r[k * g + k];
                to[k] = (float)x[k];
            }
        }
#undef R
    }
}

/* metric: NULL where none is asked for. */
static aqlm_status factor(int32_t *order, float *feedback, float *metric, const float *H, int64_t in, int64_t g,
                          bool sorted, double relative_damp) {
    const int64_t groups = in / g;
    double *a = aqlm_alloc(in * in, sizeof *a), *trace = aqlm_alloc(groups, sizeof *trace);
    aqlm_status status = a && trace ? AQLM_OK : AQLM_NO_MEMORY;
    if (!status) {
        double mean = 0.0;
        for (int64_t j = 0; j < groups; j++) {
            trace[j] = 0.0;
            for (int64_t d = j * g; d < (j + 1) * g; d++) trace[j] += H[d * in + d];
            mean += trace[j] / (double)in;
        }
        if (!(mean > 0.0) || isinf(mean)) status = AQLM_NOT_POSITIVE;
        if (sorted) sort_groups(order, trace, groups);
        else
            for (int64_t j = 0; j < groups; j++) order[j] = (int32_t)j;
        /* With groups in reverse, the Cholesky factor of H read backwards is the upper factor R with H = R R^T: metric
         * R_jj R_jj^T, feedback R_ij R_jj^-1. No inverse of H is formed. */
        for (int64_t i = 0; i < in; i++) {
            const int64_t pi = in - 1 - i, hi = order[pi / g] * g + pi % g;
            for (int64_t j = 0; j <= i; j++) {
                const int64_t pj = in - 1 - j, hj = order[pj / g] * g + pj % g;
                a[i * in + j] = H[hi * in + hj];
            }
            a[i * in + i] += relative_damp * mean;
        }
    }
    if (!status) status = cholesky(a, in);
    if (!status) {
        factor_job job = {a, feedback, metric, in, g};
        aqlm_parallel(0, groups, 1, feedback_columns, &job);
        aqlm_shared_status shared = {AQLM_OK};
        status = aqlm_get_status(&shared);
    }
    free(a);
    free(trace);
    return status;
}

aqlm_status aqlm_factor_hessian(int32_t *order, float *feedback, float *metric, const float *H, int64_t in, int64_t g,
                                double relative_damp) {
    const aqlm_shape shape = {1, in, 1, 1, g, 1};
    if (aqlm_check_shape(&shape) || !(relative_damp >= 0.0)) return AQLM_BAD_ARGUMENT;
    return factor(order, feedback, metric, H, in, g, true, relative_damp);
}

aqlm_status aqlm_factor_columns(int32_t *order, float *feedback, const float *H, int64_t in, bool sorted,
                                double relative_damp) {
    if (in < 1 || in > INT32_MAX || !(relative_damp >= 0.0)) return AQLM_BAD_ARGUMENT;
    return factor(order, feedback, NULL, H, in, 1, sorted, relative_damp);
}

/* ---- correction of the inputs' error ------------------------------------------------------ */

typedef struct correct_job {
    float *corrected;
    const float *weight, *cross;
    const double *l; /* lower factor of damped H */
    int64_t out, in;
    double alpha;
    aqlm_shared_status status;
} correct_job;

enum { SOLVED = 16 }; /* rows that are solved for beside each other: each row of the factor is read once for all */

static void correct_rows(int64_t begin, int64_t end, void *ctx) {
    correct_job *job = ctx;
    const int64_t in = job->in;
    float *product = aqlm_alloc(SOLVED * in + aqlm_gemm_workspace(), sizeof *product);
    double *z = aqlm_alloc(SOLVED * in, sizeof *z);
    if (!product || !z) aqlm_set_status(&job->status, AQLM_NO_MEMORY);
    for (int64_t panel = begin; product && z && panel < end && !aqlm_cancelled(); panel++) {
        const int64_t o0 = panel * SOLVED, rows = aqlm_min(SOLVED, job->out - o0);
        const float *weight = job->weight + o0 * in;
        aqlm_gemm(product, in, (aqlm_operand){weight, in, 1}, (aqlm_operand){job->cross, in, 1}, rows, in, in,
                  product + SOLVED * in);
        for (int64_t i = 0; i < in; i++)
            for (int64_t r = 0; r < rows; r++)
                z[r * in + i] = (product[r * in + i] - dot4(job->l + i * in, z + r * in, i)) / job->l[i * in + i];
        for (int64_t i = in - 1; i >= 0; i--) {
            const double *row = job->l + i * in;
            for (int64_t r = 0; r < rows; r++) {
                double *to = z + r * in;
                const double value = to[i] /= row[i];
                for (int64_t j = 0; j < i; j++) to[j] -= row[j] * value;
            }
        }
        for (int64_t i = 0; i < rows * in; i++) job->corrected[o0 * in + i] = (float)(weight[i] + job->alpha * z[i]);
    }
    free(product);
    free(z);
}

aqlm_status aqlm_correct_weight(float *corrected, const float *weight, const float *cross, const float *H, int64_t out,
                                int64_t in, double alpha, double relative_damp) {
    if (out < 1 || in < 1 || !(relative_damp >= 0.0)) return AQLM_BAD_ARGUMENT;
    double *a = aqlm_alloc(in * in, sizeof *a), mean = 0.0;
    if (!a) return AQLM_NO_MEMORY;
    for (int64_t i = 0; i < in; i++) mean += H[i * in + i] / (double)in;
    for (int64_t i = 0; i < in; i++) {
        for (int64_t j = 0; j <= i; j++) a[i * in + j] = H[i * in + j];
        a[i * in + i] += relative_damp * mean;
    }
    aqlm_status status = cholesky(a, in);
    if (!status) {
        correct_job job = {corrected, weight, cross, a, out, in, alpha, {AQLM_OK}};
        aqlm_parallel(0, (out + SOLVED - 1) / SOLVED, 1, correct_rows, &job);
        status = aqlm_get_status(&job.status);
    }
    free(a);
    return status;
}

aqlm_status aqlm_gaussian_reference(double *error, const double *eigenvalues, int64_t n, double rate) {
    if (n < 1 || !(rate >= 0.0)) return AQLM_BAD_ARGUMENT;
    double most = 0.0, sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(eigenvalues[i])) return AQLM_NOT_POSITIVE;
        most = eigenvalues[i] > most ? eigenvalues[i] : most;
        sum += eigenvalues[i] > 0.0 ? eigenvalues[i] : 0.0;
    }
    if (!(sum > 0.0)) return AQLM_NOT_POSITIVE;
    /* Bisect log(theta): the rate 1/n sum max(0, log2(lambda / theta) / 2) falls as theta grows. */
    double low = log(most) - 2.0 * rate * (double)n * log(2.0) - 1.0, high = log(most);
    for (int i = 0; i < 200; i++) {
        const double middle = 0.5 * (low + high);
        double bits = 0.0;
        for (int64_t k = 0; k < n; k++)
            if (eigenvalues[k] > 0.0 && log(eigenvalues[k]) > middle) bits += (log(eigenvalues[k]) - middle) / log(4.0);
        if (bits > rate * (double)n) low = middle;
        else high = middle;
    }
    const double theta = exp(0.5 * (low + high));
    double kept = 0.0;
    for (int64_t i = 0; i < n; i++)
        if (eigenvalues[i] > 0.0) kept += eigenvalues[i] < theta ? eigenvalues[i] : theta;
    *error = kept / sum;
    return AQLM_OK;
}
