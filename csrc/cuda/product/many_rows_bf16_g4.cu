#include "cuda/product/many_rows_launch.cuh"

namespace aqlm_cuda {

AQLM_TILES(__nv_bfloat16, 1, 4, 1, 2, 3, 4)

} // namespace aqlm_cuda
