/* The words of kernels.h in AVX-512. */
#include <immintrin.h>
#define VF_LANES 16
#define TILE_ROWS 12
#define TILE_VECS 2
#define NEAREST_ROWS 6
typedef __m512 vf;
typedef __mmask16 vm;
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
static inline uint32_t vm_bits(vm m) { return m; }
static inline float vf_hmin(vf x) { return _mm512_reduce_min_ps(x); }
