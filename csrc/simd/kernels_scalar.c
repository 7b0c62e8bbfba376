#include "simd.h"
#include "vec_scalar.h"
#include "tables_scalar.h"
#define AQLM_TABLE aqlm_kernels_scalar
#define AQLM_NAME "scalar"
#include "kernels.h"
