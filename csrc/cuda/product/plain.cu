/* plain.cu: products of every format and mix of dtypes: right rather than fast. */
#include "cuda/product/paths.cuh"

namespace aqlm_cuda {
namespace {

constexpr int WARPS = 8;

/* The weight that comes `index` weights of this shape behind w. */
__device__ aqlm_weight weight_behind(aqlm_weight w, int64_t index) {
    const aqlm_shape &s = w.shape;
    const int64_t codes = s.out_features / s.out_group_size * (s.in_features / s.in_group_size) * s.num_codebooks;
    const int64_t numbers = entry_at(s, s.num_codebooks, 0), number_bytes = w.dtype == AQLM_F32 ? 4 : 2;
    w.codes = static_cast<const char *>(w.codes) + index * codes * (s.nbits_per_codebook > 8 ? 2 : 1);
    w.codebooks = static_cast<const char *>(w.codebooks) + index * numbers * number_bytes;
    w.scales = static_cast<const char *>(w.scales) + index * (s.out_features / s.out_group_size) * number_bytes;
    return w;
}

/* A warp sums one output of up to 8 rows, a lane every 32nd group; of rows with weights of their own, one. */
__global__ void plain_kernel(void *y, const void *x, aqlm_weight w, const void *bias, const aqlm_dtype dtype,
                             const int n_rows, const Routes routes) {
    const int64_t o = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (o >= w.shape.out_features) return;
    const int g = w.shape.in_group_size, og = w.shape.out_group_size;
    if (routes.index) {
        const int64_t index = routes.index[blockIdx.y], y_row = blockIdx.y, x_row = y_row / routes.rows_of_x;
        const int64_t value_bytes = dtype == AQLM_F32 ? 4 : 2;
        y = static_cast<char *>(y) + y_row * routes.y_stride * value_bytes;
        x = static_cast<const char *>(x) + x_row * w.shape.in_features * value_bytes;
        if (index < 0 || index >= routes.weights) {
            if (threadIdx.x % 32 == 0) store_float(y, o, dtype, 0);
            return;
        }
        w = weight_behind(w, index);
    }
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
    for (int m = 0; m < l.count; ++m) {
        const auto &[y, w, bias] = l.products[m];
        const bool routed = l.routes.index;
        const dim3 grid(static_cast<unsigned>(divide_up(w.shape.out_features, WARPS)), routed ? l.n_rows : 1);
        plain_kernel<<<grid, 32 * WARPS, 0, l.stream>>>(y, l.x, w, bias, l.dtype, routed ? 1 : l.n_rows, l.routes);
        if (const cudaError_t error = cudaGetLastError()) return error;
    }
    return cudaSuccess;
}

} // namespace aqlm_cuda
