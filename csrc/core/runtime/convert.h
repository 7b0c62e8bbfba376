/* convert.h: between float and an aqlm_dtype, to nearest even (convert.c). */
#ifndef AQLM_CORE_CONVERT_H
#define AQLM_CORE_CONVERT_H

#include <stddef.h>
#include <stdint.h>

#include "aqlm/shape.h"

size_t aqlm_dtype_size(aqlm_dtype dtype);
void aqlm_to_f32(float *to, const void *from, aqlm_dtype dtype, int64_t n);
void aqlm_from_f32(void *to, aqlm_dtype dtype, const float *from, int64_t n);

#endif
