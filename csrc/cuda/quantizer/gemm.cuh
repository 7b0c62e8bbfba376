/* gemm.cuh: products of float matrices by the tensor cores: each float is the sum of two bf16, and three of the four
 * products are taken (relative error about 2^-17 of a term). Sums run in a fixed order: the same bits in every run.
 *
 * Tiles of 128 x 128, 32 deep; 8 warps of 64 x 32. The splitting is done on the way into shared memory, so nothing but
 * the floats is read. 4096 x 4096 x 4096 takes 1.2 ms on an H100. */
#ifndef AQLM_CUDA_GEMM_CUH
#define AQLM_CUDA_GEMM_CUH

#include "cuda/launch.cuh"

namespace aqlm_cuda {

struct Gemm {
    float *c;           /* [parts, m, n], c_part apart; rows ldc apart */
    const float *a, *b; /* of which k is contiguous, or (transposed) m and n */
    int64_t lda, ldb, ldc, c_part;
    int m, n, k, k_part; /* depth of a part, a multiple of GEMM_K */
};

constexpr int GEMM_TILE = 128, GEMM_K = 32, GEMM_THREADS = 256;
constexpr int GEMM_PITCH = GEMM_K + 8, GEMM_PITCH_T = GEMM_TILE + 8; /* free of bank conflicts for ldmatrix */
constexpr int GEMM_PLANE = GEMM_TILE * GEMM_PITCH;                   /* bf16 of one plane of an operand; T needs less */
constexpr int GEMM_MEMORY = 2 * 4 * GEMM_PLANE * 2;                  /* two stages of hi and lo of a and b, bytes */

__device__ inline uint32_t pack_bf16(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t &>(pair);
}

/* x = hi + lo */
__device__ inline void split_bf16(float4 x, uint2 &hi, uint2 &lo) {
    hi = {pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
    const float2 a = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(hi.x));
    const float2 b = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(hi.y));
    lo = {pack_bf16(x.x - a.x, x.y - a.y), pack_bf16(x.z - b.x, x.w - b.y)};
}

template <bool transposed> __device__ inline void load_matrices(uint32_t (&r)[4], const __nv_bfloat16 *p) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at));
}

/* An operand's tile on its way: 4 float4 of each thread, zeros beyond its edges. `rows` counts m or n. */
template <bool transposed> struct GemmTile {
    float4 part[4];

    __device__ void load(const float *p, int64_t ld, int row0, int rows, int k0, int k_end) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * GEMM_THREADS;
            const int row = row0 + (transposed ? at % 32 * 4 : at / 8), k = k0 + (transposed ? at / 32 : at % 8 * 4);
            const bool inside = row < rows && k < k_end; /* sizes along the contiguous dimension are multiples of 4 */
            const float *from = transposed ? p + k * ld + row : p + row * ld + k;
            part[i] = inside ? *reinterpret_cast<const float4 *>(from) : float4{0, 0, 0, 0};
        }
    }

    __device__ void store(__nv_bfloat16 *hi, __nv_bfloat16 *lo) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * GEMM_THREADS;
            const int to = transposed ? at / 32 * GEMM_PITCH_T + at % 32 * 4 : at / 8 * GEMM_PITCH + at % 8 * 4;
            uint2 h, l;
            split_bf16(part[i], h, l);
            *reinterpret_cast<uint2 *>(hi + to) = h;
            *reinterpret_cast<uint2 *>(lo + to) = l;
        }
    }
};

/* a_transposed: a is [k, m]; b_transposed: b is [k, n], else [n, k]. */
template <bool a_transposed, bool b_transposed>
__global__ void __launch_bounds__(GEMM_THREADS, 1) gemm_kernel(const Gemm p) {
    extern __shared__ __align__(128) unsigned char gemm_memory[];
    auto *shared = reinterpret_cast<__nv_bfloat16 *>(gemm_memory);
    const int m0 = blockIdx.y * GEMM_TILE, n0 = blockIdx.x * GEMM_TILE;
    const int k_begin = blockIdx.z * p.k_part, k_end = min(p.k, k_begin + p.k_part);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / 4 * 64, wn = warp % 4 * 32;
    float sum[4][4][4] = {};
    GemmTile<a_transposed> a;
    GemmTile<b_transposed> b;
    a.load(p.a, p.lda, m0, p.m, k_begin, k_end);
    b.load(p.b, p.ldb, n0, p.n, k_begin, k_end);
    int stage = 0;
    for (int k0 = k_begin; k0 < k_end; k0 += GEMM_K, stage ^= 1) {
        __nv_bfloat16 *planes = shared + stage * 4 * GEMM_PLANE;
        a.store(planes, planes + GEMM_PLANE);
        b.store(planes + 2 * GEMM_PLANE, planes + 3 * GEMM_PLANE);
        __syncthreads(); /* one is enough: the stage before is written again only after the next */
        if (k0 + GEMM_K < k_end) {
            a.load(p.a, p.lda, m0, p.m, k0 + GEMM_K, k_end);
            b.load(p.b, p.ldb, n0, p.n, k0 + GEMM_K, k_end);
        }
#pragma unroll
        for (int k = 0; k < GEMM_K; k += 16) {
            uint32_t fa[2][4][4], fb[2][2][4];
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const __nv_bfloat16 *pa = planes + part * GEMM_PLANE, *pb = planes + (2 + part) * GEMM_PLANE;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = wm + i * 16;
                    if constexpr (a_transposed)
                        load_matrices<true>(fa[part][i], pa + (k + lane % 8 + lane / 16 * 8) * GEMM_PITCH_T + row +
                                                             lane / 8 % 2 * 8);
                    else load_matrices<false>(fa[part][i], pa + (row + lane % 16) * GEMM_PITCH + k + lane / 16 * 8);
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int row = wn + i * 16;
                    if constexpr (b_transposed)
                        load_matrices<true>(fb[part][i], pb + (k + lane % 8 + lane / 8 % 2 * 8) * GEMM_PITCH_T + row +
                                                             lane / 16 * 8);
                    else
                        load_matrices<false>(fb[part][i],
                                             pb + (row + lane % 8 + lane / 16 * 8) * GEMM_PITCH + k + lane / 8 % 2 * 8);
                }
            }
#pragma unroll
            for (int product = 0; product < 3; ++product) { /* lo hi, hi lo, hi hi: the smallest first */
                const int pa = product == 0, pb = product == 1;
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        mma_k16<__nv_bfloat16>(sum[i][j], fa[pa][i][0], fa[pa][i][1], fa[pa][i][2], fa[pa][i][3],
                                               fb[pb][j / 2][j % 2 * 2], fb[pb][j / 2][j % 2 * 2 + 1]);
            }
        }
    }
    float *c = p.c + blockIdx.z * p.c_part;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m0 + wm + i * 16 + lane / 4 + half * 8, column = n0 + wn + j * 8 + lane % 4 * 2;
                if (row < p.m && column < p.n) /* n is even */
                    *reinterpret_cast<float2 *>(c + row * p.ldc + column) = {sum[i][j][half * 2],
                                                                             sum[i][j][half * 2 + 1]};
            }
}

/* In so many parts that the device is busy, each at least 128 deep. */
inline int gemm_parts(int64_t m, int64_t n, int64_t k, const Device &device) {
    const int64_t tiles = divide_up(m, GEMM_TILE) * divide_up(n, GEMM_TILE);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({device.sms / tiles, k / 128, 8})));
}

/* c[parts, m, n] = a b; k = 0 gives zeros. */
template <bool a_transposed, bool b_transposed>
cudaError_t gemm(Gemm p, int parts, const Device &device, cudaStream_t stream) {
    if (const cudaError_t error = allow_shared_memory<gemm_kernel<a_transposed, b_transposed>>(device)) return error;
    p.k_part = static_cast<int>(divide_up(divide_up(p.k, parts), GEMM_K) * GEMM_K);
    const dim3 grid(static_cast<unsigned>(divide_up(p.n, GEMM_TILE)), static_cast<unsigned>(divide_up(p.m, GEMM_TILE)),
                    static_cast<unsigned>(parts));
    gemm_kernel<a_transposed, b_transposed><<<grid, GEMM_THREADS, GEMM_MEMORY, stream>>>(p);
    return cudaGetLastError();
}

} // namespace aqlm_cuda
#endif
