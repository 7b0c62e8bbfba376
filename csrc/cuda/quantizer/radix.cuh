/* radix.cuh: a stable radix sort of (key, value) by 8 bits a pass, which does nothing where *skip. */
#ifndef AQLM_CUDA_QUANTIZER_RADIX_CUH
#define AQLM_CUDA_QUANTIZER_RADIX_CUH

#include "cuda/common.cuh"

namespace aqlm_cuda {

constexpr int DIGITS = 256, SORT_THREADS = 256, SORT_WARPS = SORT_THREADS / 32, SORT_STEPS = 16;
constexpr int SORT_TILE = SORT_THREADS * SORT_STEPS;

struct SortPass {
    const uint32_t *keys;
    const int32_t *values; /* NULL: their places */
    uint32_t *to_keys;
    int32_t *to_values;
    uint32_t *starts; /* [DIGITS, tiles] */
    uint32_t *totals; /* [DIGITS] */
    const int *skip;
    uint32_t flip; /* keys are read as key ^ flip: ~0 sorts downwards */
    int count, tiles, shift;

    __device__ uint32_t key(int i) const { return keys[i] ^ flip; }
    __device__ int digit(uint32_t key) const { return key >> shift & (DIGITS - 1); }
};

/* The sum of the values of the threads before this one, and of all. */
__device__ inline uint32_t exclusive_sum(uint32_t value, uint32_t &total) {
    __shared__ uint32_t sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    uint32_t sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += before;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    uint32_t base = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
        if (w < warp) base += sums[w];
        total += sums[w];
    }
    return base + sum - value;
}

static __global__ void __launch_bounds__(SORT_THREADS) count_digits(const SortPass s) {
    if (*s.skip) return;
    __shared__ uint32_t counts[DIGITS];
    counts[threadIdx.x] = 0;
    __syncthreads();
    const int begin = blockIdx.x * SORT_TILE;
    for (int step = 0; step < SORT_STEPS; ++step) {
        const int i = begin + step * SORT_THREADS + threadIdx.x;
        if (i < s.count) atomicAdd(&counts[s.digit(s.key(i))], 1u);
    }
    __syncthreads();
    s.starts[threadIdx.x * s.tiles + blockIdx.x] = counts[threadIdx.x];
}

/* A block for each digit: where its keys start in each tile, after those of the tiles before. */
static __global__ void __launch_bounds__(SORT_THREADS) sum_tiles(const SortPass s) {
    if (*s.skip) return;
    uint32_t *starts = s.starts + blockIdx.x * s.tiles, before = 0;
    for (int first = 0; first < s.tiles; first += SORT_THREADS) {
        const int tile = first + threadIdx.x;
        uint32_t total;
        const uint32_t sum = exclusive_sum(tile < s.tiles ? starts[tile] : 0, total);
        if (tile < s.tiles) starts[tile] = before + sum;
        before += total;
    }
    if (threadIdx.x == 0) s.totals[blockIdx.x] = before;
}

/* Warps take one part of a tile each, in their order, so that equal keys stay in theirs. */
static __global__ void __launch_bounds__(SORT_THREADS) move_keys(const SortPass s) {
    if (*s.skip) return;
    __shared__ uint32_t next[SORT_WARPS][DIGITS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int begin = blockIdx.x * SORT_TILE + warp * (SORT_TILE / SORT_WARPS);
    for (int w = 0; w < SORT_WARPS; ++w) next[w][threadIdx.x] = 0;
    uint32_t total, start = exclusive_sum(s.totals[threadIdx.x], total);
    uint32_t keys[SORT_STEPS], rank[SORT_STEPS];
#pragma unroll
    for (int step = 0; step < SORT_STEPS; ++step) {
        const int i = begin + step * 32 + lane;
        const bool in = i < s.count;
        keys[step] = in ? s.key(i) : 0;
        const uint32_t same = __match_any_sync(~0u, in ? s.digit(keys[step]) : DIGITS);
        const uint32_t before = same & ((1u << lane) - 1);
        uint32_t *at = &next[warp][s.digit(keys[step])];
        rank[step] = in ? *at + __popc(before) : 0;
        __syncwarp();
        if (in && before == 0) *at += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    start += s.starts[threadIdx.x * s.tiles + blockIdx.x];
    for (int w = 0; w < SORT_WARPS; ++w) {
        const uint32_t count = next[w][threadIdx.x];
        next[w][threadIdx.x] = start;
        start += count;
    }
    __syncthreads();
#pragma unroll
    for (int step = 0; step < SORT_STEPS; ++step) {
        const int i = begin + step * 32 + lane;
        if (i >= s.count) break;
        const uint32_t to = next[warp][s.digit(keys[step])] + rank[step];
        s.to_keys[to] = keys[step];
        s.to_values[to] = s.values ? s.values[i] : i;
    }
}

/* Two halves of memory that passes write in turn. */
struct Sort {
    uint32_t *keys[2];
    int32_t *values[2];
    uint32_t *starts, *totals;

    /* Sorts `count` keys of `bits`; the result is keys[h], values[h] of the half h that is returned. */
    int run(const void *from, int count, int bits, uint32_t flip, const int *skip, cudaStream_t stream) const {
        const int tiles = static_cast<int>(divide_up(count, SORT_TILE)), passes = static_cast<int>(divide_up(bits, 8));
        for (int pass = 0; pass < passes; ++pass) {
            const int to = pass % 2;
            SortPass s = {keys[1 - to], values[1 - to], keys[to], values[to], starts, totals, skip, 0,
                          count,        tiles,          pass * 8};
            if (pass == 0) s.keys = static_cast<const uint32_t *>(from), s.values = nullptr, s.flip = flip;
            count_digits<<<tiles, SORT_THREADS, 0, stream>>>(s);
            sum_tiles<<<DIGITS, SORT_THREADS, 0, stream>>>(s);
            move_keys<<<tiles, SORT_THREADS, 0, stream>>>(s);
        }
        return (passes - 1) % 2;
    }
};

} // namespace aqlm_cuda
#endif
