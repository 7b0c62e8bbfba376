/* shards.cuh: a row of x by a codebook too large for one block's shared memory (16-bit floats, K = 1, B > 13, g = 8,
 * og = 1).
 *
 * Gathered from L2, each entry of 16 bytes moves a sector of 32, and that is the bound. Here each block holds a
 * shard of the codebook in shared memory and reads all codes of its outputs, as the blocks with the other shards do.
 * Only the lanes whose code lies in the shard load (a gather of few lanes costs few cycles); the others hold zeros. A
 * second kernel adds up the shards. Fragments and warps as in gather.cuh. */
#ifndef AQLM_CUDA_SHARDS_CUH
#define AQLM_CUDA_SHARDS_CUH

#include "cuda/cluster.cuh"
#include "cuda/gather.cuh"

namespace aqlm_cuda {

struct ShardProblem {
    GatherProblem g;
    float *workspace;  /* [shards, out] */
    int shards, shard; /* their number; entries of each */
};

constexpr int SHARD_TILES = 16;                                /* tiles of 16 outputs between two sums over the warps */
constexpr int SHARD_PARTS = SHARD_TILES * GATHER_WARPS * TILE; /* floats */

/* Entry e of the `count` at `base` in shared memory, zeros if it has none. */
__device__ inline uint4 load_if_below(uint32_t e, uint32_t count, uint32_t base) {
    uint4 v = {0, 0, 0, 0};
    asm volatile("{ .reg .pred below;\n"
                 "setp.lt.u32 below, %4, %5;\n"
                 "@below ld.shared.v4.u32 {%0,%1,%2,%3}, [%6]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "r"(e), "r"(count), "r"(base + e * 16));
    return v;
}

template <class T> __global__ void __launch_bounds__(32 * GATHER_WARPS, 1) shard_kernel(const ShardProblem problem) {
    using L = Lane<1, 2>;
    constexpr int BLOCK_GROUPS = GATHER_WARPS * L::SLAB;
    const GatherProblem &p = problem.g;
    const int shard = problem.shard, first_entry = blockIdx.y * shard;
    extern __shared__ __align__(1024) unsigned char shared[];
    auto *const parts = reinterpret_cast<float *>(shared + shard * 16); /* [SHARD_TILES][GATHER_WARPS][TILE] */
    float *const sums = problem.workspace + static_cast<size_t>(blockIdx.y) * p.out;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    wait_for_kernels_before();

    const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), mask = p.entries - 1;
    for (int i = threadIdx.x; i < shard; i += 32 * GATHER_WARPS)
        if (first_entry + i < p.entries)
            reinterpret_cast<uint4 *>(shared)[i] = __ldg(static_cast<const uint4 *>(p.codebooks) + first_entry + i);

    const int all = (p.out + TILE - 1) / TILE;
    const int first = static_cast<int>(static_cast<int64_t>(all) * blockIdx.x / gridDim.x);
    const int tiles = static_cast<int>(static_cast<int64_t>(all) * (blockIdx.x + 1) / gridDim.x) - first;
    const size_t row_bytes = static_cast<size_t>(p.groups) * 2;
    for (int block_group = 0; block_group < p.groups; block_group += BLOCK_GROUPS) {
        const int group = block_group + (warp * 4 + quad) * L::GROUPS;
        const bool idle = block_group + warp * L::SLAB >= p.groups; /* this warp has no groups */
        uint4 x[L::GROUPS];
#pragma unroll
        for (int i = 0; i < L::GROUPS; ++i)
            x[i] =
                row == 0 && group < p.groups ? __ldg(static_cast<const uint4 *>(p.x) + group + i) : uint4{0, 0, 0, 0};
        const unsigned char *codes = p.codes + (group < p.groups ? group * 2 : 0);
        uint32_t next[2][2][L::WORDS];
        const auto load = [&](uint32_t (&to)[2][L::WORDS], int tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                load_words(to[half], codes + min((first + tile) * TILE + 8 * half + row, p.out - 1) * row_bytes);
        };
        load(next[0], 0), load(next[1], 1);
        if (block_group == 0) __syncthreads(); /* codebooks */
        for (int tile = 0; tile < tiles; ++tile) {
            uint32_t word[2][L::WORDS];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < L::WORDS; ++i)
                    word[half][i] = next[0][half][i], next[0][half][i] = next[1][half][i];
            load(next[1], tile + 2);
            float c[4][4] = {};
            if (!idle) {
#pragma unroll
                for (int i = 0; i < L::GROUPS; ++i) {
                    uint4 entry[2];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t w = word[half][i / 2];
                        const uint32_t e = ((i % 2 ? w >> 16 : w) & mask) - first_entry;
                        entry[half] = load_if_below(e, shard, base);
                    }
                    const int s = i % 2 * 2;
                    mma_k16<T>(c[s], entry[0].x, entry[1].x, entry[0].y, entry[1].y, x[i].x, x[i].y);
                    mma_k16<T>(c[s + 1], entry[0].z, entry[1].z, entry[0].w, entry[1].w, x[i].z, x[i].w);
                }
            }
            const int place = tile % SHARD_TILES;
            if (quad == 0) {
                float *const mine = parts + (place * GATHER_WARPS + warp) * TILE + row;
                mine[0] = (c[0][0] + c[1][0]) + (c[2][0] + c[3][0]);
                mine[8] = (c[0][2] + c[1][2]) + (c[2][2] + c[3][2]);
            }
            if (place == SHARD_TILES - 1 || tile == tiles - 1) {
                __syncthreads();
                const int of = threadIdx.x / TILE, o = (first + tile - place + of) * TILE + threadIdx.x % TILE;
                if (of <= place && o < p.out) {
                    float total = block_group > 0 ? sums[o] : 0;
#pragma unroll
                    for (int w = 0; w < GATHER_WARPS; ++w)
                        total += parts[(of * GATHER_WARPS + w) * TILE + threadIdx.x % TILE];
                    sums[o] = total;
                }
                __syncthreads();
            }
        }
    }
}

template <class T> __global__ void sum_shards_kernel(const ShardProblem problem) {
    const GatherProblem &p = problem.g;
    wait_for_kernels_before();
    const int o = blockIdx.x * blockDim.x + threadIdx.x;
    if (o >= p.out) return;
    float total = 0;
    for (int shard = 0; shard < problem.shards; ++shard)
        total += problem.workspace[static_cast<size_t>(shard) * p.out + o];
    total *= static_cast<float>(static_cast<const T *>(p.scales)[o]);
    if (p.bias) total += static_cast<float>(static_cast<const T *>(p.bias)[o]);
    static_cast<T *>(p.y)[o] = static_cast<T>(total);
}

inline int number_of_shards(int64_t entries, const Device &device) {
    return static_cast<int>(divide_up(entries * 16, device.shared_memory - SHARD_PARTS * 4));
}

template <class T>
cudaError_t launch_shard_kernel(const GatherProblem &g, float *workspace, const Device &device, cudaStream_t stream) {
    constexpr auto kernel = shard_kernel<T>;
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    const int shards = number_of_shards(g.entries, device);
    const ShardProblem p = {g, workspace, shards, static_cast<int>(divide_up(g.entries, shards))};
    const auto parts = static_cast<unsigned>(std::min<int64_t>(device.sms / shards, divide_up(g.out, TILE)));
    if (const cudaError_t error = launch_early<kernel>(p, dim3(parts, shards), 1, 32 * GATHER_WARPS,
                                                       p.shard * 16 + SHARD_PARTS * 4, device, stream))
        return error;
    constexpr int THREADS = 256;
    return launch_early<sum_shards_kernel<T>>(p, dim3(static_cast<unsigned>(divide_up(g.out, THREADS))), 1, THREADS, 0,
                                              device, stream);
}

} // namespace aqlm_cuda
#endif
