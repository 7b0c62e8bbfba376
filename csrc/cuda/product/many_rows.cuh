/* many_rows.cuh: many rows of x at once: entries gathered into registers are the A operand of wgmma, rows of x are B in
 * shared memory (sm_90a).
 *
 * A unit of work is 64 outputs for each warpgroup by 256 inputs. Lane (r, q) of a warp holds outputs 2r and 2r + 1 of
 * 16 and inputs 64q .. 64q + 63 of a unit, whose codes lie together: columns of x are in an order for which the lane's
 * 16 inputs of a chunk are its fragments of four instructions. So each weight is decoded once for all rows. Blocks take
 * equal shares of all units, one after the other; sums of outputs that several blocks share go through the workspace,
 * and each of these blocks finishes a part of them, always adding in the same order. What it takes, what bounds it and
 * what did not pay: docs/results.md, "Many rows on an H200". */
#ifndef AQLM_CUDA_PRODUCT_MANY_ROWS_CUH
#define AQLM_CUDA_PRODUCT_MANY_ROWS_CUH

#include "cuda/launch.cuh"
#include "cuda/product/many_rows_codes.cuh"
#include "cuda/product/many_rows_stages.cuh"
#include "cuda/product/many_rows_sums.cuh"

namespace aqlm_cuda {

/* Two of a thread's outputs, by wgmma: entries of the next chunk are gathered while fragments of the last are
 * multiplied. */
template <class T, class B, class L>
__device__ __forceinline__ void consume(const ManyRowsProblem &p, unsigned char *shared) {
    constexpr int STEPS = CHUNKS * B::PASSES;
    const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + B::BOOKS;
    Work work(p);
    CodeStream<B, L> codes(p, stages + L::BYTES);
    uint32_t word[2][B::WORDS], next[2][B::WORDS], a[2][4][4];
    typename B::Gathered e;
    if constexpr (!codes.COPIES) codes.load(word), codes.load(next);
    const int output = min(static_cast<int>(work.tile / p.row_tiles) * L::OUTS + codes.row, p.out - 1);
    prefetch(static_cast<const uint16_t *>(p.scales) + output);
    if (p.bias) prefetch(static_cast<const uint16_t *>(p.bias) + output);
    B::template fill<L::CONSUMERS>(shared, p);
    if constexpr (codes.COPIES) codes.load(word), codes.load(next);
    sync_threads_of(1, L::CONSUMERS);
    const uint32_t bank = B::bank();
    B::gather(e, shared, p, word, 0, bank), B::combine(a[0], e);
    clock_at(p, 1);
    wait_for_kernels_before();

    int stage = 0, last_stage = 0;
    uint32_t parity = 0;
    const auto release = [&] {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(stages + L::EMPTY + last_stage * 8);
    };
    const auto advance = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < B::WORDS; ++i) word[half][i] = next[half][i];
        codes.load(next);
    };
    Ends<T, L, L::ALIGNED && B::CODE == 1 && B::K <= 2> ends;
    do {
        float c[4 * L::FRAGMENTS];
#pragma unroll
        for (int i = 0; i < 4 * L::FRAGMENTS; ++i) c[i] = 0;
        for (uint32_t unit = work.first; unit < work.last; ++unit) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const bool begins = s % B::PASSES == 0; /* a stage */
                if (begins) mbarrier_wait(stages + L::FULL + stage * 8, parity);
                const uint64_t rows = wgmma_rows(stages + stage * L::STAGE_BYTES);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 4; ++step) wgmma<T, L::N>(c, a[s % 2][step], rows + step * 2);
                wgmma_commit();
                wgmma_wait<1>(); /* of the step before */
                if (begins) {
                    if (s > 0 || unit > work.first) release();
                    last_stage = stage;
                }
                if (s % B::PASSES == B::PASSES - 1 && ++stage == L::STAGES) stage = 0, parity ^= 1;
                if (L::SOONER && s == STEPS - 1) advance();
                if (s < STEPS - 1) B::gather(e, shared, p, word, s + 1, bank);
                else B::gather(e, shared, p, L::SOONER ? word : next, 0, bank);
                B::combine(a[(s + 1) % 2], e);
            }
            if constexpr (!L::SOONER) advance();
        }
        wgmma_wait<0>();
        release();
        clock_at(p, 2);
        ends.segment(p, c, work);
    } while (work.next(p));
    clock_at(p, 3);
    ends.block(p);
    clock_at(p, 4);
}

template <class T, class B, class L>
__global__ void __launch_bounds__(L::THREADS, 1) many_rows_kernel(const ManyRowsProblem p) {
#if AQLM_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + B::BOOKS;
    clock_at(p, 0);
    if (threadIdx.x == L::CONSUMERS) {
        for (int i = 0; i < L::STAGES; ++i) {
            mbarrier_init(stages + L::FULL + i * 8, 1);
            mbarrier_init(stages + L::EMPTY + i * 8, L::CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if (__shfl_sync(~0u, threadIdx.x / 32, 0) >= L::CONSUMERS / 32) {
        if constexpr (L::REALLOCATES) release_registers<L::OF_PRODUCER>();
        wait_for_kernels_before();
        asm volatile("fence.proxy.async;" ::: "memory"); /* what they wrote is read by bulk copies */
        if (threadIdx.x == L::CONSUMERS) produce<L>(p, stages);
    } else {
        if constexpr (L::REALLOCATES) take_registers<L::OF_CONSUMER>();
        consume<T, B, L>(p, shared);
    }
#else
    __trap(); /* code for another GPU: sm_90a has wgmma */
#endif
}

/* How many tiles of n rows by `outs` outputs there are, blocks that share them in runs of units, and bytes of the
 * workspace: x in tiles, parts, counters. */
struct ManyRowsCut {
    int64_t row_tiles, tiles, units, length = 1, runs, blocks, x_bytes, part_bytes, bytes;

    ManyRowsCut(const ManyRowsProblem &p, int n, int outs, bool aligned, int64_t most_blocks) {
        row_tiles = divide_up(p.n_rows, n), units = divide_up(p.in, UNIT_COLUMNS);
        tiles = divide_up(p.out, outs) * row_tiles;
        if (aligned) length = best_length(n, outs, most_blocks);
        runs = tiles * divide_up(units, length), blocks = std::min(most_blocks, runs);
        x_bytes = row_tiles * units * CHUNKS * n * 128;
        part_bytes = blocks * 2 * n * outs * 4;
        bytes = x_bytes + part_bytes + tiles * 4;
    }

  private:
    /* Long runs leave some blocks with less to do, short ones more tiles to be added up: by cycles of a unit, and of
     * parts, which are written and read at what L2 delivers to a multiprocessor. */
    int64_t best_length(int n, int outs, int64_t most_blocks) const {
        const int64_t unit = std::max(1300, 18 * n), bytes_of_part = int64_t{n} * outs * 4, added = 2500;
        int64_t best = 1, least = INT64_MAX;
        for (int64_t parts = 1; parts <= units; ++parts) { /* of a tile */
            const int64_t run = divide_up(units, parts), of_tile = divide_up(units, run), all = tiles * of_tile;
            const int64_t most = divide_up(all, most_blocks);
            const bool aligned = most == 1 || (of_tile % most == 0 && all % most_blocks == 0);
            const int64_t segments = of_tile == 1 ? 0 : aligned ? 1 : 2; /* whose sums others add to */
            const int64_t cycles = most * run * unit + (segments > 0) * added + segments * 2 * bytes_of_part / 24;
            if (cycles < least) least = cycles, best = run;
        }
        return best;
    }
};

template <class T, class B, class L>
cudaError_t launch_many_rows(ManyRowsProblem p, void *workspace, const Device &device, cudaStream_t stream) {
    constexpr auto kernel = many_rows_kernel<T, B, L>;
    const ManyRowsCut cut(p, L::N, L::OUTS, L::ALIGNED, device.sms);
    p.x_tiles = static_cast<unsigned char *>(workspace);
    p.parts = reinterpret_cast<float4 *>(p.x_tiles + cut.x_bytes);
    p.arrived = reinterpret_cast<unsigned *>(p.x_tiles + cut.x_bytes + cut.part_bytes);
    p.tiles = static_cast<int>(cut.tiles), p.row_tiles = static_cast<int>(cut.row_tiles);
    p.units = static_cast<int>(cut.units);
    p.shares = {static_cast<uint32_t>(cut.runs / cut.blocks), static_cast<uint32_t>(cut.runs % cut.blocks),
                static_cast<uint32_t>(cut.length), static_cast<uint32_t>(cut.runs / cut.tiles)};
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    constexpr int64_t THREADS = 256;
    const auto arranging = static_cast<unsigned>(divide_up(cut.row_tiles * L::N * cut.units * 8, THREADS));
    if (const cudaError_t error =
            launch_early<arrange_rows_kernel<L::N, L::EAGER>>(p, dim3(arranging), 1, THREADS, 0, device, stream))
        return error;
    return launch_early<kernel>(p, dim3(static_cast<unsigned>(cut.blocks)), 1, L::THREADS,
                                B::BOOKS + L::BYTES + CodeStream<B, L>::BYTES, device, stream);
}

} // namespace aqlm_cuda
#endif
