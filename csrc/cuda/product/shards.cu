/* shards.cu: up to 8 rows of x by codebooks too large for one block's shared memory (16-bit floats, K <= 2, B > 13,
 * g = 8, og = 1).
 *
 * Gathered from L2, each entry of 16 bytes moves a sector of 32, and that is the bound. Here the codebook lies in the
 * shared memory of five kinds of blocks, which all read the codes: four hold a plane each, two of the eight inputs of
 * nearly all entries, so that a gather is a word and one matrix instruction takes four codes of a lane; the fifth holds
 * the rest of the entries, whole, and only the lanes whose code is one of them load. What bounds it then is shared
 * memory, 32 words from random banks: at 79% of its peak (H100; HBM 27, L2 45, instruction issue 45%). A kernel before
 * cuts the codebook into planes.
 *
 * Five shards of whole entries left four lanes of five idle in every gather: 130 us for 28672x8192. Planes take as many
 * wavefronts of shared memory (16.3 million for 29.4 million codes) but half the instructions: 100 us. A table of
 * 65,536 products for each group would cost more to make than it saves with few outputs, and wants the codes of a group
 * next to each other (arithmetic). Two codebooks have blocks of their own each, which read all codes and take theirs.
 *
 * Work is cut into units, 8 outputs by 64 groups, in the order of codes in memory, and each warp takes as many of them
 * in a row. What it sums of a tile of 8 outputs goes to a partial of its own, and a kernel behind adds up the partials.
 *
 * A lane loads 8 codes, and 8 lanes a line of 128 bytes, of outputs lane / 8 and lane / 8 + 4. They are the A fragment
 * of gather.cuh, whose even rows hold groups of the first half of the line, odd rows of the second: their x are the
 * first and the second column of B, for each row of x two, and the sum of an output is in two places of C. Of more than
 * 4 rows x fills B, a column each: 4 lanes load half a line of outputs lane / 4 and lane / 4 + 8. */
#include "cuda/cluster.cuh"
#include "cuda/product/paths.cuh"
#include "cuda/product/sums.cuh"

namespace aqlm_cuda {
namespace {

constexpr int PLANES = 4, SHARD_WARPS = 32;
constexpr int PAIR = 2; /* blocks of a cluster, which hold the same */
constexpr int FEW = 4;  /* rows */

/* What a warp takes at a time, with up to ROWS rows of x. */
template <int ROWS> struct Unit {
    static constexpr int OUTS = ROWS > FEW ? 16 : 8, GROUPS = 512 / OUTS;
    static constexpr int LANES = GROUPS / 8;        /* that load codes of one output */
    static constexpr int PAD = ROWS > FEW ? 64 : 0; /* bytes behind a row of x, for two to have all banks */
};

/* Blocks of one kind with one panel of the groups and one codebook; partials of each output. */
struct Share {
    int blocks, partials;
};

struct ShardProblem {
    GatherProblem g;
    uint32_t *planes;   /* [K][PLANES][in_planes] */
    float *sums;        /* of each row: [sections][PLANES][plane.partials][out], [sections][rest.partials][out] */
    int in_planes;      /* entries that lie in planes, a multiple of 8 */
    int barrier;        /* its offset in shared memory */
    int slices, panels; /* of a unit's groups; they are cut into */
    int unit_outs;
    int sections;      /* panels of all codebooks, those of the first first */
    Share plane, rest; /* rest.blocks = 0: all entries lie in planes */

    __host__ __device__ int first_slice(int panel) const { return slices * panel / panels; }
    __host__ __device__ size_t sums_of_row() const {
        return static_cast<size_t>(sections) * (PLANES * plane.partials + rest.partials) * g.out;
    }
};

/* Units of a panel distributed among warps, at least one to each. */
struct Partition {
    uint32_t units, warps;
    __device__ Partition(const Share &share, int tiles, int slices)
        : units(tiles * slices), warps(min(share.blocks * SHARD_WARPS, tiles * slices)) {}
    __device__ int first_of(int warp) const { return units * warp / warps; }
    __device__ int owner_of(int unit) const { return ((unit + 1) * warps - 1) / units; }
};

__global__ void cut_into_planes_kernel(const ShardProblem problem) {
    const int e = min(blockIdx.x * blockDim.x + threadIdx.x, problem.in_planes - 1);
    const uint4 *const from = static_cast<const uint4 *>(problem.g.codebooks) + blockIdx.y * problem.g.entries + e;
    prefetch(from);
    wait_for_kernels_before();
    const uint4 v = __ldg(from);
    uint32_t *const to = problem.planes + static_cast<size_t>(blockIdx.y) * PLANES * problem.in_planes + e;
    to[0] = v.x, to[problem.in_planes] = v.y, to[2 * problem.in_planes] = v.z, to[3 * problem.in_planes] = v.w;
}

/* v = the 16 bytes at `from` in shared memory, where `if_so`. */
__device__ void load_if(uint4 &v, bool if_so, uint32_t from) {
    asm volatile("{ .reg .pred p;\n"
                 "setp.ne.b32 p, %4, 0;\n"
                 "@p ld.shared.v4.u32 {%0,%1,%2,%3}, [%5]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "r"(static_cast<int>(if_so)), "r"(from));
}

/* The codes of one codebook, book, of those of 8 groups. */
template <int K> __device__ uint4 codes_of(const uint4 (&all)[K], int book) {
    if constexpr (K == 1) return all[0];
    else {
        const uint32_t halves = book ? 0x7632 : 0x5410;
        return {__byte_perm(all[0].x, all[0].y, halves), __byte_perm(all[0].z, all[0].w, halves),
                __byte_perm(all[1].x, all[1].y, halves), __byte_perm(all[1].z, all[1].w, halves)};
    }
}

/* All units of one warp. prepare() runs when the first codes are in flight; multiply(c, word, slice) adds the
 * products of a unit's codes, word[half] those of outputs lane / LANES and half a unit behind, to the fragments c. */
template <int K, int ROWS, class Prepare, class Multiply>
__device__ void run_units(const ShardProblem &problem, const Partition &partition, int warp, int first, int slices,
                          int book, float *sums, const Prepare &prepare, const Multiply &multiply) {
    using U = Unit<ROWS>;
    const GatherProblem &p = problem.g;
    const int lane = threadIdx.x % 32;
    const size_t row_bytes = static_cast<size_t>(p.groups) * (2 * K);
    const bool idle = warp >= static_cast<int>(partition.warps);
    const int begin = idle ? 0 : partition.first_of(warp);
    int left = idle ? 0 : partition.first_of(warp + 1) - begin, tile = begin / slices, slice = begin - tile * slices;
    /* 0 of all tiles but the first, which others may have begun */
    int partial = warp - partition.owner_of(begin - slice);
    const unsigned char *from[2];
    const auto go_to = [&](int to_tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            from[half] = p.codes + min(to_tile * U::OUTS + U::OUTS / 2 * half + lane / U::LANES, p.out - 1) * row_bytes;
    };
    uint4 next[2][K] = {};
    const auto load = [&](int of_slice) {
        const int group = (first + of_slice) * U::GROUPS + lane % U::LANES * 8; /* 8 or none of a lane's groups exist */
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < K; ++k)
                next[half][k] = load_once(
                    reinterpret_cast<const uint4 *>(from[half] + (group < p.groups ? group * (2 * K) : 0) + 16 * k));
    };
    if (left > 0) go_to(tile), load(slice);
    prepare();
    float c[2][4] = {};
    for (; left > 0; --left) {
        const uint4 word[2] = {codes_of<K>(next[0], book), codes_of<K>(next[1], book)};
        const int of_slice = slice, o = tile * U::OUTS + lane / U::LANES;
        if (++slice == slices) slice = 0, go_to(++tile);
        if (left > 1) load(slice);
        multiply(c, word, of_slice);
        if (slice > 0 && left > 1) continue;
        const auto store = [&](int n, float low, float high) {
            if (n >= p.n_rows) return;
            float *const to = sums + n * problem.sums_of_row() + static_cast<size_t>(partial) * p.out + o;
            if (o < p.out) to[0] = low;
            if (o + U::OUTS / 2 < p.out) to[U::OUTS / 2] = high;
        };
        if constexpr (ROWS > FEW)
#pragma unroll
            for (int i = 0; i < 2; ++i) store(lane % 4 * 2 + i, c[0][i] + c[1][i], c[0][2 + i] + c[1][2 + i]);
        else {
            const bool odd = lane & 4;
            float low = odd ? c[0][1] + c[1][1] : c[0][0] + c[1][0], high = odd ? c[0][3] + c[1][3] : c[0][2] + c[1][2];
            low += __shfl_xor_sync(~0u, low, 4), high += __shfl_xor_sync(~0u, high, 4);
            store(lane % 8, low, high);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) c[0][i] = c[1][i] = 0;
        partial = 0;
    }
}

__device__ uint32_t word_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* The kernel before waited for those before it: all but the planes can be read at once. */
template <class T, int K, int ROWS>
__global__ void __launch_bounds__(32 * SHARD_WARPS, 1) shard_kernel(const ShardProblem problem) {
    using U = Unit<ROWS>;
    const GatherProblem &p = problem.g;
    extern __shared__ __align__(1024) unsigned char shared[];
    const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), barrier = base + problem.barrier;
    const int sections = problem.sections;
    const int plane_pairs = sections * PLANES * problem.plane.blocks / PAIR, pair = cluster_index();
    const bool is_plane = pair < plane_pairs;
    const int plane = pair % PLANES, index = is_plane ? pair / PLANES : pair - plane_pairs;
    const int section = index % sections, book = K == 1 ? 0 : section / problem.panels;
    const int panel = K == 1 ? section : section - book * problem.panels, first = problem.first_slice(panel);
    const int slices = problem.first_slice(panel + 1) - first, part = index / sections * PAIR + cluster_rank();
    const int warp = part * SHARD_WARPS + __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int tiles = (p.out + U::OUTS - 1) / U::OUTS;
    const int x_groups = slices * U::GROUPS;       /* of each row */
    const bool has_x = lane < U::LANES * p.n_rows; /* a column of B */
    float *sums = problem.sums;
    const int in_planes = problem.in_planes, rest = p.entries - in_planes;

    const uint32_t entry_bytes = is_plane ? in_planes * 4 : rest * 16;
    if (threadIdx.x == 0) open_barrier(barrier);
    announce();
    const auto fetch_entries = [&](const void *from) {
        await_others();
        __syncthreads(); /* which that is too, but for racecheck */
        if (threadIdx.x > 0) return;
        expect_bytes(barrier, entry_bytes);
        fetch_into_all(base, from, entry_bytes, PAIR, barrier);
    };

    if (is_plane) {
        /* a word of all entries, one of zeros, words of x */
        auto *const words = reinterpret_cast<uint32_t *>(shared), *const x = words + in_planes + 4;
        for (int at = threadIdx.x; at < p.n_rows * x_groups; at += 32 * SHARD_WARPS) {
            const int n = at / x_groups, j = at - n * x_groups, group = first * U::GROUPS + j;
            const auto *const row = static_cast<const uint32_t *>(p.x) + static_cast<size_t>(n) * p.groups * 4;
            x[n * (x_groups + U::PAD / 4) + j / U::GROUPS * U::GROUPS + j / 4 % 2 * (U::GROUPS / 2) +
              j / 8 % U::LANES * 4 + j % 4] = group < p.groups ? __ldg(row + group * 4 + plane) : 0;
        }
        if (threadIdx.x == 0) words[in_planes] = 0;
        const uint32_t x_base = static_cast<uint32_t>(__cvta_generic_to_shared(x)) +
                                lane / U::LANES * (x_groups * 4 + U::PAD) + lane % U::LANES * 16;
        const uint32_t limit = in_planes * 0x00010001u, mask = (p.entries - 1) * 0x00010001u;
        uint4 low = {}, high = {}; /* the other lanes' would be columns of B that are not used */
        sums += static_cast<size_t>(section * PLANES + plane) * problem.plane.partials * p.out;
        run_units<K, ROWS>(
            problem, Partition(problem.plane, tiles, slices), warp, first, slices, book, sums,
            [&] {
                wait_for_kernels_before();
                fetch_entries(problem.planes + static_cast<size_t>(book * PLANES + plane) * in_planes);
                __syncthreads();
                wait_for_bytes(barrier);
            },
            [&](float (&c)[2][4], const uint4(&word)[2], int slice) {
                load_if(low, has_x, x_base + slice * (U::GROUPS * 4));
                load_if(high, has_x, x_base + slice * (U::GROUPS * 4) + U::GROUPS * 2);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t a[2][2];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        /* entries of the rest read as zeros */
                        const uint32_t e = __vminu2(word_of(word[half], i) & mask, limit);
                        a[half][0] = *reinterpret_cast<const uint32_t *>(shared + (e << 2 & 0x3fffc));
                        a[half][1] = *reinterpret_cast<const uint32_t *>(shared + (e >> 14 & 0x3fffc));
                    }
                    const uint4 &x = i < 2 ? low : high;
                    mma_k16<T>(c[i % 2], a[0][0], a[1][0], a[0][1], a[1][1], i % 2 ? x.z : x.x, i % 2 ? x.w : x.y);
                }
            });
    } else {
        /* entries, x; B = 16 here, so that codes need no mask */
        auto *const x = reinterpret_cast<uint4 *>(shared) + rest;
        for (int at = threadIdx.x; at < p.n_rows * x_groups; at += 32 * SHARD_WARPS) {
            const int n = at / x_groups, j = at - n * x_groups, group = first * U::GROUPS + j;
            const auto *const row = static_cast<const uint4 *>(p.x) + static_cast<size_t>(n) * p.groups;
            x[n * (x_groups + U::PAD / 16) + j / U::GROUPS * U::GROUPS + j % 8 * U::LANES + j / 8 % U::LANES] =
                group < p.groups ? __ldg(row + group) : uint4{0, 0, 0, 0};
        }
        const uint32_t x_base = base + rest * 16 + lane / U::LANES * (x_groups * 16 + U::PAD) + lane % U::LANES * 16;
        uint4 of_group = {};
        sums += (static_cast<size_t>(sections) * PLANES * problem.plane.partials +
                 static_cast<size_t>(section) * problem.rest.partials) *
                p.out;
        run_units<K, ROWS>(
            problem, Partition(problem.rest, tiles, slices), warp, first, slices, book, sums,
            [&] {
                fetch_entries(static_cast<const uint4 *>(p.codebooks) + book * p.entries + in_planes);
                wait_for_kernels_before();
                __syncthreads();
                wait_for_bytes(barrier);
            },
            [&](float (&c)[2][4], const uint4(&word)[2], int slice) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    load_if(of_group, has_x, x_base + (slice * U::GROUPS + i * U::LANES) * 16);
                    uint4 entry[2];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t w = word_of(word[half], i / 2), e = (i % 2 ? w >> 16 : w & 0xffff) - in_planes;
                        entry[half] = uint4{0, 0, 0, 0};
                        load_if(entry[half], e < static_cast<uint32_t>(rest), base + e * 16);
                    }
                    mma_k16<T>(c[0], entry[0].x, entry[1].x, entry[0].y, entry[1].y, of_group.x, of_group.y);
                    mma_k16<T>(c[1], entry[0].z, entry[1].z, entry[0].w, entry[1].w, of_group.z, of_group.w);
                }
            });
    }
}

/* Each warp adds up the partials of some kinds of blocks. */
template <class T> __global__ void __launch_bounds__(SUMMED *SUM_WARPS) sum_shards_kernel(const ShardProblem problem) {
    const GatherProblem &p = problem.g;
    const int unit_outs = problem.unit_outs, tiles = (p.out + unit_outs - 1) / unit_outs;
    const int planes = problem.sections * PLANES;
    const int kinds = planes + (problem.rest.blocks ? problem.sections : 0);
    const float *const sums = problem.sums + blockIdx.y * problem.sums_of_row();
    finish_sums<T>(p, static_cast<size_t>(blockIdx.y) * p.out, [&](int warp, int o) {
        float total = 0;
        for (int kind = warp; kind < kinds; kind += SUM_WARPS) {
            const bool is_plane = kind < planes;
            const int panel = (is_plane ? kind / PLANES : kind - planes) % problem.panels;
            const int slices = problem.first_slice(panel + 1) - problem.first_slice(panel);
            const Partition partition(is_plane ? problem.plane : problem.rest, tiles, slices);
            const int unit = o / unit_outs * slices;
            const int partials = partition.owner_of(unit + slices - 1) - partition.owner_of(unit) + 1;
            const int first = is_plane ? kind * problem.plane.partials
                                       : planes * problem.plane.partials + (kind - planes) * problem.rest.partials;
            const float *from = sums + static_cast<size_t>(first) * p.out + o;
#pragma unroll 4
            for (int partial = 0; partial < partials; ++partial, from += p.out) total += *from;
        }
        return total;
    });
}

/* Whether products of units and warps fit in 32 bits. */
bool units_fit(int64_t out, int64_t groups, const Device &device) {
    const int64_t units = (out / Unit<FEW>::OUTS + 1) * (groups / Unit<8>::GROUPS + 1);
    return units < UINT32_MAX / (int64_t{device.sms} * SHARD_WARPS + 1);
}

/* Pairs of blocks of a section for each of its planes; those that are left have the rest, which takes 3 times as long
 * for two codes as a plane: with 66 pairs 12 and 18, faster than 11 or 13 for a plane (H100). cost: of the slower, in
 * the time of one pair with a plane. */
int pairs_of_plane(int pairs, bool has_rest, double &cost) {
    if (!has_rest) {
        const int of_plane = std::max(1, pairs / PLANES);
        cost = 1.0 / of_plane;
        return of_plane;
    }
    int best = 1;
    cost = 1e30;
    for (int of_plane = 1; of_plane == 1 || PLANES * of_plane < pairs; ++of_plane) {
        const double slower = std::max(1.0 / of_plane, 1.5 / std::max(1, pairs - PLANES * of_plane));
        if (slower < cost) cost = slower, best = of_plane;
    }
    return best;
}

/* How the work is cut; bytes of shared memory and workspace. */
ShardProblem plan_shards(const aqlm_shape &s, int64_t n_rows, const Device &device, size_t &memory, size_t &workspace) {
    ShardProblem p = {};
    const int entries = 1 << s.nbits_per_codebook, rows = static_cast<int>(n_rows);
    const int books = static_cast<int>(s.num_codebooks);
    const int unit_groups = rows > FEW ? Unit<8>::GROUPS : Unit<FEW>::GROUPS;
    const int pad = rows > FEW ? Unit<8>::PAD : Unit<FEW>::PAD;
    const int most_x = rows == 1 ? 2048 : 2560; /* groups whose x lies in shared memory, of all rows */
    p.g.out = static_cast<int>(s.out_features);
    p.unit_outs = rows > FEW ? Unit<8>::OUTS : Unit<FEW>::OUTS;
    p.slices = static_cast<int>(divide_up(s.in_features / s.in_group_size, unit_groups));
    const auto least = static_cast<int>(divide_up(p.slices, most_x / unit_groups / rows));
    const bool has_rest = entries > device.shared_memory / 4 - most_x - 1024;
    double least_cost = 1e30;
    for (int panels = least; panels < least + 4; ++panels) { /* more, where blocks are then shared out better */
        double cost;
        const int of_plane = pairs_of_plane(device.sms / PAIR / (books * panels), has_rest, cost);
        if (cost / panels >= least_cost) continue;
        least_cost = cost / panels, p.panels = panels, p.plane.blocks = of_plane * PAIR;
    }
    p.sections = books * p.panels;
    const int x_groups = static_cast<int>(divide_up(p.slices, p.panels)) * unit_groups;
    const int x_words = rows * (x_groups + pad / 4), x_vectors = rows * (x_groups + pad / 16);
    p.in_planes = std::min(entries, (device.shared_memory / 4 - x_words - 8) / 8 * 8);
    const int rest = entries - p.in_planes, pairs = device.sms / PAIR / p.sections;
    p.rest.blocks = rest ? std::max(1, pairs - PLANES * p.plane.blocks / PAIR) * PAIR : 0;
    const auto partials = [&](int blocks) {
        return static_cast<int>(divide_up(int64_t{blocks} * SHARD_WARPS, divide_up(s.out_features, p.unit_outs))) + 1;
    };
    p.plane.partials = partials(p.plane.blocks), p.rest.partials = rest ? partials(p.rest.blocks) : 0;
    p.barrier = std::max(p.in_planes + 4 + x_words, (rest ? rest + x_vectors : 0) * 4) * 4;
    memory = p.barrier + 8;
    workspace = (size_t(books) * PLANES * p.in_planes + n_rows * p.sums_of_row()) * 4;
    return p;
}

template <class T, int K, int ROWS> cudaError_t launch(const Launch &l) {
    constexpr auto kernel = shard_kernel<T, K, ROWS>;
    const Device &device = l.device;
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    size_t memory, bytes;
    ShardProblem p = plan_shards(l.products->w.shape, l.n_rows, device, memory, bytes);
    p.g = gather_problem(l);
    p.planes = static_cast<uint32_t *>(l.workspace);
    p.sums = static_cast<float *>(l.workspace) + size_t(K) * PLANES * p.in_planes;
    constexpr int THREADS = 128;
    const auto blocks = [](int items, int of_a_block, int rows) {
        return dim3(static_cast<unsigned>(divide_up(items, of_a_block)), rows);
    };
    if (const cudaError_t error =
            launch_early<cut_into_planes_kernel>(p, blocks(p.in_planes, THREADS, K), 1, THREADS, 0, device, l.stream))
        return error;
    const dim3 grid(static_cast<unsigned>(p.sections * (PLANES * p.plane.blocks + p.rest.blocks)));
    if (const cudaError_t error = launch_early<kernel>(p, grid, PAIR, 32 * SHARD_WARPS, memory, device, l.stream))
        return error;
    return launch_early<sum_shards_kernel<T>>(p, blocks(p.g.out, SUMMED, l.n_rows), 1, SUMMED * SUM_WARPS, 0, device,
                                              l.stream);
}

template <class T, int K> cudaError_t launch_rows(const Launch &l) {
    return l.n_rows > FEW ? launch<T, K, 8>(l) : launch<T, K, FEW>(l);
}

template <class T> cudaError_t launch_of(const Launch &l) {
    return l.products->w.shape.num_codebooks == 1 ? launch_rows<T, 1>(l) : launch_rows<T, 2>(l);
}

} // namespace

/* Where all blocks run at a time, and those with a plane take about as long as those with the rest. */
bool can_shard(const aqlm_shape &s, int64_t n_rows, const Device &device) {
    const bool fits = s.in_group_size == 8 && s.out_group_size == 1 && s.num_codebooks <= 2 &&
                      s.nbits_per_codebook > 13 && s.in_features % 64 == 0 && device.clusters &&
                      device.shared_memory > 200 * 1024 && units_fit(s.out_features, s.in_features / 8, device);
    if (!fits || n_rows > MAX_ROWS) return false;
    size_t memory, bytes;
    const ShardProblem p = plan_shards(s, n_rows, device, memory, bytes);
    return p.sections * (PLANES * p.plane.blocks + p.rest.blocks) <= device.sms &&
           memory <= static_cast<size_t>(device.shared_memory);
}

size_t shard_workspace(const aqlm_shape &s, int64_t n_rows, const Device &device) {
    size_t memory, bytes;
    plan_shards(s, n_rows, device, memory, bytes);
    return bytes;
}

cudaError_t run_shards(const Launch &l) {
    return l.dtype == AQLM_F16 ? launch_of<__half>(l) : launch_of<__nv_bfloat16>(l);
}

} // namespace aqlm_cuda
