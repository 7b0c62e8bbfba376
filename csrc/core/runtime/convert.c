/* convert.c: float16 and bfloat16. */
#include "core/runtime/convert.h"
#include "core/runtime/isa.h"

size_t aqlm_dtype_size(aqlm_dtype dtype) { return dtype == AQLM_F32 ? 4 : 2; }
void aqlm_to_f32(float *to, const void *from, aqlm_dtype dtype, int64_t n) { aqlm_isa()->to_f32(to, from, dtype, n); }
void aqlm_from_f32(void *to, aqlm_dtype dtype, const float *from, int64_t n) {
    aqlm_isa()->from_f32(to, dtype, from, n);
}
