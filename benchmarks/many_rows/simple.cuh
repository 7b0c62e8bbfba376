/* simple.cuh: the first rungs of the ladder (2x8g8, fp16): a thread for each number of y; W in shared memory; fragments
 * from gathered entries. */
#ifndef MANY_ROWS_SIMPLE_CUH
#define MANY_ROWS_SIMPLE_CUH

#include <mma.h>

#include "cuda/product/many_rows.cuh"

namespace ladder {

using aqlm_cuda::ManyRowsProblem;

/* 0: a thread for each number of y. */
__global__ void naive_kernel(const ManyRowsProblem p) {
    const int o = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (o >= p.out) return;
    const auto *x = static_cast<const __half *>(p.x) + static_cast<size_t>(n) * p.in;
    const auto *books = static_cast<const __half *>(p.codebooks);
    float sum = 0;
    for (int j = 0; j < p.in / 8; ++j) {
        const unsigned char *code = p.codes + (static_cast<size_t>(o) * (p.in / 8) + j) * 2;
        for (int i = 0; i < 8; ++i)
            sum += __half2float(x[j * 8 + i]) *
                   (__half2float(books[code[0] * 8 + i]) + __half2float(books[(256 + code[1]) * 8 + i]));
    }
    static_cast<__half *>(p.y)[static_cast<size_t>(n) * p.out + o] =
        __float2half(sum * __half2float(static_cast<const __half *>(p.scales)[o]));
}

/* 1: tiles of 64 outputs by 64 rows; 64 columns of W and x at a time go through shared memory. */
__global__ void __launch_bounds__(256) shared_kernel(const ManyRowsProblem p) {
    using namespace nvcuda::wmma;
    constexpr int WIDTH = 72; /* of a row in shared memory, padded against conflicts */
    __shared__ __align__(16) uint4 books[512];
    __shared__ __align__(16) __half w[64 * WIDTH], x[64 * WIDTH];
    __shared__ float y[64 * 68];
    const int o = blockIdx.x * 64, n = blockIdx.y * 64, warp = threadIdx.x / 32;
    for (int i = threadIdx.x; i < 512; i += 256) books[i] = static_cast<const uint4 *>(p.codebooks)[i];
    fragment<accumulator, 16, 16, 16, float> c[2];
    fill_fragment(c[0], 0.f), fill_fragment(c[1], 0.f);
    for (int column = 0; column < p.in; column += 64) {
        __syncthreads();
        for (int i = threadIdx.x; i < 512; i += 256) {
            const int row = i / 8, group = i % 8;
            const auto *code = p.codes + (static_cast<size_t>(min(o + row, p.out - 1)) * p.in + column) / 4 + group * 2;
            *reinterpret_cast<uint4 *>(w + row * WIDTH + group * 8) =
                aqlm_cuda::add_pairs<__half>(books[code[0]], books[256 + code[1]]);
            *reinterpret_cast<uint4 *>(x + row * WIDTH + group * 8) =
                n + row < p.n_rows
                    ? *reinterpret_cast<const uint4 *>(static_cast<const __half *>(p.x) +
                                                       static_cast<size_t>(n + row) * p.in + column + group * 8)
                    : uint4{0, 0, 0, 0};
        }
        __syncthreads();
        for (int k = 0; k < 64; k += 16) {
            fragment<matrix_a, 16, 16, 16, __half, row_major> a;
            load_matrix_sync(a, w + warp / 2 * 16 * WIDTH + k, WIDTH);
            for (int j = 0; j < 2; ++j) {
                fragment<matrix_b, 16, 16, 16, __half, col_major> b;
                load_matrix_sync(b, x + (warp % 2 * 2 + j) * 16 * WIDTH + k, WIDTH);
                mma_sync(c[j], a, b, c[j]);
            }
        }
    }
    for (int j = 0; j < 2; ++j)
        store_matrix_sync(y + (warp % 2 * 2 + j) * 16 * 68 + warp / 2 * 16, c[j], 68, mem_col_major);
    __syncthreads();
    for (int i = threadIdx.x; i < 4096; i += 256)
        if (const int row = n + i / 64, out = o + i % 64; row < p.n_rows && out < p.out)
            static_cast<__half *>(p.y)[static_cast<size_t>(row) * p.out + out] =
                __float2half(y[i / 64 * 68 + i % 64] * __half2float(static_cast<const __half *>(p.scales)[out]));
}

/* 2: a block for 16 outputs and 32 rows; its warps take 32 columns in turn. A gathered entry is a lane's part of two
 * fragments, x comes from L1. */
__global__ void __launch_bounds__(256) fragments_kernel(const ManyRowsProblem p) {
    extern __shared__ __align__(16) unsigned char books[]; /* [256][2][8 copies] entries */
    __shared__ float sums[8][16 * 32];
    for (int i = threadIdx.x; i < 4096; i += 256)
        reinterpret_cast<uint4 *>(books)[i / 8 % 256 * 16 + i / 2048 * 8 + i % 8] =
            __ldg(static_cast<const uint4 *>(p.codebooks) + i / 8);
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
    const int o = blockIdx.x * 16, n = blockIdx.y * 32;
    const uint32_t bank = lane % 8 * 16;
    float c[4][4] = {};
    for (int column = warp * 32; column < p.in; column += 256) {
        uint4 e[2];
        for (int half = 0; half < 2; ++half) {
            const uint32_t code = *reinterpret_cast<const uint16_t *>(
                p.codes + static_cast<size_t>(min(o + r + 8 * half, p.out - 1)) * p.in / 4 + column / 4 + q * 2);
            e[half] =
                aqlm_cuda::add_pairs<__half>(*reinterpret_cast<const uint4 *>(books + (code & 255) * 256 + bank),
                                             *reinterpret_cast<const uint4 *>(books + (code >> 8) * 256 + 128 + bank));
        }
        for (int j = 0; j < 4; ++j) {
            const int row = n + j * 8 + r;
            const uint4 x =
                row < p.n_rows
                    ? __ldg(reinterpret_cast<const uint4 *>(static_cast<const __half *>(p.x) +
                                                            static_cast<size_t>(row) * p.in + column + q * 8))
                    : uint4{0, 0, 0, 0};
            aqlm_cuda::mma_k16<__half>(c[j], e[0].x, e[1].x, e[0].y, e[1].y, x.x, x.y);
            aqlm_cuda::mma_k16<__half>(c[j], e[0].z, e[1].z, e[0].w, e[1].w, x.z, x.w);
        }
    }
    for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) sums[warp][(j * 8 + 2 * q + i % 2) * 16 + r + i / 2 * 8] = c[j][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 512; i += 256) {
        float total = 0;
        for (int w = 0; w < 8; ++w) total += sums[w][i];
        const int row = n + i / 16, out = o + i % 16;
        if (row < p.n_rows && out < p.out)
            static_cast<__half *>(p.y)[static_cast<size_t>(row) * p.out + out] =
                __float2half(total * __half2float(static_cast<const __half *>(p.scales)[out]));
    }
}

/* 4: outputs first .. first + outs of W, scaled, for cuBLAS; as many blocks as there are of it. */
template <class T>
__global__ void __launch_bounds__(512) decode_some_kernel(const ManyRowsProblem p, T *w, int first, int outs) {
    extern __shared__ __align__(16) unsigned char books[]; /* [256][2][8 copies] entries */
    for (int i = threadIdx.x; i < 4096; i += 512)
        reinterpret_cast<uint4 *>(books)[i / 8 % 256 * 16 + i / 2048 * 8 + i % 8] =
            __ldg(static_cast<const uint4 *>(p.codebooks) + i / 8);
    __syncthreads();
    const uint32_t bank = threadIdx.x % 8 * 16;
    const int groups = p.in / 8, per_row = groups / 8; /* a thread decodes 8 groups, lanes in turn */
    const int warps = gridDim.x * 16, lane = threadIdx.x % 32, parts = (per_row + 31) / 32; /* of 256 groups */
    for (int at = blockIdx.x * 16 + threadIdx.x / 32; at < outs * parts; at += warps) {
        const int o = at / parts, group = at % parts * 256 + lane;
        const float scale = static_cast<float>(static_cast<const T *>(p.scales)[first + o]);
        const auto *from = reinterpret_cast<const uint16_t *>(p.codes) + static_cast<size_t>(first + o) * groups;
        uint32_t code[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) code[i] = group + i * 32 < groups ? __ldg(from + group + i * 32) : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (group + i * 32 >= groups) break;
            const uint4 a = *reinterpret_cast<const uint4 *>(books + __byte_perm(code[i], bank, 0x7604));
            const uint4 b = *reinterpret_cast<const uint4 *>(books + __byte_perm(code[i], bank, 0x7614) + 128);
            uint4 sum;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                using P = typename aqlm_cuda::Pair<T>;
                const float2 u = P::to_float2(reinterpret_cast<const typename P::type *>(&a)[k]);
                const float2 v = P::to_float2(reinterpret_cast<const typename P::type *>(&b)[k]);
                reinterpret_cast<typename P::type *>(&sum)[k] =
                    P::from_floats((u.x + v.x) * scale, (u.y + v.y) * scale);
            }
            reinterpret_cast<uint4 *>(w)[static_cast<size_t>(o) * groups + group + i * 32] = sum;
        }
    }
}

inline cudaError_t run_simple(int rung, const ManyRowsProblem &p, cudaStream_t stream) {
    const auto up = [](int a, int b) { return static_cast<unsigned>((a + b - 1) / b); };
    if (rung == 0) naive_kernel<<<dim3(up(p.out, 128), p.n_rows), 128, 0, stream>>>(p);
    if (rung == 1) shared_kernel<<<dim3(up(p.out, 64), up(p.n_rows, 64)), 256, 0, stream>>>(p);
    if (rung == 2) {
        cudaFuncSetAttribute(fragments_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
        fragments_kernel<<<dim3(up(p.out, 16), up(p.n_rows, 32)), 256, 65536, stream>>>(p);
    }
    return cudaGetLastError();
}

} // namespace ladder
#endif
