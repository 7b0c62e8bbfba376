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
    static_assert(L::STAGE_CHUNKS * B::PASSES % L::BATCH == 0 && STEPS / L::BATCH % 2 == 0);
    const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + B::BOOKS;
    Work<L> work(p);
    CodeStream<B, L> codes(p, stages + L::BYTES);
    uint32_t word[2][B::WORDS], next[2][B::WORDS], a[2][L::BATCH][4][4];
    typename B::Gathered e[L::BATCH];
    const int output =
        min((static_cast<int>(work.tile / p.row_tiles) * L::CLUSTER + codes.rank) * L::OUTS + codes.row, p.out - 1);
    prefetch(static_cast<const uint16_t *>(p.scales) + output);
    if (p.bias) prefetch(static_cast<const uint16_t *>(p.bias) + output);
    B::template fill<L::CONSUMERS>(shared, p);
    codes.load(word), codes.load(next);
    sync_threads_of(1, L::CONSUMERS);
    const uint32_t bank = B::bank();
#pragma unroll
    for (int i = 0; i < L::BATCH; ++i) B::gather(e[i], shared, p, word, i, bank), B::combine(a[0][i], e[i]);
    clock_at(p, 1);
    if constexpr (!L::SPLITS) wait_for_kernels_before();

    int stage = 0, last_stage = 0;
    uint32_t parity = 0;
    const auto release = [&](int which) {
        if constexpr (L::CLUSTER == 1) {
            if (threadIdx.x % 32 == 0) mbarrier_arrive(stages + L::EMPTY + which * 8);
        } else if (threadIdx.x % 32 < L::CLUSTER) mbarrier_arrive_at(stages + L::EMPTY + which * 8, threadIdx.x % 32);
    };
    const auto make_ends = [&] {
        if constexpr (L::SPLITS) return SplitEnds<T, L>{stages};
        else return Ends<T, L, (B::CODE == 1 && B::K <= 2)>();
    };
    auto ends = make_ends();
    do {
        float c[4 * L::FRAGMENTS];
#pragma unroll
        for (int i = 0; i < 4 * L::FRAGMENTS; ++i) c[i] = 0;
        for (uint32_t unit = work.first; unit < work.last; ++unit) {
#pragma unroll
            for (int s = 0; s < STEPS; s += L::BATCH) {
                const int i = s / B::PASSES % L::STAGE_CHUNKS, now = s / L::BATCH % 2;
                const bool begins = i == 0 && s % B::PASSES == 0; /* a stage */
                const auto gather = [&] {
#pragma unroll
                    for (int b = 0; b < L::BATCH; ++b) {
                        const int at = s + L::BATCH + b;
                        if (at < STEPS) B::gather(e[b], shared, p, word, at, bank);
                        else B::gather(e[b], shared, p, next, at - STEPS, bank);
                    }
                };
                if constexpr (L::EARLY) gather();
                if (begins) mbarrier_wait(stages + L::FULL + stage * 8, parity);
                wgmma_fence();
#pragma unroll
                for (int b = 0; b < L::BATCH; ++b) {
                    const int chunk = i + (s % B::PASSES + b) / B::PASSES;
                    const uint64_t rows = wgmma_rows(stages + stage * L::STAGE_BYTES + chunk * L::CHUNK_BYTES);
#pragma unroll
                    for (int step = 0; step < 4; ++step) wgmma<T, L::N>(c, a[now][b][step], rows + step * 2);
                }
                wgmma_commit();
                wgmma_wait<1>(); /* of the steps before */
                if (begins) {
                    if (s > 0 || unit > work.first) release(last_stage);
                    last_stage = stage;
                }
                if ((s + L::BATCH) % (L::STAGE_CHUNKS * B::PASSES) == 0 && ++stage == L::STAGES) stage = 0, parity ^= 1;
                if constexpr (!L::EARLY) gather();
#pragma unroll
                for (int b = 0; b < L::BATCH; ++b) B::combine(a[now ^ 1][b], e[b]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < B::WORDS; ++i) word[half][i] = next[half][i];
            codes.load(next);
        }
        wgmma_wait<0>();
        release(last_stage);
        clock_at(p, 2);
        ends.segment(p, c, work);
    } while (work.next(p));
    clock_at(p, 3);
    ends.block(p);
    clock_at(p, 4);
}

/* Of few rows, a block of the next launch fits beside one of this, and begins. */
template <class B, class L> constexpr int resident_blocks() {
    constexpr int BYTES = B::BOOKS + L::BYTES + CodeStream<B, L>::BYTES + 1024;
    return B::CODE == 1 && B::K <= 2 && L::N <= 32 && !L::REALLOCATES && !L::EARLY && 2 * BYTES <= 228 * 1024 ? 2 : 1;
}

template <class T, class B, class L>
__global__ void __launch_bounds__(L::THREADS, resident_blocks<B, L>()) many_rows_kernel(const ManyRowsProblem p) {
#if AQLM_HAS_WGMMA
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + B::BOOKS;
    clock_at(p, 0);
    if (threadIdx.x == L::CONSUMERS) {
        for (int i = 0; i < L::STAGES; ++i) {
            mbarrier_init(stages + L::FULL + i * 8, L::FILLERS);
            mbarrier_init(stages + L::EMPTY + i * 8, L::CONSUMERS / 32 * L::CLUSTER);
        }
        if constexpr (L::SPLITS) {
            mbarrier_init(stages + L::LEFT, L::CONSUMERS / 32 * p.split);
            mbarrier_init(stages + L::READ, L::CONSUMERS / 32 * p.split);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    if constexpr (L::CLUSTER > 1 || L::SPLITS) announce();
    if constexpr (L::SPLITS) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if constexpr (L::CLUSTER > 1 || L::SPLITS) await_others();
    if (__shfl_sync(~0u, threadIdx.x / 32, 0) >= L::CONSUMERS / 32) {
        if constexpr (L::REALLOCATES) release_registers<L::OF_PRODUCER>();
        wait_for_kernels_before();
        asm volatile("fence.proxy.async;" ::: "memory"); /* what they wrote is read by bulk copies */
        if constexpr (L::SPLITS) Filler<L>(p, stages).run(shared + B::BOOKS);
        else if (threadIdx.x == L::CONSUMERS) produce<L>(p, stages);
        __syncwarp();
    } else {
        if constexpr (L::REALLOCATES) take_registers<L::OF_CONSUMER>();
        consume<T, B, L>(p, shared);
    }
    if constexpr (L::CLUSTER > 1) announce(), await_others(); /* others may still write here */
#else
    __trap(); /* code for another GPU: sm_90a has wgmma */
#endif
}

/* How many tiles of n rows by `outs` outputs of each block of a cluster there are, clusters that share them, and bytes
 * of the workspace: x in tiles, parts, counters. */
struct ManyRowsCut {
    int64_t row_tiles, tiles, units, clusters, x_bytes, part_bytes, bytes;
    int64_t length, runs; /* units of a run, runs of all tiles */

    ManyRowsCut(int64_t out, int64_t in, int64_t n_rows, int n, int outs, int cluster, int64_t most_clusters) {
        row_tiles = divide_up(n_rows, n), units = divide_up(in, UNIT_COLUMNS);
        tiles = divide_up(out, outs * cluster) * row_tiles;
        length = best_length(n, outs, most_clusters);
        runs = tiles * divide_up(units, length), clusters = std::min(most_clusters, runs);
        x_bytes = row_tiles * units * CHUNKS * n * 128;
        part_bytes = most_clusters * cluster * 2 * n * outs * 4;
        bytes = x_bytes + part_bytes + tiles * cluster * 4;
    }

  private:
    /* Long runs leave some clusters with less to do, short ones more tiles to be added up: by cycles of a unit, and of
     * parts, which are written and read at what L2 delivers to a multiprocessor. */
    int64_t best_length(int n, int outs, int64_t most_clusters) const {
        const int64_t unit = std::max(1300, 18 * n), bytes_of_part = int64_t{n} * outs * 4, added = 2500;
        int64_t best = 1, least = INT64_MAX;
        for (int64_t parts = 1; parts <= units; ++parts) { /* of a tile */
            const int64_t run = divide_up(units, parts), of_tile = divide_up(units, run), all = tiles * of_tile;
            const int64_t most = divide_up(all, most_clusters);
            const bool aligned = most == 1 || (of_tile % most == 0 && all % most_clusters == 0);
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
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    int resident = device.sms;
    if (L::CLUSTER > 1)
        if (const cudaError_t error = resident_clusters<kernel>(resident, L::CLUSTER, L::THREADS, device)) return error;
    const ManyRowsCut cut(p.out, p.in, p.n_rows, L::N, L::OUTS, L::CLUSTER,
                          std::min(resident, device.sms / L::CLUSTER));
    p.x_tiles = static_cast<unsigned char *>(workspace);
    p.parts = reinterpret_cast<float4 *>(p.x_tiles + cut.x_bytes);
    p.arrived = reinterpret_cast<unsigned *>(p.x_tiles + cut.x_bytes + cut.part_bytes);
    p.counters = static_cast<int>(cut.tiles) * L::CLUSTER, p.row_tiles = static_cast<int>(cut.row_tiles);
    p.units = static_cast<int>(cut.units);
    p.shares = {static_cast<uint32_t>(cut.runs / cut.clusters), static_cast<uint32_t>(cut.runs % cut.clusters),
                static_cast<uint32_t>(cut.length), static_cast<uint32_t>(cut.runs / cut.tiles)};
    constexpr int64_t THREADS = 256;
    const auto arranging = static_cast<unsigned>(divide_up(cut.row_tiles * L::N * cut.units * 8, THREADS));
    if (const cudaError_t error =
            launch_early<arrange_rows_kernel<L::N, L::EAGER>>(p, dim3(arranging), 1, THREADS, 0, device, stream))
        return error;
    return launch_early<kernel>(p, dim3(static_cast<unsigned>(cut.clusters * L::CLUSTER)), L::CLUSTER, L::THREADS,
                                B::BOOKS + L::BYTES + CodeStream<B, L>::BYTES, device, stream);
}

/* Blocks that share a tile's units, and clusters of them. */
template <class T, class B, class L>
cudaError_t best_split(const ManyRowsProblem &p, int &split, int &clusters, const Device &device) {
    constexpr auto kernel = many_rows_kernel<T, B, L>;
    int64_t least = INT64_MAX;
    for (int size = 1; size <= std::min(MAX_CLUSTER, p.units); ++size) {
        int resident;
        if (const cudaError_t error = resident_clusters<kernel>(resident, size, L::THREADS, device)) return error;
        if (resident == 0) continue;
        const int64_t unit = std::max(1300, 30 * L::N), added = size > 1 ? 800 + 50 * size : 0;
        const int64_t cycles = divide_up(p.counters, resident) * (divide_up(p.units, size) * unit + added);
        if (cycles < least) least = cycles, split = size, clusters = std::min(resident, p.counters);
    }
    return cudaSuccess;
}

template <class T, class B, class L>
cudaError_t launch_split(ManyRowsProblem p, const Device &device, cudaStream_t stream) {
    constexpr auto kernel = many_rows_kernel<T, B, L>;
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    p.units = static_cast<int>(divide_up(p.in, UNIT_COLUMNS));
    p.row_tiles = static_cast<int>(divide_up(p.n_rows, L::N));
    p.counters = static_cast<int>(divide_up(p.out, L::OUTS)) * p.row_tiles;
    int clusters = 0;
    if (p.split > 0) {
        if (const cudaError_t error = resident_clusters<kernel>(clusters, p.split, L::THREADS, device)) return error;
        clusters = std::min(clusters, p.counters);
    } else if (const cudaError_t error = best_split<T, B, L>(p, p.split, clusters, device)) return error;
    return launch_early<kernel>(p, dim3(static_cast<unsigned>(clusters * p.split)), p.split, L::THREADS,
                                B::BOOKS + L::BYTES + CodeStream<B, L>::BYTES, device, stream);
}

} // namespace aqlm_cuda
#endif
