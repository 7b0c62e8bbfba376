#include "cuda/product/many_rows_launch.cuh"

namespace aqlm_cuda {

AQLM_TILES(__nv_bfloat16, 2, 8, 1, 2)

} // namespace aqlm_cuda
