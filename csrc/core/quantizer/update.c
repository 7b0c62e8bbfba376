/* update.c: with the codes fixed, codebooks are linear least squares under H and scales are closed form
 * (docs/method.md); the paper takes steps of Adam on both. The normal equations are never formed: one product with
 * them, and one gradient, is decode, one matrix product with H, and a gather of each entry's members. */
#include "aqlm/quantizer.h"
#include "core/quantizer/small.h"
#include "core/quantizer/working.h"
#include "core/runtime/gemm.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

#include <math.h>

enum { ROWS = 128 };

typedef struct layer {
    const float *weight, *H, *scales, *codebooks;
    const uint16_t *codes;
    const aqlm_shape *shape;
    bool residual;    /* rows are W - s q (s q if weight is NULL), else q itself */
    float *product;   /* [out, in] rows times H, or NULL: not kept */
    double *row_sums; /* [out, 2]: <rows, rows H> and <W, rows H>, or NULL */
    aqlm_shared_status status;
} layer;

static void product_range(int64_t begin, int64_t end, void *ctx) {
    layer *l = ctx;
    const int64_t in = l->shape->in_features;
    float *memory = aqlm_alloc(2 * ROWS * in + aqlm_gemm_workspace(), sizeof *memory);
    if (!memory) {
        aqlm_set_status(&l->status, AQLM_NO_MEMORY);
        return;
    }
    for (int64_t r0 = begin; r0 < end && !aqlm_cancelled(); r0 += ROWS) {
        const int64_t n = aqlm_min(ROWS, end - r0);
        float *q = memory;
        float *p = l->product ? l->product + r0 * in : memory + ROWS * in;
        if (l->codes) aqlm_decode_working(q, l->codes, l->codebooks, l->shape, r0, r0 + n);
        else memset(q, 0, (size_t)(n * in) * sizeof *q);
        for (int64_t r = 0; r < n && l->residual; r++) {
            const float scale = l->scales ? l->scales[r0 + r] : 0.0f, *w = l->weight ? l->weight + (r0 + r) * in : NULL;
            for (int64_t i = 0; i < in; i++) q[r * in + i] = w ? w[i] - scale * q[r * in + i] : scale * q[r * in + i];
        }
        aqlm_gemm(p, in, (aqlm_operand){q, in, 1}, (aqlm_operand){l->H, in, 1}, n, in, in, memory + 2 * ROWS * in);
        for (int64_t r = 0; r < n && l->row_sums; r++) {
            double own = 0.0, cross = 0.0;
            const float *w = l->weight ? l->weight + (r0 + r) * in : NULL;
            for (int64_t i = 0; i < in; i++) {
                own += (double)q[r * in + i] * p[r * in + i];
                if (w) cross += (double)w[i] * p[r * in + i];
            }
            l->row_sums[2 * (r0 + r)] = own;
            l->row_sums[2 * (r0 + r) + 1] = cross;
        }
    }
    free(memory);
}

static aqlm_status product(layer *l) {
    const int64_t out = l->shape->out_features;
    aqlm_parallel(0, out, aqlm_even_grain(out, 16), product_range, l);
    return aqlm_get_status(&l->status);
}

static aqlm_status check(const uint16_t *codes, const aqlm_shape *shape) {
    aqlm_status status = aqlm_check_quantizer_shape(shape);
    return status ? status : aqlm_check_working_codes(codes, shape);
}

aqlm_status aqlm_quantization_error(double *error, const float *weight, const float *H, const uint16_t *codes,
                                    const float *codebooks, const float *scales, const aqlm_shape *shape) {
    aqlm_status status = codes ? check(codes, shape) : aqlm_check_quantizer_shape(shape);
    if (status) return status;
    double *sums = aqlm_alloc(2 * shape->out_features, sizeof *sums);
    if (!sums) return AQLM_NO_MEMORY;
    layer l = {weight, H, codes ? scales : NULL, codebooks, codes, shape, true, NULL, sums, {AQLM_OK}};
    status = product(&l);
    *error = 0.0;
    for (int64_t o = 0; o < shape->out_features && !status; o++) *error += sums[2 * o];
    free(sums);
    return status;
}

aqlm_status aqlm_update_scales(float *scales, const float *weight, const float *H, const uint16_t *codes,
                               const float *codebooks, const aqlm_shape *shape) {
    aqlm_status status = check(codes, shape);
    if (status) return status;
    double *sums = aqlm_alloc(2 * shape->out_features, sizeof *sums);
    if (!sums) return AQLM_NO_MEMORY;
    layer l = {weight, H, NULL, codebooks, codes, shape, false, NULL, sums, {AQLM_OK}};
    status = product(&l);
    for (int64_t o = 0; o < shape->out_features && !status; o++)
        if (sums[2 * o] > 0.0) {
            const float scale = (float)(sums[2 * o + 1] / sums[2 * o]);
            if (isfinite(scale)) scales[o] = scale;
        }
    free(sums);
    return status;
}

/* ---- codebooks by conjugate gradients ------------------------------------------------------------ */

typedef struct normal {
    const aqlm_shape *shape;
    const float *scales, *H, *product;
    const uint16_t *codes;
    const uint32_t *start;  /* [K * E + 1] into members */
    const uint32_t *member; /* positions o * J + j of each entry's members, ascending */
    double *gathered;       /* [K * E, g]: sum over members of s_o (rows H)_oj */
    double *factor;         /* [K * E, g, g]: Cholesky factors of sum over members of s_o^2 H_jj */
} normal;

/* Every entry sums its own members in order, so no result depends on the threads. */
static void gather_entries(int64_t begin, int64_t end, void *ctx) {
    const normal *n = ctx;
    const int64_t g = n->shape->in_group_size, J = n->shape->in_features / g;
    for (int64_t e = begin; e < end && !aqlm_cancelled(); e++) {
        double sum[32] = {0};
        for (uint32_t m = n->start[e]; m < n->start[e + 1]; m++) {
            const int64_t at = n->member[m];
            const double scale = n->scales[at / J];
            for (int64_t d = 0; d < g; d++) sum[d] += scale * n->product[at * g + d];
        }
        memcpy(n->gathered + e * g, sum, (size_t)g * sizeof *sum);
    }
}

static void factor_entries(int64_t begin, int64_t end, void *ctx) {
    const normal *n = ctx;
    const int64_t g = n->shape->in_group_size, J = n->shape->in_features / g, in = n->shape->in_features;
    double sum[32 * 32];
    for (int64_t e = begin; e < end && !aqlm_cancelled(); e++) {
        memset(sum, 0, (size_t)(g * g) * sizeof *sum);
        for (uint32_t m = n->start[e]; m < n->start[e + 1]; m++) {
            const int64_t o = n->member[m] / J, j = n->member[m] % J;
            const double square = (double)n->scales[o] * n->scales[o];
            const float *H = n->H + j * g * (in + 1);
            for (int64_t r = 0; r < g; r++)
                for (int64_t c = 0; c < g; c++) sum[r * g + c] += square * H[r * in + c];
        }
        double trace = 0.0;
        for (int64_t d = 0; d < g; d++) trace += sum[d * g + d];
        for (int64_t d = 0; d < g; d++) sum[d * g + d] += 1e-6 * trace / (double)g + 1e-30;
        if (!aqlm_cholesky_small(n->factor + e * g * g, sum, g)) n->factor[e * g * g] = 0.0; /* entry stays as it is */
    }
}

static double inner(const double *x, const double *y, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static void precondition(double *z, const double *r, const normal *n, int64_t entries, int64_t g) {
    for (int64_t e = 0; e < entries; e++) {
        const double *l = n->factor + e * g * g;
        if (l[0] > 0.0 && n->start[e + 1] > n->start[e]) aqlm_solve_small(z + e * g, l, r + e * g, g);
        else memset(z + e * g, 0, (size_t)g * sizeof *z);
    }
}

static void index_members(uint32_t *start, uint32_t *member, const uint16_t *codes, int64_t points, int64_t K,
                          int64_t E) {
    memset(start, 0, (size_t)(K * E + 1) * sizeof *start);
    for (int64_t i = 0; i < points; i++)
        for (int64_t k = 0; k < K; k++) start[k * E + codes[i * K + k] + 1]++;
    for (int64_t e = 0; e < K * E; e++) start[e + 1] += start[e];
    for (int64_t i = 0; i < points; i++)
        for (int64_t k = 0; k < K; k++) member[start[k * E + codes[i * K + k]]++] = (uint32_t)i;
    for (int64_t e = K * E; e > 0; e--) start[e] = start[e - 1];
    start[0] = 0;
}

aqlm_status aqlm_update_codebooks(float *codebooks, const float *weight, const float *H, const uint16_t *codes,
                                  const float *scales, const aqlm_shape *shape, int64_t cg_steps) {
    aqlm_status status = check(codes, shape);
    if (status || cg_steps < 0) return AQLM_BAD_ARGUMENT;
    const int64_t K = shape->num_codebooks, E = INT64_C(1) << shape->nbits_per_codebook, g = shape->in_group_size;
    const int64_t out = shape->out_features, in = shape->in_features, points = out * (in / g), n = K * E * g;
    if (points * K > UINT32_MAX) return AQLM_BAD_ARGUMENT;
    double *d = aqlm_alloc(5 * n + K * E * g * g, sizeof *d);
    float *f = aqlm_alloc(out * in + n, sizeof *f);
    uint32_t *index = aqlm_alloc(K * E + 1 + points * K, sizeof *index);
    if (d && f && index) {
        double *x = d, *r = x + n, *z = r + n, *p = z + n, *Ap = p + n;
        float *product_rows = f, *direction = f + out * in;
        index_members(index, index + K * E + 1, codes, points, K, E);
        normal eq = {shape, scales, H, product_rows, codes, index, index + K * E + 1, r, Ap + n};
        layer l = {weight, H, scales, codebooks, codes, shape, true, product_rows, NULL, {AQLM_OK}};
        status = product(&l);
        if (!status) {
            aqlm_parallel(0, K * E, 8, gather_entries, &eq);
            aqlm_parallel(0, K * E, 8, factor_entries, &eq);
            status = aqlm_get_status(&l.status);
        }
        for (int64_t i = 0; i < n; i++) x[i] = codebooks[i];
        l.weight = NULL; /* from here on: products with the normal matrix */
        l.codebooks = direction;
        eq.gathered = Ap;
        double rz = 0.0, first = 0.0;
        for (int64_t step = 0; step < cg_steps && !status; step++) {
            precondition(z, r, &eq, K * E, g);
            const double next = inner(r, z, n);
            if (step == 0) first = next;
            if (!(next > 1e-14 * first)) break;
            const double beta = step == 0 ? 0.0 : next / rz;
            rz = next;
            for (int64_t i = 0; i < n; i++) {
                p[i] = z[i] + (step == 0 ? 0.0 : beta * p[i]);
                direction[i] = (float)p[i];
            }
            if ((status = product(&l))) break;
            aqlm_parallel(0, K * E, 8, gather_entries, &eq);
            if ((status = aqlm_get_status(&l.status))) break;
            const double curve = inner(p, Ap, n);
            if (!(curve > 0.0)) break;
            const double alpha = rz / curve;
            for (int64_t i = 0; i < n; i++) {
                x[i] += alpha * p[i];
                r[i] -= alpha * Ap[i];
            }
        }
        for (int64_t i = 0; i < n && !status; i++) codebooks[i] = (float)x[i];
    } else status = AQLM_NO_MEMORY;
    free(d);
    free(f);
    free(index);
    return status;
}

/* ---- codebooks and scales by Adam ------------------------------------------------------------------ */

/* One step for one number; beta1 is 0, so the gradient is the direction. AMSGrad divides by the largest moment yet. */
static void adam(float *x, double *moment, double *most, double gradient, double learning_rate, double correction) {
    *moment = AQLM_ADAM_BETA2 * *moment + (1.0 - AQLM_ADAM_BETA2) * gradient * gradient;
    if (*moment > *most) *most = *moment;
    *x = (float)(*x - learning_rate * gradient / (sqrt(*most / correction) + AQLM_ADAM_EPS));
}

aqlm_status aqlm_update_adam(float *codebooks, float *scales, double *moments, const float *weight, const float *H,
                             const uint16_t *codes, const aqlm_shape *shape, int64_t steps, double learning_rate,
                             int64_t steps_before) {
    aqlm_status status = check(codes, shape);
    if (status || steps < 0 || steps_before < 0 || !(learning_rate >= 0.0)) return AQLM_BAD_ARGUMENT;
    const int64_t K = shape->num_codebooks, E = INT64_C(1) << shape->nbits_per_codebook,
                  n = K * E * shape->in_group_size;
    const int64_t out = shape->out_features, in = shape->in_features, points = out * (in / shape->in_group_size);
    if (points * K > UINT32_MAX) return AQLM_BAD_ARGUMENT;
    double *gathered = aqlm_alloc(n + 2 * out, sizeof *gathered), *row_sums = gathered + n, *most = moments + n + out;
    float *product_rows = aqlm_alloc(out * in, sizeof *product_rows);
    uint32_t *index = aqlm_alloc(K * E + 1 + points * K, sizeof *index);
    if (gathered && product_rows && index) {
        index_members(index, index + K * E + 1, codes, points, K, E);
        normal eq = {shape, scales, H, product_rows, codes, index, index + K * E + 1, gathered, NULL};
        layer l = {weight, H, scales, codebooks, codes, shape, true, product_rows, row_sums, {AQLM_OK}};
        for (int64_t step = 1; step <= steps; step++) {
            if ((status = product(&l))) break;
            aqlm_parallel(0, K * E, 8, gather_entries, &eq);
            if ((status = aqlm_get_status(&l.status))) break;
            const double correction = 1.0 - pow(AQLM_ADAM_BETA2, (double)(steps_before + step));
            const double factor = -2.0 / (double)out; /* of the loss tr(D H D^T) / out */
            for (int64_t i = 0; i < n; i++)
                adam(codebooks + i, moments + i, most + i, factor * gathered[i], learning_rate, correction);
            for (int64_t o = 0; o < out; o++) { /* <q, D H> = (<W, D H> - <D, D H>) / scale */
                const double cross = row_sums[2 * o + 1] - row_sums[2 * o];
                const double gradient = scales[o] != 0.0f ? factor * cross / scales[o] : 0.0;
                adam(scales + o, moments + n + o, most + n + o, gradient, learning_rate, correction);
            }
        }
    } else status = AQLM_NO_MEMORY;
    free(gathered);
    free(product_rows);
    free(index);
    return status;
}
