/* rates.cuh: what bounds the kernels: cycles that one multiprocessor takes for each instruction of theirs. */
#ifndef MANY_ROWS_RATES_CUH
#define MANY_ROWS_RATES_CUH

#include <cstdio>
#include <vector>

#include "cuda/product/many_rows.cuh"

namespace ladder {

constexpr int TIMES = 64;

/* m64 n N k16 with A in registers, 4 in a group; SUMS accumulators in turn. */
template <int N, int SUMS> __global__ void wgmma_rate(long long *cycles, float *out) {
#if AQLM_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char shared[];
    for (int i = threadIdx.x; i < N * 32; i += blockDim.x) reinterpret_cast<uint32_t *>(shared)[i] = 0;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const uint64_t rows = aqlm_cuda::wgmma_rows(static_cast<uint32_t>(__cvta_generic_to_shared(shared)));
    float c[SUMS][N / 2] = {};
    uint32_t a[4][4];
    for (auto &f : a)
        for (auto &v : f) v = threadIdx.x;
    const long long begin = clock64();
    for (int t = 0; t < TIMES; ++t) {
        aqlm_cuda::wgmma_fence();
#pragma unroll
        for (int s = 0; s < 4; ++s) aqlm_cuda::wgmma<__half, N>(c[s % SUMS], a[s], rows + s * 2);
        aqlm_cuda::wgmma_commit();
        aqlm_cuda::wgmma_wait<1>();
    }
    aqlm_cuda::wgmma_wait<0>();
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
    float sum = 0;
    for (auto &s : c)
        for (float v : s) sum += v;
    if (sum == 1) *out = sum;
#endif
}

/* mma.sync m16n8k16 with 8 independent accumulators. */
__global__ void mma_rate(long long *cycles, float *out) {
    float c[8][4] = {};
    const uint32_t v = threadIdx.x;
    __syncthreads();
    const long long begin = clock64();
    for (int t = 0; t < TIMES; ++t)
#pragma unroll
        for (auto &s : c) aqlm_cuda::mma_k16<__half>(s, v, v, v, v, v, v);
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
    float sum = 0;
    for (auto &s : c)
        for (float x : s) sum += x;
    if (sum == 1) *out = sum;
}

/* Entries at random by 16-byte loads, as the kernels gather them; `copies` of 8, else conflicts. */
__global__ void gather_rate(long long *cycles, float *out, int copies) {
    extern __shared__ __align__(1024) unsigned char shared[];
    for (int i = threadIdx.x; i < 16384; i += blockDim.x) reinterpret_cast<uint32_t *>(shared)[i] = 0;
    __syncthreads();
    const uint32_t bank = threadIdx.x % copies * 16;
    uint32_t code = threadIdx.x * 2654435761u;
    uint4 sum = {0, 0, 0, 0};
    const long long begin = clock64();
    for (int t = 0; t < TIMES; ++t) {
        uint4 v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] =
                *reinterpret_cast<const uint4 *>(shared + __byte_perm(code, bank, 0x7604 | i % 4 << 4) + i / 4 * 128);
        }
        code = code * 1664525 + 1013904223;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum.x ^= v[i].x, sum.y ^= v[i].y, sum.z ^= v[i].z, sum.w ^= v[i].w;
    }
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 1) *out = 1;
}

inline void print_rates() {
    long long *cycles;
    float *out;
    cudaMalloc(&cycles, 132 * 8), cudaMalloc(&out, 4);
    const auto run = [&](const char *what, auto kernel, int threads, int memory, double instructions, auto... more) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory);
        for (int i = 0; i < 2; ++i) kernel<<<132, threads, memory>>>(cycles, out, more...);
        std::vector<long long> host(132);
        const cudaError_t error = cudaMemcpy(host.data(), cycles, 132 * 8, cudaMemcpyDeviceToHost);
        std::printf("%-28s %4d threads: %7.2f cycles each%s\n", what, threads, host[7] / instructions,
                    error ? cudaGetErrorString(error) : "");
    };
    for (const int groups : {1, 2, 4}) {
        const int t = groups * 128;
        const double each = TIMES * 4.0 * groups;
        run("wgmma n16", wgmma_rate<16, 1>, t, 32768, each);
        run("wgmma n16, 2 sums", wgmma_rate<16, 2>, t, 32768, each);
        run("wgmma n16, 4 sums", wgmma_rate<16, 4>, t, 32768, each);
        run("wgmma n32", wgmma_rate<32, 1>, t, 32768, each);
        run("wgmma n32, 2 sums", wgmma_rate<32, 2>, t, 32768, each);
        run("wgmma n64", wgmma_rate<64, 1>, t, 32768, each);
        run("wgmma n128", wgmma_rate<128, 1>, t, 32768, each);
        if (groups < 4) run("wgmma n256", wgmma_rate<256, 1>, t, 32768, each);
    }
    for (const int warps : {4, 8, 16}) {
        run("mma.sync", mma_rate, warps * 32, 0, TIMES * 8.0 * warps);
        for (const int copies : {8, 4, 2, 1})
            run(("gathers, copies " + std::to_string(copies)).c_str(), gather_rate, warps * 32, 65536,
                TIMES * 8.0 * warps, copies);
    }
    cudaFree(cycles), cudaFree(out);
}

} // namespace ladder
#endif
