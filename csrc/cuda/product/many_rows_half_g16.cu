#include "cuda/product/many_rows_launch.cuh"

namespace aqlm_cuda {

AQLM_TILES(__half, 1, 16, 1, 2, 3, 4)

} // namespace aqlm_cuda
