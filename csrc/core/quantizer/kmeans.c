/* kmeans.c: residual k-means, the start of AQLM (arXiv 2401.06118, section 3.1). */
#include "aqlm/quantizer.h"
#include "core/quantizer/working.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"
#include "core/runtime/rng.h"

#include <float.h>
#include <math.h>

enum {
    ROWS = 256,    /* rows assigned at once */
    POINTS = 4096, /* groups for each entry that a codebook is made of, in evenly spaced rows: of embeddings there are
                      many more. With 1024 the error after one pass of search was 2% larger. */
};

typedef struct error_rank {
    float error;
    int32_t point;
} error_rank;

typedef struct kmeans {
    float *residual;              /* [out, J, g], what the codebooks so far leave of w / scale */
    const float *weight_of;       /* [J, g] weight of each column's squared distance */
    const float *row_weight;      /* [out] scale^2, so that every group counts by its size in W */
    float *entries;               /* [E, g], the codebook being made */
    int32_t *assigned;            /* [J, out] */
    float *error;                 /* [J, out], weighted squared distance of each group to its entry */
    error_rank *rank;             /* [J * out], scratch */
    int64_t out, J, g, E, padded; /* out: rows that are looked at, */
    int64_t stride;               /* one of so many */
    bool uniform;                 /* weight_of is 1 everywhere: one weighted copy of the codebook serves all groups */
    aqlm_shared_status status;
} kmeans;

static const float *group_at(const kmeans *km, int64_t row, int64_t j) {
    return km->residual + (row * km->stride * km->J + j) * km->g;
}

static void prepare(kmeans *km, int64_t j, float *ct, float *norm) {
    const int64_t g = km->g, n = km->padded;
    for (int64_t i = 0; i < n; i++) {
        if (i >= km->E) {
            norm[i] = INFINITY;
            for (int64_t d = 0; d < g; d++) ct[d * n + i] = 0.0f;
            continue;
        }
        float square = 0.0f;
        for (int64_t d = 0; d < g; d++) {
            const float x = km->entries[i * g + d], w = km->weight_of[j * g + d];
            ct[d * n + i] = 2.0f * w * x;
            square += w * x * x;
        }
        norm[i] = square;
    }
}

/* Groups of one column block j at a time, so that all rows share its weighted copy of the codebook. */
static void assign(int64_t begin, int64_t end, void *ctx) {
    kmeans *km = ctx;
    const int64_t g = km->g, n = km->padded;
    float *scratch = aqlm_alloc((g + 1) * n + ROWS * (g + 1), sizeof *scratch);
    if (!scratch) {
        aqlm_set_status(&km->status, AQLM_NO_MEMORY);
        return;
    }
    float *ct = scratch, *norm = ct + g * n, *target = norm + n, *low = target + ROWS * g;
    int64_t prepared = -1;
    for (int64_t item = begin; item < end && !aqlm_cancelled(); item++) {
        const int64_t blocks = (km->out + ROWS - 1) / ROWS, j = item / blocks, r0 = item % blocks * ROWS;
        const int64_t rows = aqlm_min(ROWS, km->out - r0);
        if (prepared < 0 || (prepared != j && !km->uniform)) prepare(km, j, ct, norm);
        prepared = j;
        for (int64_t r = 0; r < rows; r++) memcpy(target + r * g, group_at(km, r0 + r, j), (size_t)g * sizeof *target);
        aqlm_isa()->nearest(km->assigned + j * km->out + r0, low, norm, ct, target, rows, g, n);
        for (int64_t r = 0; r < rows; r++) {
            float square = low[r];
            for (int64_t d = 0; d < g; d++) square += km->weight_of[j * g + d] * target[r * g + d] * target[r * g + d];
            km->error[j * km->out + r0 + r] = (square > 0.0f ? square : 0.0f) * km->row_weight[(r0 + r) * km->stride];
        }
    }
    free(scratch);
}

static aqlm_status run_assign(kmeans *km) {
    aqlm_parallel(0, km->J * ((km->out + ROWS - 1) / ROWS), 1, assign, km);
    return aqlm_get_status(&km->status);
}

/* Largest error first, then lowest index. */
static int by_error(const void *a, const void *b) {
    const error_rank *x = a, *y = b;
    if (x->error != y->error) return x->error > y->error ? -1 : 1;
    return x->point < y->point ? -1 : 1;
}

/* Weighted means of the members; entries without members move to the groups served worst so far. */
static void update_entries(kmeans *km, double *sum, double *mass) {
    const int64_t g = km->g, points = km->J * km->out;
    memset(sum, 0, (size_t)(km->E * g) * sizeof *sum);
    memset(mass, 0, (size_t)(km->E * g) * sizeof *mass);
    for (int64_t j = 0; j < km->J; j++)
        for (int64_t o = 0; o < km->out; o++) {
            const int64_t e = km->assigned[j * km->out + o];
            const float *x = group_at(km, o, j);
            for (int64_t d = 0; d < g; d++) {
                const double w = (double)km->weight_of[j * g + d] * km->row_weight[o * km->stride];
                sum[e * g + d] += w * x[d];
                mass[e * g + d] += w;
            }
        }
    int64_t next = -1; /* into rank, once it is sorted */
    for (int64_t e = 0; e < km->E; e++) {
        double total = 0.0;
        for (int64_t d = 0; d < g; d++) {
            total += mass[e * g + d];
            if (mass[e * g + d] > 0.0) km->entries[e * g + d] = (float)(sum[e * g + d] / mass[e * g + d]);
        }
        if (total > 0.0) continue;
        if (next < 0) {
            for (int64_t i = 0; i < points; i++) km->rank[i] = (error_rank){km->error[i], (int32_t)i};
            qsort(km->rank, (size_t)points, sizeof *km->rank, by_error);
            next = 0;
        }
        if (next == points || !(km->rank[next].error > 0.0f)) continue; /* every group is met exactly */
        const int64_t point = km->rank[next++].point;
        memcpy(km->entries + e * g, group_at(km, point % km->out, point / km->out), (size_t)g * sizeof *km->entries);
    }
}

static double total_error(const kmeans *km) {
    double sum = 0.0;
    for (int64_t i = 0; i < km->J * km->out; i++) sum += km->error[i];
    return sum;
}

/* Distinct groups drawn at random (Floyd's algorithm would need a set; a shuffled prefix is enough). */
static void seed_entries(kmeans *km, int32_t *order, aqlm_rng *rng) {
    const int64_t points = km->J * km->out;
    for (int64_t i = 0; i < points; i++) order[i] = (int32_t)i;
    for (int64_t e = 0; e < km->E; e++) {
        int64_t pick = e % points;
        if (e < points) {
            pick = e + aqlm_rng_below(rng, points - e);
            const int32_t t = order[e];
            order[e] = order[pick];
            order[pick] = t;
            pick = e;
        }
        memcpy(km->entries + e * km->g, group_at(km, order[pick] / km->J, order[pick] % km->J),
               (size_t)km->g * sizeof(float));
    }
}

aqlm_status aqlm_residual_kmeans(uint16_t *codes, float *codebooks, const float *weight, const float *scales,
                                 const float *column_weight, const aqlm_shape *s, int64_t init_max_iter,
                                 double tolerance, uint64_t seed) {
    aqlm_status status = aqlm_check_quantizer_shape(s);
    if (status || init_max_iter < 1 || !(tolerance >= 0.0)) return AQLM_BAD_ARGUMENT;
    const int64_t out = s->out_features, in = s->in_features, g = s->in_group_size, J = in / g, K = s->num_codebooks;
    const int64_t E = INT64_C(1) << s->nbits_per_codebook, padded = aqlm_round_up(E, AQLM_LANES), points = out * J;
    if (points > INT32_MAX) return AQLM_BAD_ARGUMENT;
    const int64_t stride = aqlm_max(1, points / (POINTS * E)), rows = (out + stride - 1) / stride;
    float *f = aqlm_alloc(out * in + in + out + points, sizeof *f);
    double *sum = aqlm_alloc(2 * E * g, sizeof *sum);
    int32_t *n = aqlm_alloc(2 * points, sizeof *n);
    error_rank *rank = aqlm_alloc(points, sizeof *rank);
    if (!f || !sum || !n || !rank) status = AQLM_NO_MEMORY;
    if (!status) {
        float *weight_of = f + out * in, *row_weight = weight_of + in;
        kmeans km = {.residual = f,
                     .weight_of = weight_of,
                     .row_weight = row_weight,
                     .assigned = n,
                     .error = row_weight + out,
                     .rank = rank,
                     .out = rows,
                     .stride = stride,
                     .J = J,
                     .g = g,
                     .E = E,
                     .padded = padded,
                     .uniform = column_weight == NULL,
                     .status = {AQLM_OK}};
        for (int64_t i = 0; i < in; i++) weight_of[i] = column_weight ? column_weight[i] : 1.0f;
        for (int64_t o = 0; o < out; o++) {
            const float inverse = fabsf(scales[o]) >= FLT_MIN ? 1.0f / scales[o] : 0.0f;
            row_weight[o] = scales[o] * scales[o];
            for (int64_t i = 0; i < in; i++) f[o * in + i] = weight[o * in + i] * inverse;
        }
        aqlm_rng rng = aqlm_rng_seed(seed);
        for (int64_t k = 0; k < K && !status; k++) {
            km.entries = codebooks + k * E * g;
            seed_entries(&km, n + points, &rng);
            if ((status = run_assign(&km))) break;
            double before = total_error(&km);
            for (int64_t round = 0; round < init_max_iter; round++) {
                update_entries(&km, sum, sum + E * g);
                if ((status = run_assign(&km))) break;
                const double after = total_error(&km);
                if (!(before - after > tolerance * before)) break;
                before = after;
            }
            if (stride > 1) {
                km.out = out, km.stride = 1;
                if ((status = run_assign(&km))) break;
                km.out = rows, km.stride = stride;
            }
            for (int64_t o = 0; o < out && !status; o++)
                for (int64_t j = 0; j < J; j++) {
                    const int32_t e = km.assigned[j * out + o];
                    codes[(o * J + j) * K + k] = (uint16_t)e;
                    for (int64_t d = 0; d < g; d++) f[o * in + j * g + d] -= km.entries[e * g + d];
                }
        }
    }
    free(f);
    free(sum);
    free(n);
    free(rank);
    return status;
}
