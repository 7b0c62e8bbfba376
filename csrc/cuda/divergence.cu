/* divergence.cu: KL(softmax(original) || softmax(logits)) of each row, and its gradient to the logits.
 *
 * A block of threads has a row and reads it twice: for the largest logit and the sum of exponentials, kept together so
 * that one pass finds both, then for the terms. In between the rows of all blocks mostly stay in L2. Sums have a fixed
 * order. */
#include <cmath>

#include "cuda/common.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;

template <class T> struct alignas(16) Run {
    static constexpr int SIZE = 16 / sizeof(T);
    T at[SIZE];
};

/* Sum of exp(x - most) over some x, the largest of which is most. */
struct Sum {
    float most, sum;

    __device__ float scaled(float to) const { return most == to ? sum : sum * expf(most - to); }
    __device__ void add(float x) { sum += x == -INFINITY ? 0.0f : expf(x - most); } /* no x is above most */
    __device__ void raise(float x) {
        if (x > most) sum = scaled(x), most = x;
    }
};
__device__ inline Sum together(Sum a, Sum b) {
    const float most = fmaxf(a.most, b.most);
    return {most, a.scaled(most) + b.scaled(most)};
}
__device__ inline float together(float a, float b) { return a + b; }
__device__ inline Sum from_lane(Sum x, int offset) {
    return {__shfl_xor_sync(~0u, x.most, offset), __shfl_xor_sync(~0u, x.sum, offset)};
}
__device__ inline float from_lane(float x, int offset) { return __shfl_xor_sync(~0u, x, offset); }

/* Of all threads, for all of them. parts: of each warp; none may be in use. */
template <class X> __device__ X reduce(X x, X *parts) {
    for (int offset = 16; offset > 0; offset /= 2) x = together(x, from_lane(x, offset));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int warp = 1; warp < WARPS; ++warp) x = together(x, parts[warp]);
    return x;
}

/* do_run(place) for each of the thread's runs of a row of n words, of one word where runs are not whole. */
template <class T, bool whole, class Do> __device__ inline void for_runs(int64_t n, const Do &do_run) {
    constexpr int SIZE = whole ? Run<T>::SIZE : 1;
    for (int64_t at = int64_t{threadIdx.x} * SIZE; at < n; at += THREADS * SIZE) do_run(at);
}

template <class T, bool whole> __device__ inline void load_run(float (&to)[whole ? Run<T>::SIZE : 1], const T *from) {
    if constexpr (whole) {
        const Run<T> run = *reinterpret_cast<const Run<T> *>(from);
#pragma unroll
        for (int i = 0; i < Run<T>::SIZE; ++i) to[i] = static_cast<float>(run.at[i]);
    } else {
        to[0] = static_cast<float>(*from);
    }
}

template <class T, bool whole> __device__ inline Sum sum_of(const T *row, int64_t n) {
    constexpr int SIZE = whole ? Run<T>::SIZE : 1;
    Sum found = {-INFINITY, 0};
    for_runs<T, whole>(n, [&](int64_t at) {
        float x[SIZE], most = -INFINITY;
        load_run<T, whole>(x, row + at);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) most = fmaxf(most, x[i]);
        found.raise(most);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) found.add(x[i]);
    });
    return found;
}

template <class T, bool whole>
__global__ void __launch_bounds__(THREADS)
    divergence_kernel(float *kl, T *gradient, const T *original, const T *logits, int64_t n) {
    constexpr int SIZE = whole ? Run<T>::SIZE : 1;
    __shared__ Sum parts[2][WARPS];
    __shared__ float totals[WARPS];
    const int64_t first = int64_t{blockIdx.x} * n;
    const T *row_p = original + first, *row_q = logits + first;
    const Sum p_sum = reduce(sum_of<T, whole>(row_p, n), parts[0]);
    const Sum q_sum = reduce(sum_of<T, whole>(row_q, n), parts[1]);
    const float log_p_sum = logf(p_sum.sum), log_q_sum = logf(q_sum.sum);
    float total = 0;
    for_runs<T, whole>(n, [&](int64_t at) {
        float x[SIZE], y[SIZE];
        load_run<T, whole>(x, row_p + at);
        load_run<T, whole>(y, row_q + at);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            const float log_p = x[i] - p_sum.most - log_p_sum, log_q = y[i] - q_sum.most - log_q_sum;
            const float p = expf(log_p), difference = expf(log_q) - p;
            /* q - p adds up to 0, and errors of the normalization, which all words share, to 0 with it. */
            total += (p == 0 ? 0.0f : p * (log_p - log_q)) + difference;
            y[i] = difference;
        }
        if (gradient == nullptr) return;
        if constexpr (whole) {
            Run<T> run;
#pragma unroll
            for (int i = 0; i < SIZE; ++i) run.at[i] = static_cast<T>(y[i]);
            *reinterpret_cast<Run<T> *>(gradient + first + at) = run;
        } else {
            gradient[first + at] = static_cast<T>(y[0]);
        }
    });
    total = reduce(total, totals);
    if (threadIdx.x == 0) kl[blockIdx.x] = total < 0 ? 0 : total;
}

template <class T>
cudaError_t launch(float *kl, void *gradient, const void *original, const void *logits, int64_t n_rows, int64_t n,
                   cudaStream_t stream) {
    const auto grid = static_cast<unsigned>(n_rows);
    const auto *p = static_cast<const T *>(original), *q = static_cast<const T *>(logits);
    auto *to = static_cast<T *>(gradient);
    const auto places = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(q) |
                        reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(n * int64_t{sizeof(T)});
    if (places % 16 == 0) divergence_kernel<T, true><<<grid, THREADS, 0, stream>>>(kl, to, p, q, n);
    else divergence_kernel<T, false><<<grid, THREADS, 0, stream>>>(kl, to, p, q, n);
    return cudaGetLastError();
}

} // namespace
} // namespace aqlm_cuda

extern "C" cudaError_t aqlm_cuda_divergence(float *kl, void *gradient, const void *original, const void *logits,
                                            aqlm_dtype dtype, int64_t n_rows, int64_t n_words, cudaStream_t stream) {
    using namespace aqlm_cuda;
    if (n_rows == 0) return cudaSuccess;
    if (n_rows > INT32_MAX) return cudaErrorInvalidValue;
    switch (dtype) {
    case AQLM_F16: return launch<__half>(kl, gradient, original, logits, n_rows, n_words, stream);
    case AQLM_BF16: return launch<__nv_bfloat16>(kl, gradient, original, logits, n_rows, n_words, stream);
    default: return launch<float>(kl, gradient, original, logits, n_rows, n_words, stream);
    }
}
