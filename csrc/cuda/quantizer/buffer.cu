/* buffer.cu: steps of Adam for the buffers of PV-Tuning (core/quantizer/buffer.c), each operation rounded as there.
 *
 * A warp has a block of moments, 8 values a lane: two runs of 4, so that each access is one of 16 bytes of floats,
 * whose neighbours are its neighbours' in the warp. All is read once and written once: memory is the bound. */
#include <cmath>

#include "cuda/aqlm_cuda_quantizer.h"
#include "cuda/common.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, BLOCK = AQLM_MOMENTS_BLOCK, EACH = BLOCK / 32, RUN = EACH / 2;
constexpr float ROUND = 12582912.0f; /* 1.5 * 2^23: x + this has x, rounded, in its low bits */

struct Step {
    float *buffer;
    void *first, *second;
    float *scales;
    const void *gradient;
    int64_t n, blocks;
    float divisor, rest1, beta2, rest2, rate, root, eps;
};

template <class T> struct alignas(RUN * sizeof(T)) Four {
    T at[RUN];
};

/* Value i of a lane's, in its block. */
__device__ inline int place(int i) { return i / RUN * (32 * RUN) + static_cast<int>(threadIdx.x % 32) * RUN + i % RUN; }

/* Values from `at` on, of which `left` are there. */
template <class T> __device__ inline void load(T (&to)[EACH], const void *from, int64_t at, int64_t left) {
    const T *values = static_cast<const T *>(from) + at;
    if (left >= BLOCK) {
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            const auto four = *reinterpret_cast<const Four<T> *>(values + place(run * RUN));
#pragma unroll
            for (int i = 0; i < RUN; ++i) to[run * RUN + i] = four.at[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < EACH; ++i) to[i] = place(i) < left ? values[place(i)] : T();
    }
}

template <class T> __device__ inline void store(void *to, const T (&from)[EACH], int64_t at, int64_t left) {
    T *values = static_cast<T *>(to) + at;
    if (left >= BLOCK) {
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            Four<T> four;
#pragma unroll
            for (int i = 0; i < RUN; ++i) four.at[i] = from[run * RUN + i];
            *reinterpret_cast<Four<T> *>(values + place(run * RUN)) = four;
        }
    } else {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (place(i) < left) values[place(i)] = from[i];
    }
}

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(__half x) { return __half2float(x); }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

/* The largest of the block's numbers, of which none is negative, over `levels`. */
__device__ inline float scale_of(const float (&x)[EACH], float levels) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
    return __fdiv_rn(__uint_as_float(most), levels);
}

__device__ inline float fourth_root(float x) { return __fsqrt_rn(__fsqrt_rn(x)); }

template <class T> __device__ inline T rounded(float q) {
    return static_cast<T>(__float_as_uint(__fadd_rn(q, ROUND)) & 255u);
}

__device__ inline float store_first(int8_t (&bytes)[EACH], const float (&m)[EACH]) {
    float root[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) root[i] = fourth_root(fabsf(m[i]));
    const float scale = scale_of(root, 127.0f), divisor = scale == 0.0f ? 1.0f : scale;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float q = __fdiv_rn(root[i], divisor);
        bytes[i] = rounded<int8_t>(m[i] < 0.0f ? -q : q);
    }
    return scale;
}

__device__ inline float store_second(uint8_t (&bytes)[EACH], const float (&v)[EACH]) {
    float root[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) root[i] = __fsqrt_rn(fourth_root(v[i]));
    const float scale = scale_of(root, 255.0f), divisor = scale == 0.0f ? 1.0f : scale;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float q = __fdiv_rn(root[i], divisor);
        bytes[i] = rounded<uint8_t>(q > 1.0f || root[i] == 0.0f ? q : 1.0f);
    }
    return scale;
}

/* Moments of a lane, and where they are kept. */
template <bool bytes, bool keeps_first> struct Moments {
    float m[EACH], v[EACH];

    __device__ void read(const Step &s, int64_t block, int64_t at, int64_t left) {
        if constexpr (bytes) {
            int8_t of_first[EACH];
            uint8_t of_second[EACH];
            const float scale = keeps_first ? s.scales[block] : 0.0f, other = s.scales[s.blocks + block];
            if constexpr (keeps_first) load(of_first, s.first, at, left);
            load(of_second, s.second, at, left);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                if constexpr (keeps_first) {
                    const float root = __fmul_rn(of_first[i], scale);
                    m[i] = __fmul_rn(__fmul_rn(root, fabsf(root)), __fmul_rn(root, root));
                }
                const float root = __fmul_rn(of_second[i], other), square = __fmul_rn(root, root);
                const float fourth = __fmul_rn(square, square);
                v[i] = __fmul_rn(fourth, fourth);
            }
        } else {
            if constexpr (keeps_first) load(m, s.first, at, left);
            load(v, s.second, at, left);
        }
    }

    __device__ void write(const Step &s, int64_t block, int64_t at, int64_t left) const {
        if constexpr (bytes) {
            int8_t of_first[EACH];
            uint8_t of_second[EACH];
            float scale = 0.0f;
            if constexpr (keeps_first) {
                scale = store_first(of_first, m);
                store(s.first, of_first, at, left);
            }
            const float other = store_second(of_second, v);
            store(s.second, of_second, at, left);
            if (threadIdx.x % 32 == 0) {
                if constexpr (keeps_first) s.scales[block] = scale;
                s.scales[s.blocks + block] = other;
            }
        } else {
            if constexpr (keeps_first) store(s.first, m, at, left);
            store(s.second, v, at, left);
        }
    }
};

template <class T, bool bytes, bool keeps_first> __global__ void __launch_bounds__(THREADS) step_kernel(const Step s) {
    const int64_t block = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, at = block * BLOCK, left = s.n - at;
    if (block >= s.blocks) return;
    T raw[EACH];
    float x[EACH];
    Moments<bytes, keeps_first> moments;
    load(raw, s.gradient, at, left);
    load(x, s.buffer, at, left);
    moments.read(s, block, at, left);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float g = __fdiv_rn(as_float(raw[i]), s.divisor);
        float m = g, v = moments.v[i];
        if constexpr (keeps_first) {
            m = moments.m[i];
            m = moments.m[i] = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), s.rest1));
        }
        v = moments.v[i] = __fadd_rn(__fmul_rn(v, s.beta2), __fmul_rn(__fmul_rn(g, g), s.rest2));
        const float size = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.root), s.eps);
        x[i] = __fsub_rn(x[i], __fmul_rn(s.rate, __fdiv_rn(m, size)));
    }
    store(s.buffer, x, at, left);
    moments.write(s, block, at, left);
}

template <class T> cudaError_t launch(const Step &s, cudaStream_t stream) {
    const auto grid = static_cast<unsigned>(divide_up(s.blocks, WARPS));
    if (s.scales && s.first) step_kernel<T, true, true><<<grid, THREADS, 0, stream>>>(s);
    else if (s.scales) step_kernel<T, true, false><<<grid, THREADS, 0, stream>>>(s);
    else if (s.first) step_kernel<T, false, true><<<grid, THREADS, 0, stream>>>(s);
    else step_kernel<T, false, false><<<grid, THREADS, 0, stream>>>(s);
    return cudaGetLastError();
}

} // namespace
} // namespace aqlm_cuda

extern "C" cudaError_t aqlm_cuda_buffer_step(float *buffer, const aqlm_buffer_moments *moments, const void *gradient,
                                             aqlm_dtype gradient_dtype, int64_t n, const aqlm_buffer_options *options,
                                             cudaStream_t stream) {
    using namespace aqlm_cuda;
    if (n == 0) return cudaSuccess;
    const double t = static_cast<double>(options->step), beta1 = options->beta1, beta2 = options->beta2;
    const Step step = {buffer,
                       moments->first,
                       moments->second,
                       moments->scales,
                       gradient,
                       n,
                       divide_up(n, BLOCK),
                       static_cast<float>(options->divisor),
                       static_cast<float>(1.0 - beta1),
                       static_cast<float>(beta2),
                       static_cast<float>(1.0 - beta2),
                       static_cast<float>(options->learning_rate / (1.0 - std::pow(beta1, t))),
                       static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t))),
                       static_cast<float>(AQLM_BUFFER_EPS)};
    switch (gradient_dtype) {
    case AQLM_F16: return launch<__half>(step, stream);
    case AQLM_BF16: return launch<__nv_bfloat16>(step, stream);
    default: return launch<float>(step, stream);
    }
}
