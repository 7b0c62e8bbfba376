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
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); }
static inline uint32_t vm_bits(vm m) { return m; }
static inline float vf_hmin(vf x) { return _mm512_reduce_min_ps(x); }
/* Twice eight values. */
static inline __m256i vf_two_halves(const void *a, const void *b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a)),
                                   _mm_loadu_si128((const __m128i *)b), 1);
}
static inline vf vf_load8x2_bf16(const void *a, const void *b) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(vf_two_halves(a, b)), 16));
}
static inline vf vf_load8x2_f16(const void *a, const void *b) { return _mm512_cvtph_ps(vf_two_halves(a, b)); }
static inline vf vf_load8x2_f32(const void *a, const void *b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
}
