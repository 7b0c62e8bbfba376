/* tables.cuh: a row of x by tables of its products with the codebooks (B <= 8, og = 1), for one weight or several.
 *
 * The 128 codes of a row that a block looks up at a time have a table each, 256 fp32 products, 128 KB in all. Lane L of
 * every warp owns codes 4L .. 4L+3 and keeps their tables in its own bank of shared memory, so lookups never conflict,
 * and a lookup costs three instructions: entry e of lane L lies at byte 256 e + 4 L, which one byte permutation makes
 * of the code. A cluster's blocks cut the row into slices, build their tables once, run all of the cluster's outputs
 * through them, and add up through distributed shared memory. Where that would mean tables of several slices for each
 * block, the row is cut into parts of a few slices instead, and a kernel behind adds up the parts.
 *
 * What bounds it (H100; ncu's counters: benchmarks/results/cuda_bounds.json). 28672x8192: HBM, bytes of codes by the
 * time of a launch in a graph are 79 (1x8), 89 (2x8), 89 (4x8) and 92% (8x8) of the copy bandwidth. Small shapes: fixed
 * phases, in cycles by clock64 for 2x8 at 4096x4096, about 10,000 from launch to launch, in an earlier version that
 * took 0.8 us more: 580 to the kernel before, 2,300 until x and entries are there, 1,100 to make tables, 360 at the
 * barrier, 2,600 to look up, 1,900 to add up and finish.
 *
 * What did not pay: outputs spread evenly over warps with shorter last batches (4 to 18% slower); the codes of batches
 * ahead fetched to L2 (cold: a sector of each row 5% faster to 17% slower, its line in bulk 2% faster to 21% slower,
 * all four sectors 5 to 63% slower) or those of a round ahead (x and entries waited behind them: 0.2 to 2 us slower in
 * most shapes); codes two batches ahead in registers (3 to 7% slower in all but 4096x4096); codes loaded in place, one
 * after each output's lookups (1 to 7% slower); entries kept in registers for all slices (spills). */
#ifndef AQLM_CUDA_PRODUCT_TABLES_CUH
#define AQLM_CUDA_PRODUCT_TABLES_CUH

#include "cuda/cluster.cuh"
#include "cuda/product/sums.cuh"
#include "cuda/product/tables_launch.cuh"

namespace aqlm_cuda {

/* Where entry e of the table of code 4 lane + i starts, in bytes. */
__device__ inline int table_at(int i, int entry, int lane) {
    return (i >> 1) * (TABLE_BYTES / 2) + entry * 256 + (i & 1) * 128 + lane * 4;
}

/* Tables by matrix instructions: rows are the groups of x, columns entries. Warp w makes the tables of code w % 4 of
 * every lane, 8 entries at a time. Lanes of one quarter of a warp hold the same rows for different entries, that is the
 * same bank, so each stores its four rows in another order.
 *
 * What a member function needs is found in it: between their calls, time passes that costs nothing. */
template <class T, int G> struct TableRows {
    static constexpr int STEPS = G < 8 ? 1 : G / 8, WARPS_APART = TABLE_WARPS / 4, TILES = 256 / 8 / WARPS_APART;
    static constexpr int ROWS = 4;    /* rows of a lane: matrix s / 2, half s % 2 */
    const unsigned char *x, *entries; /* this lane's word of `group`, and of its first entry of `book` */
    const unsigned char *from[ROWS];  /* where x is loaded from, NULL for zeros */
    int mask, group, groups, warp, lane;
    uint32_t tables[ROWS]; /* where entries of the rows start, in the order of storing */
    uint32_t a[ROWS][STEPS];

    /* Fewer than 256 entries recur, so that the unused high bits of a code do not matter. */
    __device__ TableRows(const TableProblem &p, const TableWeight &w, int group, int book, int warp, int lane,
                         size_t x_row)
        : mask(p.entries - 1), group(group), groups(p.groups), warp(warp), lane(lane) {
        const int entry = warp / 4 * 8 + lane / 4, word = 2 * (lane % 4);
        entries = static_cast<const unsigned char *>(w.codebooks) +
                  (static_cast<size_t>(book * p.entries + (entry & mask)) * G + word) * 2;
        x = static_cast<const unsigned char *>(p.x) + ((x_row * p.groups + group) * G + word) * 2;
    }

    __device__ bool has_words() const { return G >= 8 || lane % 4 < 2; }

    /* Row s is the group that many ahead of `group`. */
    __device__ void aim_row(int s, int ahead) {
        from[s] = has_words() && group + ahead < groups ? x + ahead * (G * 2) : nullptr;
    }

    __device__ void load() {
#pragma unroll
        for (int s = 0; s < ROWS; ++s)
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
                a[s][step] = from[s] ? __ldg(reinterpret_cast<const uint32_t *>(from[s] + step * 16)) : 0;
    }

    __device__ uint32_t load_entry(int offset) const {
        return has_words() ? __ldg(reinterpret_cast<const uint32_t *>(entries + offset)) : 0;
    }

    /* Of the rows, whose codes are of these lanes. */
    __device__ void find_tables_of(const int (&lanes)[ROWS]) {
        int order[ROWS];
        rotate(order, lanes);
#pragma unroll
        for (int s = 0; s < ROWS; ++s) tables[s] = table_at(warp % 4, warp / 4 * 8 + 2 * (lane % 4), order[s]);
    }

    /* The products of the rows with 8 entries. */
    __device__ void store_tile(unsigned char *to, int t, const float (&c)[2][4]) const {
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

    /* By a quarter of the warp more for each lane of a quarter. */
    template <class V> __device__ void rotate(V (&to)[ROWS], const V (&from)[ROWS]) const {
        V half[ROWS];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) half[s] = lane & 1 ? from[(s + 1) % ROWS] : from[s];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) to[s] = lane & 2 ? half[(s + 2) % ROWS] : half[s];
    }
};

/* K = PERIOD << log_k. From lane to lane the codebooks of a warp's code recur with PERIOD. Lanes are sorted by them, so
 * that matrix m has those from m * (PERIOD / 2) on, BOOKS of them. Where these are several, all rows are multiplied
 * with each, but as zeros if they are not its; two are one instruction on 16 columns. 3x8g8 at 4096x4096 (H100): 44 us
 * with tables made by one thread each; unsorted 6.9 (K = 3; 5: 11.3), sorted 6.1 (10.2). */
template <class T, int G, int PERIOD> struct TableBuilder : TableRows<T, G> {
    using Rows = TableRows<T, G>;
    using Rows::a, Rows::lane, Rows::mask, Rows::ROWS, Rows::STEPS, Rows::TILES, Rows::warp, Rows::WARPS_APART;
    static constexpr int BOOKS = PERIOD % 2 ? PERIOD / 2 + 1 : 1;
    /* as many as registers hold */
    static constexpr int AT_A_TIME = PERIOD * STEPS * TILES <= 64   ? TILES
                                     : PERIOD * STEPS * TILES < 140 ? TILES / 2
                                                                    : TILES / 4;
    static constexpr bool BOOKS_VARY = PERIOD > 2; /* codebooks differ from slice to slice */
    int log_k, book_bytes, first_book;
    uint32_t b[AT_A_TIME][PERIOD][STEPS];

    static __device__ int log_of(int num_codebooks) { return PERIOD == 2 ? 2 : num_codebooks / PERIOD / 2; }
    static __device__ int first_group(const TableProblem &p, int warp, int lane) {
        if constexpr (BOOKS_VARY) return 0;
        return PERIOD == 2 ? lane / 4 : (lane / 4 * 4 + warp % 4) >> log_of(p.num_codebooks);
    }

    __device__ TableBuilder(const TableProblem &p, const TableWeight &w, int warp, int lane, size_t x_row)
        : Rows(p, w, first_group(p, warp, lane), BOOKS_VARY ? 0 : warp % 4 & (p.num_codebooks - 1), warp, lane, x_row),
          log_k(log_of(p.num_codebooks)), book_bytes(p.entries * G * 2) {}

    /* Of row s: its place among the sorted lanes, which of PERIOD codebooks it has, its lane. */
    __device__ int place(int s) const { return 8 * s + lane / 4; }
    static constexpr int EACH = 32 / PERIOD, MORE = 32 % PERIOD; /* lanes of a codebook; codebooks that have one more */
    __device__ int book(int s) const {
        if constexpr (!BOOKS_VARY) return s * PERIOD / ROWS;
        const int at = place(s);
        return at < MORE * (EACH + 1) ? at / (EACH + 1) : (at - MORE) / EACH;
    }
    __device__ int lane_of(int s) const { return book(s) + PERIOD * (place(s) - book(s) * EACH - min(book(s), MORE)); }

    /* Chooses the groups of the codes from first_code on. */
    __device__ void aim(int first_code) {
#pragma unroll
        for (int s = 0; s < ROWS; ++s) {
            if constexpr (BOOKS_VARY) this->aim_row(s, (first_code + 4 * lane_of(s) + warp % 4) / PERIOD >> log_k);
            else this->aim_row(s, (first_code >> log_k + PERIOD - 1) + (PERIOD == 2 ? 8 * (s % 2) : (32 >> log_k) * s));
        }
        if constexpr (BOOKS_VARY) first_book = first_code + warp % 4;
    }

    /* Unless codebooks vary they are those of every slice, but kept they would take registers from looking up. */
    __device__ void load_entries(int first_tile = 0) {
        int book_at[PERIOD];
#pragma unroll
        for (int m = 0; m < PERIOD; ++m) {
            const int next = BOOKS_VARY ? first_book + 4 * m : 4 * m;
            book_at[m] = (!BOOKS_VARY ? next : log_k ? next % (2 * PERIOD) : next % PERIOD) * book_bytes;
        }
        const auto load_with = [&](int mask) {
#pragma unroll
            for (int t = 0; t < AT_A_TIME; ++t)
#pragma unroll
                for (int m = 0; m < PERIOD; ++m)
#pragma unroll
                    for (int step = 0; step < STEPS; ++step)
                        b[t][m][step] = this->load_entry(((first_tile + t) * WARPS_APART * 8 & mask) * G * 2 +
                                                         step * 16 + book_at[m]);
        };
        if (mask == 255) load_with(255); /* all addresses are constants apart */
        else {
            int of_codes = mask;
            asm volatile("" : "+r"(of_codes)); /* lest addresses are kept for all rounds */
            load_with(of_codes);
        }
    }

    __device__ void find_tables() { this->find_tables_of({lane_of(0), lane_of(1), lane_of(2), lane_of(3)}); }

    __device__ void store(unsigned char *to) {
        uint32_t of_book[ROWS][BOOKS][STEPS];
#pragma unroll
        for (int s = 0; s < ROWS; ++s)
#pragma unroll
            for (int k = 0; k < BOOKS; ++k)
#pragma unroll
                for (int step = 0; step < STEPS; ++step)
                    of_book[s][k][step] = BOOKS == 1 || book(s) == s / 2 * (PERIOD / 2) + k ? a[s][step] : 0;
#pragma unroll
        for (int first = 0; first < TILES; first += AT_A_TIME) {
            if (first > 0) load_entries(first);
#pragma unroll
            for (int t = 0; t < AT_A_TIME; ++t) {
                float c[2][4] = {};
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int k = 0; k < BOOKS; k += 2)
#pragma unroll
                        for (int step = 0; step < STEPS; ++step) {
                            const auto &upper = of_book[2 * m], &lower = of_book[2 * m + 1];
                            const auto &books = b[t] + m * (PERIOD / 2);
                            if (k + 1 < BOOKS)
                                mma_k16<T>(c[m], upper[k][step], lower[k][step], upper[k + 1][step], lower[k + 1][step],
                                           books[k][step], books[k + 1][step]);
                            else mma_k8<T>(c[m], upper[k][step], lower[k][step], books[k][step]);
                        }
                this->store_tile(to, first + t, c);
            }
        }
    }
};

constexpr int ANY_PERIOD = 0;

/* The same for any K, g and dtypes, a lane its own tables. */
template <> struct TableBuilder<float, 0, ANY_PERIOD> {
    const TableProblem &p;
    const TableWeight &w;
    int warp, lane, first_code;
    size_t x_row;

    __device__ TableBuilder(const TableProblem &p, const TableWeight &w, int warp, int lane, size_t x_row)
        : p(p), w(w), warp(warp), lane(lane), x_row(x_row) {}

    __device__ void aim(int code) { first_code = code; }
    __device__ void load() {}
    __device__ void load_entries() {}
    __device__ void find_tables() {}

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
                                   load_float(w.codebooks, entry * g + n, p.weight_dtype), sum);
                *reinterpret_cast<float *>(tables + table_at(i, e, lane)) = sum;
            }
        }
    }
};

/* Of rows that have weights of their own, as many blocks each: that of this block, the first where it has none. Which
 * it is may be found by the kernel before. */
template <bool ROUTED>
__device__ inline TableWeight weight_of_row(bool &has_weight, TableWeight w, const TableProblem &p, int blocks) {
    if constexpr (!ROUTED) return w;
    wait_for_kernels_before();
    const int64_t index = p.routes.index[blockIdx.z / blocks];
    has_weight = index >= 0 && index < p.routes.weights;
    if (!has_weight) return w;
    w.codes += index * w.out * (p.groups * p.num_codebooks);
    w.codebooks = static_cast<const unsigned char *>(w.codebooks) + index * p.codebook_bytes;
    w.scales = static_cast<const unsigned char *>(w.scales) + index * w.out * (p.weight_dtype == AQLM_F32 ? 4 : 2);
    return w;
}

/* What this block finishes of such a row, unless another kernel does. */
__device__ inline void zero_outputs(const TableWeight &w, const TableProblem &p, int row) {
    const int share = p.cut.share, first = ((blockIdx.y - w.first_cluster) * p.cut.cluster_size + blockIdx.x) * share;
    if (p.cut.parts > 1) return;
    for (int o = first + threadIdx.x; o < min(first + share, w.out); o += 32 * TABLE_WARPS)
        store_float(w.y, static_cast<size_t>(row) * w.y_stride + o, p.dtype, 0);
}

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

/* T float: tables of any dtypes; ROUTED: each row has a weight of its own. grid [size, clusters, parts * n_rows],
 * clusters of [size]. The order is by what is waited for: nothing is found before it is needed, or after while loads
 * are in flight.
 *
 * The compiler put the codes' loads behind lookups, or lookups before loads, as registers were free: up to 8% for
 * better or worse. load_now and a branch that is never taken hold the order. A wait hidden in a prologue (a scale
 * converted to float, a copy of an entry, a spill) cost up to 600 of 5,500 samples of ncu, whose source page shows it
 * (--section SourceCounters). Bytes of a thread that are still spilled (sm_90a): 12 to 16 with g = 4, 12 to 28
 * with g = 8 (196 with K = 7), up to 160 with g = 16, 144 to 624 with g = 32.
 *
 * A cluster's block and a single one have a loop each: while one loop asked at every step where its sums go and whether
 * a slice follows, most shapes took 1 to 6% longer. Arguments are a struct by value (what every thread reads) and one
 * of weights, of which a block copies its own: that costs one weight alone nothing; a reference into it cost 3%. */
template <class T, int G, int PERIOD, bool ROUTED>
__global__ void __launch_bounds__(32 * TABLE_WARPS, 1)
    table_kernel(const TableProblem p, const __grid_constant__ TableWeights weights) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char *const tables = shared;
    const int cluster = blockIdx.y;
    bool has_weight = true;
    const TableWeight w = weight_of_row<ROUTED>(
        has_weight, weights.of[(cluster >= weights.of[1].first_cluster) + (cluster >= weights.of[2].first_cluster)], p,
        p.cut.parts);
    if (!has_weight) {
        zero_outputs(w, p, blockIdx.z);
        return;
    }
    /* While the kernels before finish: what that does not change, or L2 alone sees. */
    if (const int at = threadIdx.x * 128; at < p.codebook_bytes)
        prefetch(static_cast<const unsigned char *>(w.codebooks) + at);
    const int size = p.cut.cluster_size, share = p.cut.share, cluster_outs = size * share, rank = blockIdx.x;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32; /* uniform to the compiler too */
    const int first_out = (cluster - w.first_cluster) * cluster_outs, n_outs = min(cluster_outs, w.out - first_out);
    const int y_row = p.cut.parts == 1 ? blockIdx.z : blockIdx.z / p.cut.parts;
    const int x_row = ROUTED ? y_row / p.routes.rows_of_x : y_row;
    const int part = blockIdx.z - y_row * p.cut.parts;
    const int row_codes = p.groups * p.num_codebooks, first_slice = part * p.cut.slices_of_part;
    const auto first_row = static_cast<size_t>(min(first_out + warp * BATCH + lane % BATCH, w.out - 1));
    prefetch(w.codes + first_row * row_codes + min((first_slice + rank) * TABLE_CODES, row_codes - 1));
    TableBuilder<T, G, PERIOD> builder(p, w, warp, lane, x_row);
    builder.aim((first_slice + rank) * TABLE_CODES);
    wait_for_kernels_before();
    builder.load();
    builder.load_entries();

    /* Batches of outputs are distributed among the warps. The codes of one are loaded while the one before is looked
     * up, of the next slice if need be; near the end of W it starts earlier and sums some outputs for nothing. */
    const auto load = [&](uint32_t (&to)[BATCH], int slice, int from) {
        const int code = slice * TABLE_CODES + 4 * lane;
        const uint8_t *codes = w.codes + static_cast<size_t>(min(first_out + from, w.out - BATCH)) * row_codes;
        codes += code < row_codes ? code : 0; /* what has no group has tables of zeros */
#pragma unroll
        for (int r = 0; r < BATCH; ++r, codes += row_codes) to[r] = load_now(reinterpret_cast<const uint32_t *>(codes));
    };
    uint32_t words[2][BATCH];
    if (warp * BATCH < n_outs) load(words[0], first_slice + rank, warp * BATCH);

    const uint32_t bank = lane * 4;
    float *const sums = reinterpret_cast<float *>(shared + TABLE_BYTES); /* [size, share]: from all blocks, its own */
    const int own = max(min(share, n_outs - rank * share), 0), first_own = first_out + rank * share;
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(sums));
    const Mailbox mailbox = {address + cluster_outs * 4, address};
    if (size > 1) {
        if (threadIdx.x == 0) mailbox.open(own * size * 4);
        announce();
    }
    const auto scale_of = [&](int o) { return load_as<T>(w.scales, first_own + o, p.weight_dtype); };
    const auto bias_of = [&](int o) { return w.bias ? load_as<T>(w.bias, first_own + o, p.dtype) : T(0.f); };
    T scale(0.f), bias(0.f); /* of the first output that this thread finishes */
    if (static_cast<int>(threadIdx.x) < own && p.cut.parts == 1)
        scale = scale_of(threadIdx.x), bias = bias_of(threadIdx.x);
    builder.find_tables();

    bool odd = false; /* which of words comes next */
    /* found(output of the cluster, its sum over the slice whose tables are there), for those of this warp. */
    const auto look_up = [&](int slice, bool is_last, const auto &found) {
        int from = warp * BATCH;
        const auto step = [&](const uint32_t (&word)[BATCH], uint32_t (&next)[BATCH]) {
            const bool more = from + TABLE_WARPS * BATCH < n_outs;
            if (more || !is_last)
                load(next, more ? slice : slice + 1, more ? from + TABLE_WARPS * BATCH : warp * BATCH);
            if (w.out < BATCH) return; /* never, but it keeps the compiler from looking up before it has loaded */
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
            const int o = min(from, w.out - BATCH - first_out) + lane / (32 / BATCH);
            if (lane % (32 / BATCH) == 0 && o >= from && o < n_outs) found(o, total);
            from += TABLE_WARPS * BATCH;
        };
        for (; from < n_outs; odd = !odd)
            if (odd) step(words[1], words[0]);
            else step(words[0], words[1]);
    };
    const auto finish = [&](int o, float total) {
        if (p.cut.parts > 1) {
            w.sums[static_cast<size_t>(blockIdx.z) * w.out + first_own + o] = total;
            return;
        }
        if (o >= 32 * TABLE_WARPS) scale = scale_of(o), bias = bias_of(o);
        total = total * static_cast<float>(scale) + static_cast<float>(bias);
        store_as<T>(w.y, static_cast<size_t>(y_row) * (ROUTED ? w.y_stride : w.out) + first_own + o, p.dtype, total);
    };
    if (size > 1) { /* a slice a block; a sum goes at once to the block that finishes the output */
        const float of_share = 1.f / share;
        builder.store(tables);
        __syncthreads();
        await_others();
        look_up(rank, true, [&](int o, float total) {
            const int to = static_cast<int>((o + 0.5f) * of_share);
            mailbox.send(total, to, rank * share + o - to * share);
        });
        mailbox.wait();
        for (int o = threadIdx.x; o < own; o += 32 * TABLE_WARPS) {
            float total = 0;
#pragma unroll 4
            for (int other = 0; other < size; ++other) total += sums[other * share + o];
            finish(o, total);
        }
        return;
    }
    const int slices = (row_codes + TABLE_CODES - 1) / TABLE_CODES;
    const int end_slice = min(slices, first_slice + p.cut.slices_of_part);
    for (int slice = first_slice; slice < end_slice; ++slice) {
        const bool is_first = slice == first_slice;
        if (!is_first) {
            builder.load_entries();
            __syncthreads(); /* the last lookups in the tables before */
        }
        builder.store(tables);
        builder.aim((slice + 1) * TABLE_CODES);
        builder.load();
        __syncthreads();
        look_up(slice, slice + 1 == end_slice,
                [&](int o, float total) { sums[o] = is_first ? total : sums[o] + total; });
    }
    __syncthreads();
    for (int o = threadIdx.x; o < own; o += 32 * TABLE_WARPS) finish(o, sums[o]);
}

/* y of rows cut into parts. grid [out / SUMMED, weights, n_rows]. */
template <class T, bool ROUTED>
__global__ void __launch_bounds__(SUMMED *SUM_WARPS)
    sum_parts_kernel(const TableProblem p, const __grid_constant__ TableWeights weights) {
    bool has_weight = true;
    const TableWeight w = weight_of_row<ROUTED>(has_weight, weights.of[blockIdx.y], p, 1);
    const auto at = static_cast<size_t>(blockIdx.z) * (ROUTED ? w.y_stride : w.out);
    if (!has_weight) {
        const int o = blockIdx.x * SUMMED + threadIdx.x;
        if (threadIdx.x < SUMMED && o < w.out) store_as<T>(w.y, at + o, p.dtype, 0);
        return;
    }
    const auto sum = [&](int warp, int o) {
        float total = 0;
        const float *from = w.sums + (static_cast<size_t>(blockIdx.z) * p.cut.parts + warp) * w.out + o;
#pragma unroll 4
        for (int part = warp; part < p.cut.parts; part += SUM_WARPS, from += size_t{SUM_WARPS} * w.out) total += *from;
        return total;
    };
    finish_sums<T>(w, at, sum, p.dtype, p.weight_dtype);
}

template <class T, int G, int PERIOD, bool ROUTED = false> cudaError_t launch_table_kernel(const TableLaunch &l) {
    constexpr auto kernel = table_kernel<T, G, PERIOD, ROUTED>;
    if (const cudaError_t error = allow_shared_memory<kernel>(l.device)) return error;
    const auto &[parts, slices_of_part, size, share] = l.problem.cut;
    const dim3 grid(size, l.clusters, parts * l.n_rows);
    const cudaError_t error = launch_early<kernel>(l.problem, grid, size, 32 * TABLE_WARPS,
                                                   TABLE_BYTES + share * size * 4 + 8, l.device, l.stream, l.weights);
    if (error || parts == 1) return error;
    const dim3 sum_grid(static_cast<unsigned>(divide_up(l.most_outs, SUMMED)), l.count, l.n_rows);
    return launch_early<sum_parts_kernel<T, ROUTED>>(l.problem, sum_grid, 1, SUMMED * SUM_WARPS, 0, l.device, l.stream,
                                                     l.weights);
}

template <class T, int G> cudaError_t launch_tables(const TableLaunch &l) {
    if (l.problem.routes.index) return launch_table_kernel<T, G, 1, true>(l);
    switch (l.problem.num_codebooks) {
    case 1:
    case 2:
    case 4: return launch_table_kernel<T, G, 1>(l);
    case 8: return launch_table_kernel<T, G, 2>(l);
    case 3:
    case 6: return launch_table_kernel<T, G, 3>(l);
    }
    return l.problem.num_codebooks == 5 ? launch_table_kernel<T, G, 5>(l) : launch_table_kernel<T, G, 7>(l);
}

} // namespace aqlm_cuda
#endif
