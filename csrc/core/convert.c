/* convert.c: float16 and bfloat16, round to nearest even, as branch-free loops the compiler vectorises. */
#include "core.h"

size_t aqlm_dtype_size(aqlm_dtype dtype) { return dtype == AQLM_F32 ? 4 : 2; }

static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline float half_to_float(uint16_t h) {
    /* Shifting the half into place leaves an exponent 112 too small; the product restores it, denormals too. */
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7fff) << 13;
    float x = float_of(magnitude) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u; /* Inf and NaN keep their mantissa */
    return float_of(sign | bits_of(x) | special);
}

static inline uint16_t float_to_half(float x) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    /* Below 2^-14 the result is denormal: adding 0.5 makes the FPU round at the right bit. */
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
    uint32_t result = magnitude < 0x38800000u ? small : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result; /* rounds to Inf from 65520 up */
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return (uint16_t)(sign | result);
}

static inline uint16_t float_to_bfloat(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffff) > 0x7f800000u ? (u >> 16) | 0x40 : rounded);
}

void aqlm_to_f32(float *to, const void *from, aqlm_dtype dtype, int64_t n) {
    const uint16_t *half = from;
    if (dtype == AQLM_F32) memcpy(to, from, (size_t)n * 4);
    else if (dtype == AQLM_F16)
        for (int64_t i = 0; i < n; i++) to[i] = half_to_float(half[i]);
    else
        for (int64_t i = 0; i < n; i++) to[i] = float_of((uint32_t)half[i] << 16);
}

void aqlm_from_f32(void *to, aqlm_dtype dtype, const float *from, int64_t n) {
    uint16_t *half = to;
    if (dtype == AQLM_F32) memcpy(to, from, (size_t)n * 4);
    else if (dtype == AQLM_F16)
        for (int64_t i = 0; i < n; i++) half[i] = float_to_half(from[i]);
    else
        for (int64_t i = 0; i < n; i++) half[i] = float_to_bfloat(from[i]);
}
