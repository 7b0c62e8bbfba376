/* many_rows_stages.cuh: x in the order of wgmma's B, on its way to stages in shared memory (many_rows.cuh). */
#ifndef AQLM_CUDA_PRODUCT_MANY_ROWS_STAGES_CUH
#define AQLM_CUDA_PRODUCT_MANY_ROWS_STAGES_CUH

#include "cuda/product/many_rows_work.cuh"

namespace aqlm_cuda {

/* One thread: x's stages, as the block's units need them. */
template <class L> __device__ void produce(const ManyRowsProblem &p, uint32_t stages) {
    int stage = 0;
    uint32_t parity = 1;
    Work work(p);
    do {
        const unsigned char *from =
            p.x_tiles + (static_cast<size_t>(work.tile % p.row_tiles) * p.units + work.first) * CHUNKS * L::STAGE_BYTES;
        for (uint32_t i = work.first * CHUNKS; i < work.last * CHUNKS; ++i, from += L::STAGE_BYTES) {
            const uint32_t full = stages + L::FULL + stage * 8;
            mbarrier_wait(stages + L::EMPTY + stage * 8, parity);
            expect_bytes(full, L::STAGE_BYTES);
            fetch_bulk(stages + stage * L::STAGE_BYTES, from, L::STAGE_BYTES, full);
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

/* x in the order of wgmma's B, tile after tile, and no parts that have arrived. */
template <int N, bool EAGER> __global__ void arrange_rows_kernel(const ManyRowsProblem p) {
#if __CUDA_ARCH__ >= 900
    if constexpr (EAGER) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    wait_for_kernels_before();
    const int per_row = p.units * 8, index = blockIdx.x * blockDim.x + threadIdx.x;
    for (int t = index; t < p.tiles; t += gridDim.x * blockDim.x) p.arrived[t] = 0;
    const int n = index / per_row, at = index % per_row, unit = at / 8, chunk = at / 2 % 4, half = at % 2;
    if (n >= p.row_tiles * N) return;
    uint4 v[4];
    load_row(v, p, n, unit * UNIT_COLUMNS + chunk * 16 + half * 8);
    const size_t row = (static_cast<size_t>(n / N) * p.units * CHUNKS + unit * CHUNKS + chunk) * N + n % N;
    arrange(reinterpret_cast<uint4 *>(p.x_tiles + row * 128), n, half, v);
}

} // namespace aqlm_cuda
#endif
