/* hadamard.cu: aqlm_hadamard on a GPU, the same bits: sums of two in the same tree, of a factor's row in its order. */
#include "cuda/aqlm_cuda_quantizer.h"
#include "cuda/common.cuh"
#include "cuda/launch.cuh"

#include "aqlm/rounding.h"

#include <cmath>
#include <vector>

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256, MOST_SHARED = 32768; /* floats of a run in shared memory */

/* Butterflies of all strides below `power`, of one run in each block of threads. */
__global__ void butterflies_kernel(float *y, const float *x, int power, float scale) {
    extern __shared__ float run[];
    const int64_t base = int64_t(blockIdx.x) * power;
    for (int i = threadIdx.x; i < power; i += blockDim.x) run[i] = x[base + i];
    __syncthreads();
    for (int stride = 1; stride < power; stride *= 2) {
        for (int pair = threadIdx.x; pair < power / 2; pair += blockDim.x) {
            const int at = pair / stride * 2 * stride + pair % stride;
            const float a = run[at], b = run[at + stride];
            run[at] = a + b;
            run[at + stride] = a - b;
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < power; i += blockDim.x) y[base + i] = run[i] * scale;
}

/* Those of one stride, in place, for runs that shared memory does not hold. */
__global__ void butterfly_kernel(float *y, int64_t pairs, int64_t stride, float scale) {
    const int64_t pair = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (pair >= pairs) return;
    float *at = y + pair / stride * 2 * stride + pair % stride;
    const float a = at[0], b = at[stride];
    at[0] = (a + b) * scale;
    at[stride] = (a - b) * scale;
}

/* y[j] = sum over k of signs[j, k] x[k] along an axis of p values `stride` apart; of signs[k, j] for the inverse. */
__global__ void factor_kernel(float *y, const float *x, const int8_t *signs, int64_t count, int p, int64_t stride,
                              bool inverse, float scale) {
    const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= count) return;
    const int j = static_cast<int>(at / stride % p);
    const float *from = x + (at - j * stride);
    float sum = 0.0f;
    for (int k = 0; k < p; ++k) sum += float(signs[inverse ? k * p + j : j * p + k]) * from[k * stride];
    y[at] = sum * scale;
}

unsigned blocks_of(int64_t count) { return static_cast<unsigned>(divide_up(count, THREADS)); }

cudaError_t butterflies(float *y, const float *x, int64_t count, int64_t power, float scale, cudaStream_t stream) {
    const int64_t shared = power < MOST_SHARED ? power : MOST_SHARED;
    const auto bytes = static_cast<int>(shared * sizeof(float));
    if (const cudaError_t error =
            cudaFuncSetAttribute(butterflies_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
        return error;
    const int threads = shared >= 1024 ? 512 : shared >= 64 ? static_cast<int>(shared / 2) : 32;
    butterflies_kernel<<<static_cast<unsigned>(count / shared), threads, bytes, stream>>>(
        y, x, static_cast<int>(shared), power == shared ? scale : 1.0f);
    for (int64_t stride = shared; stride < power; stride *= 2)
        butterfly_kernel<<<blocks_of(count / 2), THREADS, 0, stream>>>(y, count / 2, stride,
                                                                       2 * stride == power ? scale : 1.0f);
    return cudaGetLastError();
}

} // namespace
} // namespace aqlm_cuda

extern "C" size_t aqlm_cuda_hadamard_workspace(int64_t rows, int64_t n) {
    int64_t factors[AQLM_HADAMARD_FACTORS];
    const int n_factors = aqlm_hadamard_factors(aqlm_hadamard_order(n), factors);
    size_t bytes = n_factors ? size_t(rows * n) * sizeof(float) : 0;
    for (int f = 0; f < n_factors; ++f) bytes += size_t(factors[f] * factors[f]);
    return bytes;
}

extern "C" cudaError_t aqlm_cuda_hadamard(float *y, const float *x, int64_t rows, int64_t n, bool inverse,
                                          void *workspace, cudaStream_t stream) {
    using namespace aqlm_cuda;
    const int64_t order = aqlm_hadamard_order(n), count = rows * n;
    if (count == 0) return cudaSuccess;
    int64_t factors[AQLM_HADAMARD_FACTORS], power = order;
    const int n_factors = aqlm_hadamard_factors(order, factors);
    for (int f = 0; f < n_factors; ++f) power /= factors[f];
    const auto scale = static_cast<float>(1.0 / std::sqrt(double(order)));
    auto *other = static_cast<float *>(workspace);
    float *to = n_factors % 2 ? other : y; /* so that the last step writes y */
    cudaError_t error = butterflies(to, x, count, power, n_factors ? 1.0f : scale, stream);
    auto *signs = reinterpret_cast<int8_t *>(other + count);
    int64_t stride = power;
    for (int f = 0; f < n_factors && !error; ++f) {
        const int64_t p = factors[f];
        std::vector<int8_t> matrix(size_t(p * p));
        if (aqlm_paley(matrix.data(), p)) return cudaErrorInvalidValue;
        /* from pageable memory: copied before this returns */
        error = cudaMemcpyAsync(signs, matrix.data(), matrix.size(), cudaMemcpyHostToDevice, stream);
        if (error) break;
        const float *from = to;
        to = to == y ? other : y;
        factor_kernel<<<blocks_of(count), THREADS, 0, stream>>>(to, from, signs, count, static_cast<int>(p), stride,
                                                                inverse, f == n_factors - 1 ? scale : 1.0f);
        error = cudaGetLastError();
        signs += p * p;
        stride *= p;
    }
    return error;
}
