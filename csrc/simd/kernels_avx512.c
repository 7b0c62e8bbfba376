#include "simd.h"
#include "vec_avx512.h"
#include "tables_avx512.h"
#define AQLM_TABLE aqlm_kernels_avx512
#define AQLM_NAME "avx512"
#define AQLM_OWN_TABLES
#include "kernels.h"
