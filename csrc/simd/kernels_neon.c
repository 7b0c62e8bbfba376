#include "simd.h"
#include "vec_neon.h"
#include "tables_neon.h"
#define AQLM_TABLE aqlm_kernels_neon
#define AQLM_NAME "neon"
#include "kernels.h"
