/* wgmma.cuh: products of a warpgroup with A in registers, and what they wait for (sm_90a alone). */
#ifndef AQLM_CUDA_WGMMA_CUH
#define AQLM_CUDA_WGMMA_CUH

#include "cuda/common.cuh"

namespace aqlm_cuda {

/* Where there are these instructions. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define AQLM_HAS_WGMMA 1
#else
#define AQLM_HAS_WGMMA 0
#endif

__device__ inline void wgmma_fence() {
#if AQLM_HAS_WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void wgmma_commit() {
#if AQLM_HAS_WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/* Until at most `left` of the committed groups are unfinished. */
template <int left> __device__ inline void wgmma_wait() {
#if AQLM_HAS_WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
#endif
}

/* B, N rows of 64 16-bit numbers, 128 bytes each, at a multiple of 1,024 bytes in shared memory; the 16 bytes at
 * 16 c of row n lie at 16 (c ^ n % 8). Its next 16 columns: + 2. */
__device__ inline uint64_t wgmma_rows(uint32_t at) {
    constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62, EIGHT_ROWS = uint64_t{1024 >> 4} << 32;
    return SWIZZLE_128 | EIGHT_ROWS | uint64_t{1} << 16 | (at & 0x3ffff) >> 4;
}

/* c[64, N] += a[64, 16] b[N, 16]^T, fragments as PTX defines them. */
template <class T, int N> __device__ inline void wgmma(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b) {
#if AQLM_HAS_WGMMA
#define AQLM_C8(i)                                                                                                     \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]),        \
        "+f"(c[i + 7])
#define AQLM_WGMMA(n, places, of_a, of_b, ...)                                                                         \
    if constexpr (N == n && std::is_same_v<T, __half>)                                                                 \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" places "}, {" of_a "}, " of_b          \
                     ", 1, 1, 1, 0;"                                                                                   \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
    else if constexpr (N == n)                                                                                         \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" places "}, {" of_a "}, " of_b        \
                     ", 1, 1, 1, 0;"                                                                                   \
                     : __VA_ARGS__                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#define AQLM_P16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define AQLM_C16R AQLM_C8(0)
#define AQLM_P32                                                                                                       \
    AQLM_P16 ","                                                                                                       \
             "%8,%9,%10,%11,%12,%13,%14,%15"
#define AQLM_C32R AQLM_C16R, AQLM_C8(8)
#define AQLM_P48                                                                                                       \
    AQLM_P32 ","                                                                                                       \
             "%16,%17,%18,%19,%20,%21,%22,%23"
#define AQLM_C48R AQLM_C32R, AQLM_C8(16)
#define AQLM_P64                                                                                                       \
    AQLM_P48 ","                                                                                                       \
             "%24,%25,%26,%27,%28,%29,%30,%31"
#define AQLM_C64R AQLM_C48R, AQLM_C8(24)
#define AQLM_P96                                                                                                       \
    AQLM_P64 ","                                                                                                       \
             "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define AQLM_C96R AQLM_C64R, AQLM_C8(32), AQLM_C8(40)
#define AQLM_P128                                                                                                      \
    AQLM_P96 ","                                                                                                       \
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define AQLM_C128R AQLM_C96R, AQLM_C8(48), AQLM_C8(56)
#define AQLM_P192                                                                                                      \
    AQLM_P128 ","                                                                                                      \
              "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,"       \
              "%88,%89,%90,%91,%92,%93,%94,%95"
#define AQLM_C192R AQLM_C128R, AQLM_C8(64), AQLM_C8(72), AQLM_C8(80), AQLM_C8(88)
#define AQLM_P256                                                                                                      \
    AQLM_P192 ","                                                                                                      \
              "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,"       \
              "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define AQLM_C256R AQLM_C192R, AQLM_C8(96), AQLM_C8(104), AQLM_C8(112), AQLM_C8(120)
    AQLM_WGMMA(16, AQLM_P16, "%8,%9,%10,%11", "%12", AQLM_C16R)
    AQLM_WGMMA(32, AQLM_P32, "%16,%17,%18,%19", "%20", AQLM_C32R)
    AQLM_WGMMA(48, AQLM_P48, "%24,%25,%26,%27", "%28", AQLM_C48R)
    AQLM_WGMMA(64, AQLM_P64, "%32,%33,%34,%35", "%36", AQLM_C64R)
    AQLM_WGMMA(96, AQLM_P96, "%48,%49,%50,%51", "%52", AQLM_C96R)
    AQLM_WGMMA(128, AQLM_P128, "%64,%65,%66,%67", "%68", AQLM_C128R)
    AQLM_WGMMA(192, AQLM_P192, "%96,%97,%98,%99", "%100", AQLM_C192R)
    AQLM_WGMMA(256, AQLM_P256, "%128,%129,%130,%131", "%132", AQLM_C256R)
#undef AQLM_WGMMA
#undef AQLM_C8
#undef AQLM_P16
#undef AQLM_C16R
#undef AQLM_P32
#undef AQLM_C32R
#undef AQLM_P48
#undef AQLM_C48R
#undef AQLM_P64
#undef AQLM_C64R
#undef AQLM_P96
#undef AQLM_C96R
#undef AQLM_P128
#undef AQLM_C128R
#undef AQLM_P192
#undef AQLM_C192R
#undef AQLM_P256
#undef AQLM_C256R
#endif
}

} // namespace aqlm_cuda
#endif
