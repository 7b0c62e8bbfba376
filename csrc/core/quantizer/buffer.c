/* buffer.c: steps of Adam for the buffers of PV-Tuning. Blocks of moments are independent of each other, so results do
 * not depend on how they are shared out. */
#include "aqlm/quantizer.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

#include <math.h>

enum { BLOCK = AQLM_MOMENTS_BLOCK, LEAST = 16 }; /* fewer blocks are not worth a thread */
_Static_assert((int)BLOCK == (int)AQLM_MOMENTS, "the kernels' blocks are those of the interface");

typedef struct step_job {
    float *buffer;
    const aqlm_buffer_moments *moments;
    const void *gradient;
    aqlm_dtype dtype;
    int64_t n;
    aqlm_adam adam;
    const aqlm_kernels *isa;
} step_job;

static void step_bytes(const step_job *job, int64_t block, const float *gradient, int64_t n) {
    const aqlm_kernels *isa = job->isa;
    const int64_t at = block * BLOCK, blocks = (job->n + BLOCK - 1) / BLOCK;
    int8_t *first = job->moments->first;
    uint8_t *second = job->moments->second;
    float *scales = job->moments->scales, m[BLOCK], v[BLOCK];
    if (first) isa->load_first(m, first + at, scales[block], n);
    isa->load_second(v, second + at, scales[blocks + block], n);
    isa->adam(job->buffer + at, first ? m : NULL, v, gradient, n, &job->adam);
    if (first) scales[block] = isa->store_first(first + at, m, n);
    scales[blocks + block] = isa->store_second(second + at, v, n);
}

static void step_blocks(int64_t begin, int64_t end, void *ctx) {
    const step_job *job = ctx;
    float converted[BLOCK];
    for (int64_t block = begin; block < end && !aqlm_cancelled(); block++) {
        const int64_t at = block * BLOCK, n = aqlm_min(BLOCK, job->n - at);
        const float *gradient = converted;
        if (job->dtype == AQLM_F32) gradient = (const float *)job->gradient + at;
        else job->isa->to_f32(converted, (const uint16_t *)job->gradient + at, (int)job->dtype, n);
        if (job->moments->scales) step_bytes(job, block, gradient, n);
        else {
            float *first = job->moments->first, *second = job->moments->second;
            job->isa->adam(job->buffer + at, first ? first + at : NULL, second + at, gradient, n, &job->adam);
        }
    }
}

aqlm_status aqlm_buffer_step(float *buffer, const aqlm_buffer_moments *moments, const void *gradient, aqlm_dtype dtype,
                             int64_t n, const aqlm_buffer_options *options) {
    const double beta1 = options->beta1, beta2 = options->beta2;
    if (n < 0 || options->step < 1 || !(beta1 >= 0.0 && beta1 < 1.0) || !(beta2 >= 0.0 && beta2 < 1.0) ||
        (beta1 > 0.0 && !moments->first) || !(options->divisor > 0.0) || !(options->learning_rate >= 0.0))
        return AQLM_BAD_ARGUMENT;
    const double t = (double)options->step;
    const aqlm_adam adam = {(float)options->divisor,
                            (float)(1.0 - beta1),
                            (float)beta2,
                            (float)(1.0 - beta2),
                            (float)(options->learning_rate / (1.0 - pow(beta1, t))),
                            (float)sqrt(1.0 - pow(beta2, t)),
                            (float)AQLM_BUFFER_EPS};
    step_job job = {buffer, moments, gradient, dtype, n, adam, aqlm_isa()};
    aqlm_parallel(0, (n + BLOCK - 1) / BLOCK, LEAST, step_blocks, &job);
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}
