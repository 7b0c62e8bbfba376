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

#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/wgmma.cuh"

namespace aqlm_cuda {

constexpr int UNIT_COLUMNS = 256, CHUNKS = 4, CHUNK_COLUMNS = 64; /* of x's tiles in shared memory */

/* The shares of clusters in all runs of units, of which the first clusters have one more than others. A tile is runs of
 * `length` units, the last may have fewer. */
struct Shares {
    uint32_t runs, more;      /* of each cluster; clusters that have one more */
    uint32_t length, of_tile; /* units of a run, runs of a tile */
    __device__ uint32_t first_of(uint32_t cluster) const { return runs * cluster + min(cluster, more); }
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
    unsigned *arrived;      /* [tiles][blocks of a cluster] blocks whose parts are there */
    long long *clocks;      /* [blocks][8] or NULL */
    int out, in, n_rows, entries;
    int counters, row_tiles, units; /* tiles of y and blocks of clusters; tiles along its rows; units of a tile */
    int split;                      /* blocks of a cluster that share a tile's units */
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
/* What other blocks of the cluster wrote is read after it. */
__device__ inline void mbarrier_wait_for_all(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}
/* On the barrier of block `rank` of the cluster. */
__device__ inline void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .u32 at;\n"
                 "mapa.shared::cluster.u32 at, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [at]; }" ::"r"(barrier),
                 "r"(rank)
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

template <class T> __device__ inline uint32_t add_pairs(uint32_t a, uint32_t b) {
    using P = typename Pair<T>::type;
    const P sum = __hadd2(*reinterpret_cast<P *>(&a), *reinterpret_cast<P *>(&b));
    return *reinterpret_cast<const uint32_t *>(&sum);
}
template <class T> __device__ inline uint4 add_pairs(const uint4 &a, const uint4 &b) {
    return {add_pairs<T>(a.x, b.x), add_pairs<T>(a.y, b.y), add_pairs<T>(a.z, b.z), add_pairs<T>(a.w, b.w)};
}

/* Entries of G numbers by K codes of CODE bytes, in pieces of at most 16 bytes. Those of one-byte codes lie in shared
 * memory in planes of 64 KB, 256 bytes for each code, COPIES times: lanes of a quarter of a warp (of half of one, for
 * pieces of 8 bytes) read banks of their own where that is all of 128 bytes. Others are gathered from L2. */
template <class T, int K_, int CODE_, int G_, int COPIES_ = G_ == 4 ? 16 : 8> struct Entries {
    static constexpr int K = K_, CODE = CODE_, G = G_, COPIES = COPIES_;
    static constexpr int PIECE = G == 4 ? 8 : 16, PIECES = G * 2 / PIECE, WORDS_OF_PIECE = PIECE / 4;
    static constexpr int SLOT = COPIES * PIECE, SLOTS = 256 / SLOT; /* of a plane's 256 bytes: a piece's copies */
    static constexpr int PLANE = 65536, BOOKS = CODE == 1 ? (K * PIECES + SLOTS - 1) / SLOTS * PLANE : 0;
    static constexpr int BYTES = 64 / G * K * CODE; /* of a lane's codes of an output and unit */
    static constexpr int WORDS = (BYTES + 3) / 4;
    /* Sums of more than four entries would be rounded too often: two products of as many each. */
    static constexpr int PASSES = K > 4 ? 2 : 1, MOST = (K + PASSES - 1) / PASSES;
    using Piece = std::conditional_t<PIECE == 8, uint2, uint4>;

    __device__ static constexpr int place_of(int slot) { return slot / SLOTS * PLANE + slot % SLOTS * SLOT; }

    template <int THREADS> __device__ static void fill(unsigned char *books, const ManyRowsProblem &p) {
        if constexpr (CODE == 1) {
            constexpr int MOST = (K * 256 * PIECES + THREADS - 1) / THREADS; /* in flight at once */
            constexpr int ALL = K * 256 * PIECES;
            Piece v[MOST];
            const auto *from = static_cast<const Piece *>(p.codebooks);
#pragma unroll
            for (int i = 0; i < MOST; ++i)
                if (const int at = i * THREADS + threadIdx.x;
                    at < ALL) { /* bits of a code that are too many: ignored */
                    const int entry = at / PIECES % 256 & (p.entries - 1);
                    v[i] = __ldg(from + (at / PIECES / 256 * p.entries + entry) * PIECES + at % PIECES);
                }
#pragma unroll
            for (int i = 0; i < MOST; ++i) {
                const int at = i * THREADS + threadIdx.x, slot = at / PIECES / 256 * PIECES + at % PIECES;
                if (at >= ALL) break;
                unsigned char *const to = books + place_of(slot) + at / PIECES % 256 * 256;
#pragma unroll
                for (int copy = 0; copy < COPIES; ++copy) /* lanes that write together write to different banks */
                    *reinterpret_cast<Piece *>(to + (copy + threadIdx.x) % COPIES * PIECE) = v[i];
            }
        }
    }
    __device__ static uint32_t bank() { return threadIdx.x % COPIES * PIECE; }

    __device__ static Piece piece(const unsigned char *books, const ManyRowsProblem &p, const uint32_t (&word)[WORDS],
                                  int group, int k, int piece, uint32_t bank) {
        const int at = (group * K + k) * CODE;
        const uint32_t w = word[at / 4];
        if constexpr (CODE == 1)
            return *reinterpret_cast<const Piece *>(books + place_of(k * PIECES + piece) +
                                                    __byte_perm(w, bank, 0x7604 | at % 4 << 4));
        else
            return __ldg(static_cast<const Piece *>(p.codebooks) +
                         (k * p.entries + ((at % 4 ? w >> 16 : w) & (p.entries - 1))) * PIECES + piece);
    }
    __device__ static void add(uint32_t (&sum)[8], const uint32_t (&other)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = add_pairs<T>(sum[i], other[i]);
    }
    using Gathered = uint32_t[MOST][2][8];

    /* Entries of chunk step / PASSES: of two outputs 16 inputs each. */
    __device__ static void gather(Gathered &e, const unsigned char *books, const ManyRowsProblem &p,
                                  const uint32_t (&word)[2][WORDS], int step, uint32_t bank) {
        const int i = step / PASSES, first = step % PASSES * MOST;
#pragma unroll
        for (int k = 0; k < MOST; ++k)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int at = 0; at < 8; at += WORDS_OF_PIECE) {
                    const int number = i * 16 + at * 2;
                    if (first + k >= K) {
                        e[k][half][at] = e[k][half][at + 1] = 0;
                        if constexpr (PIECE == 16) e[k][half][at + 2] = e[k][half][at + 3] = 0;
                        continue;
                    }
                    const Piece v = piece(books, p, word[half], number / G, first + k, number % G * 2 / PIECE, bank);
                    e[k][half][at] = v.x, e[k][half][at + 1] = v.y;
                    if constexpr (PIECE == 16) e[k][half][at + 2] = v.z, e[k][half][at + 3] = v.w;
                }
    }
    /* The fragments: their sums, in words that four instructions take two by two. */
    __device__ static void combine(uint32_t (&a)[4][4], Gathered &e) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (MOST == 4) add(e[2][half], e[3][half]);
            if constexpr (MOST >= 2) add(e[0][half], e[1][half]);
            if constexpr (MOST >= 3) add(e[0][half], e[2][half]);
#pragma unroll
            for (int w = 0; w < 8; ++w) a[w / 2][half + w % 2 * 2] = e[0][half][w];
        }
    }
};

/* N rows at a time, WARPGROUPS of 64 outputs; STAGES of STAGE_CHUNKS chunks of x; codes of AHEAD units in flight.
 * CLUSTER blocks fetch them together. EARLY: entries are gathered before the chunk before is multiplied. */
template <int N_, int WARPGROUPS_, int STAGES_, int CLUSTER_ = 1, int AHEAD_ = 4, bool EARLY_ = false,
          bool EAGER_ = false, int STAGE_CHUNKS_ = 1, int BATCH_ = 1>
struct ManyRowsTiling {
    static constexpr int N = N_, WARPGROUPS = WARPGROUPS_, STAGES = STAGES_, STAGE_CHUNKS = STAGE_CHUNKS_;
    static constexpr int CLUSTER = CLUSTER_, AHEAD = AHEAD_, FRAGMENTS = N / 8;
    static constexpr int BATCH = BATCH_;
    static constexpr bool EARLY = EARLY_, EAGER = EAGER_;
    /* Registers are dealt out by warpgroups: where they are short, the producer is one that gives its own up. */
    static constexpr bool REALLOCATES = N >= 128 || WARPGROUPS > 2 || BATCH > 1 || (EARLY && N >= 64);
    static constexpr int OF_CONSUMER = WARPGROUPS <= 2 ? 240 : WARPGROUPS == 3 ? 160 : 112; /* registers */
    static constexpr int OF_PRODUCER = WARPGROUPS == 3 ? 32 : 24;
    static constexpr int CONSUMERS = WARPGROUPS * 128, OUTS = WARPGROUPS * 64;
    static constexpr int THREADS = CONSUMERS + (REALLOCATES ? 128 : 32);
    static constexpr int CHUNK_BYTES = N * 128, STAGE_BYTES = STAGE_CHUNKS * CHUNK_BYTES;

    static constexpr bool SPLITS = false;
    static constexpr int FILLERS = 1; /* threads that say that a stage is full */

    /* Where barriers lie in shared memory, behind the stages; bytes of all. */
    static constexpr int FULL = STAGES * STAGE_BYTES, EMPTY = FULL + STAGES * 8, BYTES = EMPTY + STAGES * 8;
    static_assert(BYTES % 16 == 0); /* what follows is aligned */
};

/* Few rows and one launch: blocks of a cluster each have a part of every tile's units, and read each other's sums; four
 * warps arrange x themselves, in stages of 8 KB. */
template <int N_, int WARPGROUPS_, int STAGES_, int AHEAD_ = 4, bool EARLY_ = false> struct SplitTiling {
    static constexpr int N = N_, WARPGROUPS = WARPGROUPS_, STAGES = STAGES_, STAGE_CHUNKS = N < 64 ? 64 / N : 1;
    static constexpr int CLUSTER = 1, AHEAD = AHEAD_, FRAGMENTS = N / 8, BATCH = 1;
    static constexpr bool EARLY = EARLY_, EAGER = true, REALLOCATES = true, SPLITS = true;
    static constexpr int OF_CONSUMER = WARPGROUPS > 2 ? 144 : N > 64 ? 184 : 208;
    static constexpr int OF_PRODUCER = WARPGROUPS > 2 ? 72 : N > 64 ? 136 : 88;
    static constexpr int CONSUMERS = WARPGROUPS * 128, OUTS = WARPGROUPS * 64;
    static constexpr int FILLERS = 128, THREADS = CONSUMERS + FILLERS;
    static constexpr int CHUNK_BYTES = N * 128, STAGE_BYTES = STAGE_CHUNKS * CHUNK_BYTES;
    static constexpr int FULL = STAGES * STAGE_BYTES, EMPTY = FULL + STAGES * 8;
    static constexpr int LEFT = EMPTY + STAGES * 8, READ = LEFT + 8; /* sums are there, and have been read */
    static constexpr int SUMS = READ + 8, BYTES = SUMS + FRAGMENTS * CONSUMERS * 16;
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
template <class L> struct Work {
    uint32_t tile, first, last, left; /* left: runs behind these */

    __device__ explicit Work(const ManyRowsProblem &p) {
        if constexpr (L::SPLITS) {
            const uint32_t rank = blockIdx.x % p.split;
            tile = blockIdx.x / p.split, first = p.units * rank / p.split, last = p.units * (rank + 1) / p.split;
            return;
        }
        const uint32_t cluster = blockIdx.x / L::CLUSTER, begin = p.shares.first_of(cluster);
        tile = begin / p.shares.of_tile, left = p.shares.first_of(cluster + 1) - begin;
        take(p, begin - tile * p.shares.of_tile);
    }
    /* Whether there is one more. */
    __device__ bool next(const ManyRowsProblem &p) {
        if constexpr (L::SPLITS) {
            const uint32_t more = tile + gridDim.x / p.split;
            if (more >= p.counters) return false;
            tile = more;
            return true;
        }
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

/* BYTES bytes of a thread's own, from global to shared memory, without waiting; the bytes around them come to L2. */
template <int BYTES> __device__ inline void copy_ahead(uint32_t to, const unsigned char *from) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

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

/* A thread's codes, unit after unit: AHEAD units are on the way to shared memory of its own (two-byte codes of a unit
 * cannot be: one unit, to registers). */
template <class B, class L> struct CodeStream {
    static constexpr bool COPIES = B::BYTES % 4 == 0;
    static constexpr int PIECE = B::BYTES % 16 == 0 ? 16 : B::BYTES % 8 == 0 ? 8 : 4, PIECES = 2 * B::BYTES / PIECE;
    static constexpr int SLOT = PIECES * PIECE * L::CONSUMERS, BYTES = COPIES ? L::AHEAD * SLOT : 0;
    const ManyRowsProblem &p;
    const size_t row_bytes;
    const unsigned char *from[2];
    Work<L> work;
    uint32_t unit, slots, slot = 0; /* addresses in shared memory */
    const int row, quad, rank;

    __device__ CodeStream(const ManyRowsProblem &problem, uint32_t ring)
        : p(problem), row_bytes(static_cast<size_t>(p.in) / 64 * B::BYTES), work(problem), unit(work.first),
          slots(ring + threadIdx.x * PIECE), row(threadIdx.x / 4 * 2), quad(threadIdx.x % 4),
          rank(L::CLUSTER == 1 ? 0 : cluster_rank()) {
        go_to();
        if constexpr (COPIES)
#pragma unroll
            for (int i = 0; i < L::AHEAD; ++i) copy(i * SLOT);
    }
    __device__ void go_to() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int o = (static_cast<int>(work.tile / p.row_tiles) * L::CLUSTER + rank) * L::OUTS + row + half;
            from[half] = p.codes + min(o, p.out - 1) * row_bytes;
        }
    }
    __device__ void step() {
        if (++unit < work.last) return;
        if (work.next(p)) unit = work.first, go_to();
        else --unit; /* the last again, which nothing reads */
    }
    __device__ void copy(uint32_t to) {
        const int part = unit * 4 + quad, at = part * 64 < p.in ? part * B::BYTES : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < PIECES / 2; ++i)
                copy_ahead<PIECE>(slots + to + (half * (PIECES / 2) + i) * PIECE * L::CONSUMERS,
                                  from[half] + at + i * PIECE);
        commit_copies();
        step();
    }
    /* Of the next unit. */
    __device__ void load(uint32_t (&to)[2][B::WORDS]) {
        if constexpr (COPIES) {
            wait_for_copies<L::AHEAD - 1>();
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const uint32_t at = slots + slot + i * PIECE * L::CONSUMERS;
                uint32_t *const w = to[i / (PIECES / 2)] + i % (PIECES / 2) * (PIECE / 4);
                if constexpr (PIECE == 16)
                    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                                 : "r"(at)
                                 : "memory");
                else if constexpr (PIECE == 8)
                    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at) : "memory");
                else asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w[0]) : "r"(at) : "memory");
            }
            copy(slot);
            slot = slot == (L::AHEAD - 1) * SLOT ? 0 : slot + SLOT;
        } else {
            const int part = unit * 4 + quad;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                to[half][0] =
                    __ldg(reinterpret_cast<const uint16_t *>(from[half] + (part * 64 < p.in ? part * B::BYTES : 0)));
            step();
        }
    }
};

/* What a thread of consumers holds of a tile of y: of every 8 rows two, of two outputs. */
template <class T, class L> struct Finish {
    T *to;
    const int out;
    int rows; /* from its first one on */
    bool second;
    float scale[2], bias[2];

    __device__ Finish(const ManyRowsProblem &p, uint32_t tile, int thread) : out(p.out) {
        const int rank = blockIdx.x % L::CLUSTER, row = tile % p.row_tiles * L::N + thread % 4 * 2;
        const int o = (tile / p.row_tiles * L::CLUSTER + rank) * L::OUTS + thread / 4 * 2;
        to = static_cast<T *>(p.y) + static_cast<size_t>(row) * out + o;
        rows = o < out ? p.n_rows - row : 0, second = o + 1 < out;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = min(o + i, out - 1);
            scale[i] = static_cast<float>(static_cast<const T *>(p.scales)[at]);
            bias[i] = p.bias ? static_cast<float>(static_cast<const T *>(p.bias)[at]) : 0.f;
        }
    }
    __device__ bool in_pairs() const { return out % 2 == 0; }

    template <bool PAIRS> __device__ void store(T *at, float low, float high) const {
        const float y0 = low * scale[0] + bias[0], y1 = high * scale[1] + bias[1];
        if constexpr (PAIRS) *reinterpret_cast<typename Pair<T>::type *>(at) = Pair<T>::from_floats(y0, y1);
        else {
            at[0] = static_cast<T>(y0);
            if (second) at[1] = static_cast<T>(y1);
        }
    }
    /* A fragment, of rows 8j .. 8j + 7. */
    template <bool PAIRS> __device__ void store8(int j, const float4 &v) const {
        T *const at = to + static_cast<size_t>(j) * 8 * out;
        if (8 * j < rows) store<PAIRS>(at, v.x, v.z);
        if (8 * j + 1 < rows) store<PAIRS>(at + out, v.y, v.w);
    }
    template <bool PAIRS> __device__ void store_all(const float (&c)[4 * L::FRAGMENTS]) const {
#pragma unroll
        for (int j = 0; j < L::FRAGMENTS; ++j) store8<PAIRS>(j, {c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]});
    }
};

__device__ inline unsigned load_acquire(const unsigned *from) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

/* Blocks that share a tile, one after the other; each finishes fragments begin .. end of all. */
template <class L> struct Sharers {
    static constexpr int THREADS = L::CONSUMERS, TILE = L::FRAGMENTS * THREADS;
    int count, own, begin, end;
    unsigned *arrived;
    const float4 *of_first, *of_second; /* the first one's part may be its second, that of others is their first */

    __device__ Sharers(const ManyRowsProblem &p, uint32_t tile) {
        const Shares &shares = p.shares;
        const uint32_t first_run = tile * shares.of_tile, first = shares.owner_of(first_run);
        const int rank = blockIdx.x % L::CLUSTER;
        count = shares.owner_of(first_run + shares.of_tile - 1) - first + 1, own = blockIdx.x / L::CLUSTER - first;
        begin = L::FRAGMENTS * own / count, end = L::FRAGMENTS * (own + 1) / count;
        arrived = p.arrived + tile * L::CLUSTER + rank;
        const float4 *const parts = p.parts + static_cast<size_t>(first * L::CLUSTER + rank) * 2 * TILE + threadIdx.x;
        of_first = parts + (shares.first_of(first) < first_run) * TILE, of_second = parts + L::CLUSTER * 2 * TILE;
    }
    __device__ float4 part(int s, int j) const {
        return __ldcg((s == 0 ? of_first : of_second + (s - 1) * L::CLUSTER * 2 * TILE) + j * THREADS);
    }
    __device__ void arrive() const {
        sync_threads_of(1, THREADS);
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    }
    __device__ void await() const {
        if (threadIdx.x == 0)
            while (load_acquire(arrived) < static_cast<unsigned>(count)) {}
        sync_threads_of(1, THREADS);
    }
};

__device__ inline void clock_at(const ManyRowsProblem &p, int i) {
    if (p.clocks && threadIdx.x == 0) p.clocks[blockIdx.x * 8 + i] = clock64();
}

/* What becomes of sums at the end of a segment, and of the block's work. Sums that blocks share go through the
 * workspace; several are added up at once, for each waits for L2. */
template <class T, class L> struct Ends {
    static constexpr uint32_t NONE = ~0u;
    static constexpr int FEW = 4;                     /* blocks that share a tile */
    uint32_t first_shared = NONE, last_shared = NONE; /* tiles */

    __device__ void segment(const ManyRowsProblem &p, const float (&c)[4 * L::FRAGMENTS], const Work<L> &work) {
        if (work.last - work.first == static_cast<uint32_t>(p.units)) {
            const Finish<T, L> finish(p, work.tile, threadIdx.x);
            if (finish.in_pairs()) finish.template store_all<true>(c);
            else finish.template store_all<false>(c);
            return;
        }
        const bool late = work.first == 0 && work.tile != Work<L>(p).tile;
        const Sharers<L> sharers(p, work.tile);
        const bool keeps = work.left == 0 && sharers.count <= FEW;
        float4 *const to =
            p.parts + (static_cast<size_t>(blockIdx.x) * 2 + late) * (L::FRAGMENTS * L::CONSUMERS) + threadIdx.x;
#pragma unroll
        for (int j = 0; j < L::FRAGMENTS; ++j)
            if (!keeps || j < sharers.begin || j >= sharers.end)
                __stcg(to + j * L::CONSUMERS, float4{c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]});
        sharers.arrive();
        if (keeps) add_to(p, c, sharers, work.tile);
        else (late ? last_shared : first_shared) = work.tile;
    }
    /* What others have of sums that are still in registers. */
    __device__ void add_to(const ManyRowsProblem &p, const float (&c)[4 * L::FRAGMENTS], const Sharers<L> &sharers,
                           uint32_t tile) const {
        constexpr int SOME = L::FRAGMENTS < 8 ? L::FRAGMENTS : 8;
        const Finish<T, L> finish(p, tile, threadIdx.x);
        sharers.await();
#pragma unroll
        for (int i = 0; i < L::FRAGMENTS; i += SOME) {
            if (i + SOME <= sharers.begin || i >= sharers.end) continue;
            float4 sum[SOME];
#pragma unroll
            for (int k = 0; k < SOME; ++k) sum[k] = {0, 0, 0, 0};
#pragma unroll 1
            for (int s = 0; s < sharers.count; ++s)
#pragma unroll
                for (int k = 0; k < SOME; ++k) {
                    const int j = i + k;
                    float4 v = {c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]};
                    if (s != sharers.own && j >= sharers.begin && j < sharers.end) v = sharers.part(s, j);
                    sum[k].x += v.x, sum[k].y += v.y, sum[k].z += v.z, sum[k].w += v.w;
                }
#pragma unroll
            for (int k = 0; k < SOME; ++k)
                if (i + k >= sharers.begin && i + k < sharers.end) store8(finish, i + k, sum[k]);
        }
    }
    __device__ static void store8(const Finish<T, L> &finish, int j, const float4 &v) {
        if (finish.in_pairs()) finish.template store8<true>(j, v);
        else finish.template store8<false>(j, v);
    }
    /* SOME fragments and UNROLL blocks' parts at once. */
    template <int SOME, int UNROLL> __device__ static void add(const Finish<T, L> &finish, const Sharers<L> &sharers) {
#pragma unroll 1
        for (int i = sharers.begin; i < sharers.end; i += SOME) {
            float4 sum[SOME];
#pragma unroll
            for (int k = 0; k < SOME; ++k) sum[k] = sharers.part(0, min(i + k, sharers.end - 1));
#pragma unroll UNROLL
            for (int s = 1; s < sharers.count; ++s)
#pragma unroll
                for (int k = 0; k < SOME; ++k) {
                    const float4 v = sharers.part(s, min(i + k, sharers.end - 1));
                    sum[k].x += v.x, sum[k].y += v.y, sum[k].z += v.z, sum[k].w += v.w;
                }
#pragma unroll
            for (int k = 0; k < SOME; ++k)
                if (i + k < sharers.end) store8(finish, i + k, sum[k]);
        }
    }
    __device__ void block(const ManyRowsProblem &p) const {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const uint32_t tile = i ? last_shared : first_shared;
            if (tile == NONE) continue;
            const Sharers<L> sharers(p, tile);
            const Finish<T, L> finish(p, tile, threadIdx.x);
            sharers.await();
            if (sharers.count <= FEW) add<(L::FRAGMENTS < 8 ? L::FRAGMENTS : 8), 1>(finish, sharers);
            else add<1, 16>(finish, sharers);
        }
    }
};

__device__ inline float4 load_from(uint32_t address, uint32_t rank) {
    float4 v = {};
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .u32 at;\n"
                 "mapa.shared::cluster.u32 at, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [at]; }"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address), "r"(rank)
                 : "memory");
#endif
    return v;
}

/* The same by blocks of a cluster: each finishes a part of their sums, which lie in their shared memories. */
template <class T, class L> struct SplitEnds {
    const uint32_t stages;
    uint32_t parity = 0;
    bool begun = false;

    __device__ void arrive(const ManyRowsProblem &p, int barrier) const {
        __syncwarp();
        if (static_cast<int>(threadIdx.x % 32) < p.split) mbarrier_arrive_at(stages + barrier, threadIdx.x % 32);
    }
    __device__ void wait_for_reading() {
        if (begun) mbarrier_wait_for_all(stages + L::READ, parity), parity ^= 1;
    }
    __device__ void segment(const ManyRowsProblem &p, const float (&c)[4 * L::FRAGMENTS], const Work<L> &work) {
        constexpr int THREADS = L::CONSUMERS, TILE = L::FRAGMENTS * THREADS;
        wait_for_kernels_before(); /* y may be read by those */
        if (p.split == 1) {
            const Finish<T, L> finish(p, work.tile, threadIdx.x);
            if (finish.in_pairs()) finish.template store_all<true>(c);
            else finish.template store_all<false>(c);
            return;
        }
        wait_for_reading();
        const uint32_t sums = stages + L::SUMS;
#pragma unroll
        for (int j = 0; j < L::FRAGMENTS; ++j)
            asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(sums + (j * THREADS + threadIdx.x) * 16),
                         "f"(c[4 * j]), "f"(c[4 * j + 1]), "f"(c[4 * j + 2]), "f"(c[4 * j + 3])
                         : "memory");
        arrive(p, L::LEFT);
        const int rank = blockIdx.x % p.split, end = TILE * (rank + 1) / p.split;
        const int begin = TILE * rank / p.split + static_cast<int>(threadIdx.x);
        const Finish<T, L> finish(p, work.tile, begin % THREADS);
        mbarrier_wait_for_all(stages + L::LEFT, parity);
#pragma unroll 1
        for (int i = begin; i < end; i += THREADS) {
            float4 sum = load_from(sums + i * 16, 0);
#pragma unroll 4
            for (int s = 1; s < p.split; ++s) {
                const float4 v = load_from(sums + i * 16, s);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            if (finish.in_pairs()) finish.template store8<true>(i / THREADS, sum);
            else finish.template store8<false>(i / THREADS, sum);
        }
        arrive(p, L::READ);
        begun = true;
    }
    __device__ void block(const ManyRowsProblem &) { wait_for_reading(); } /* then the block may end */
};

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
        else return Ends<T, L>();
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
