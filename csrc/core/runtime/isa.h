/* isa.h: the kernels of the chosen instruction set (dispatch.c). */
#ifndef AQLM_CORE_ISA_H
#define AQLM_CORE_ISA_H

#include "simd/bf16.h"
#include "simd/simd.h"

/* It may change at any time (aqlm_set_isa). Kernels give the same bits on every ISA, but what make_tables and
 * make_short_tables lay out is read by table_sums of the same one alone: who calls both keeps the table of its call. */
const aqlm_kernels *aqlm_isa(void);
const aqlm_bf16_kernels *aqlm_bf16_isa(void); /* NULL: this CPU multiplies no bf16; aqlm_set_isa has no say in it */

#endif
