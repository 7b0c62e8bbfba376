/* The words of kernels.h in plain C: the specification of the others, and the fallback. */
#include <math.h>
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
static inline vf vf_fma(vf a, vf b, vf c) { return fmaf(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return fmaf(-a, b, c); }
static inline vf vf_min(vf a, vf b) { return a < b ? a : b; }
static inline vm vf_lt(vf a, vf b) { return a < b; }
static inline vf vf_select(vm m, vf a, vf b) { return m ? a : b; }
static inline uint32_t vm_bits(vm m) { return (uint32_t)m; }
static inline float vf_hmin(vf x) { return x; }
