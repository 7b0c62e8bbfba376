/* tables.cuh: a row of x by tables of its products with the codebooks (16-bit floats, B <= 8, og = 1).
 *
 * The 256 codes of a row that a block looks up at a time have a table each, 256 fp16 products, 128 KB in all. Lane L of
 * every warp owns codes 8L .. 8L+7 and keeps their tables in its own bank of shared memory, so lookups never conflict,
 * and entry e of lane L lies at byte 256 e + 4 L, which one byte permutation makes of the code. A cluster's blocks cut
 * the row into slices, make their tables, run all of the cluster's outputs through them, and add up through distributed
 * shared memory.
 *
 * Products are scaled by a power of two for the largest possible one to be just below fp16's largest. Their rounding is
 * that of a dense fp16 weight: 2^-11 of each product. Sums are fp32. */
#ifndef AQLM_CUDA_TABLES_CUH
#define AQLM_CUDA_TABLES_CUH

#include "cuda/common.cuh"

namespace aqlm_cuda {

struct TableProblem {
    void *y;               /* [n_rows, out] */
    const void *x;         /* [n_rows, in] */
    const uint8_t *codes;  /* [out, J, K] */
    const void *codebooks; /* [K, E, g] */
    const void *scales;    /* [out] */
    const void *bias;      /* [out] or NULL */
    int out, groups, num_codebooks, entries, in_group_size;
    int size, share; /* blocks of a cluster; outputs that each finishes */
};

constexpr int TABLE_WARPS = 32, LANE_CODES = 8, TABLE_CODES = 32 * LANE_CODES, TABLE_BYTES = TABLE_CODES * 256 * 2;
constexpr int BATCH = 4; /* outputs a warp sums at a time */

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

__device__ inline int cluster_index() {
#if __CUDA_ARCH__ >= 900
    int index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
#else
    return blockIdx.x;
#endif
}

/* Sums of a cluster's blocks go to the block that finishes those outputs: each block has a mailbox of 4-byte values and a
 * barrier in shared memory that counts the bytes which arrived. */
struct Mailbox {
    uint32_t barrier, values; /* addresses in shared memory */

    /* One thread; `bytes` will come. */
    __device__ void open(int bytes) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.init.shared.b64 [%0], 1;\n"
                     "fence.mbarrier_init.release.cluster;\n"
                     "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
                     "r"(bytes)
                     : "memory");
#endif
    }
    /* All threads: after open, and before the first send. */
    static __device__ void announce() {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
    }
    static __device__ void await_others() {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }
    __device__ void send(float value, int rank, int index) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .u32 to, at;\n"
                     "mapa.shared::cluster.u32 to, %0, %3;\n"
                     "mapa.shared::cluster.u32 at, %1, %3;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %2, [at]; }" ::"r"(values +
                                                                                                            index * 4),
                     "r"(barrier), "r"(__float_as_uint(value)), "r"(rank)
                     : "memory");
#endif
    }
    __device__ void wait() const {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred done;\n"
                     "again: mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n"
                     "@!done bra again; }" ::"r"(barrier)
                     : "memory");
#endif
    }
};

/* Where entry e of the table of code 8 lane + i starts, in bytes; those of i and i + 4 share a word. */
__device__ inline int table_at(int i, int entry, int lane) {
    return i / 2 % 2 * (TABLE_BYTES / 2) + entry * 256 + i % 2 * 128 + lane * 4 + i / 4 * 2;
}

/* The larger of most and the bits of |v|, for each 16-bit half of four. */
__device__ inline uint32_t abs_max(uint32_t most, const void *p, int i) {
    const uint2 v = __ldg(static_cast<const uint2 *>(p) + i);
    return __vmaxu2(most, __vmaxu2(v.x & 0x7fff7fff, v.y & 0x7fff7fff));
}

/* largest[0], [1] = bits of the largest |x| and |codebooks|, of n[0], n[1] 8-byte words; they were 0. */
__device__ inline void block_abs_max(uint32_t *largest, const void *x, const void *codebooks, int x_words,
                                     int book_words) {
    const int i = threadIdx.x;
    uint32_t of_x = i < x_words ? abs_max(0, x, i) : 0, of_books = i < book_words ? abs_max(0, codebooks, i) : 0;
#pragma unroll 1
    for (int at = i + 32 * TABLE_WARPS; at < max(x_words, book_words); at += 32 * TABLE_WARPS) {
        if (at < x_words) of_x = abs_max(of_x, x, at);
        if (at < book_words) of_books = abs_max(of_books, codebooks, at);
    }
    of_x = __reduce_max_sync(~0u, max(of_x & 0xffff, of_x >> 16));
    of_books = __reduce_max_sync(~0u, max(of_books & 0xffff, of_books >> 16));
    if (i % 32 == 0) atomicMax(largest, of_x), atomicMax(largest + 1, of_books);
}

/* e with |v| < 2^e, of the bits of |v|. */
template <class T> __device__ inline int exponent_above(uint32_t bits) {
    return std::is_same_v<T, __half> ? static_cast<int>(bits >> 10) - 14 : static_cast<int>(bits >> 7) - 126;
}

__device__ inline float power_of_two(int e) { return __uint_as_float((min(max(e, -126), 127) + 127) << 23); }

/* Tables by matrix instructions: rows are the groups of x, columns entries. K divides 8. Warp w makes the tables of codes
 * w % 4 and w % 4 + 4 of every lane, 8 entries at a time. Lanes of one quarter of a warp hold the same rows for
 * different entries, that is the same bank, so each stores its four rows in another order. */
template <class T, int G> struct TableBuilder {
    static constexpr int STEPS = G < 8 ? 1 : G / 8, WARPS_APART = TABLE_WARPS / 4, TILES = 256 / 8 / WARPS_APART;
    static constexpr int ROWS = 4;    /* of a lane: matrix s / 2, half s % 2; table lane 8 s + row */
    const unsigned char *x, *entries; /* this lane's word of its first group and entry */
    int mask, first_tile, group, groups, log_k, second_book;
    bool has_words, one, two;
    uint32_t table, order; /* where this lane's first entry starts for table lane 0; the row it stores first */
    uint32_t a[2][ROWS][STEPS];

    __device__ TableBuilder(const TableProblem &p, int warp, int lane, size_t x_row) {
        const int i = warp % 4, row = lane / 4, quad = lane % 4;
        log_k = p.num_codebooks == 8 ? 3 : p.num_codebooks / 2;
        one = quad & 1, two = quad & 2, has_words = G >= 8 || quad < 2;
        mask = p.entries - 1, first_tile = warp / 4;
        groups = p.groups;
        group = (8 * row + i) >> log_k;
        table = table_at(i, first_tile * 8 + 2 * quad, row), order = quad;
        const int book = i & (p.num_codebooks - 1);
        second_book = log_k < 3 ? 0 : 4 * p.entries * G * 2;
        entries = static_cast<const unsigned char *>(p.codebooks) +
                  (static_cast<size_t>(book * p.entries + (row & mask)) * G + 2 * quad) * 2;
        x = static_cast<const unsigned char *>(p.x) + ((x_row * p.groups + group) * G + 2 * quad) * 2;
    }

    /* Groups of the codes from first_code on. */
    __device__ void load(int first_code) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int s = 0; s < ROWS; ++s) {
                const int ahead = (first_code + 64 * s + 4 * half) >> log_k;
                const bool valid = has_words && group + ahead < groups;
#pragma unroll
                for (int step = 0; step < STEPS; ++step)
                    a[half][s][step] =
                        valid ? __ldg(reinterpret_cast<const uint32_t *>(x + (ahead * G + step * 8) * 2)) : 0;
            }
    }

    __device__ void store(unsigned char *to, float scale) const {
        uint32_t lanes[ROWS];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) lanes[s] = table + (s + order) % ROWS * 8 * 4;
        uint32_t all[TILES][2][STEPS];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            /* fewer than 256 entries recur, so that the unused high bits of a code do not matter */
            const int offset = ((first_tile + t * WARPS_APART) * 8 & mask) * G * 2;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const auto word = [&](int book) {
                    const auto *from = reinterpret_cast<const uint32_t *>(entries + offset + book + step * 16);
                    return has_words ? __ldg(from) : 0;
                };
                all[t][0][step] = word(0);
                all[t][1][step] = log_k < 3 ? all[t][0][step] : word(second_book);
            }
        }
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            const auto &b = all[t];
            float c[2][2][4] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int step = 0; step < STEPS; ++step)
                        mma_k8<T>(c[half][m], a[half][2 * m][step], a[half][2 * m + 1][step], b[half][step]);
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                uint32_t v[ROWS], stored[ROWS];
#pragma unroll
                for (int s = 0; s < ROWS; ++s) {
                    const int at = s % 2 * 2 + column;
                    const __half2 pair = __floats2half2_rn(c[0][s / 2][at] * scale, c[1][s / 2][at] * scale);
                    v[s] = *reinterpret_cast<const uint32_t *>(&pair);
                }
                rotate(stored, v);
#pragma unroll
                for (int s = 0; s < ROWS; ++s)
                    *reinterpret_cast<uint32_t *>(to + lanes[s] + table_at(0, t * WARPS_APART * 8 + column, 0)) =
                        stored[s];
            }
        }
    }

    /* By one more for each lane of a quad. */
    __device__ void rotate(uint32_t (&to)[ROWS], const uint32_t (&from)[ROWS]) const {
        uint32_t half[ROWS];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) half[s] = one ? from[(s + 1) % ROWS] : from[s];
#pragma unroll
        for (int s = 0; s < ROWS; ++s) to[s] = two ? half[(s + 2) % ROWS] : half[s];
    }
};

/* The same for any K and g, a lane its own tables. */
template <class T> struct TableBuilder<T, 0> {
    const TableProblem &p;
    int warp, lane, first_code;
    const T *x;

    __device__ TableBuilder(const TableProblem &p, int warp, int lane, size_t x_row)
        : p(p), warp(warp), lane(lane), x(static_cast<const T *>(p.x) + x_row * p.groups * p.in_group_size) {}

    __device__ void load(int code) { first_code = code; }

    __device__ void store(unsigned char *tables, float scale) const {
        const int g = p.in_group_size;
        for (int i = 0; i < LANE_CODES; ++i) {
            const int code = first_code + LANE_CODES * lane + i, group = code / p.num_codebooks;
            for (int e = warp; e < 256; e += TABLE_WARPS) {
                const T *entry = static_cast<const T *>(p.codebooks) +
                                 (code % p.num_codebooks * p.entries + (e & (p.entries - 1))) * g;
                float sum = 0;
                if (group < p.groups)
                    for (int n = 0; n < g; ++n)
                        sum = fmaf(static_cast<float>(x[group * g + n]), static_cast<float>(entry[n]), sum);
                *reinterpret_cast<__half *>(tables + table_at(i, e, lane)) = __float2half_rn(sum * scale);
            }
        }
    }
};

/* sum over lanes of v[BATCH]: lane r * 32 / BATCH gets that of v[r]. */
__device__ inline float reduce_batch(float (&v)[BATCH], int lane) {
    int distance = 16;
#pragma unroll
    for (int width = BATCH / 2; width >= 1; width /= 2, distance /= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int r = 0; r < width; ++r) {
            const float keep = upper ? v[r + width] : v[r], send = upper ? v[r] : v[r + width];
            v[r] = keep + __shfl_xor_sync(~0u, send, distance);
        }
    }
    for (; distance >= 1; distance /= 2) v[0] += __shfl_xor_sync(~0u, v[0], distance);
    return v[0];
}

/* G = 0: any K and g. grid [clusters * cluster_size, n_rows]. */
template <class T, int G> __global__ void __launch_bounds__(32 * TABLE_WARPS, 1) table_kernel(const TableProblem p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned char *const tables = shared;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32; /* uniform to the compiler too */
    const int size = p.size, share = p.share, cluster_outs = size * share, rank = cluster_rank();
    float *const sums = reinterpret_cast<float *>(shared + TABLE_BYTES); /* [cluster_outs] */
    float *const inbox = sums + cluster_outs;                           /* [cluster_size, cluster_outs / cluster_size] */
    const int first_out = cluster_index() * cluster_outs, n_outs = min(cluster_outs, p.out - first_out);
    const int row_codes = p.groups * p.num_codebooks, slices = (row_codes + TABLE_CODES - 1) / TABLE_CODES;
    const uint32_t bank = lane * 4;

    const int own = max(min(share, n_outs - rank * share), 0), first_own = first_out + rank * share;
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(inbox));
    const Mailbox mailbox = {address + cluster_outs * 4, address};
    auto *const largest = reinterpret_cast<uint32_t *>(inbox + cluster_outs + 2); /* of x, of codebooks */
    if (threadIdx.x < 2) largest[threadIdx.x] = 0;
    if (size > 1) {
        if (threadIdx.x == 0) mailbox.open(own * size * 4);
        Mailbox::announce();
    }
    wait_for_kernels_before();
    if (threadIdx.x < own) {
        prefetch(static_cast<const T *>(p.scales) + first_own + threadIdx.x);
        if (p.bias) prefetch(static_cast<const T *>(p.bias) + first_own + threadIdx.x);
    }

    /* Batches of outputs are dealt out to the warps. The codes of one are loaded while the one before is looked up, of
     * the next slice if need be; near the end of W it starts earlier and sums some outputs for nothing. */
    const auto load = [&](uint2(&to)[BATCH], int slice, int from) {
        const int code = slice * TABLE_CODES + LANE_CODES * lane;
        const uint8_t *codes = p.codes + static_cast<size_t>(min(first_out + from, p.out - BATCH)) * row_codes;
        codes += code < row_codes ? code : 0; /* what has no group has tables of zeros */
#pragma unroll
        for (int r = 0; r < BATCH; ++r, codes += row_codes) to[r] = load_once(reinterpret_cast<const uint2 *>(codes));
    };
    int slice = rank, from = warp * BATCH;
    const auto step = [&](const uint2(&word)[BATCH], uint2(&next)[BATCH]) {
        const bool more = from + TABLE_WARPS * BATCH < n_outs, again = slice + size < slices;
        if (more || again) load(next, more ? slice : slice + size, more ? from + TABLE_WARPS * BATCH : warp * BATCH);
        float sum[BATCH];
#pragma unroll
        for (int r = 0; r < BATCH; ++r) {
            float product[LANE_CODES];
#pragma unroll
            for (int i = 0; i < LANE_CODES; ++i) /* byte i of the codes becomes byte 1 of the address */
                product[i] = __half2float(*reinterpret_cast<const __half *>(
                    tables + table_at(i, 0, 0) +
                    __byte_perm(i < 4 ? word[r].x : word[r].y, bank, 0x7604 | i % 4 << 4)));
            sum[r] = ((product[0] + product[1]) + (product[2] + product[3])) +
                     ((product[4] + product[5]) + (product[6] + product[7]));
        }
        const float total = reduce_batch(sum, lane);
        const int o = min(from, p.out - BATCH - first_out) + lane / (32 / BATCH);
        if (lane % (32 / BATCH) == 0 && o >= from && o < n_outs) sums[o] = slice == rank ? total : sums[o] + total;
        from += TABLE_WARPS * BATCH;
    };
    uint2 words[2][BATCH];
    if (from < n_outs) load(words[0], rank, from); /* on their way while tables are made */
    TableBuilder<T, G> builder(p, warp, lane, blockIdx.y);
    builder.load(rank * TABLE_CODES);
    __syncthreads();
    const int in = p.groups * p.in_group_size;
    block_abs_max(largest, static_cast<const T *>(p.x) + static_cast<size_t>(blockIdx.y) * in, p.codebooks, in / 4,
                  p.num_codebooks * p.entries * p.in_group_size / 4);
    __syncthreads();
    /* no product is 2^exponent or more */
    const int exponent = exponent_above<T>(largest[0]) + exponent_above<T>(largest[1]) + __ffs(p.in_group_size) - 1;
    const float scale = power_of_two(15 - exponent), unscale = power_of_two(exponent - 15);
    bool odd = false;
    for (; slice < slices; slice += size) {
        if (slice != rank) __syncthreads(); /* the last lookups in the tables before */
        builder.store(tables, scale);
        builder.load((slice + size) * TABLE_CODES);
        __syncthreads();
        for (from = warp * BATCH; from < n_outs; odd = !odd)
            if (odd)
                step(words[1], words[0]);
            else
                step(words[0], words[1]);
    }

    __syncthreads();
    if (size > 1) {
        Mailbox::await_others();
        const int to = warp % size, turn = warp / size, turns = TABLE_WARPS / size; /* some warps may be left over */
        for (int o = turn * 32 + lane; o < min(share, n_outs - to * share) && turn < turns; o += turns * 32)
            mailbox.send(sums[to * share + o], to, rank * share + o);
        mailbox.wait();
    }
    for (int o = threadIdx.x; o < own; o += 32 * TABLE_WARPS) {
        float total = 0;
        if (size == 1)
            total = sums[o];
        else
            for (int other = 0; other < size; ++other) total += inbox[other * share + o];
        total *= unscale * static_cast<float>(static_cast<const T *>(p.scales)[first_own + o]);
        if (p.bias) total += static_cast<float>(static_cast<const T *>(p.bias)[first_own + o]);
        static_cast<T *>(p.y)[static_cast<size_t>(blockIdx.y) * p.out + first_own + o] = static_cast<T>(total);
    }
}

template <class T, int G>
cudaError_t launch_table_kernel(TableProblem p, int n_rows, const Device &device, cudaStream_t stream) {
    constexpr int MAX_CLUSTER = 8;
    const auto kernel = table_kernel<T, G>;
    if (const cudaError_t error = allow_shared_memory<table_kernel<T, G>>(device)) return error;
    const int slices = static_cast<int>(divide_up(p.groups * p.num_codebooks, TABLE_CODES));
    const int rounds = static_cast<int>(divide_up(slices, device.clusters ? MAX_CLUSTER : 1));
    const int size = static_cast<int>(divide_up(slices, rounds));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size);
    config.blockDim = dim3(32 * TABLE_WARPS);
    config.dynamicSmemBytes = device.shared_memory;
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    config.attrs = attributes;
    config.numAttrs = !device.clusters ? 0 : size > 1 ? 2 : 1;
#ifdef NOPDL
    config.attrs = attributes + 1; config.numAttrs = size > 1;
#endif

    static std::atomic<int> resident[MAX_DEVICES][MAX_CLUSTER + 1]; /* clusters that run at a time */
    int clusters = size == 1 ? device.sms : resident[device.index][size].load(std::memory_order_relaxed);
    if (clusters == 0) {
        if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return error;
        resident[device.index][size].store(clusters, std::memory_order_relaxed);
    }
    const int most = (device.shared_memory - TABLE_BYTES - 16) / 8 / size; /* outputs of each block of a cluster */
    const int share = static_cast<int>(divide_up(p.out, static_cast<int64_t>(clusters) * size));
    p.size = size;
    p.share = std::min(share + share % 2, most / 2 * 2); /* even: the barrier behind them is aligned */
    config.gridDim = dim3(static_cast<unsigned>(divide_up(p.out, p.share * size)) * size, n_rows);
    config.dynamicSmemBytes = TABLE_BYTES + p.share * size * 8 + 16;
    return cudaLaunchKernelEx(&config, kernel, p);
}

} // namespace aqlm_cuda
#endif
