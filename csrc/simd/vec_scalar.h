/* The words of kernels.h in plain C: the specification of the others, and the fallback. */
#include <math.h>
#include <string.h>
#define VF_LANES 1
#define TILE_ROWS 4
#define TILE_VECS 4
#define NEAREST_ROWS 4
typedef float vf;
typedef int vm;
static inline vf vf_load(const float *p) { return *p; }
static inline void vf_store(float *p, vf x) { *p = x; }
static inline vf vf_set1(float x) { return x; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_fma(vf a, vf b, vf c) { return fmaf(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return fmaf(-a, b, c); }
static inline vf vf_min(vf a, vf b) { return a < b ? a : b; }
static inline vm vf_lt(vf a, vf b) { return a < b; }
static inline vf vf_select(vm m, vf a, vf b) { return m ? a : b; }
static inline uint32_t vm_bits(vm m) { return (uint32_t)m; }
static inline float vf_hmin(vf x) { return x; }
/* Eight values from memory, of 16 bits, as floats. */
static inline void vf_load8_bf16(vf *to, const void *from) {
    const uint16_t *half = from;
    for (int i = 0; i < 8; i++) {
        uint32_t bits = (uint32_t)half[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}
static inline void vf_load8_f16(vf *to, const void *from) {
    const uint16_t *half = from;
    for (int i = 0; i < 8; i++) to[i] = aqlm_half_to_float(half[i]);
}
