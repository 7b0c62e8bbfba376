/* many_rows_codes.cuh: codes on their way, and the entries that they name as fragments of wgmma (many_rows.cuh). */
#ifndef AQLM_CUDA_PRODUCT_MANY_ROWS_CODES_CUH
#define AQLM_CUDA_PRODUCT_MANY_ROWS_CODES_CUH

#include "cuda/product/many_rows_work.cuh"

namespace aqlm_cuda {

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

/* 16 bytes that are read once; the bytes around them come to L2. */
__device__ inline uint4 load_hinted(const unsigned char *from) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(from));
    return v;
}
template <int BYTES> __device__ inline void load_codes(uint32_t (&to)[(BYTES + 3) / 4], const unsigned char *from) {
    if constexpr (BYTES % 16 == 0)
#pragma unroll
        for (int i = 0; i < BYTES / 4; i += 4) {
            const uint4 v = load_hinted(from + i * 4);
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

/* A thread's codes, unit after unit: AHEAD units are on the way to shared memory of its own, or one to registers. */
template <class B, class L> struct CodeStream {
    static constexpr bool COPIES = L::AHEAD > 0 && B::BYTES % 4 == 0;
    static constexpr int PIECE = B::BYTES % 16 == 0 ? 16 : B::BYTES % 8 == 0 ? 8 : 4, PIECES = 2 * B::BYTES / PIECE;
    static constexpr int SLOT = PIECES * PIECE * L::CONSUMERS, BYTES = COPIES ? L::AHEAD * SLOT : 0;
    const ManyRowsProblem &p;
    const size_t row_bytes;
    const unsigned char *from[2];
    Work work;
    uint32_t unit, slots, slot = 0; /* addresses in shared memory */
    const int row, quad;

    __device__ CodeStream(const ManyRowsProblem &problem, uint32_t ring)
        : p(problem), row_bytes(static_cast<size_t>(p.in) / 64 * B::BYTES), work(problem), unit(work.first),
          slots(ring + threadIdx.x * PIECE), row(threadIdx.x / 4 * 2), quad(threadIdx.x % 4) {
        go_to();
        if constexpr (COPIES)
#pragma unroll
            for (int i = 0; i < L::AHEAD; ++i) copy(i * SLOT);
    }
    __device__ void go_to() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int o = static_cast<int>(work.tile / p.row_tiles) * L::OUTS + row + half;
            from[half] = p.codes + min(o, p.out - 1) * row_bytes;
        }
    }
    __device__ void step() {
        if (++unit < work.last) return;
        if (work.next(p)) unit = work.first, go_to();
        else --unit; /* the last again, which nothing reads */
    }
    /* Of the lane's 64 inputs; of the first where a unit is longer than the row. */
    __device__ int at() const {
        const int part = unit * 4 + quad;
        return part * 64 < p.in ? part * B::BYTES : 0;
    }
    __device__ void copy(uint32_t to) {
        const int at = this->at();
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
            for (int i = 0; i < PIECES; ++i)
                read(to[i / (PIECES / 2)] + i % (PIECES / 2) * (PIECE / 4), slots + slot + i * PIECE * L::CONSUMERS);
            copy(slot);
            slot = slot == (L::AHEAD - 1) * SLOT ? 0 : slot + SLOT;
        } else {
            const int at = this->at();
#pragma unroll
            for (int half = 0; half < 2; ++half) load_codes<B::BYTES>(to[half], from[half] + at);
            step();
        }
    }
    __device__ static void read(uint32_t *w, uint32_t at) {
        if constexpr (PIECE == 16)
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                         : "r"(at)
                         : "memory");
        else if constexpr (PIECE == 8)
            asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at) : "memory");
        else asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w[0]) : "r"(at) : "memory");
    }
};

} // namespace aqlm_cuda
#endif
