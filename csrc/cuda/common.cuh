/* common.cuh: what all kernels share: dtypes as floats, entries of codebooks, matrix instructions. */
#ifndef AQLM_CUDA_COMMON_CUH
#define AQLM_CUDA_COMMON_CUH

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/aqlm_cuda.h"

namespace aqlm_cuda {

/* Any dtype at run time: for paths that are right rather than fast. */
__device__ inline float load_float(const void *p, size_t i, aqlm_dtype dtype) {
    switch (dtype) {
    case AQLM_F16: return __half2float(static_cast<const __half *>(p)[i]);
    case AQLM_BF16: return __bfloat162float(static_cast<const __nv_bfloat16 *>(p)[i]);
    default: return static_cast<const float *>(p)[i];
    }
}

__device__ inline void store_float(void *p, size_t i, aqlm_dtype dtype, float value) {
    switch (dtype) {
    case AQLM_F16: static_cast<__half *>(p)[i] = __float2half_rn(value); break;
    case AQLM_BF16: static_cast<__nv_bfloat16 *>(p)[i] = __float2bfloat16_rn(value); break;
    default: static_cast<float *>(p)[i] = value;
    }
}

/* Code i of stored codes. */
__device__ inline uint32_t load_code(const void *codes, size_t i, bool wide, uint32_t mask) {
    return (wide ? static_cast<const uint16_t *>(codes)[i] : static_cast<const uint8_t *>(codes)[i]) & mask;
}

/* Where entry `code` of codebook k starts, in numbers: [og, g] of them. */
__device__ inline size_t entry_at(const aqlm_shape &s, int64_t k, int64_t code) {
    return ((k << s.nbits_per_codebook) + code) * s.out_group_size * s.in_group_size;
}

/* Number (row, i) of group (o, j) of W before its scale, of any format: the sum over the codebooks in their order. */
__device__ inline float weight_at(const aqlm_weight &w, int64_t o, int64_t row, int64_t j, int64_t i) {
    const aqlm_shape &s = w.shape;
    const bool wide = s.nbits_per_codebook > 8;
    const int num_codebooks = static_cast<int>(s.num_codebooks);
    const size_t first_code = (o * (s.in_features / s.in_group_size) + j) * num_codebooks;
    float sum = 0;
    for (int k = 0; k < num_codebooks; ++k) {
        const uint32_t code = load_code(w.codes, first_code + k, wide, (1u << s.nbits_per_codebook) - 1);
        sum += load_float(w.codebooks, entry_at(s, k, code) + row * s.in_group_size + i, w.dtype);
    }
    return sum;
}

template <class T> struct Pair;
template <> struct Pair<__half> {
    using type = __half2;
    static __device__ float2 to_float2(type v) { return __half22float2(v); }
    static __device__ type from_floats(float a, float b) { return __floats2half2_rn(a, b); }
};
template <> struct Pair<__nv_bfloat16> {
    using type = __nv_bfloat162;
    static __device__ float2 to_float2(type v) { return __bfloat1622float2(v); }
    static __device__ type from_floats(float a, float b) { return __floats2bfloat162_rn(a, b); }
};

/* c[16, 8] += a[16, 8] b[8, 8] and c[16, 8] += a[16, 16] b[16, 8], fragments as PTX defines them. */
template <class T> __device__ inline void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(b));
    else
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(b));
}

template <class T>
__device__ inline void mma_k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                               uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* A scale or bias; T float: of any dtype, known at run time. Else it is not waited for, as a conversion would. */
template <class T> __device__ inline T load_as(const void *p, int i, aqlm_dtype dtype) {
    if constexpr (std::is_same_v<T, float>) return load_float(p, i, dtype);
    else return static_cast<const T *>(p)[i];
}

template <class T> __device__ inline void store_as(void *p, size_t i, aqlm_dtype dtype, float value) {
    if constexpr (std::is_same_v<T, float>) store_float(p, i, dtype, value);
    else static_cast<T *>(p)[i] = static_cast<T>(value);
}

/* Codes are read once: L1 does not keep them. */
__device__ inline uint32_t load_once(const uint32_t *p) {
    uint32_t v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
/* The same, where it is written: before all accesses to memory that follow. */
__device__ inline uint32_t load_now(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ inline uint2 load_once(const uint2 *p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ inline uint4 load_once(const uint4 *p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}

__device__ inline void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/* Of a kernel launched with programmatic stream serialization: it may start while those before it finish. What they
 * wrote must be read after this, and the next kernel may start after it. */
__device__ inline void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

} // namespace aqlm_cuda
#endif
