/* isa.h: the kernels of the chosen instruction set (dispatch.c). */
#ifndef AQLM_CORE_ISA_H
#define AQLM_CORE_ISA_H

#include "simd/bf16.h"
#include "simd/simd.h"

const aqlm_kernels *aqlm_isa(void);
const aqlm_bf16_kernels *aqlm_bf16_isa(void); /* NULL: this CPU multiplies no bf16; aqlm_set_isa has no say in it */

#endif
