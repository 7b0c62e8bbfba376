/* working.h: working codes uint16_t [out, J, K], which the quantizer searches; og = 1 (working.c). */
#ifndef AQLM_CORE_WORKING_H
#define AQLM_CORE_WORKING_H

#include <stdint.h>

#include "aqlm/shape.h"
#include "aqlm/status.h"

#ifdef __cplusplus
extern "C" {
#endif

aqlm_status aqlm_check_quantizer_shape(const aqlm_shape *shape); /* a valid shape with og = 1 */
aqlm_status aqlm_check_working_codes(const uint16_t *codes, const aqlm_shape *shape);

/* q[end - begin, in]: rows begin..end without their scales. */
void aqlm_decode_working(float *q, const uint16_t *codes, const float *codebooks, const aqlm_shape *shape,
                         int64_t begin, int64_t end);

/* order[groups], then of each group the order of its codebooks [num_codebooks], of a sweep with this seed. */
void aqlm_sweep_order(int32_t *order, int64_t groups, int64_t num_codebooks, uint64_t seed);

#ifdef __cplusplus
}
#endif
#endif
