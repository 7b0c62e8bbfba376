#include "cuda/product/many_rows_launch.cuh"

namespace aqlm_cuda {

AQLM_TILES(__half, 1, 32, 1, 2, 4)

} // namespace aqlm_cuda
