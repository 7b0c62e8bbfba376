#include "simd.h"
#include "vec_avx2.h"
#include "tables_avx2.h"
#define AQLM_TABLE aqlm_kernels_avx2
#define AQLM_NAME "avx2"
#include "kernels.h"
