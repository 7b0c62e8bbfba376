/* decode_rows_backward.cu: gradients to codebooks and scales, codes held. Every sum has one fixed order. */
#include "cuda/common.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256;

/* The sum over the block of each thread's value, to thread 0. */
__device__ float block_sum(float value) {
    __shared__ float sums[THREADS / 32];
    for (int distance = 16; distance; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x > 0) return 0;
    for (int warp = 1; warp < THREADS / 32; ++warp) value += sums[warp];
    return value;
}

__global__ void keys_kernel(int32_t *keys, const aqlm_weight w, const int64_t k, const int64_t count) {
    const int64_t group = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (group < count)
        keys[group] = load_code(w.codes, group * w.shape.num_codebooks + k, w.shape.nbits_per_codebook > 8,
                                (1u << w.shape.nbits_per_codebook) - 1);
}

/* The first of n sorted keys that is not less than key. */
__device__ int64_t lower_bound(const int32_t *keys, int64_t n, int32_t key) {
    int64_t low = 0;
    while (low < n) {
        const int64_t middle = (low + n) / 2;
        if (keys[middle] < key) low = middle + 1;
        else n = middle;
    }
    return low;
}

/* grid [entries, og * g]: one number of one entry, over the groups that use it. */
__global__ void codebook_kernel(void *grad, const int32_t *sorted, const int64_t *order, const void *grad_rows,
                                const aqlm_dtype row_dtype, const aqlm_weight w, const int64_t k, const int64_t count) {
    const int64_t g = w.shape.in_group_size, groups = w.shape.in_features / g, og = w.shape.out_group_size;
    const int64_t entry = blockIdx.x, element = blockIdx.y;
    const int64_t begin = lower_bound(sorted, count, static_cast<int32_t>(entry));
    const int64_t end = lower_bound(sorted, count, static_cast<int32_t>(entry + 1));
    float sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
        const int64_t o = order[i] / groups, j = order[i] % groups;
        const size_t at = (o * og + element / g) * w.shape.in_features + j * g + element % g;
        sum = fmaf(load_float(w.scales, o, w.dtype), load_float(grad_rows, at, row_dtype), sum);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) store_float(grad, entry_at(w.shape, k, entry) + element, w.dtype, sum);
}

__global__ void scale_kernel(void *grad, const void *grad_rows, const aqlm_dtype row_dtype, const aqlm_weight w) {
    const int64_t g = w.shape.in_group_size, in = w.shape.in_features, og = w.shape.out_group_size, o = blockIdx.x;
    float sum = 0;
    for (int64_t at = threadIdx.x; at < og * in; at += THREADS) {
        const int64_t row = at / in, j = at % in / g, i = at % g;
        sum = fmaf(weight_at(w, o, row, j, i), load_float(grad_rows, (o * og + row) * in + j * g + i, row_dtype), sum);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) store_float(grad, o, w.dtype, sum);
}

int64_t groups_of(const aqlm_shape &s) { return s.out_features / s.out_group_size * (s.in_features / s.in_group_size); }

} // namespace
} // namespace aqlm_cuda

using namespace aqlm_cuda;

extern "C" cudaError_t aqlm_cuda_codes_of(int32_t *keys, const aqlm_weight *w, int64_t k, cudaStream_t stream) {
    const int64_t count = groups_of(w->shape);
    keys_kernel<<<static_cast<unsigned>(divide_up(count, THREADS)), THREADS, 0, stream>>>(keys, *w, k, count);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_codebook_gradient(void *grad_codebooks, const int32_t *sorted, const int64_t *order,
                                                   const void *grad_rows, aqlm_dtype row_dtype, const aqlm_weight *w,
                                                   int64_t k, cudaStream_t stream) {
    const dim3 grid(1u << w->shape.nbits_per_codebook,
                    static_cast<unsigned>(w->shape.out_group_size * w->shape.in_group_size));
    codebook_kernel<<<grid, THREADS, 0, stream>>>(grad_codebooks, sorted, order, grad_rows, row_dtype, *w, k,
                                                  groups_of(w->shape));
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_scale_gradient(void *grad_scales, const void *grad_rows, aqlm_dtype row_dtype,
                                                const aqlm_weight *w, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(w->shape.out_features / w->shape.out_group_size);
    scale_kernel<<<blocks, THREADS, 0, stream>>>(grad_scales, grad_rows, row_dtype, *w);
    return cudaGetLastError();
}
