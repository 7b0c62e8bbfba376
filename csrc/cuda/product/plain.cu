/* plain.cu: products of every format and mix of dtypes: right rather than fast. */
#include "cuda/product/paths.cuh"

namespace aqlm_cuda {
namespace {

constexpr int WARPS = 8;

/* A warp sums one output of up to 8 rows, a lane every 32nd group. */
__global__ void plain_kernel(void *y, const void *x, const aqlm_weight w, const void *bias, const aqlm_dtype dtype,
                             const int n_rows) {
    const int64_t o = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (o >= w.shape.out_features) return;
    const int g = w.shape.in_group_size, og = w.shape.out_group_size;
    const int64_t in = w.shape.in_features, groups = in / g;
    float sums[MAX_ROWS] = {};
    for (int64_t j = threadIdx.x % 32; j < groups; j += 32) {
        float of_group[MAX_ROWS] = {}; /* long rows would lose bits in one sum */
        for (int i = 0; i < g; ++i) {
            const float value = weight_at(w, o / og, o % og, j, i);
#pragma unroll
            for (int n = 0; n < MAX_ROWS; ++n)
                if (n < n_rows) of_group[n] = fmaf(value, load_float(x, n * in + j * g + i, dtype), of_group[n]);
        }
#pragma unroll
        for (int n = 0; n < MAX_ROWS; ++n) sums[n] += of_group[n];
    }
#pragma unroll
    for (int n = 0; n < MAX_ROWS; ++n) {
        if (n >= n_rows) break;
        for (int distance = 16; distance; distance /= 2) sums[n] += __shfl_xor_sync(~0u, sums[n], distance);
        float total = sums[n] * load_float(w.scales, o / og, w.dtype);
        if (bias) total += load_float(bias, o, dtype);
        if (threadIdx.x % 32 == 0) store_float(y, n * w.shape.out_features + o, dtype, total);
    }
}

} // namespace

cudaError_t run_plain(const Launch &l) {
    const auto &[y, w, bias] = *l.products;
    const auto blocks = static_cast<unsigned>(divide_up(w.shape.out_features, WARPS));
    plain_kernel<<<blocks, 32 * WARPS, 0, l.stream>>>(y, l.x, w, bias, l.dtype, l.n_rows);
    return cudaGetLastError();
}

} // namespace aqlm_cuda
