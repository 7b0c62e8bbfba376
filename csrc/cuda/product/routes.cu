/* routes.cu: rows that each have one of several weights, sorted by them on the device: nothing is read by the host, so
 * that a CUDA graph holds for other rows too.
 *
 * In which order rows of a weight come is left to chance; no row's result depends on the others in its chunk. */
#include "cuda/product/paths.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256;

/* One block. What is of no weight comes last. */
__global__ void __launch_bounds__(THREADS) route_kernel(const Routes routes, const int n_rows) {
    __shared__ int starts[MAX_WEIGHTS + 1]; /* how many rows a weight has; then where those that are left come */
    const int kinds = routes.weights + 1;
    const auto weight_of = [&](int row) {
        const int64_t index = routes.index[row];
        return index >= 0 && index < routes.weights ? static_cast<int>(index) : routes.weights;
    };
    for (int w = threadIdx.x; w < kinds; w += THREADS) starts[w] = 0;
    __syncthreads();
    wait_for_kernels_before();
    for (int row = threadIdx.x; row < n_rows; row += THREADS) atomicAdd(starts + weight_of(row), 1);
    __syncthreads();
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int place = 0, chunk = 0; /* behind the weights before */
        for (int first = 0; first < kinds; first += 32) {
            const int w = first + lane, rows = w < kinds ? starts[w] : 0, chunks = (rows + MAX_ROWS - 1) / MAX_ROWS;
            int rows_to = rows, chunks_to = chunks; /* with this weight */
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int more_rows = __shfl_up_sync(~0u, rows_to, distance);
                const int more_chunks = __shfl_up_sync(~0u, chunks_to, distance);
                if (lane >= distance) rows_to += more_rows, chunks_to += more_chunks;
            }
            const int at = place + rows_to - rows;
            if (w < kinds) starts[w] = at;
            for (int i = 0; i < chunks; ++i) {
                int *const of = routes.table + 1 + 3 * (chunk + chunks_to - chunks + i);
                of[0] = w < routes.weights ? w : -1;
                of[1] = at + i * MAX_ROWS;
                of[2] = min(rows - i * MAX_ROWS, MAX_ROWS);
            }
            place += __shfl_sync(~0u, rows_to, 31), chunk += __shfl_sync(~0u, chunks_to, 31);
        }
        if (lane == 0) routes.table[0] = chunk;
    }
    __syncthreads();
    int *const order = routes.table + 1 + 3 * routes.most_chunks;
    for (int row = threadIdx.x; row < n_rows; row += THREADS) order[atomicAdd(starts + weight_of(row), 1)] = row;
}

} // namespace

/* The most that rows of `weights` weights and of none are cut into. */
int most_chunks(int64_t n_rows, int64_t weights) {
    return static_cast<int>(std::min(n_rows, (n_rows + (MAX_ROWS - 1) * (weights + 1)) / MAX_ROWS));
}

size_t route_workspace(int64_t n_rows, int64_t weights) {
    return sizeof(int) * (1 + 3 * size_t(most_chunks(n_rows, weights)) + n_rows);
}

cudaError_t run_routes(const Routes &routes, int n_rows, const Device &device, cudaStream_t stream) {
    return launch_early<route_kernel>(routes, dim3(1), 1, THREADS, 0, device, stream, n_rows);
}

} // namespace aqlm_cuda
