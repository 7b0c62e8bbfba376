/* gather.cu: up to 8 rows of x by gathered codebook entries and matrix instructions (g = 8, og = 1).
 *
 * A lane gathers whole entries of 16 bytes and they are the A fragment as they are: lane (r, q) of a warp holds outputs
 * r and r + 8 and its own group, whose 8 inputs are the columns 2q, 2q+1, 2q+8, 2q+9 of two instructions; B holds the
 * same inputs of 8 rows of x. Sums over codebooks and groups are fp32 inside the instruction. For B <= 8 codebooks lie
 * in shared memory eight times, one copy for each eighth of the banks, so that gathers never conflict; larger ones are
 * gathered from L2. A warp owns a slice of groups, keeps x for it in registers and runs through the block's outputs.
 * After every second tile of 16 outputs the block adds up its warps. */
#include "cuda/product/paths.cuh"

namespace aqlm_cuda {
namespace {

constexpr int GATHER_WARPS = 16, TILE = 16;
constexpr int SUM_TILES = 2; /* tiles between two sums over the warps, whose parts have two stages */
constexpr int PARTS_BYTES = 2 * SUM_TILES * GATHER_WARPS * 32 * 16;
constexpr int BOOK_PAIR_BYTES = 256 * 256; /* [256 entries][2 codebooks][8 copies][16 bytes] */

/* K codes of CODE bytes; a lane takes GROUPS groups at a time, WORDS words of codes. */
template <int K, int CODE> struct Lane {
    static constexpr int GROUPS = K * CODE <= 2 ? 8 : 4;
    static constexpr int WORDS = GROUPS * K * CODE / 4;
    static constexpr int WARP_GROUPS = 4 * GROUPS;

    /* Where group j of a warp's lies in row n of them in shared memory: lanes of a quarter of a warp, which read two
     * rows of four lanes' groups, read all banks. */
    static __device__ int place(int j, int n) { return j ^ (GROUPS == 8 ? j / 8 + n % 2 * 4 : j / 8 * 2 + n % 2); }
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

template <class T, int K, int CODE>
__global__ void __launch_bounds__(32 * GATHER_WARPS, 1) gather_kernel(const GatherProblem p) {
    using L = Lane<K, CODE>;
    constexpr int AHEAD = CODE == 1 ? 2 : 1; /* tiles whose codes are in flight */
    constexpr int BLOCK_GROUPS = GATHER_WARPS * 4 * L::GROUPS;
    constexpr int BOOKS = CODE == 1 ? (K + 1) / 2 * BOOK_PAIR_BYTES : 0;
    extern __shared__ __align__(1024) unsigned char shared[];
    auto *const parts = reinterpret_cast<float4 *>(shared + BOOKS); /* [2][SUM_TILES][GATHER_WARPS][32] */
    /* [GATHER_WARPS][n_rows][WARP_GROUPS] of x */
    auto *const staged = reinterpret_cast<uint4 *>(shared + BOOKS + PARTS_BYTES);
    auto *const sums =
        reinterpret_cast<float *>(staged + GATHER_WARPS * p.n_rows * L::WARP_GROUPS); /* [tiles of the block][128] */
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;

    wait_for_kernels_before();
    const auto *books = static_cast<const uint4 *>(p.codebooks);
    if constexpr (CODE == 1)
        for (int i = threadIdx.x; i < K * p.entries * 8; i += 32 * GATHER_WARPS) {
            const int copy = i % 8, entry = i / 8 % p.entries, k = i / 8 / p.entries;
            *reinterpret_cast<uint4 *>(shared + k / 2 * BOOK_PAIR_BYTES + entry * 256 + k % 2 * 128 + copy * 16) =
                __ldg(books + k * p.entries + entry);
        }

    const int tiles = (p.out + TILE - 1) / TILE;
    const int first = static_cast<int>(static_cast<int64_t>(tiles) * blockIdx.x / gridDim.x);
    const int last = static_cast<int>(static_cast<int64_t>(tiles) * (blockIdx.x + 1) / gridDim.x);
    const size_t row_bytes = static_cast<size_t>(p.groups) * K * CODE;
    const uint32_t mask = CODE == 1 ? (p.entries - 1) * 0x01010101u : (p.entries - 1) * 0x00010001u;
    const uint32_t bank = lane % 8 * 16;
    bool first_round = true;
    int stage = 0;

    for (int block_group = 0; block_group < p.groups; block_group += BLOCK_GROUPS, first_round = false) {
        const bool last_round = block_group + BLOCK_GROUPS >= p.groups;
        const int group = block_group + (warp * 4 + quad) * L::GROUPS;
        uint4 x[L::GROUPS]; /* whole lines are loaded, and distributed through shared memory */
        uint4 *const own = staged + warp * p.n_rows * L::WARP_GROUPS;
        __syncwarp();
        for (int at = lane; at < p.n_rows * L::WARP_GROUPS; at += 32) {
            const int n = at / L::WARP_GROUPS, j = block_group + warp * L::WARP_GROUPS + at % L::WARP_GROUPS;
            own[n * L::WARP_GROUPS + L::place(at % L::WARP_GROUPS, n)] =
                j < p.groups ? __ldg(static_cast<const uint4 *>(p.x) + static_cast<size_t>(n) * p.groups + j)
                             : uint4{0, 0, 0, 0};
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < L::GROUPS; ++i)
            x[i] = row < p.n_rows ? own[row * L::WARP_GROUPS + L::place(quad * L::GROUPS + i, row)] : uint4{0, 0, 0, 0};
        const unsigned char *codes = p.codes + (group < p.groups ? group * K * CODE : 0);
        const bool idle = block_group + warp * 4 * L::GROUPS >= p.groups; /* this warp has no groups */
        uint32_t next[AHEAD][2][L::WORDS];
        const auto load = [&](uint32_t (&to)[2][L::WORDS], int tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                load_words(to[half], codes + min(tile * TILE + 8 * half + row, p.out - 1) * row_bytes);
        };
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) load(next[a], first + a);
        if (first_round) __syncthreads(); /* codebooks */
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
            float c[4][4] = {}; /* four sums, for none to wait for another */
            if (!idle) {
#pragma unroll
                for (int i = 0; i < L::GROUPS; ++i)
#pragma unroll
                    for (int k = 0; k < K; ++k) {
                        uint4 entry[2];
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int at = (i * K + k) * CODE;
                            const uint32_t w = word[half][at / 4];
                            if constexpr (CODE == 1)
                                entry[half] =
                                    *reinterpret_cast<const uint4 *>(shared + k / 2 * BOOK_PAIR_BYTES + k % 2 * 128 +
                                                                     __byte_perm(w, bank, 0x7604 | at % 4 << 4));
                            else entry[half] = __ldg(books + k * p.entries + (at % 4 ? w >> 16 : w & 0xffff));
                        }
                        const int s = (i * K + k) % 2 * 2;
                        mma_k16<T>(c[s], entry[0].x, entry[1].x, entry[0].y, entry[1].y, x[i].x, x[i].y);
                        mma_k16<T>(c[s + 1], entry[0].z, entry[1].z, entry[0].w, entry[1].w, x[i].z, x[i].w);
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
                const int o = summed * TILE + element / 16 + element % 4 / 2 * 8, n = element / 4 % 4 * 2 + element % 2;
                const bool writes = last_round && o < p.out && n < p.n_rows;
                float total = 0, scale = 0, bias = 0;
                if (writes) {
                    scale = static_cast<float>(static_cast<const T *>(p.scales)[o]);
                    if (p.bias) bias = static_cast<float>(static_cast<const T *>(p.bias)[o]);
                }
#pragma unroll
                for (int w = 0; w < GATHER_WARPS; ++w)
                    total += reinterpret_cast<const float *>(to + (of * GATHER_WARPS + w) * 32)[element];
                float *const kept = sums + (summed - first) * 128 + element;
                if (!first_round) total += *kept;
                if (!last_round) *kept = total;
                if (writes)
                    static_cast<T *>(p.y)[static_cast<size_t>(n) * p.out + o] = static_cast<T>(total * scale + bias);
            }
            stage ^= 1;
        }
    }
}

template <class T, int K, int CODE> cudaError_t launch(const GatherProblem &p, const Launch &l) {
    constexpr int BOOKS = CODE == 1 ? (K + 1) / 2 * BOOK_PAIR_BYTES : 0;
    if (const cudaError_t error = allow_shared_memory<gather_kernel<T, K, CODE>>(l.device)) return error;
    const int64_t tiles = divide_up(p.out, TILE);
    const size_t fixed = BOOKS + PARTS_BYTES + size_t(GATHER_WARPS) * p.n_rows * Lane<K, CODE>::WARP_GROUPS * 16;
    const int64_t most = (l.device.shared_memory - static_cast<int64_t>(fixed)) / (128 * 4); /* tiles of one block */
    const int64_t blocks = std::max(std::min<int64_t>(tiles, l.device.sms), divide_up(tiles, most));
    return launch_early<gather_kernel<T, K, CODE>>(p, dim3(static_cast<unsigned>(blocks)), 1, 32 * GATHER_WARPS,
                                                   fixed + divide_up(tiles, blocks) * 128 * 4, l.device, l.stream);
}

template <class T> cudaError_t launch_of(const Launch &l) {
    const GatherProblem p = gather_problem(l);
    const aqlm_shape &s = l.products->w.shape;
    if (s.nbits_per_codebook > 8) return s.num_codebooks == 1 ? launch<T, 1, 2>(p, l) : launch<T, 2, 2>(p, l);
    switch (s.num_codebooks) {
    case 1: return launch<T, 1, 1>(p, l);
    case 2: return launch<T, 2, 1>(p, l);
    case 3: return launch<T, 3, 1>(p, l);
    default: return launch<T, 4, 1>(p, l);
    }
}

} // namespace

bool can_gather(const aqlm_shape &s, const Device &device) {
    const int64_t K = s.num_codebooks, bytes = s.nbits_per_codebook <= 8 ? 1 : 2;
    if (s.in_group_size != 8 || s.out_group_size != 1 || K * bytes > 4) return false;
    if (bytes == 1 && (K + 1) / 2 * BOOK_PAIR_BYTES + PARTS_BYTES + 48 * 1024 > device.shared_memory) return false;
    return s.in_features / 8 % (K * bytes <= 2 ? 8 : 4) == 0;
}

GatherProblem gather_problem(const Launch &l) {
    const auto &[y, w, bias] = *l.products;
    return {y,
            l.x,
            static_cast<const unsigned char *>(w.codes),
            w.codebooks,
            w.scales,
            bias,
            static_cast<int>(w.shape.out_features),
            static_cast<int>(w.shape.in_features / w.shape.in_group_size),
            1 << w.shape.nbits_per_codebook,
            l.n_rows};
}

cudaError_t run_gather(const Launch &l) {
    return l.dtype == AQLM_F16 ? launch_of<__half>(l) : launch_of<__nv_bfloat16>(l);
}

} // namespace aqlm_cuda
