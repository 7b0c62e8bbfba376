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

/* The shares of blocks in all units, of which the first blocks have one more than others. */
struct Shares {
    uint32_t units, more; /* of each block; blocks that have one more */
    __device__ uint32_t first_of(uint32_t block) const { return units * block + min(block, more); }
    __device__ uint32_t owner_of(uint32_t unit) const {
        const uint32_t of_more = more * (units + 1);
        return unit < of_more ? unit / (units + 1) : more + (unit - of_more) / units;
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
    /* The fragments of chunk step / PASSES: of two outputs 16 inputs each, in words that four instructions take two by
     * two. */
    __device__ static void decode(uint32_t (&a)[4][4], const unsigned char *books, const ManyRowsProblem &p,
                                  const uint32_t (&word)[2][WORDS], int step, uint32_t bank) {
        const int i = step / PASSES, first = step % PASSES * MOST;
        uint32_t e[MOST][2][8];
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

/* N rows at a time, WARPGROUPS of 64 outputs; STAGES of STAGE_CHUNKS chunks of x; codes of AHEAD units in flight, and
 * fragments of BUFFERS chunks; L2 fetches HINT bytes around codes. */
template <int N_, int WARPGROUPS_, int STAGES_, int STAGE_CHUNKS_ = 1, int AHEAD_ = 1, int BUFFERS_ = 2,
          int HINT_ = 256>
struct ManyRowsTiling {
    static constexpr int N = N_, WARPGROUPS = WARPGROUPS_, STAGES = STAGES_, STAGE_CHUNKS = STAGE_CHUNKS_;
    static constexpr int AHEAD = AHEAD_, BUFFERS = BUFFERS_, HINT = HINT_, FRAGMENTS = N / 8;
    /* Registers are dealt out by warpgroups: where they are short, the producer is one that gives its own up. */
    static constexpr bool REALLOCATES = N >= 128 || WARPGROUPS > 2;
    static constexpr int OF_CONSUMER = WARPGROUPS <= 2 ? 240 : WARPGROUPS == 3 ? 160 : 112; /* registers */
    static constexpr int OF_PRODUCER = WARPGROUPS == 3 ? 32 : 24;
    static constexpr int CONSUMERS = WARPGROUPS * 128, OUTS = WARPGROUPS * 64;
    static constexpr int THREADS = CONSUMERS + (REALLOCATES ? 128 : 32);
    static constexpr int CHUNK_BYTES = N * 128, STAGE_BYTES = STAGE_CHUNKS * CHUNK_BYTES;
    static_assert(CHUNKS % BUFFERS == 0);

    /* Where barriers lie in shared memory, behind the stages; bytes of all. */
    static constexpr int FULL = STAGES * STAGE_BYTES, EMPTY = FULL + STAGES * 8, BYTES = EMPTY + STAGES * 8;
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
    uint32_t tile, first, last, left; /* left: units behind these */

    __device__ explicit Work(const ManyRowsProblem &p) {
        const uint32_t begin = p.shares.first_of(blockIdx.x), end = p.shares.first_of(blockIdx.x + 1);
        tile = begin / p.units, first = begin - tile * p.units;
        last = min(static_cast<uint32_t>(p.units), first + end - begin), left = end - begin - (last - first);
    }
    /* Whether there is one more. */
    __device__ bool next(const ManyRowsProblem &p) {
        if (left == 0) return false;
        ++tile, first = 0, last = min(static_cast<uint32_t>(p.units), left), left -= last;
        return true;
    }
};

/* 16 bytes that are read once; the bytes around them that L2 fetches too. */
template <int HINT> __device__ inline uint4 load_hinted(const unsigned char *from) {
    uint4 v;
    if constexpr (HINT == 128)
        asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(from));
    else if constexpr (HINT == 256)
        asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(from));
    else v = load_once(reinterpret_cast<const uint4 *>(from));
    return v;
}
template <int BYTES, int HINT>
__device__ inline void load_codes(uint32_t (&to)[(BYTES + 3) / 4], const unsigned char *from) {
    if constexpr (BYTES % 16 == 0)
#pragma unroll
        for (int i = 0; i < BYTES / 4; i += 4) {
            const uint4 v = load_hinted<HINT>(from + i * 4);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    else if constexpr (BYTES % 8 == 0)
#pragma unroll
        for (int i = 0; i < BYTES / 4; i += 2) {
            const uint2 v = load_once(reinterpret_cast<const uint2 *>(from + i * 4));
            to[i] = v.x, to[i + 1] = v.y;
        }
    else if constexpr (BYTES % 4 == 0)
#pragma unroll
        for (int i = 0; i < BYTES / 4; ++i) to[i] = load_once(reinterpret_cast<const uint32_t *>(from + i * 4));
    else
#pragma unroll
        for (int i = 0; i < BYTES; i += 2) {
            const uint32_t v = __ldg(reinterpret_cast<const uint16_t *>(from + i));
            to[i / 4] = i % 4 ? to[i / 4] | v << 16 : v;
        }
}

/* One thread: x's stages, as the block's units need them. */
template <class L> __device__ void produce(const ManyRowsProblem &p, uint32_t stages) {
    int stage = 0;
    uint32_t parity = 1;
    Work work(p);
    do {
        const unsigned char *from =
            p.x_tiles + (static_cast<size_t>(work.tile % p.row_tiles) * p.units + work.first) * CHUNKS * L::CHUNK_BYTES;
        for (uint32_t i = work.first * CHUNKS; i < work.last * CHUNKS; i += L::STAGE_CHUNKS, from += L::STAGE_BYTES) {
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
                   ? __ldg(reinterpret_cast<const uint4 *>(static_cast<const char *>(p.x) +
                                                           (static_cast<size_t>(n) * p.in + column) * 2))
                   : uint4{0, 0, 0, 0};
}

/* x in the order of wgmma's B, tile after tile, and no parts that have arrived. */
template <int N> __global__ void arrange_rows_kernel(const ManyRowsProblem p) {
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

/* Where a thread's codes lie, unit after unit. */
template <class B, class L> struct CodeStream {
    const ManyRowsProblem &p;
    const size_t row_bytes;
    const unsigned char *from[2];
    Work work;
    uint32_t unit;
    const int row, quad;

    __device__ explicit CodeStream(const ManyRowsProblem &problem)
        : p(problem), row_bytes(static_cast<size_t>(p.in) / 64 * B::BYTES), work(problem), unit(work.first),
          row(threadIdx.x / 4 * 2), quad(threadIdx.x % 4) {
        go_to();
    }
    __device__ void go_to() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int o = static_cast<int>(work.tile / p.row_tiles) * L::OUTS + row + half;
            from[half] = p.codes + min(o, p.out - 1) * row_bytes;
        }
    }
    __device__ void load(uint32_t (&to)[2][B::WORDS]) {
        const int part = unit * 4 + quad;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            load_codes<B::BYTES, L::HINT>(to[half], from[half] + (part * 64 < p.in ? part * B::BYTES : 0));
        if (++unit < work.last) return;
        if (work.next(p)) unit = work.first, go_to();
        else --unit; /* the last again, which nothing reads */
    }
};

/* What a thread holds of a tile of y: outputs o and o + 1. */
template <class T, class L> struct Finish {
    const ManyRowsProblem &p;
    int o, first_row;
    float scale[2], bias[2];
    bool in_pairs;

    __device__ Finish(const ManyRowsProblem &problem, uint32_t tile)
        : p(problem), o(static_cast<int>(tile / p.row_tiles) * L::OUTS + threadIdx.x / 4 * 2),
          first_row(static_cast<int>(tile % p.row_tiles) * L::N + threadIdx.x % 4 * 2), in_pairs(p.out % 2 == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = min(o + i, p.out - 1);
            scale[i] = static_cast<float>(static_cast<const T *>(p.scales)[at]);
            bias[i] = p.bias ? static_cast<float>(static_cast<const T *>(p.bias)[at]) : 0.f;
        }
    }
    __device__ void store(int n, float low, float high) const {
        if (n >= p.n_rows || o >= p.out) return;
        T *const to = static_cast<T *>(p.y) + static_cast<size_t>(n) * p.out + o;
        const float y0 = low * scale[0] + bias[0], y1 = high * scale[1] + bias[1];
        if (in_pairs) *reinterpret_cast<typename Pair<T>::type *>(to) = Pair<T>::from_floats(y0, y1);
        else {
            to[0] = static_cast<T>(y0);
            if (o + 1 < p.out) to[1] = static_cast<T>(y1);
        }
    }
    /* Fragments of 8 rows. */
    __device__ void store8(int j, const float4 &v) const {
        store(first_row + 8 * j, v.x, v.z);
        store(first_row + 8 * j + 1, v.y, v.w);
    }
};

__device__ inline unsigned load_acquire(const unsigned *from) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

/* This block's part of the sums of a tile that it shares. */
template <class T, class L> __device__ void add_parts(const ManyRowsProblem &p, uint32_t tile) {
    constexpr int THREADS = L::CONSUMERS, TILE = L::FRAGMENTS * THREADS;
    const Shares &shares = p.shares;
    const uint32_t first_unit = tile * p.units;
    const uint32_t first = shares.owner_of(first_unit), last = shares.owner_of(first_unit + p.units - 1);
    const int sharers = last - first + 1, own = blockIdx.x - first;
    const Finish<T, L> finish(p, tile);
    if (threadIdx.x == 0)
        while (load_acquire(p.arrived + tile) < static_cast<unsigned>(sharers)) {}
    sync_threads_of(1, THREADS);
    const auto *const of_first = p.parts + static_cast<size_t>(first) * 2 * TILE + threadIdx.x;
    const int late = shares.first_of(first) < first_unit; /* the first block's second part */
    for (int j = L::FRAGMENTS * own / sharers; j < L::FRAGMENTS * (own + 1) / sharers; ++j) {
        float4 sum = __ldcg(of_first + late * TILE + j * THREADS);
#pragma unroll 4
        for (int s = 1; s < sharers; ++s) {
            const float4 v = __ldcg(of_first + s * 2 * TILE + j * THREADS);
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        finish.store8(j, sum);
    }
}

__device__ inline void clock_at(const ManyRowsProblem &p, int i) {
    if (p.clocks && threadIdx.x == 0) p.clocks[blockIdx.x * 8 + i] = clock64();
}

/* What this block shares with others goes to the workspace. */
template <class L>
__device__ void leave_part(const ManyRowsProblem &p, const float (&c)[4 * L::FRAGMENTS], uint32_t tile, int late) {
    float4 *const to =
        p.parts + (static_cast<size_t>(blockIdx.x) * 2 + late) * (L::FRAGMENTS * L::CONSUMERS) + threadIdx.x;
#pragma unroll
    for (int j = 0; j < L::FRAGMENTS; ++j)
        __stcg(to + j * L::CONSUMERS, float4{c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]});
    sync_threads_of(1, L::CONSUMERS);
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p.arrived + tile) : "memory");
}

/* What becomes of sums at the end of a segment, and of the block's work. */
template <class T, class L> struct Ends {
    static constexpr uint32_t NONE = ~0u;
    uint32_t first_shared = NONE, last_shared = NONE; /* tiles */

    __device__ void segment(const ManyRowsProblem &p, const float (&c)[4 * L::FRAGMENTS], const Work &work) {
        if (work.last - work.first == static_cast<uint32_t>(p.units)) {
            const Finish<T, L> finish(p, work.tile);
#pragma unroll
            for (int j = 0; j < L::FRAGMENTS; ++j)
                finish.store8(j, {c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]});
            return;
        }
        const bool late = work.first == 0 && work.tile != Work(p).tile;
        leave_part<L>(p, c, work.tile, late);
        (late ? last_shared : first_shared) = work.tile;
    }
    __device__ void block(const ManyRowsProblem &p) const {
        if (first_shared != NONE) add_parts<T, L>(p, first_shared);
        if (last_shared != NONE) add_parts<T, L>(p, last_shared);
    }
};

/* Two of a thread's outputs, by wgmma: fragments of the next chunk are decoded while those of the last are multiplied.
 */
template <class T, class B, class L>
__device__ __forceinline__ void consume(const ManyRowsProblem &p, unsigned char *shared) {
    constexpr int DISTANCE = L::BUFFERS - 1, STEPS = CHUNKS * B::PASSES;
    const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + B::BOOKS;
    Work work(p);
    CodeStream<B, L> codes(p);
    uint32_t word[2][B::WORDS], next[L::AHEAD][2][B::WORDS], a[L::BUFFERS][4][4];
    codes.load(word);
#pragma unroll
    for (int i = 0; i < L::AHEAD; ++i) codes.load(next[i]);
    const int output = min(static_cast<int>(work.tile / p.row_tiles) * L::OUTS + codes.row, p.out - 1);
    prefetch(static_cast<const uint16_t *>(p.scales) + output);
    if (p.bias) prefetch(static_cast<const uint16_t *>(p.bias) + output);
    B::template fill<L::CONSUMERS>(shared, p);
    sync_threads_of(1, L::CONSUMERS);
    const uint32_t bank = B::bank();
#pragma unroll
    for (int i = 0; i < DISTANCE; ++i) B::decode(a[i], shared, p, word, i, bank);
    clock_at(p, 1);
    wait_for_kernels_before();

    int stage = 0, last_stage = 0;
    uint32_t parity = 0;
    Ends<T, L> ends;
    do {
        float c[4 * L::FRAGMENTS];
#pragma unroll
        for (int i = 0; i < 4 * L::FRAGMENTS; ++i) c[i] = 0;
        for (uint32_t unit = work.first; unit < work.last; ++unit) {
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int i = s / B::PASSES % L::STAGE_CHUNKS;
                const bool begins = i == 0 && s % B::PASSES == 0; /* a stage */
                if (begins) mbarrier_wait(stages + L::FULL + stage * 8, parity);
                const uint64_t rows = wgmma_rows(stages + stage * L::STAGE_BYTES + i * L::CHUNK_BYTES);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 4; ++step) wgmma<T, L::N>(c, a[s % L::BUFFERS][step], rows + step * 2);
                wgmma_commit();
                wgmma_wait<1>(); /* of the step before */
                if (begins) {
                    if ((s > 0 || unit > work.first) && threadIdx.x % 32 == 0)
                        mbarrier_arrive(stages + L::EMPTY + last_stage * 8);
                    last_stage = stage;
                }
                if (i == L::STAGE_CHUNKS - 1 && s % B::PASSES == B::PASSES - 1 && ++stage == L::STAGES)
                    stage = 0, parity ^= 1;
                constexpr int LAST = STEPS - DISTANCE;
                if (s < LAST) B::decode(a[(s + DISTANCE) % L::BUFFERS], shared, p, word, s + DISTANCE, bank);
                else B::decode(a[(s + DISTANCE) % L::BUFFERS], shared, p, next[0], s - LAST, bank);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < B::WORDS; ++i) {
                    word[half][i] = next[0][half][i];
#pragma unroll
                    for (int n = 0; n < L::AHEAD - 1; ++n) next[n][half][i] = next[n + 1][half][i];
                }
            codes.load(next[L::AHEAD - 1]);
        }
        wgmma_wait<0>();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(stages + L::EMPTY + last_stage * 8);
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

/* How many tiles of n rows by `outs` outputs there are, blocks that share them, and bytes of the workspace: x in tiles,
 * parts, counters. */
struct ManyRowsCut {
    int64_t row_tiles, tiles, units, blocks, x_bytes, part_bytes, bytes;
    ManyRowsCut(int64_t out, int64_t in, int64_t n_rows, int n, int outs, int64_t most_blocks) {
        row_tiles = divide_up(n_rows, n), units = divide_up(in, UNIT_COLUMNS);
        tiles = divide_up(out, outs) * row_tiles;
        blocks = std::min(most_blocks, tiles * units);
        x_bytes = row_tiles * units * CHUNKS * n * 128;
        part_bytes = blocks * 2 * n * outs * 4;
        bytes = x_bytes + part_bytes + tiles * 4;
    }
};

template <class T, class B, class L>
cudaError_t launch_many_rows(ManyRowsProblem p, void *workspace, const Device &device, cudaStream_t stream) {
    constexpr auto kernel = many_rows_kernel<T, B, L>;
    const ManyRowsCut cut(p.out, p.in, p.n_rows, L::N, L::OUTS, device.sms);
    p.x_tiles = static_cast<unsigned char *>(workspace);
    p.parts = reinterpret_cast<float4 *>(p.x_tiles + cut.x_bytes);
    p.arrived = reinterpret_cast<unsigned *>(p.x_tiles + cut.x_bytes + cut.part_bytes);
    p.tiles = static_cast<int>(cut.tiles), p.row_tiles = static_cast<int>(cut.row_tiles);
    p.units = static_cast<int>(cut.units);
    const int64_t units = cut.tiles * cut.units;
    p.shares = {static_cast<uint32_t>(units / cut.blocks), static_cast<uint32_t>(units % cut.blocks)};
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    constexpr int64_t THREADS = 256;
    const auto arranging = static_cast<unsigned>(divide_up(cut.row_tiles * L::N * cut.units * 8, THREADS));
    if (const cudaError_t error =
            launch_early<arrange_rows_kernel<L::N>>(p, dim3(arranging), 1, THREADS, 0, device, stream))
        return error;
    return launch_early<kernel>(p, dim3(static_cast<unsigned>(cut.blocks)), 1, L::THREADS, B::BOOKS + L::BYTES, device,
                                stream);
}

} // namespace aqlm_cuda
#endif
