/* sums.cuh: y from sums that other kernels left in a workspace. */
#ifndef AQLM_CUDA_PRODUCT_SUMS_CUH
#define AQLM_CUDA_PRODUCT_SUMS_CUH

#include "cuda/common.cuh"

namespace aqlm_cuda {

/* Kernels that make a row of y, from number `at` on, from what others left in a workspace: SUMMED outputs a block, and
 * each of its warps adds up a part of what there is, sum(warp, output). dtypes: only if T is float. */
constexpr int SUMMED = 32, SUM_WARPS = 8;

template <class T, class Problem, class Sum>
__device__ inline void finish_sums(const Problem &p, size_t at, const Sum &sum, aqlm_dtype dtype = AQLM_F32,
                                   aqlm_dtype weight_dtype = AQLM_F32) {
    const int warp = threadIdx.x / SUMMED, o = blockIdx.x * SUMMED + threadIdx.x % SUMMED;
    const bool finishes = warp == 0 && o < p.out;
    if constexpr (!std::is_same_v<T, float>)
        if (finishes) {
            prefetch(static_cast<const T *>(p.scales) + o);
            if (p.bias) prefetch(static_cast<const T *>(p.bias) + o);
        }
    wait_for_kernels_before();
    T scale(0.f), bias(0.f);
    if (finishes) scale = load_as<T>(p.scales, o, weight_dtype);
    if (finishes && p.bias) bias = load_as<T>(p.bias, o, dtype);
    __shared__ float parts[SUM_WARPS][SUMMED];
    float total = o < p.out ? sum(warp, o) : 0;
    parts[warp][threadIdx.x % SUMMED] = total;
    __syncthreads();
    if (!finishes) return;
    for (int other = 1; other < SUM_WARPS; ++other) total += parts[other][threadIdx.x];
    total = total * static_cast<float>(scale) + static_cast<float>(bias);
    store_as<T>(p.y, at + o, dtype, total);
}

} // namespace aqlm_cuda
#endif
