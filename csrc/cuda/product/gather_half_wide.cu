#include "cuda/product/gather.cuh"

template <> cudaError_t aqlm_cuda::launch_gather<__half, 2>(GatherWork &work, const GatherGrid &grid, int K, int G) {
    return launch_gather_wide<__half>(work, grid, K, G);
}
