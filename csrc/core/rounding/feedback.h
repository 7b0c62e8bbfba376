/* feedback.h: the walk over a row's columns that rounding with error feedback is (feedback.c). */
#ifndef AQLM_CORE_FEEDBACK_H
#define AQLM_CORE_FEEDBACK_H

#include <stdint.h>

#include "aqlm/status.h"

/* Rounds columns first..first + width of `order` of a row: values[width], what stands for targets[width], the weights
 * with the errors so far fed back. targets has `columns` in all, those of later columns of the block among them. */
typedef void (*aqlm_rounder)(void *ctx, int64_t row, int64_t first, const float *targets, int64_t columns,
                             float *values);

typedef struct aqlm_walk {
    const float *weight;   /* [out, in] */
    const int32_t *order;  /* [in / width], groups of columns */
    const float *feedback; /* [in, in] in `order`, or NULL */
    int64_t out, in, width;
    aqlm_rounder round;
    void *ctx;
} aqlm_walk;

/* Rows in panels, on many threads; the same bits on each. */
aqlm_status aqlm_walk_columns(const aqlm_walk *w);

#endif
