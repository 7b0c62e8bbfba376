#include "cuda/product/many_rows_launch.cuh"

namespace aqlm_cuda {

AQLM_TILES(__half, 2, 16, 1)

} // namespace aqlm_cuda
