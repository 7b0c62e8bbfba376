#include "cuda/product/many_rows_launch.cuh"

namespace aqlm_cuda {

AQLM_TILES(__nv_bfloat16, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8)

} // namespace aqlm_cuda
