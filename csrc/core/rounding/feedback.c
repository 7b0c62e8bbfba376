/* feedback.c: rounding with error feedback. With H = R R^T in the order of the columns, the error tr(D H D^T) is
 * |D R|^2: column j is best rounded from w_j + sum_{i<j} d_i R_ij / R_jj, the errors d of those before it (QuIP, arXiv
 * 2307.13304, section 3; GPTQ gives the same, their theorem 6). Errors reach later blocks of columns as one product. */
#include "core/rounding/feedback.h"
#include "core/runtime/gemm.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

enum { ROWS = 16, COLUMNS = 128 };

typedef struct walk_job {
    const aqlm_walk *w;
    aqlm_shared_status status;
} walk_job;

/* targets[rows, columns] of the block: weights in `order` and what the errors before it send. */
static void aim(const aqlm_walk *w, float *targets, const float *errors, float *gemm, int64_t o0, int64_t rows,
                int64_t b0, int64_t columns) {
    if (w->feedback && b0)
        aqlm_gemm(targets, COLUMNS, (aqlm_operand){errors, w->in, 1}, (aqlm_operand){w->feedback + b0, w->in, 1}, rows,
                  columns, b0, gemm);
    else memset(targets, 0, (size_t)(ROWS * COLUMNS) * sizeof *targets);
    for (int64_t r = 0; r < rows; r++) {
        const float *from = w->weight + (o0 + r) * w->in;
        float *to = targets + r * COLUMNS;
        for (int64_t c = 0; c < columns; c++)
            to[c] += from[(int64_t)w->order[(b0 + c) / w->width] * w->width + (b0 + c) % w->width];
    }
}

static void walk_row(const aqlm_walk *w, float *targets, float *errors, int64_t row, int64_t b0, int64_t columns) {
    const int64_t width = w->width;
    float values[8];
    for (int64_t c = 0; c < columns; c += width) {
        w->round(w->ctx, row, b0 + c, targets + c, columns - c, values);
        for (int64_t i = 0; i < width; i++) {
            const int64_t at = (int64_t)w->order[(b0 + c) / width] * width + i;
            errors[b0 + c + i] = w->weight[row * w->in + at] - values[i];
        }
        for (int64_t i = 0; w->feedback && i < width; i++) {
            const float *send = w->feedback + (b0 + c + i) * w->in + b0, error = errors[b0 + c + i];
            for (int64_t later = c + width; later < columns; later++) targets[later] += error * send[later];
        }
    }
}

static void walk_panels(int64_t begin, int64_t end, void *ctx) {
    walk_job *job = ctx;
    const aqlm_walk *w = job->w;
    float *errors = aqlm_alloc(ROWS * w->in + ROWS * COLUMNS + aqlm_gemm_workspace(), sizeof *errors);
    if (!errors) {
        aqlm_set_status(&job->status, AQLM_NO_MEMORY);
        return;
    }
    float *targets = errors + ROWS * w->in, *gemm = targets + ROWS * COLUMNS;
    for (int64_t panel = begin; panel < end && !aqlm_cancelled(); panel++) {
        const int64_t o0 = panel * ROWS, rows = aqlm_min(ROWS, w->out - o0);
        for (int64_t b0 = 0; b0 < w->in; b0 += COLUMNS) {
            const int64_t columns = aqlm_min(COLUMNS, w->in - b0);
            aim(w, targets, errors, gemm, o0, rows, b0, columns);
            for (int64_t r = 0; r < rows; r++)
                walk_row(w, targets + r * COLUMNS, errors + r * w->in, o0 + r, b0, columns);
        }
    }
    free(errors);
}

aqlm_status aqlm_walk_columns(const aqlm_walk *w) {
    walk_job job = {w, {AQLM_OK}};
    aqlm_parallel(0, (w->out + ROWS - 1) / ROWS, 1, walk_panels, &job);
    return aqlm_get_status(&job.status);
}
