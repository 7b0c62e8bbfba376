/* many_rows_work.cuh: what all of the kernel for many rows knows (many_rows.cuh): the problem, tilings, what a block
 * does, barriers. */
#ifndef AQLM_CUDA_PRODUCT_MANY_ROWS_WORK_CUH
#define AQLM_CUDA_PRODUCT_MANY_ROWS_WORK_CUH

#include "cuda/cluster.cuh"
#include "cuda/wgmma.cuh"

namespace aqlm_cuda {

constexpr int UNIT_COLUMNS = 256, CHUNKS = 4, CHUNK_COLUMNS = 64; /* of x's tiles in shared memory */

/* The shares of blocks in all runs of units, of which the first blocks have one more than others. A tile is runs of
 * `length` units, the last may have fewer. */
struct Shares {
    uint32_t runs, more;      /* of each block; blocks that have one more */
    uint32_t length, of_tile; /* units of a run, runs of a tile */
    __device__ uint32_t first_of(uint32_t block) const { return runs * block + min(block, more); }
    __device__ uint32_t owner_of(uint32_t run) const {
        const uint32_t of_more = more * (runs + 1);
        return run < of_more ? run / (runs + 1) : more + (run - of_more) / runs;
    }
};

struct ManyRowsProblem {
    void *y;
    const void *x;
    const unsigned char *codes;
    const void *codebooks, *scales, *bias;
    unsigned char *x_tiles; /* [row tiles][chunks of columns][N][128 bytes] */
    float4 *parts;          /* [blocks][2][N / 8][threads] */
    unsigned *arrived;      /* [tiles] blocks whose parts are there */
    long long *clocks;      /* [blocks][8] or NULL */
    int out, in, n_rows, entries;
    int tiles, row_tiles, units; /* tiles of y, along its rows alone; units of a tile */
    Shares shares;
};

__device__ inline void mbarrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}
__device__ inline void fetch_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
#endif
}
__device__ inline void sync_threads_of(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* N rows at a time, WARPGROUPS of 64 outputs; STAGES of x; codes of AHEAD units on the way to shared memory, or of one
 * to registers. ALIGNED: blocks' shares end where tiles do, as far as that is cheaper. EAGER: the kernel begins beside
 * the one that arranges x. SOONER: codes are asked for one chunk earlier. AT_ONCE fragments are added up at once. */
template <int N_, int WARPGROUPS_, int STAGES_, int AHEAD_ = 0, bool ALIGNED_ = (AHEAD_ > 0), bool EAGER_ = ALIGNED_,
          bool SOONER_ = false, int AT_ONCE_ = ALIGNED_ ? 8 : 1>
struct ManyRowsTiling {
    static constexpr int N = N_, WARPGROUPS = WARPGROUPS_, STAGES = STAGES_, AHEAD = AHEAD_, AT_ONCE = AT_ONCE_;
    static constexpr int FRAGMENTS = N / 8;
    static constexpr bool ALIGNED = ALIGNED_, EAGER = EAGER_, SOONER = SOONER_;
    /* Registers are dealt out by warpgroups: where they are short, the producer is one that gives its own up. */
    static constexpr bool REALLOCATES = N >= 128 || WARPGROUPS > 2;
    static constexpr int OF_CONSUMER = WARPGROUPS <= 2 ? 240 : WARPGROUPS == 3 ? 160 : 112; /* registers */
    static constexpr int OF_PRODUCER = WARPGROUPS == 3 ? 32 : 24;
    static constexpr int CONSUMERS = WARPGROUPS * 128, OUTS = WARPGROUPS * 64;
    static constexpr int THREADS = CONSUMERS + (REALLOCATES ? 128 : 32);
    static constexpr int STAGE_BYTES = N * 128; /* a chunk */

    /* Where barriers lie in shared memory, behind the stages; bytes of all. */
    static constexpr int FULL = STAGES * STAGE_BYTES, EMPTY = FULL + STAGES * 8, BYTES = EMPTY + STAGES * 8;
    static_assert(BYTES % 16 == 0); /* what follows is aligned */
};

template <int COUNT> __device__ inline void take_registers() {
#if AQLM_HAS_WGMMA
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT> __device__ inline void release_registers() {
#if AQLM_HAS_WGMMA
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

/* What a block does, segment after segment: units first .. last of a tile. */
struct Work {
    uint32_t tile, first, last, left; /* left: runs behind these */

    __device__ explicit Work(const ManyRowsProblem &p) {
        const uint32_t begin = p.shares.first_of(blockIdx.x);
        tile = begin / p.shares.of_tile, left = p.shares.first_of(blockIdx.x + 1) - begin;
        take(p, begin - tile * p.shares.of_tile);
    }
    /* Whether there is one more. */
    __device__ bool next(const ManyRowsProblem &p) {
        if (left == 0) return false;
        ++tile, take(p, 0);
        return true;
    }
    __device__ void take(const ManyRowsProblem &p, uint32_t run) {
        const uint32_t runs = min(left, p.shares.of_tile - run);
        first = run * p.shares.length, last = min(static_cast<uint32_t>(p.units), (run + runs) * p.shares.length);
        left -= runs;
    }
};

__device__ inline void clock_at(const ManyRowsProblem &p, int i) {
    if (p.clocks && threadIdx.x == 0) p.clocks[blockIdx.x * 8 + i] = clock64();
}

} // namespace aqlm_cuda
#endif
