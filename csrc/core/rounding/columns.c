/* columns.c: single columns to uniform grids of their groups. */
#include "aqlm/rounding.h"
#include "core/rounding/feedback.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

#include <math.h>

enum { SHRINKS = 32 };        /* grids that are tried: extents from the whole one */
#define SHRINK (1.0f / 40.0f) /* down in steps of this */

typedef struct columns {
    const aqlm_columns *c;
    uint8_t *codes;
    float *scales, *zeros;
} columns;

/* 11 significant bits, as float16 has them: to nearest, ties away from zero. */
static float shortened(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + UINT32_C(0x1000)) & ~UINT32_C(0x1fff);
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float nearest_code(float x, float scale, float zero, float most) {
    if (!(scale > 0.0f)) return zero;
    const float code = floorf(x / scale + zero + 0.5f);
    return code < 0.0f ? 0.0f : code > most ? most : code;
}

static float squared_error(const float *x, int64_t n, float scale, float zero, float most) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        const float d = x[i] - scale * (nearest_code(x[i], scale, zero, most) - zero);
        sum += d * d;
    }
    return sum;
}

/* The grid of least squared error for x[n] among those shrunk from its extent. */
static void find_grid(const aqlm_columns *c, const float *x, int64_t n, float *scale, float *zero) {
    const float most = (float)((1 << c->bits) - 1), middle = 0.5f * most;
    float low = 0.0f, high = 0.0f, least = INFINITY;
    for (int64_t i = 0; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    const bool symmetric = c->grid == AQLM_GRID_SYMMETRIC;
    const float extent = high > -low ? high : -low, width = symmetric ? 2.0f * extent : high - low;
    *scale = 0.0f;
    *zero = symmetric ? middle : 0.0f;
    if (!(width > 0.0f)) return;
    for (int i = 0; i < SHRINKS; i++) {
        const float s = shortened(width * (1.0f - (float)i * SHRINK) / most);
        if (!(s > 0.0f)) break;
        const float shrunk = low * (1.0f - (float)i * SHRINK);
        const float z = symmetric ? middle : nearest_code(-shrunk, s, 0.0f, most);
        const float error = squared_error(x, n, s, z, most);
        if (error < least) {
            least = error;
            *scale = s;
            *zero = z;
        }
    }
}

static void round_column(void *ctx, int64_t row, int64_t first, const float *targets, int64_t left, float *values) {
    const columns *all = ctx;
    const aqlm_columns *c = all->c;
    const int64_t column = c->order[first], group = column / c->group_size;
    const int64_t at = row * (c->in_features / c->group_size) + group;
    if (c->grid != AQLM_GRID_GIVEN && c->at_start && column % c->group_size == 0 && left >= c->group_size)
        find_grid(c, targets, c->group_size, all->scales + at, all->zeros + at);
    const float scale = all->scales[at], zero = all->zeros[at];
    const float code = nearest_code(targets[0], scale, zero, (float)((1 << c->bits) - 1));
    all->codes[row * c->in_features + column] = (uint8_t)code;
    values[0] = scale * (code - zero);
}

static void find_grids(int64_t begin, int64_t end, void *ctx) {
    const columns *all = ctx;
    const aqlm_columns *c = all->c;
    const int64_t groups = c->in_features / c->group_size;
    for (int64_t i = begin; i < end; i++)
        find_grid(c, c->weight + i / groups * c->in_features + i % groups * c->group_size, c->group_size,
                  all->scales + i, all->zeros + i);
}

aqlm_status aqlm_round_columns(uint8_t *codes, float *scales, float *zeros, const aqlm_columns *c) {
    if (c->out_features < 1 || c->in_features < 1 || c->group_size < 1 || c->in_features % c->group_size ||
        c->bits < 1 || c->bits > 8)
        return AQLM_BAD_ARGUMENT;
    columns all = {c, codes, scales, zeros};
    if (c->grid != AQLM_GRID_GIVEN) /* also those that at_start finds anew */
        aqlm_parallel(0, c->out_features * (c->in_features / c->group_size), 64, find_grids, &all);
    const aqlm_walk walk = {c->weight, c->order, c->feedback, c->out_features, c->in_features, 1, round_column, &all};
    return aqlm_walk_columns(&walk);
}
