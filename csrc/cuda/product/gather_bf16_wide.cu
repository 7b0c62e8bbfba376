#include "cuda/product/gather.cuh"

template <>
cudaError_t aqlm_cuda::launch_gather<__nv_bfloat16, 2>(GatherWork &work, const GatherGrid &grid, int K, int G) {
    return launch_gather_wide<__nv_bfloat16>(work, grid, K, G);
}
