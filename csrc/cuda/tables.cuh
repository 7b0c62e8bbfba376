/* tables.cuh: a row of x by tables of its products with the codebooks (B <= 8, og = 1).
 *
 * The 128 codes of a row that a block looks up at a time have a table each, 256 fp32 products, 128 KB in all. Lane L of
 * every warp owns codes 4L .. 4L+3 and keeps their tables in its own bank of shared memory, so lookups never conflict,
 * and a lookup costs three instructions: entry e of lane L lies at byte 256 e + 4 L, which one byte permutation makes
 * of the code. A cluster's blocks cut the row into slices, build their tables once, run all of the cluster's outputs
 * through them, and add up through distributed shared memory. */
#ifndef AQLM_CUDA_TABLES_CUH
#define AQLM_CUDA_TABLES_CUH

#include "cuda/cluster.cuh"

namespace aqlm_cuda {

struct TableProblem {
    void *y;               /* [n_rows, out] */
    const void *x;         /* [n_rows, in] */
    const uint8_t *codes;  /* [out, J, K] */
    const void *codebooks; /* [K, E, g] */
    const void *scales;    /* [out] */
    const void *bias;      /* [out] or NULL */
    aqlm_dtype dtype, weight_dtype;
    int out, groups, num_codebooks, entries, in_group_size, codebook_bytes;
    int size, share; /* blocks of a cluster; outputs that each finishes */
    /* A last round with fewer slices than blocks: each slice is looked up by several, for last_outs outputs each. */
    int last_outs;
    uint64_t last_part; /* which of them a block looks up, four bits for each block of the cluster */
};

constexpr int TABLE_WARPS = 16, TABLE_CODES = 128, TABLE_BYTES = TABLE_CODES * 256 * 4;
constexpr int BATCH = 16; /* outputs a warp sums at a time */

/* Where entry e of the table of code 4 lane + i starts, in bytes. */
__device__ inline int table_at(int i, int entry, int lane) {
    return (i >> 1) * (TABLE_BYTES / 2) + entry * 256 + (i & 1) * 128 + lane * 4;
}

/* Tables by matrix instructions: rows are the groups of x, columns entries. K divides 8. Warp w makes the tables of
 * code w % 4 of every lane, 8 entries at a time. Lanes of one quarter of a warp hold the same rows for different
 * entries, that is the same bank, so each stores its four rows in another order. */
template <class T, int G> struct TableBuilder {
    static constexpr int STEPS = G < 8 ? 1 : G / 8, WARPS_APART = TABLE_WARPS / 4, TILES = 256 / 8 / WARPS_APART;
    static constexpr int ROWS = 4;    /* of a lane: matrix s / 2, half s % 2 */
    const unsigned char *x, *entries; /* this lane's word of its first group and entry */
    int mask, first_tile, group, groups, row_groups, log_k, second_book;
    bool has_words, one, two;
    uint32_t tables[ROWS]; /* where entries of the rows start, in the order of storing */
    uint32_t a[ROWS][STEPS];

    __device__ TableBuilder(const TableProblem &p, int warp, int lane, size_t x_row) {
        const int i = warp % 4, row = lane / 4, quad = lane % 4;
        log_k = p.num_codebooks == 8 ? 3 : p.num_codebooks / 2;
        one = quad & 1, two = quad & 2, has_words = G >= 8 || quad < 2;
        mask = p.entries - 1, first_tile = warp / 4;
        groups = p.groups;
        group = log_k < 3 ? (4 * row + i) >> log_k : row;
        row_groups = log_k < 3 ? 32 >> log_k : 8; /* from one of the rows to the next; K = 8: to the next half */
        int lanes[ROWS], order[ROWS];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) lanes[s] = log_k < 3 ? 8 * s + row : 16 * (s % 2) + 2 * row + s / 2;
        rotate(order, lanes);
#pragma unroll
        for (int s = 0; s < ROWS; ++s) tables[s] = table_at(i, first_tile * 8 + 2 * quad, order[s]);
        const int book = i & (p.num_codebooks - 1);
        second_book = log_k < 3 ? 0 : 4 * p.entries * G * 2;
        entries = static_cast<const unsigned char *>(p.codebooks) +
                  (static_cast<size_t>(book * p.entries + (row & mask)) * G + 2 * quad) * 2;
        x = static_cast<const unsigned char *>(p.x) + ((x_row * p.groups + group) * G + 2 * quad) * 2;
    }

    /* Groups of the codes from first_code on. */
    __device__ void load(int first_code) {
#pragma unroll
        for (int s = 0; s < ROWS; ++s) {
            const int ahead = (first_code >> log_k) + row_groups * (log_k < 3 ? s : s % 2);
            const bool valid = has_words && group + ahead < groups;
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
                a[s][step] = valid ? __ldg(reinterpret_cast<const uint32_t *>(x + (ahead * G + step * 8) * 2)) : 0;
        }
    }

    __device__ void store(unsigned char *to) const {
        uint32_t b[TILES][2][STEPS];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            /* fewer than 256 entries recur, so that the unused high bits of a code do not matter */
            const int offset = ((first_tile + t * WARPS_APART) * 8 & mask) * G * 2;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const auto word = [&](int book) {
                    return __ldg(reinterpret_cast<const uint32_t *>(entries + offset + book + step * 16));
                };
                b[t][0][step] = has_words ? word(0) : 0;
                b[t][1][step] = has_words && log_k == 3 ? word(second_book) : b[t][0][step];
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            float c[2][4] = {};
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int step = 0; step < STEPS; ++step)
                    mma_k8<T>(c[m], a[2 * m][step], a[2 * m + 1][step], b[t][m][step]);
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                const float v[ROWS] = {c[0][column], c[0][2 + column], c[1][column], c[1][2 + column]};
                float stored[ROWS];
                rotate(stored, v);
                const int entry = t * WARPS_APART * 8 + column;
#pragma unroll
                for (int s = 0; s < ROWS; ++s)
                    *reinterpret_cast<float *>(to + tables[s] + table_at(0, entry, 0)) = stored[s];
            }
        }
    }

    /* By a quarter of the warp more for each lane of a quarter. */
    template <class V> __device__ void rotate(V (&to)[ROWS], const V (&from)[ROWS]) const {
        V half[ROWS];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) half[s] = one ? from[(s + 1) % ROWS] : from[s];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) to[s] = two ? half[(s + 2) % ROWS] : half[s];
    }
};

/* The same for any K, g and dtypes, a lane its own tables. */
template <> struct TableBuilder<float, 0> {
    const TableProblem &p;
    int warp, lane, first_code;
    size_t x_row;

    __device__ TableBuilder(const TableProblem &p, int warp, int lane, size_t x_row)
        : p(p), warp(warp), lane(lane), x_row(x_row) {}

    __device__ void load(int code) { first_code = code; }

    __device__ void store(unsigned char *tables) const {
        const int g = p.in_group_size;
        for (int i = 0; i < 4; ++i) {
            const int code = first_code + 4 * lane + i, group = code / p.num_codebooks, book = code % p.num_codebooks;
            for (int e = warp; e < 256; e += TABLE_WARPS) {
                const size_t entry = static_cast<size_t>(book) * p.entries + (e & (p.entries - 1));
                float sum = 0;
                if (group < p.groups)
                    for (int n = 0; n < g; ++n)
                        sum = fmaf(load_float(p.x, (x_row * p.groups + group) * g + n, p.dtype),
                                   load_float(p.codebooks, entry * g + n, p.weight_dtype), sum);
                *reinterpret_cast<float *>(tables + table_at(i, e, lane)) = sum;
            }
        }
    }
};

/* sum over lanes of v[BATCH]: lane r * 32 / BATCH gets that of v[r]. */
template <int WIDTH = BATCH / 2> __device__ inline float reduce_batch(float (&v)[BATCH], int lane) {
    constexpr int DISTANCE = 32 / BATCH * WIDTH;
    const bool upper = lane & DISTANCE;
#pragma unroll
    for (int r = 0; r < WIDTH; ++r) {
        const float keep = upper ? v[r + WIDTH] : v[r], send = upper ? v[r] : v[r + WIDTH];
        v[r] = keep + __shfl_xor_sync(~0u, send, DISTANCE);
    }
    if constexpr (WIDTH > 1) return reduce_batch<WIDTH / 2>(v, lane);
    else {
#pragma unroll
        for (int distance = DISTANCE / 2; distance >= 1; distance /= 2) v[0] += __shfl_xor_sync(~0u, v[0], distance);
        return v[0];
    }
}

/* A scale or bias; T float: of any dtype. */
template <class T> __device__ inline float load_as(const void *p, int i, aqlm_dtype dtype) {
    if constexpr (std::is_same_v<T, float>) return load_float(p, i, dtype);
    else return static_cast<float>(static_cast<const T *>(p)[i]);
}

/* T float: tables of any dtypes. grid [clusters * cluster_size, n_rows]. */
template <class T, int G> __global__ void __launch_bounds__(32 * TABLE_WARPS, 1) table_kernel(const TableProblem p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char *const tables = shared;
    const int size = p.size, share = p.share, cluster_outs = size * share, rank = cluster_rank();
    float *const sums = reinterpret_cast<float *>(shared + TABLE_BYTES); /* [cluster_outs] */
    float *const inbox = sums + cluster_outs; /* [cluster_size, cluster_outs / cluster_size] */
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32; /* uniform to the compiler too */
    const int first_out = cluster_index() * cluster_outs, n_outs = min(cluster_outs, p.out - first_out);
    const int row_codes = p.groups * p.num_codebooks, slices = (row_codes + TABLE_CODES - 1) / TABLE_CODES;
    const uint32_t bank = lane * 4;

    const int own = max(min(share, n_outs - rank * share), 0), first_own = first_out + rank * share;
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(inbox));
    const Mailbox mailbox = {address + cluster_outs * 4, address};
    if (size > 1) {
        if (threadIdx.x == 0) mailbox.open(own * size * 4);
        announce();
    }
    /* While kernels before end: what their ends do not change, or L2 alone sees. */
    const auto first_row = static_cast<size_t>(min(first_out + warp * BATCH + lane % BATCH, p.out - 1));
    prefetch(p.codes + first_row * row_codes + min(rank * TABLE_CODES, row_codes - 1));
    if (const size_t at = threadIdx.x * size_t{128}; at < static_cast<size_t>(p.codebook_bytes))
        prefetch(static_cast<const unsigned char *>(p.codebooks) + at);
    TableBuilder<T, G> builder(p, warp, lane, blockIdx.y);
    wait_for_kernels_before();

    /* Batches of outputs are dealt out to the warps. The codes of one are loaded while the one before is looked up, of
     * the next slice if need be; near the end of W it starts earlier and sums some outputs for nothing. */
    const auto load = [&](uint32_t (&to)[BATCH], int slice, int from) {
        const int code = slice * TABLE_CODES + 4 * lane;
        const uint8_t *codes = p.codes + static_cast<size_t>(min(first_out + from, p.out - BATCH)) * row_codes;
        codes += code < row_codes ? code : 0; /* what has no group has tables of zeros */
#pragma unroll
        for (int r = 0; r < BATCH; ++r, codes += row_codes)
            to[r] = load_once(reinterpret_cast<const uint32_t *>(codes));
    };
    /* Slices are dealt out by rounds. */
    struct Round {
        int slice, begin, end;
    };
    const auto round_at = [&](int first_slice) -> Round {
        const int left = slices - first_slice;
        if (left >= size) return {first_slice + rank, 0, n_outs};
        if (left <= 0) return {slices, 0, 0};
        const int part = p.last_part >> 4 * rank & 15, begin = part * p.last_outs,
                  end = min(begin + p.last_outs, n_outs);
        if (begin >= end) return {slices, 0, 0};
        return {first_slice + rank - part * left, begin, end};
    };
    Round now = {rank, 0, n_outs}, then = round_at(size);
    int from = warp * BATCH;
    bool first_round = true;
    const auto step = [&](const uint32_t (&word)[BATCH], uint32_t (&next)[BATCH]) {
        const bool more = from + TABLE_WARPS * BATCH < now.end;
        if (more || then.slice < slices)
            load(next, more ? now.slice : then.slice, more ? from + TABLE_WARPS * BATCH : then.begin + warp * BATCH);
        float sum[BATCH];
#pragma unroll
        for (int r = 0; r < BATCH; ++r) {
            float products[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) /* byte i of the word becomes byte 1 of the address */
                products[i] = *reinterpret_cast<const float *>(tables + table_at(i, 0, 0) +
                                                               __byte_perm(word[r], bank, 0x7604 | i << 4));
            sum[r] = (products[0] + products[1]) + (products[2] + products[3]);
        }
        const float total = reduce_batch(sum, lane);
        const int o = min(from, p.out - BATCH - first_out) + lane / (32 / BATCH);
        if (lane % (32 / BATCH) == 0 && o >= from && o < now.end) sums[o] = first_round ? total : sums[o] + total;
        from += TABLE_WARPS * BATCH;
    };
    uint32_t words[2][BATCH];
    if (from < n_outs) load(words[0], rank, from); /* on their way while tables are made */
    builder.load(rank * TABLE_CODES);
    const auto scale_of = [&](int o) { return load_as<T>(p.scales, first_own + o, p.weight_dtype); };
    const auto bias_of = [&](int o) { return p.bias ? load_as<T>(p.bias, first_own + o, p.dtype) : 0; };
    float scale = 0, bias = 0; /* of the first output that this thread finishes */
    if (static_cast<int>(threadIdx.x) < own) scale = scale_of(threadIdx.x), bias = bias_of(threadIdx.x);
    bool odd = false;
    for (int next_slice = size; now.slice < slices; now = then, then = round_at(next_slice)) {
        if (!first_round) __syncthreads(); /* the last lookups in the tables before */
        builder.store(tables);
        builder.load(then.slice * TABLE_CODES);
        __syncthreads();
        for (from = now.begin + warp * BATCH; from < now.end; odd = !odd)
            if (odd) step(words[1], words[0]);
            else step(words[0], words[1]);
        first_round = false, next_slice += size;
    }

    __syncthreads();
    if (size > 1) {
        await_others();
        const int to = warp % size, turn = warp / size, turns = TABLE_WARPS / size; /* some warps may be left over */
        for (int o = turn * 32 + lane; o < min(share, n_outs - to * share) && turn < turns; o += turns * 32)
            mailbox.send(sums[to * share + o], to, rank * share + o);
        mailbox.wait();
    }
    for (int o = threadIdx.x; o < own; o += 32 * TABLE_WARPS) {
        float total = 0;
        if (size == 1) total = sums[o];
        else
            for (int other = 0; other < size; ++other) total += inbox[other * share + o];
        if (o >= 32 * TABLE_WARPS) scale = scale_of(o), bias = bias_of(o);
        store_float(p.y, static_cast<size_t>(blockIdx.y) * p.out + first_own + o, p.dtype, total * scale + bias);
    }
}

template <class T, int G>
cudaError_t launch_table_kernel(TableProblem p, int n_rows, const Device &device, cudaStream_t stream) {
    constexpr auto kernel = table_kernel<T, G>;
    constexpr int64_t TABLES_COST = 560; /* of making tables, in outputs looked up (H200) */
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    const int64_t slices = divide_up(p.groups * p.num_codebooks, TABLE_CODES);
    int64_t least = INT64_MAX;
    for (int size = 1; size <= std::min<int64_t>(slices, device.clusters ? MAX_CLUSTER : 1); ++size) {
        int clusters;
        if (const cudaError_t error = resident_clusters<kernel>(clusters, size, 32 * TABLE_WARPS, device)) return error;
        if (clusters == 0) continue;
        const int64_t most = (device.shared_memory - TABLE_BYTES - 8) / 8 / size / 2 * 2; /* even: the barrier behind */
        const int64_t share = std::min(divide_up(p.out, int64_t(2) * clusters * size) * 2, most); /* them is aligned */
        const int64_t waves = divide_up(p.out, share * size * clusters), left = slices % size;
        const int64_t parts = left ? size / left : 1, last = left ? TABLES_COST + divide_up(share * size, parts) : 0;
        const int64_t cost = waves * (slices / size * (TABLES_COST + share * size) + last);
        if (cost >= least) continue;
        least = cost, p.size = size, p.share = static_cast<int>(share);
        p.last_outs = static_cast<int>(divide_up(share * size, parts * BATCH)) * BATCH;
    }

    for (int rank = 0; rank < p.size && slices % p.size; ++rank)
        p.last_part |= uint64_t(rank / (slices % p.size)) << 4 * rank;
    const dim3 grid(static_cast<unsigned>(divide_up(p.out, p.share * p.size)) * p.size, n_rows);
    return launch_early<kernel>(p, grid, p.size, 32 * TABLE_WARPS, TABLE_BYTES + p.share * p.size * 8 + 8, device,
                                stream);
}

} // namespace aqlm_cuda
#endif
