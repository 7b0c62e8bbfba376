/* many_rows_stages.cuh: x in the order of wgmma's B, on its way to stages in shared memory (many_rows.cuh). */
#ifndef AQLM_CUDA_PRODUCT_MANY_ROWS_STAGES_CUH
#define AQLM_CUDA_PRODUCT_MANY_ROWS_STAGES_CUH

#include "cuda/product/many_rows_work.cuh"

namespace aqlm_cuda {

/* One thread: x's stages, as the block's units need them. */
template <class L> __device__ void produce(const ManyRowsProblem &p, uint32_t stages) {
    int stage = 0;
    uint32_t parity = 1;
    Work<L> work(p);
    do {
        const unsigned char *from =
            p.x_tiles + (static_cast<size_t>(work.tile % p.row_tiles) * p.units + work.first) * CHUNKS * L::CHUNK_BYTES;
        for (uint32_t i = work.first * CHUNKS; i < work.last * CHUNKS; i += L::STAGE_CHUNKS, from += L::STAGE_BYTES) {
            const uint32_t full = stages + L::FULL + stage * 8;
            mbarrier_wait(stages + L::EMPTY + stage * 8, parity);
            expect_bytes(full, L::STAGE_BYTES);
            if constexpr (L::CLUSTER == 1) fetch_bulk(stages + stage * L::STAGE_BYTES, from, L::STAGE_BYTES, full);
            else fetch_into_all(stages + stage * L::STAGE_BYTES, from, L::STAGE_BYTES, L::CLUSTER, full);
            if (++stage == L::STAGES) stage = 0, parity ^= 1;
        }
    } while (work.next(p));
}

/* 16 bytes c of row n of a chunk, which lie at c ^ n % 8, hold numbers 2c and 2c + 1 of the 16 of each q: from v[q],
 * the first or second half of these. */
__device__ inline void arrange(uint4 *row, int n, int half, const uint4 (&v)[4]) {
    row[(half * 4 + 0) ^ n % 8] = {v[0].x, v[1].x, v[2].x, v[3].x};
    row[(half * 4 + 1) ^ n % 8] = {v[0].y, v[1].y, v[2].y, v[3].y};
    row[(half * 4 + 2) ^ n % 8] = {v[0].z, v[1].z, v[2].z, v[3].z};
    row[(half * 4 + 3) ^ n % 8] = {v[0].w, v[1].w, v[2].w, v[3].w};
}
__device__ inline void load_row(uint4 (&v)[4], const ManyRowsProblem &p, int n, int column) {
#pragma unroll
    for (int q = 0; q < 4; ++q, column += 64)
        v[q] = n < p.n_rows && column < p.in
                   ? __ldcg(reinterpret_cast<const uint4 *>(static_cast<const char *>(p.x) +
                                                            (static_cast<size_t>(n) * p.in + column) * 2))
                   : uint4{0, 0, 0, 0};
}

/* Stages of x that four warps arrange: how far they are. */
template <class L> struct Filler {
    static constexpr int AHEAD = L::N <= 16 ? 2 : 3; /* stages whose numbers are on the way to registers */
    static constexpr int REPEATS = L::N <= 64 ? 1 : L::N / 64;
    using Numbers = uint4[REPEATS][4];
    const ManyRowsProblem &p;
    const uint32_t stages;
    Work<L> work;
    uint32_t at; /* chunks of the tile */
    bool more = true;
    int stage = 0;
    uint32_t parity = 1;
    int half, chunk, n;

    __device__ Filler(const ManyRowsProblem &problem, uint32_t stages)
        : p(problem), stages(stages), work(problem), at(work.first * CHUNKS) {
        const int t = threadIdx.x - L::CONSUMERS; /* 8 write to different banks */
        half = t % 2, chunk = t / 8 % L::STAGE_CHUNKS, n = t / (8 * L::STAGE_CHUNKS) * 4 + t / 2 % 4;
    }
    /* What the thread has of the next stage. */
    __device__ void load(Numbers &v) {
        const uint32_t now = at + chunk;
#pragma unroll
        for (int i = 0; i < REPEATS; ++i)
            load_row(v[i], p, static_cast<int>(work.tile % p.row_tiles) * L::N + i * 64 + n,
                     now / CHUNKS * UNIT_COLUMNS + now % CHUNKS * 16 + half * 8);
        at += L::STAGE_CHUNKS;
        if (at < work.last * CHUNKS) return;
        more = work.next(p), at = work.first * CHUNKS;
    }
    __device__ void store(const Numbers &v, unsigned char *shared) {
        mbarrier_wait(stages + L::EMPTY + stage * 8, parity);
        unsigned char *const to = shared + stage * L::STAGE_BYTES + chunk * L::CHUNK_BYTES + n * 128;
#pragma unroll
        for (int i = 0; i < REPEATS; ++i) arrange(reinterpret_cast<uint4 *>(to + i * 64 * 128), n, half, v[i]);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        mbarrier_arrive(stages + L::FULL + stage * 8);
        if (++stage == L::STAGES) stage = 0, parity ^= 1;
    }
    __device__ void run(unsigned char *shared) {
        Numbers v[AHEAD];
        bool loaded[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD - 1; ++i)
            if ((loaded[i] = more)) load(v[i]);
        for (;;) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                constexpr int LAST = AHEAD - 1;
                if ((loaded[(i + LAST) % AHEAD] = more)) load(v[(i + LAST) % AHEAD]);
                if (!loaded[i]) return;
                store(v[i], shared);
            }
        }
    }
};

/* x in the order of wgmma's B, tile after tile, and no parts that have arrived. */
template <int N, bool EAGER> __global__ void arrange_rows_kernel(const ManyRowsProblem p) {
#if __CUDA_ARCH__ >= 900
    if constexpr (EAGER) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    wait_for_kernels_before();
    const int per_row = p.units * 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    for (int t = index; t < p.counters; t += gridDim.x * blockDim.x) p.arrived[t] = 0;
    const int n = index / per_row, at = index % per_row, unit = at / 8, chunk = at / 2 % 4, half = at % 2;
    if (n >= p.row_tiles * N) return;
    uint4 v[4];
    load_row(v, p, n, unit * UNIT_COLUMNS + chunk * 16 + half * 8);
    const size_t row = (static_cast<size_t>(n / N) * p.units * CHUNKS + unit * CHUNKS + chunk) * N + n % N;
    arrange(reinterpret_cast<uint4 *>(p.x_tiles + row * 128), n, half, v);
}

} // namespace aqlm_cuda
#endif
