/* hessian.cu: H from products of activations, and its block factor for error feedback, as core/quantizer/hessian.c. */
#include "cuda/aqlm_cuda_quantizer.h"
#include "cuda/common.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256, TILE = 32, TILE_ROWS = THREADS / TILE;

/* ---- the sum ---- */

/* Tiles of the upper triangle, and their mirrored ones. */
__global__ void __launch_bounds__(THREADS) add_kernel(double *sum, const float *square, const int64_t in) {
    if (blockIdx.x < blockIdx.y) return;
    __shared__ double tile[TILE][TILE + 1];
    const int64_t i0 = static_cast<int64_t>(blockIdx.y) * TILE, j0 = static_cast<int64_t>(blockIdx.x) * TILE;
    const int lane = threadIdx.x % TILE, first = threadIdx.x / TILE;
    for (int r = first; r < TILE; r += TILE_ROWS) {
        const int64_t i = i0 + r, j = j0 + lane;
        if (i >= in || j >= in || i > j) continue;
        sum[i * in + j] = tile[r][lane] = sum[i * in + j] + square[i * in + j];
    }
    __syncthreads();
    for (int r = first; r < TILE; r += TILE_ROWS) {
        const int64_t j = j0 + r, i = i0 + lane;
        if (i < in && j < in && i < j) sum[j * in + i] = tile[lane][r];
    }
}

__global__ void __launch_bounds__(THREADS) add_product_kernel(double *sum, const float *product, const int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) sum[i] += product[i];
}

/* ---- the correction of a weight ---- */

/* A block for each row; each finds the mean itself, in one order. */
__global__ void __launch_bounds__(THREADS)
    damp_kernel(double *damped, const float *H, const double relative_damp, const int64_t in) {
    __shared__ double sums[THREADS];
    double sum = 0;
    for (int64_t d = threadIdx.x; d < in; d += THREADS) sum += H[d * in + d] / static_cast<double>(in);
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    const int64_t i = blockIdx.x;
    for (int64_t j = threadIdx.x; j < in; j += THREADS)
        damped[i * in + j] = H[i * in + j] + (i == j ? relative_damp * sums[0] : 0);
}

/* Tiles, so that both are read and written along their rows. */
__global__ void __launch_bounds__(THREADS)
    turn_kernel(double *turned, const float *product, const int64_t out, const int64_t in) {
    __shared__ float tile[TILE][TILE + 1];
    const int64_t o0 = static_cast<int64_t>(blockIdx.y) * TILE, i0 = static_cast<int64_t>(blockIdx.x) * TILE;
    const int lane = threadIdx.x % TILE, first = threadIdx.x / TILE;
    for (int r = first; r < TILE; r += TILE_ROWS)
        if (o0 + r < out && i0 + lane < in) tile[r][lane] = product[(o0 + r) * in + i0 + lane];
    __syncthreads();
    for (int r = first; r < TILE; r += TILE_ROWS)
        if (i0 + r < in && o0 + lane < out) turned[(i0 + r) * out + o0 + lane] = tile[lane][r];
}

__global__ void __launch_bounds__(THREADS)
    add_turned_kernel(float *corrected, const float *weight, const double *solved, const int64_t row_stride,
                      const int64_t column_stride, const double alpha, const int64_t out, const int64_t in) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= out * in) return;
    const int64_t o = at / in, i = at % in;
    corrected[at] = static_cast<float>(weight[at] + alpha * solved[i * row_stride + o * column_stride]);
}

/* ---- the order ---- */

__global__ void trace_kernel(double *trace, const float *H, const int64_t in, const int64_t g) {
    const int64_t j = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (j >= in / g) return;
    double sum = 0;
    for (int64_t d = j * g; d < (j + 1) * g; ++d) sum += H[d * in + d];
    trace[j] = sum;
}

/* Rises with the number, the same for 0 and -0; NaN has a place too, so that an order always is one. */
__device__ uint64_t ordered(double value) {
    const auto bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
    return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

/* The rank of a group is the number of those before it. */
__global__ void __launch_bounds__(THREADS) rank_kernel(int32_t *order, const double *trace, const int groups) {
    __shared__ uint64_t others[THREADS];
    const int j = blockIdx.x * THREADS + threadIdx.x;
    const uint64_t mine = j < groups ? ordered(trace[j]) : 0;
    int rank = 0;
    for (int first = 0; first < groups; first += THREADS) {
        __syncthreads();
        if (first + threadIdx.x < groups) others[threadIdx.x] = ordered(trace[first + threadIdx.x]);
        __syncthreads();
        for (int i = 0; i < min(THREADS, groups - first); ++i)
            rank += others[i] > mine || (others[i] == mine && first + i < j);
    }
    if (j < groups) order[rank] = j;
}

/* One block: *mean of the diagonal. */
__global__ void __launch_bounds__(THREADS)
    mean_kernel(double *mean, const double *trace, const int groups, const int64_t in) {
    __shared__ double sums[THREADS];
    double sum = 0;
    for (int j = threadIdx.x; j < groups; j += THREADS) sum += trace[j] / static_cast<double>(in);
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *mean = sums[0];
}

/* ---- the matrix to factor ---- */

__global__ void permute_kernel(double *permuted, const float *H, const int32_t *order, const double *mean,
                               const double relative_damp, const int64_t in, const int g) {
    const int64_t i = blockIdx.x, pi = in - 1 - i, hi = static_cast<int64_t>(order[pi / g]) * g + pi % g;
    const int64_t j = static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x, pj = in - 1 - j;
    if (j >= in) return;
    double value = 0;
    if (j <= i) value = H[hi * in + static_cast<int64_t>(order[pj / g]) * g + pj % g];
    if (j == i) value += relative_damp * *mean;
    permuted[i * in + j] = value;
}

/* ---- feedback and metric ---- */

/* R(i, k) of the upper factor of H in `order`: the lower factor of the reversed matrix, read backwards. */
struct Factor {
    const double *lower;
    int64_t row_stride, column_stride, in;

    __device__ double operator()(int64_t i, int64_t k) const {
        return lower[(in - 1 - i) * row_stride + (in - 1 - k) * column_stride];
    }
};

/* A block for each group: metric = R_jj R_jj^T. */
__global__ void __launch_bounds__(THREADS) metric_kernel(float *metric, const Factor R, const int g) {
    __shared__ double r[TILE][TILE + 1];
    const int64_t j0 = static_cast<int64_t>(blockIdx.x) * g;
    for (int at = threadIdx.x; at < g * g; at += THREADS)
        r[at / g][at % g] = at / g <= at % g ? R(j0 + at / g, j0 + at % g) : 0;
    __syncthreads();
    for (int at = threadIdx.x; at < g * g; at += THREADS) {
        const int i = at / g, k = at % g;
        double sum = 0;
        for (int p = max(i, k); p < g; ++p) sum += r[i][p] * r[k][p];
        metric[blockIdx.x * static_cast<int64_t>(g) * g + at] = static_cast<float>(sum);
    }
}

/* 64 rows of 32 columns, those of 32 / G groups: x R_jj = R(row, group j) by forward substitution. */
constexpr int ROWS = 64;
template <int G> __global__ void __launch_bounds__(THREADS) feedback_kernel(float *feedback, const Factor R) {
    const int64_t i0 = static_cast<int64_t>(blockIdx.y) * ROWS, j0 = static_cast<int64_t>(blockIdx.x) * TILE;
    const int lane = threadIdx.x % TILE, first = threadIdx.x / TILE;
    if (i0 >= j0 + TILE) { /* all below the diagonal */
        for (int r = first; r < ROWS; r += TILE_ROWS)
            if (i0 + r < R.in && j0 + lane < R.in) feedback[(i0 + r) * R.in + j0 + lane] = 0;
        return;
    }
    __shared__ double tile[ROWS][TILE + 1], diagonal[TILE][TILE + 1];
    const bool by_columns = R.column_stride == 1; /* which of them lie side by side */
    for (int at = threadIdx.x; at < (ROWS + TILE) * TILE; at += THREADS) {
        const bool below = at >= ROWS * TILE;
        const int rows = below ? TILE : ROWS, n = below ? at - ROWS * TILE : at;
        const int r = by_columns ? n / TILE : n % rows, c = by_columns ? n % TILE : n / rows;
        const int64_t i = (below ? j0 : i0) + r, k = j0 + c;
        (below ? diagonal : tile)[r][c] = i < R.in && k < R.in && i <= k ? R(i, k) : 0;
    }
    __syncthreads();
    for (int item = threadIdx.x; item < ROWS * (TILE / G); item += THREADS) {
        const int r = item % ROWS, c = item / ROWS * G;
        if (j0 + c >= R.in) continue;
        const bool before = i0 + r < j0 + c;
        double x[G];
#pragma unroll
        for (int k = 0; k < G; ++k) {
            double sum = before ? tile[r][c + k] : 0;
#pragma unroll
            for (int p = 0; p < k; ++p) sum -= x[p] * diagonal[c + p][c + k];
            x[k] = sum / diagonal[c + k][c + k];
        }
#pragma unroll
        for (int k = 0; k < G; ++k) tile[r][c + k] = x[k];
    }
    __syncthreads();
    for (int r = first; r < ROWS; r += TILE_ROWS)
        if (i0 + r < R.in && j0 + lane < R.in)
            feedback[(i0 + r) * R.in + j0 + lane] = static_cast<float>(tile[r][lane]);
}

unsigned blocks(int64_t n, int64_t of) { return static_cast<unsigned>(divide_up(n, of)); }

} // namespace
} // namespace aqlm_cuda

using namespace aqlm_cuda;

extern "C" cudaError_t aqlm_cuda_add_square(double *sum, const float *square, int64_t in_features,
                                            cudaStream_t stream) {
    const unsigned tiles = blocks(in_features, TILE);
    add_kernel<<<dim3(tiles, tiles), THREADS, 0, stream>>>(sum, square, in_features);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_add_product(double *sum, const float *product, int64_t n, cudaStream_t stream) {
    if (n > 0) add_product_kernel<<<blocks(n, THREADS), THREADS, 0, stream>>>(sum, product, n);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_damp_hessian(double *damped, const float *H, double relative_damp, int64_t in_features,
                                              cudaStream_t stream) {
    const auto rows = static_cast<unsigned>(in_features);
    damp_kernel<<<rows, THREADS, 0, stream>>>(damped, H, relative_damp, in_features);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_turn(double *turned, const float *product, int64_t out_features, int64_t in_features,
                                      cudaStream_t stream) {
    const dim3 grid(blocks(in_features, TILE), blocks(out_features, TILE));
    turn_kernel<<<grid, THREADS, 0, stream>>>(turned, product, out_features, in_features);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_add_turned(float *corrected, const float *weight, const double *solved,
                                            int64_t row_stride, int64_t column_stride, double alpha,
                                            int64_t out_features, int64_t in_features, cudaStream_t stream) {
    const unsigned grid = blocks(out_features * in_features, THREADS);
    add_turned_kernel<<<grid, THREADS, 0, stream>>>(corrected, weight, solved, row_stride, column_stride, alpha,
                                                    out_features, in_features);
    return cudaGetLastError();
}

extern "C" size_t aqlm_cuda_order_groups_workspace(int64_t in_features, int64_t in_group_size) {
    return static_cast<size_t>(in_features / in_group_size) * sizeof(double);
}

extern "C" cudaError_t aqlm_cuda_order_groups(int32_t *order, double *mean, const float *H, int64_t in_features,
                                              int64_t in_group_size, void *workspace, cudaStream_t stream) {
    auto *trace = static_cast<double *>(workspace);
    const auto groups = static_cast<int>(in_features / in_group_size);
    trace_kernel<<<blocks(groups, THREADS), THREADS, 0, stream>>>(trace, H, in_features, in_group_size);
    rank_kernel<<<blocks(groups, THREADS), THREADS, 0, stream>>>(order, trace, groups);
    mean_kernel<<<1, THREADS, 0, stream>>>(mean, trace, groups, in_features);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_permute_hessian(double *permuted, const float *H, const int32_t *order,
                                                 const double *mean, double relative_damp, int64_t in_features,
                                                 int64_t in_group_size, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(in_features), blocks(in_features, THREADS));
    permute_kernel<<<grid, THREADS, 0, stream>>>(permuted, H, order, mean, relative_damp, in_features,
                                                 static_cast<int>(in_group_size));
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_factor_blocks(float *feedback, float *metric, const double *lower, int64_t row_stride,
                                               int64_t column_stride, int64_t in_features, int64_t in_group_size,
                                               cudaStream_t stream) {
    const Factor R = {lower, row_stride, column_stride, in_features};
    const dim3 grid(blocks(in_features, TILE), blocks(in_features, ROWS));
    metric_kernel<<<blocks(in_features, in_group_size), THREADS, 0, stream>>>(metric, R,
                                                                              static_cast<int>(in_group_size));
    switch (in_group_size) {
    case 4: feedback_kernel<4><<<grid, THREADS, 0, stream>>>(feedback, R); break;
    case 8: feedback_kernel<8><<<grid, THREADS, 0, stream>>>(feedback, R); break;
    case 16: feedback_kernel<16><<<grid, THREADS, 0, stream>>>(feedback, R); break;
    case 32: feedback_kernel<32><<<grid, THREADS, 0, stream>>>(feedback, R); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
