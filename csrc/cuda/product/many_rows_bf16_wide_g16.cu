#include "cuda/product/many_rows_launch.cuh"

namespace aqlm_cuda {

AQLM_TILES(__nv_bfloat16, 2, 16, 1)

} // namespace aqlm_cuda
