/* The words of kernels.h in NEON (AArch64). */
#include <arm_neon.h>
#define VF_LANES 4
#define TILE_ROWS 8
#define TILE_VECS 2
#define NEAREST_ROWS 4
typedef float32x4_t vf;
typedef uint32x4_t vm;
static inline vf vf_load(const float *p) { return vld1q_f32(p); }
static inline void vf_store(float *p, vf x) { vst1q_f32(p, x); }
static inline vf vf_set1(float x) { return vdupq_n_f32(x); }
static inline vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf vf_fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
static inline vm vf_lt(vf a, vf b) { return vcltq_f32(a, b); }
static inline vf vf_select(vm m, vf a, vf b) { return vbslq_f32(m, a, b); }
static inline vf vf_min(vf a, vf b) { return vf_select(vf_lt(a, b), a, b); }
static inline uint32_t vm_bits(vm m) {
    static const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(m, vld1q_u32(bit)));
}
static inline float vf_hmin(vf x) { return vminvq_f32(x); }
static inline void vf_load8_bf16(vf *to, const void *from) {
    const uint16x8_t half = vld1q_u16(from);
    to[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16));
    to[1] = vreinterpretq_f32_u32(vshll_high_n_u16(half, 16));
}
static inline void vf_load8_f16(vf *to, const void *from) {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(from));
    to[0] = vcvt_f32_f16(vget_low_f16(half));
    to[1] = vcvt_high_f32_f16(half);
}
