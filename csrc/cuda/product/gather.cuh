/* gather.cuh: up to 8 rows of x by gathered codebook entries and matrix instructions, for one weight, several, or
 * several of which each row has its own.
 *
 * A lane gathers 16 bytes of an entry and they are the A fragment as they are: lane (r, q) of a warp holds outputs r
 * and r + 8 and its own group, whose 8 inputs are the columns 2q, 2q+1, 2q+8, 2q+9 of two instructions; B holds the
 * same inputs of 8 rows of x. Of entries of 16 or 32 numbers 2 or 4 lanes next to each other have a piece each, so that
 * a gather from L2 moves whole sectors of 32 bytes; one of 4 numbers is one instruction. Sums over codebooks and groups
 * are fp32 inside the instruction. For B <= 8 codebooks lie in shared memory as often as it takes for an entry to fill
 * all banks, a lane its own copy, so that gathers never conflict; larger ones are gathered from L2. A warp owns a slice
 * of groups, keeps x for it in registers and runs through the block's outputs. After every second tile of 16 outputs
 * the block adds up its warps.
 *
 * Bounds (arithmetic; method.md's rates for an H100): an entry of 8 numbers moves a sector of which half is used,
 * 1x16g8 is at most 0.67 of fp16; of 16 numbers all of it, at most 1.9; two codebooks of 8, at most 0.5, which is why
 * one row of those goes by shards.cu. */
#ifndef AQLM_CUDA_PRODUCT_GATHER_CUH
#define AQLM_CUDA_PRODUCT_GATHER_CUH

#include "cuda/product/gather_launch.cuh"

namespace aqlm_cuda {

/* K codes of CODE bytes for G numbers. K = 0: any number of codebooks and outputs of a group, whose codes are taken one
 * by one, each with its own piece of x. */
template <int CODE, int G, int K> struct Lane {
    static constexpr int LANES = G > 8 ? G / 8 : 1;            /* that share an entry */
    static constexpr int X_WORDS = G / LANES / 2;              /* of a lane's piece */
    static constexpr int ITEMS = K > 0 && K *CODE > 2 ? 4 : 8; /* groups of a lane at a time; K = 0: codes */
    static constexpr int CODES = ITEMS * (K > 0 ? K : 1), WORDS = CODES * CODE / 4;
    static constexpr int ITEM_BYTES = (K > 0 ? K : 1) * CODE;
    static constexpr int WARP_ITEMS = 4 / LANES * ITEMS, WARP_PIECES = 4 * ITEMS;

    /* Where piece j of a warp's lies in row n of them in shared memory: lanes of a quarter of a warp, which read two
     * rows of four lanes' groups, read all banks. */
    static __device__ int place(int j, int n) { return j ^ (ITEMS == 8 ? j / 8 + n % 2 * 4 : j / 8 * 2 + n % 2); }
};

template <int WORDS> __device__ void load_words(uint32_t (&to)[WORDS], const unsigned char *from) {
    if constexpr (WORDS % 4 == 0)
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const uint4 v = load_once(reinterpret_cast<const uint4 *>(from + i * 4));
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    else if constexpr (WORDS % 2 == 0)
#pragma unroll
        for (int i = 0; i < WORDS; i += 2) {
            const uint2 v = load_once(reinterpret_cast<const uint2 *>(from + i * 4));
            to[i] = v.x, to[i + 1] = v.y;
        }
    else
#pragma unroll
        for (int i = 0; i < WORDS; ++i) to[i] = load_once(reinterpret_cast<const uint32_t *>(from + i * 4));
}

/* The same of codes that are not aligned, from number `first` on; the last stands for those behind it. */
template <int CODE, int WORDS>
__device__ void load_codes(uint32_t (&to)[WORDS], const unsigned char *row, int first, int last) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        to[i] = 0;
#pragma unroll
        for (int b = 0; b < 4; b += CODE) {
            const int at = min(first + (i * 4 + b) / CODE, last);
            if constexpr (CODE == 1) to[i] |= static_cast<uint32_t>(__ldg(row + at)) << 8 * b;
            else to[i] |= static_cast<uint32_t>(__ldg(reinterpret_cast<const uint16_t *>(row) + at)) << 8 * b;
        }
    }
}

/* A piece of an entry, or of x. */
template <int WORDS> struct Piece {
    uint32_t word[WORDS];
    using Vector = std::conditional_t<WORDS == 4, uint4, uint2>;

    __device__ void operator=(const uint4 &v) {
        static_assert(WORDS == 4);
        word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    }
    __device__ void operator=(const uint2 &v) {
        static_assert(WORDS == 2);
        word[0] = v.x, word[1] = v.y;
    }
};

/* sums += two outputs' entries by x: sums[0] by the first half of a piece, sums[1] by the second. */
template <class T, int WORDS>
__device__ void multiply(float (&first)[4], float (&second)[4], const Piece<WORDS> (&entry)[2], const Piece<WORDS> &x) {
    mma_k16<T>(first, entry[0].word[0], entry[1].word[0], entry[0].word[1], entry[1].word[1], x.word[0], x.word[1]);
    if constexpr (WORDS == 4)
        mma_k16<T>(second, entry[0].word[2], entry[1].word[2], entry[0].word[3], entry[1].word[3], x.word[2],
                   x.word[3]);
}

/* ROUTED: rows have weights of their own; else there is one weight, and a block has one piece of work. */
template <class T, int CODE, int G, int K, bool ROUTED>
__global__ void __launch_bounds__(32 * GATHER_WARPS, 1) gather_kernel(const __grid_constant__ GatherWork work) {
    using L = Lane<CODE, G, K>;
    using Vector = typename Piece<L::X_WORDS>::Vector;
    constexpr int AHEAD = CODE == 1 && K > 0 ? 2 : 1; /* tiles whose codes are in flight */
    constexpr int BLOCK_ITEMS = GATHER_WARPS * L::WARP_ITEMS;
    constexpr bool PAIRED = CODE == 1 && K > 0; /* codebooks lie as pairs, 8 times */
    const int book_bytes = PAIRED ? (K + 1) / 2 * BOOK_PAIR_BYTES : work.book_bytes;
    extern __shared__ __align__(1024) unsigned char shared[];
    auto *const parts = reinterpret_cast<float4 *>(shared + book_bytes); /* [2][SUM_TILES][GATHER_WARPS][32] */
    /* [GATHER_WARPS][n_rows][WARP_PIECES] of x */
    auto *const staged = reinterpret_cast<uint4 *>(shared + book_bytes + PARTS_BYTES);
    const int n_staged = K > 0 ? GATHER_WARPS * work.most_rows * L::WARP_PIECES : 0;
    auto *const sums = reinterpret_cast<float *>(staged + n_staged); /* [tiles of a piece of work][128] */
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    const int piece = quad % L::LANES; /* of an entry */

    wait_for_kernels_before();
    const Routes &routes = work.routes;
    const int64_t all_tiles = static_cast<int64_t>(ROUTED ? routes.table[0] : 1) * work.tiles;
    int begin = static_cast<int>(all_tiles * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(all_tiles * (blockIdx.x + 1) / gridDim.x);
    int loaded = -1; /* the weight whose codebooks are there */
    int stage = 0;

    while (begin < end) {
        const int chunk = ROUTED ? begin / work.tiles : 0, in_chunk = begin - chunk * work.tiles;
        const int m = ROUTED ? (in_chunk >= work.first_tile[1]) + (in_chunk >= work.first_tile[2]) : 0;
        const GatherProblem &p = work.of[m];
        const int og = K > 0 ? 1 : p.out_group_size;
        int expert = 0, n_rows = p.n_rows;
        const int *order = nullptr; /* which rows they are */
        if constexpr (ROUTED) {
            const int *const of = routes.table + 1 + 3 * chunk;
            expert = of[0], n_rows = of[2], order = routes.table + 1 + 3 * routes.most_chunks + of[1];
        }
        const auto row_of = [&](int n) { return ROUTED ? order[n] : n; };
        const auto x_row_of = [&](int n) { return ROUTED ? order[n] / routes.rows_of_x : n; };
        const int first = ROUTED ? in_chunk - work.first_tile[m] : begin;
        const int last =
            ROUTED ? min(first + min(end - begin, work.most_tiles), (p.out + GATHER_TILE - 1) / GATHER_TILE) : end;
        begin += last - first;
        if (ROUTED && expert < 0) {
            const int first_out = first * GATHER_TILE, n_outs = min(last * GATHER_TILE, p.out) - first_out;
            for (int i = threadIdx.x; i < n_rows * n_outs; i += 32 * GATHER_WARPS)
                static_cast<T *>(
                    p.y)[static_cast<size_t>(row_of(i / n_outs)) * work.y_stride + first_out + i % n_outs] = T(0.f);
            continue;
        }
        const int num_codebooks = K > 0 ? K : p.num_codebooks;
        const size_t row_bytes = static_cast<size_t>(p.groups) * num_codebooks * CODE;
        const size_t codebooks_bytes = static_cast<size_t>(num_codebooks) * p.entries * og * G * 2;
        const unsigned char *const all_codes = p.codes + expert * (row_bytes * (p.out / og));
        const auto *const codebooks = static_cast<const unsigned char *>(p.codebooks) + expert * codebooks_bytes;
        const auto *const books = reinterpret_cast<const Vector *>(codebooks);
        const T *const scales = static_cast<const T *>(p.scales) + static_cast<size_t>(expert) * (p.out / og);

        const bool is_new = loaded != expert * MAX_GROUPED + m;
        loaded = expert * MAX_GROUPED + m;
        if constexpr (PAIRED) {
            for (int i = threadIdx.x; is_new && i < K * p.entries * 8; i += 32 * GATHER_WARPS) {
                const int copy = i % 8, entry = i / 8 % p.entries, k = i / 8 / p.entries;
                *reinterpret_cast<uint4 *>(shared + k / 2 * BOOK_PAIR_BYTES + entry * 256 + k % 2 * 128 + copy * 16) =
                    __ldg(books + k * p.entries + entry);
            }
        } else if constexpr (CODE == 1) { /* [codebook][entry][output of a group][copy][piece] */
            const int items = is_new ? num_codebooks * p.entries * og * work.copies * L::LANES : 0;
            for (int i = threadIdx.x; i < items; i += 32 * GATHER_WARPS)
                reinterpret_cast<Vector *>(shared)[i] =
                    __ldg(books + i / L::LANES / work.copies * L::LANES + i % L::LANES);
        }
        /* Of K = 0: where a code's entry lies from `entries` on, beside its `base`. */
        const int copies = max(work.copies, 1);
        const auto out_stride = static_cast<uint32_t>(G * 2 * copies), entry_stride = og * out_stride;
        const unsigned char *const entries = CODE == 1 && work.copies > 0 ? shared : codebooks;

        const int n_items = K > 0 ? p.groups : p.groups * num_codebooks;
        const bool is_aligned = K > 0 || n_items % L::CODES == 0;
        const uint32_t mask = CODE == 1 ? (p.entries - 1) * 0x01010101u : (p.entries - 1) * 0x00010001u;
        const uint32_t bank = lane % 8 * 16;
        bool first_round = true;

        for (int block_item = 0; block_item < n_items; block_item += BLOCK_ITEMS, first_round = false) {
            const bool last_round = block_item + BLOCK_ITEMS >= n_items;
            const int warp_item = block_item + warp * L::WARP_ITEMS, item = warp_item + quad / L::LANES * L::ITEMS;
            Piece<L::X_WORDS> x[L::ITEMS];
            uint32_t base[K > 0 ? 1 : L::ITEMS];
            if constexpr (K > 0) { /* whole lines are loaded, and distributed through shared memory */
                uint4 *const own = staged + warp * n_rows * L::WARP_PIECES;
                const int pieces = p.groups * L::LANES;
                __syncwarp();
                for (int at = lane; at < n_rows * L::WARP_PIECES; at += 32) {
                    const int n = at / L::WARP_PIECES, j = warp_item * L::LANES + at % L::WARP_PIECES;
                    own[n * L::WARP_PIECES + L::place(at % L::WARP_PIECES, n)] =
                        j < pieces
                            ? __ldg(static_cast<const uint4 *>(p.x) + static_cast<size_t>(x_row_of(n)) * pieces + j)
                            : uint4{0, 0, 0, 0};
                }
                __syncwarp();
#pragma unroll
                for (int i = 0; i < L::ITEMS; ++i) {
                    const int j = (quad / L::LANES * L::ITEMS + i) * L::LANES + piece;
                    x[i] = row < n_rows ? own[row * L::WARP_PIECES + L::place(j, row)] : uint4{0, 0, 0, 0};
                }
            } else {
                int group = item / num_codebooks, book = item - group * num_codebooks;
                const bool has_row = row < n_rows;
                const size_t x_row = has_row ? x_row_of(row) : 0;
                const auto *const from = static_cast<const Vector *>(p.x) + x_row * p.groups * L::LANES + piece;
                const uint32_t own = lane / L::LANES % copies * (G * 2) + piece * 16;
#pragma unroll
                for (int i = 0; i < L::ITEMS; ++i) {
                    x[i] = has_row && item + i < n_items ? __ldg(from + group * L::LANES) : Vector{};
                    base[i] = book * p.entries * entry_stride + own;
                    if (++book == num_codebooks) book = 0, ++group;
                }
            }
            const bool idle = warp_item >= n_items; /* this warp has no groups */
            const int own_item = item < n_items ? item : 0;
            uint32_t next[AHEAD][2][L::WORDS];
            const auto load = [&](uint32_t (&to)[2][L::WORDS], int tile) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int o = min(tile * GATHER_TILE + 8 * half + row, p.out - 1);
                    if (og > 1) o /= og;
                    const unsigned char *const codes = all_codes + o * row_bytes;
                    if (is_aligned) load_words(to[half], codes + own_item * L::ITEM_BYTES);
                    else load_codes<CODE>(to[half], codes, own_item, n_items - 1);
                }
            };
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) load(next[a], first + a);
            if (first_round && is_new) __syncthreads(); /* codebooks */
            for (int tile = first; tile < last; ++tile) {
                uint32_t word[2][L::WORDS];
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int i = 0; i < L::WORDS; ++i) {
                        word[half][i] = next[0][half][i] & mask;
#pragma unroll
                        for (int a = 0; a < AHEAD - 1; ++a) next[a][half][i] = next[a + 1][half][i];
                    }
                load(next[AHEAD - 1], tile + AHEAD);
                const unsigned char *of_half[2] = {entries, entries};
                if (K == 0 && og > 1)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        of_half[half] += (min(tile * GATHER_TILE + 8 * half + row, p.out - 1) % og) * out_stride;
                float c[4][4] = {}; /* four sums, for none to wait for another */
                if (!idle) {
#pragma unroll
                    for (int i = 0; i < L::ITEMS; ++i)
#pragma unroll
                        for (int k = 0; k < (K > 0 ? K : 1); ++k) {
                            Piece<L::X_WORDS> entry[2];
                            constexpr int EACH = K > 0 ? K : 1;
                            const int at = (i * EACH + k) * CODE;
#pragma unroll
                            for (int half = 0; half < 2; ++half) {
                                const uint32_t w = word[half][at / 4];
                                if constexpr (PAIRED)
                                    entry[half] = *reinterpret_cast<const uint4 *>(
                                        shared + k / 2 * BOOK_PAIR_BYTES + k % 2 * 128 +
                                        __byte_perm(w, bank, 0x7604 | at % 4 << 4));
                                else if constexpr (K > 0) {
                                    const uint32_t code = at % 4 ? w >> 16 : w & 0xffff;
                                    entry[half] = __ldg(books + (k * p.entries + code) * L::LANES + piece);
                                } else {
                                    const uint32_t code = CODE == 1 ? __byte_perm(w, 0, 0x4440 | at % 4)
                                                                    : __byte_perm(w, 0, at % 4 ? 0x4432 : 0x4410);
                                    const auto *const from = reinterpret_cast<const Vector *>(
                                        of_half[half] + (code * entry_stride + base[i]));
                                    if constexpr (CODE == 1) entry[half] = *from;
                                    else entry[half] = __ldg(from);
                                }
                            }
                            const int s = (i * EACH + k) % 2 * 2;
                            multiply<T>(c[s], c[s + 1], entry, x[i]);
                        }
                }
                float part[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) part[i] = (c[0][i] + c[1][i]) + (c[2][i] + c[3][i]);
                const int place = (tile - first) % SUM_TILES;
                float4 *const to = parts + stage * SUM_TILES * GATHER_WARPS * 32;
                to[place * GATHER_WARPS * 32 + threadIdx.x] = {part[0], part[1], part[2], part[3]};
                if (place < SUM_TILES - 1 && tile < last - 1) continue;
                __syncthreads();
                const int of = threadIdx.x / 128, element = threadIdx.x % 128; /* of a tile's 16 outputs by 8 rows */
                const int summed = tile - place + of;
                if (of <= place) {
                    const int o = summed * GATHER_TILE + element / 16 + element % 4 / 2 * 8;
                    const int n = element / 4 % 4 * 2 + element % 2;
                    const bool writes = last_round && o < p.out && n < n_rows;
                    float total = 0, scale = 0, bias = 0;
                    if (writes) {
                        scale = static_cast<float>(scales[og > 1 ? o / og : o]);
                        if (p.bias) bias = static_cast<float>(static_cast<const T *>(p.bias)[o]);
                    }
#pragma unroll
                    for (int w = 0; w < GATHER_WARPS; ++w)
                        total += reinterpret_cast<const float *>(to + (of * GATHER_WARPS + w) * 32)[element];
                    float *const kept = sums + (summed - first) * 128 + element;
                    if (!first_round) total += *kept;
                    if (!last_round) *kept = total;
                    if (writes)
                        static_cast<T *>(p.y)[static_cast<size_t>(row_of(n)) * work.y_stride + o] =
                            static_cast<T>(total * scale + bias);
                }
                stage ^= 1;
            }
        }
        if constexpr (!ROUTED) break;
    }
}

template <class T, int CODE, int G, int K, bool ROUTED>
cudaError_t launch_gather_kernel(GatherWork &work, const GatherGrid &grid) {
    using L = Lane<CODE, G, K>;
    constexpr auto kernel = gather_kernel<T, CODE, G, K, ROUTED>;
    if (const cudaError_t error = allow_shared_memory<kernel>(grid.device)) return error;
    const int64_t books = CODE == 1 && K > 0 ? (K + 1) / 2 * BOOK_PAIR_BYTES : work.book_bytes;
    const int64_t fixed = books + PARTS_BYTES + (K > 0 ? GATHER_WARPS * work.most_rows * L::WARP_PIECES * 16 : 0);
    const int64_t fit = (grid.device.shared_memory - fixed) / SUM_BYTES;
    int64_t blocks = std::min<int64_t>(grid.most_tiles, grid.device.sms);
    if (!ROUTED) blocks = std::max(blocks, divide_up(grid.most_tiles, fit));
    work.most_tiles = static_cast<int>(ROUTED ? std::min(fit, int64_t{ROUTED_TILES}) : divide_up(work.tiles, blocks));
    return launch_early<kernel>(work, dim3(static_cast<unsigned>(blocks)), 1, 32 * GATHER_WARPS,
                                fixed + work.most_tiles * SUM_BYTES, grid.device, grid.stream);
}

template <class T, int CODE, int G, int K> cudaError_t launch_either(GatherWork &work, const GatherGrid &grid) {
    return work.routes.index ? launch_gather_kernel<T, CODE, G, K, true>(work, grid)
                             : launch_gather_kernel<T, CODE, G, K, false>(work, grid);
}

template <class T, int CODE> cudaError_t launch_any_gather(GatherWork &work, const GatherGrid &grid, int G) {
    switch (G) {
    case 4: return launch_either<T, CODE, 4, 0>(work, grid);
    case 8: return launch_either<T, CODE, 8, 0>(work, grid);
    case 16: return launch_either<T, CODE, 16, 0>(work, grid);
    default: return launch_either<T, CODE, 32, 0>(work, grid);
    }
}

/* Instances for K codebooks of G numbers, those of any number where K is 0. */
template <class T> cudaError_t launch_gather_books(GatherWork &work, const GatherGrid &grid, int K, int G) {
    switch (K) {
    case 1: return launch_either<T, 1, 8, 1>(work, grid);
    case 2: return launch_either<T, 1, 8, 2>(work, grid);
    case 3: return launch_either<T, 1, 8, 3>(work, grid);
    case 4: return launch_either<T, 1, 8, 4>(work, grid);
    default: return launch_any_gather<T, 1>(work, grid, G);
    }
}
template <class T> cudaError_t launch_gather_wide(GatherWork &work, const GatherGrid &grid, int K, int G) {
    if (K == 1 && G == 16) return launch_either<T, 2, 16, 1>(work, grid);
    switch (K) {
    case 1: return launch_either<T, 2, 8, 1>(work, grid);
    case 2: return launch_either<T, 2, 8, 2>(work, grid);
    default: return launch_any_gather<T, 2>(work, grid, G);
    }
}

} // namespace aqlm_cuda
#endif
