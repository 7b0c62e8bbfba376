/* pairs.cu: the best pair of the last two codebooks for each row of a group, after each state of a beam over the other
 * codebooks (core/quantizer/search.c, search_pairs).
 *
 * The cost of a pair is u_a + v_b + M_ab, M_ab = 2 c_a S c_b the same for all rows: tables of all groups of a launch are
 * made before it, in 16 bits. The smallest u_a + M_ab of each row and b is a product of matrices with min for + and +
 * for x, in 16 bits, two rows in a register: one instruction for two pairs (viaddmin.s16x2 of Hopper; others emulate
 * it). 16 bits decide within 1/16,383 of the largest |M|, which is one to three percent of a group's error where they
 * err at all; then b is held while the best a is found in float, a held while the best b is. Measured beside an
 * all-float scan: the same error to 1e-4, 2.5 times as fast. The CPU prunes by the triangle inequality instead, which
 * threads in step could not use. */
#include <climits>

#include "cuda/quantizer/walk.cuh"

#ifndef PHASE
#define PHASE(n)
#endif

namespace aqlm_cuda {
namespace {

constexpr int MOST_FREE = 6; /* codebooks before the last two */
constexpr int LEVELS = 16383;
#ifndef TILE_V
#define TILE_V 32
#define TILE_T 512
#define TILE_P 4
#endif
constexpr int TILE = TILE_V, TILE_THREADS = TILE_T, TILE_PAIRS = TILE_P;
constexpr int ENTRIES = 256, QUADS = ENTRIES / 4; /* places for entries; beyond E they cost infinity */

/* ---- tables -------------------------------------------------------------------------------------------- */

constexpr int STRIP = 32; /* entries a of a block of threads */

__host__ __device__ constexpr int table_pitch(int E) { return E < 4 ? 4 : E; }

/* c S c */
template <int G> __device__ float square_in(const float *S, const float (&c)[G]) {
    float square = 0;
#pragma unroll
    for (int d = 0; d < G; ++d) {
        float sum = 0;
#pragma unroll
        for (int p = 0; p < G; ++p) sum = fmaf(c[p], S[p * G + d], sum);
        square = fmaf(sum, c[d], square);
    }
    return square;
}

/* For each group of the block: norms [K, E] of all entries, the step, and the table [E, pitch] of M_ab in steps.
 * Grid (strips, groups). */
template <int G> __global__ void __launch_bounds__(ENTRIES) table_kernel(const Walk w) {
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, i = blockIdx.y, E = w.E, pitch = table_pitch(E);
    __shared__ __align__(16) float S[G * G], reach[2][ENTRIES / 32], strip[STRIP * G];
    const float *book1 = w.codebooks + int64_t(w.K - 2) * E * G, *book2 = book1 + E * G;
    const int first = blockIdx.x * STRIP, count = min(STRIP, E - first);
    for (int at = t; at < G * G; at += ENTRIES) S[at] = w.metric[int64_t(w.first + i) * G * G + at];
    for (int at = t; at < count * G; at += ENTRIES) strip[at] = book1[first * G + at];
    __syncthreads();
    float *norms = const_cast<float *>(w.norms) + int64_t(i) * w.K * E;
    for (int k = 0; k < w.K - 2 && blockIdx.x == 0 && t < E; ++k)
        norms[k * E + t] = square_in<G>(S, Entry<G>(w.codebooks + (int64_t(k) * E + t) * G).x);
    const int own = min(t, E - 1);
    const Entry<G> b(book2 + own * G);
    float M[G], square2 = 0; /* 2 c_b S */
#pragma unroll
    for (int d = 0; d < G; ++d) {
        float sum = 0;
#pragma unroll
        for (int p = 0; p < G; ++p) sum = fmaf(b.x[p], S[p * G + d], sum);
        M[d] = 2.0f * sum;
        square2 = fmaf(sum, b.x[d], square2);
    }
    const float square1 = square_in<G>(S, Entry<G>(book1 + own * G).x);
    if (blockIdx.x == 0 && t < E) norms[(w.K - 2) * E + t] = square1, norms[(w.K - 1) * E + t] = square2;
    const float most1 = warp_max(square1), most2 = warp_max(square2);
    if (lane == 0) reach[0][warp] = most1, reach[1][warp] = most2;
    __syncthreads();
    float reach1 = 0, reach2 = 0;
    for (int k = 0; k < ENTRIES / 32; ++k) reach1 = fmaxf(reach1, reach[0][k]), reach2 = fmaxf(reach2, reach[1][k]);
    const float step = fmaxf(2.0f * sqrtf(reach1) * sqrtf(reach2) / LEVELS, FLT_MIN), per_step = 1.0f / step;
    if (blockIdx.x == 0 && t == 0) const_cast<float *>(w.steps)[i] = step;
#pragma unroll
    for (int d = 0; d < G; ++d) M[d] *= per_step;
    int16_t *table = const_cast<int16_t *>(w.tables) + (int64_t(i) * E + first) * pitch;
    for (int a = 0; a < count && t < pitch; ++a) {
        float cross = 0;
#pragma unroll
        for (int d = 0; d < G; ++d) cross = fmaf(M[d], strip[a * G + d], cross);
        table[a * pitch + t] = static_cast<int16_t>(__float2int_rn(cross));
    }
}

/* ---- states: a beam over the codebooks before the last two ------------------------------------------- */

/* A state of the beam over the first K - 2 codebooks, of one row. */
struct States {
    float *cost;     /* [2, rows * most] */
    float *left;     /* [2, rows * most, G] target' - q S */
    uint16_t *codes; /* [2, rows * most, MOST_FREE] */
    int *size;       /* [rows] */
};

template <int G> __host__ __device__ constexpr int64_t state_floats(int64_t virtual_rows, int64_t rows) {
    return 2 * virtual_rows * (1 + G + MOST_FREE / 2) + rows;
}

template <int G> __device__ float times(const float *S, const float *q, int d) { /* (q S)_d */
    float sum = 0;
#pragma unroll
    for (int p = 0; p < G; ++p) sum = fmaf(q[p], S[p * G + d], sum);
    return sum;
}

/* The warp's row: its `most` cheapest states of codebooks 0 .. free - 1, by `most` scans of all; ties to the earlier
 * state, then entry. norms [free, E]. Leaves them in half free % 2 of `states`. */
template <int G>
__device__ void expand_row(const Walk &w, const float *S, const float *norms, const float *target, const States &states,
                           int r, int n) {
    const int lane = threadIdx.x % 32, free = w.K - 2, most = w.states;
    int size = 1;
    if (lane == 0) states.cost[r * most] = 0;
    if (lane < G) states.left[r * most * G + lane] = target[lane];
    __syncwarp();
    for (int k = 0; k < free; ++k) {
        const int from = k % 2 * n + r * most, to = (k + 1) % 2 * n + r * most, all = min(most, size * w.E);
        const float *book = w.codebooks + int64_t(k) * w.E * G;
        float last = -INFINITY;
        int last_at = -1;
        for (int kept = 0; kept < all; ++kept) {
            float best = INFINITY;
            int best_at = INT_MAX;
            for (int h = 0; h < size; ++h) {
                const float *left = states.left + (from + h) * G;
                for (int e = lane; e < w.E; e += 32) {
                    const float cost =
                        states.cost[from + h] + fmaf(-2.0f, Entry<G>(book + e * G).dot(left), norms[k * w.E + e]);
                    const int at = h * w.E + e;
                    if (is_before(last, last_at, cost, at) && is_before(cost, at, best, best_at))
                        best = cost, best_at = at;
                }
            }
            warp_min(best, best_at);
            last = best, last_at = best_at;
            if (best_at == INT_MAX) best_at = 0; /* NaN everywhere: any */
            const int h = best_at / w.E, e = best_at % w.E;
            if (lane == 0) states.cost[to + kept] = best;
            if (lane < G)
                states.left[(to + kept) * G + lane] =
                    states.left[(from + h) * G + lane] - times<G>(S, book + e * G, lane);
            if (lane < MOST_FREE)
                states.codes[(to + kept) * MOST_FREE + lane] =
                    lane == k ? static_cast<uint16_t>(e) : states.codes[(from + h) * MOST_FREE + lane];
        }
        size = all;
        __syncwarp();
    }
    if (lane == 0) states.size[r] = size;
}

/* ---- the kernel ---------------------------------------------------------------------------------------- */

/* How THREADS threads share V rows: for the search in 16 bits, 4 entries b and 2 P rows each, and a slice of the entries
 * a; for scans of a codebook, 4 entries and R rows. */
template <int G, int V, int THREADS, int P> struct Pairs {
    static constexpr int TEAMS = V / 2 / P, SLICES = THREADS / QUADS / TEAMS, R = V * QUADS / THREADS;
    static_assert(V * G <= THREADS && V * G % 32 == 0 && TEAMS * P * 2 == V && SLICES >= 1 && R >= 1);

    struct alignas(4 * P) Words { /* of 2 P rows, 16 bits each */
        uint32_t pair[P];
    };
    struct Shared {
        float S[G * G];
        float4 books[2][G / 4][ENTRIES]; /* the last two */
        float norms[2][ENTRIES];
        float left[V * G], linear[V * G]; /* -2 (target' - q S) of each row, and that + 2 c S */
        float change[V * G], target[V * G];
        int4 found[2][V]; /* the lowest cost of two warps and whose: of a, of b */
        int low[V];
        float cost[V];
        Words sums[TEAMS][ENTRIES];                /* u_a */
        uint32_t least[SLICES][V / 2][ENTRIES];    /* of u_a + M_ab */
    };
};

/* Floats as integers of the same order, and back. */
__device__ inline int ordered(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ inline float unordered(int x) { return __int_as_float(x ^ (x >> 31 & 0x7fffffff)); }

/* cost[n][r] = norm + x_r c of entries t % QUADS + n QUADS; x [R, G] in shared memory. */
template <int G, int R>
__device__ void scan(float (&cost)[4][R], const float *norms, const float4 (*book)[ENTRIES], const float *x) {
    const int q = threadIdx.x % QUADS;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int r = 0; r < R; ++r) cost[n][r] = norms[q + n * QUADS];
#pragma unroll
    for (int d = 0; d < G / 4; ++d) {
        float4 c[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) c[n] = book[d][q + n * QUADS];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float4 v = *reinterpret_cast<const float4 *>(x + r * G + 4 * d);
#pragma unroll
            for (int n = 0; n < 4; ++n)
                cost[n][r] = fmaf(v.w, c[n].w, fmaf(v.z, c[n].z, fmaf(v.y, c[n].y, fmaf(v.x, c[n].x, cost[n][r]))));
        }
    }
}

/* The lowest of each row among a warp's entries and which that is; ties to the lower. */
template <int R> __device__ void keep_lowest(int4 *found /* [R] */, const float (&cost)[4][R]) {
    const int q = threadIdx.x % QUADS, half = threadIdx.x / 32 % 2;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float best = cost[0][r];
        int at = q;
#pragma unroll
        for (int n = 1; n < 4; ++n)
            if (cost[n][r] < best) best = cost[n][r], at = q + n * QUADS;
        const int key = ordered(best), low = __reduce_min_sync(~0u, key);
        at = __reduce_min_sync(~0u, key == low ? at : INT_MAX);
        if (threadIdx.x % 32 == 0) reinterpret_cast<int2 *>(found + r)[half] = {low, at};
    }
}
__device__ inline int which(int4 found, int E) {
    const int at = found.z < found.x || (found.z == found.x && found.w < found.y) ? found.w : found.y;
    return min(at, E - 1); /* NaN: any */
}

/* linear of (row, d): left + 2 c S for an entry c of which this thread holds number d. */
template <int G> __device__ float add_entry(float left, float c, const float *S) {
    const int d = threadIdx.x % G;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < G; ++p) sum = fmaf(__shfl_sync(~0u, c, p, G), S[p * G + d], sum);
    return fmaf(2.0f, sum, left);
}

/* What the changes of group i [count, G] are for the block's later groups: T [rows, columns] += change coupling. */
template <int G> __device__ void send_on(float *T, const float *change, const Walk &w, int i, int count) {
    const int columns = w.columns(G), begin = (i + 1 - w.first) * G, quads = (columns - begin) / 4;
    if (quads == 0) return;
    const int teams = max(1, static_cast<int>(blockDim.x) / quads), team = threadIdx.x / quads;
    if (team >= teams) return;
    const int column = begin + threadIdx.x % quads * 4;
    const float *couple = w.couple + int64_t(i) * G * w.in + w.first * G + column;
#pragma unroll
    for (int p = 0; p < G; p += 4) {
        float4 c[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) c[k] = *reinterpret_cast<const float4 *>(couple + int64_t(p + k) * w.in);
        for (int r = team; r < count; r += teams) {
            const float4 by = *reinterpret_cast<const float4 *>(change + r * G + p);
            const float factor[4] = {by.x, by.y, by.z, by.w};
            auto &to = *reinterpret_cast<float4 *>(T + r * columns + column);
            float4 sum = to;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                sum.x = fmaf(factor[k], c[k].x, sum.x), sum.y = fmaf(factor[k], c[k].y, sum.y);
                sum.z = fmaf(factor[k], c[k].z, sum.z), sum.w = fmaf(factor[k], c[k].w, sum.w);
            }
            to = sum;
        }
    }
}

template <int G, int V, int THREADS, int P>
__global__ void __launch_bounds__(THREADS, THREADS > 256 ? 1 : 2) pair_kernel(const Walk w) {
    using Q = Pairs<G, V, THREADS, P>;
    constexpr int R = Q::R, SQUARES = (G * G + THREADS - 1) / THREADS, NORMS = 2 * ENTRIES / THREADS;
    extern __shared__ __align__(128) float pair_memory[];
    auto &x = *reinterpret_cast<typename Q::Shared *>(pair_memory);
    float *T = pair_memory + sizeof(typename Q::Shared) / 4; /* [rows, columns] */
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, E = w.E, pitch = table_pitch(E), columns = w.columns(G);
    const int first = blockIdx.x * w.rows, count = min(w.rows, w.out - first);
    const int n = w.rows * w.states; /* virtual rows: a row in one of its states */
    States states;                   /* `left` first: it is read by fours */
    states.left = T + w.rows * columns;
    states.cost = states.left + 2 * n * G;
    states.codes = reinterpret_cast<uint16_t *>(states.cost + 2 * n);
    states.size = reinterpret_cast<int *>(states.codes + 2 * n * MOST_FREE);
    float *before = reinterpret_cast<float *>(states.size + w.rows), *best = before + w.rows;
    auto *best_at = reinterpret_cast<int *>(best + w.rows); /* [rows, 3] state, a, b */

    /* Of number d of row r, a thread's own while there are so many rows. */
    const int r = t / G, d = t % G;
    const bool mine = r < count && t < w.rows * G;
    const int64_t row = first + (mine ? r : 0);
    const float scale = mine ? w.scales[row] : 0.0f;
    float weight, D = 0, square[SQUARES], norm[NORMS];
    const auto load = [&](int i) {
        weight = mine ? w.weight[row * w.in + w.order[i] * G + d] : 0.0f;
        if (!w.ldl && mine) D = w.D[row * w.in + i * G + d];
#pragma unroll
        for (int k = 0; k < SQUARES; ++k)
            if (t + k * THREADS < G * G) square[k] = w.metric[int64_t(i) * G * G + t + k * THREADS];
#pragma unroll
        for (int k = 0; k < NORMS; ++k) {
            const int at = t + k * THREADS, e = at % ENTRIES;
            norm[k] = e < E ? w.norms[(int64_t(i - w.first) * w.K + w.K - 2 + at / ENTRIES) * E + e] : INFINITY;
        }
    };
    const auto store = [&] {
#pragma unroll
        for (int k = 0; k < SQUARES; ++k)
            if (t + k * THREADS < G * G) x.S[t + k * THREADS] = square[k];
#pragma unroll
        for (int k = 0; k < NORMS; ++k) x.norms[0][t + k * THREADS] = norm[k];
    };
    load(w.first);
    const float *last_two = w.codebooks + int64_t(w.K - 2) * E * G;
    for (int at = t; at < 2 * ENTRIES * G; at += THREADS) {
        const int book = at / (ENTRIES * G), e = at / G % ENTRIES, c = at % G;
        reinterpret_cast<float *>(&x.books[book][c / 4][e])[c % 4] = e < E ? last_two[(book * E + e) * G + c] : 0.0f;
    }
    for (int at = t; at < w.rows * columns; at += THREADS) {
        const int o = at / columns, c = at % columns;
        float sum = 0;
        for (int part = 0; part < w.parts && o < count; ++part)
            sum += w.T[(int64_t(part) * w.out + first + o) * columns + c];
        T[at] = sum;
    }
    store();
    __syncthreads();
    const int q = t % QUADS, team = t / QUADS % Q::TEAMS, slice = t / QUADS / Q::TEAMS;
    const int v0 = t / QUADS * R; /* the first of R rows in scans */

    for (int i = w.first; i < w.first + w.count; ++i) {
        PHASE(0);
        const float of_group = weight, D_before = D;
        if (i + 1 < w.first + w.count) load(i + 1);
        {
            const float t0 = mine ? T[r * columns + (i - w.first) * G + d] : 0.0f;
            const float base = w.ldl ? of_group + t0 : of_group - D_before;
            float sum = w.ldl ? 0.0f : t0;
            if (t < V * G) {
#pragma unroll
                for (int p = 0; p < G; ++p) sum = fmaf(__shfl_sync(~0u, base, p, G), x.S[p * G + d], sum);
                const float target = fabsf(scale) >= FLT_MIN ? sum / scale : 0.0f;
                x.target[t] = target;
                if (w.K == 2) x.left[t] = -2.0f * target;
                if (t < V) x.low[t] = INT_MAX;
            }
        }
        const float step = w.steps[i - w.first], per_step = 1.0f / step;
        const int half = (w.K - 2) % 2 * n;
        if (w.K > 2) {
            __syncthreads();
            const float *norms = w.norms + int64_t(i - w.first) * w.K * E;
            for (int o = warp; o < w.rows; o += THREADS / 32) {
                expand_row<G>(w, x.S, norms, x.target + o * G, states, o, n);
                float cost = INFINITY; /* of the codes as they are */
                if (!w.ldl && o < count) {
                    const uint16_t *code =
                        w.codes + (int64_t(first + o) * (w.in / G) + w.order[i]) * w.K;
                    float sum[G] = {}, cross = 0;
                    for (int k = 0; k < w.K; ++k) {
                        const Entry<G> entry(w.codebooks + (int64_t(k) * E + code[k]) * G);
#pragma unroll
                        for (int c = 0; c < G; ++c) sum[c] += entry.x[c];
                    }
#pragma unroll
                    for (int c = 0; c < G; ++c) cross = fmaf(x.target[o * G + c], sum[c], cross);
                    cost = square_in<G>(x.S, sum) - 2.0f * cross;
                }
                if (lane == 0) before[o] = cost, best[o] = INFINITY;
            }
        }
        for (int tile = 0; tile < n; tile += V) {
            if (w.K > 2) {
                __syncthreads();
                if (t < V * G) x.left[t] = tile + r < n ? -2.0f * states.left[(half + tile) * G + t] : 0.0f;
                if (t < V) x.low[t] = INT_MAX;
            }
            __syncthreads();
            PHASE(1);
            float cost[4][R];
            scan<G, R>(cost, x.norms[0], x.books[0], x.left + v0 * G);
#pragma unroll
            for (int v = 0; v < R; ++v) {
                const float least = fminf(fminf(cost[0][v], cost[1][v]), fminf(cost[2][v], cost[3][v]));
                const int low = __reduce_min_sync(~0u, ordered(least));
                if (lane == 0) atomicMin(&x.low[v0 + v], low);
            }
            __syncthreads();
            PHASE(2);
            /* u_a in steps above the smallest; more than the largest difference of two M is never the best. */
            {
                uint32_t word[4][(R + 1) / 2];
#pragma unroll
                for (int v = 0; v < R; ++v) {
                    const float low = unordered(x.low[v0 + v]);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int steps =
                            __float2int_rn(fminf((cost[e][v] - low) * per_step, 2.0f * LEVELS)) - LEVELS - 1;
                        if (v % 2 == 0) word[e][v / 2] = steps & 0xffff;
                        else word[e][v / 2] |= steps << 16;
                    }
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    auto *to = reinterpret_cast<uint16_t *>(&x.sums[v0 / (2 * P)][q + e * QUADS]) + v0 % (2 * P);
                    if constexpr (R == 1) *to = static_cast<uint16_t>(word[e][0]);
                    else if constexpr (R == 2) *reinterpret_cast<uint32_t *>(to) = word[e][0];
                    else
#pragma unroll
                        for (int v = 0; v < R / 2; v += 2)
                            *reinterpret_cast<uint2 *>(to + 2 * v) = {word[e][v], word[e][v + 1]};
                }
            }
            __syncthreads();
            PHASE(3);
            {
                uint32_t least[4][P];
#pragma unroll
                for (int b = 0; b < 4; ++b)
#pragma unroll
                    for (int v = 0; v < P; ++v) least[b][v] = 0x7fff7fff;
                const int begin = slice * E / Q::SLICES, end = (slice + 1) * E / Q::SLICES;
                const auto *table = reinterpret_cast<const uint2 *>(
                    w.tables + (int64_t(i - w.first) * E + begin) * pitch + min(4 * q, pitch - 4));
                const auto *sums = x.sums[team] + begin;
#pragma unroll 8
                for (int a = 0; a < end - begin; ++a) {
                    const uint2 m = __ldg(table + a * (pitch / 4));
                    const typename Q::Words u = sums[a];
                    const uint32_t of_b[4] = {__byte_perm(m.x, 0, 0x1010), __byte_perm(m.x, 0, 0x3232),
                                              __byte_perm(m.y, 0, 0x1010), __byte_perm(m.y, 0, 0x3232)};
#pragma unroll
                    for (int b = 0; b < 4; ++b)
#pragma unroll
                        for (int v = 0; v < P; ++v) least[b][v] = __viaddmin_s16x2(of_b[b], u.pair[v], least[b][v]);
                }
#pragma unroll
                for (int v = 0; v < P; ++v)
                    *reinterpret_cast<uint4 *>(&x.least[slice][team * P + v][4 * q]) = {least[0][v], least[1][v],
                                                                                        least[2][v], least[3][v]};
            }
            __syncthreads();
            PHASE(4);
            /* In float: the best b of those costs, its best a, that one's best b */
            scan<G, R>(cost, x.norms[1], x.books[1], x.left + v0 * G);
#pragma unroll
            for (int v = 0; v < R; ++v)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    uint32_t least = x.least[0][(v0 + v) / 2][q + e * QUADS];
#pragma unroll
                    for (int s = 1; s < Q::SLICES; ++s)
                        least = __vmins2(least, x.least[s][(v0 + v) / 2][q + e * QUADS]);
                    const int steps = static_cast<int16_t>((v0 + v) % 2 ? least >> 16 : least & 0xffff);
                    cost[e][v] = fmaf(static_cast<float>(steps), step, cost[e][v]);
                }
            keep_lowest<R>(x.found[1] + v0, cost);
            __syncthreads();
            PHASE(5);
            if (t < V * G) {
                const int b = which(x.found[1][r], E);
                const float c = reinterpret_cast<const float *>(&x.books[1][d / 4][b])[d % 4];
                x.linear[t] = add_entry<G>(x.left[t], c, x.S);
            }
            __syncthreads();
            scan<G, R>(cost, x.norms[0], x.books[0], x.linear + v0 * G);
            keep_lowest<R>(x.found[0] + v0, cost);
            __syncthreads();
            PHASE(6);
            if (t < V * G) {
                const int a = which(x.found[0][r], E);
                const float c = reinterpret_cast<const float *>(&x.books[0][d / 4][a])[d % 4];
                x.linear[t] = add_entry<G>(x.left[t], c, x.S);
            }
            __syncthreads();
            scan<G, R>(cost, x.norms[1], x.books[1], x.linear + v0 * G);
            keep_lowest<R>(x.found[1] + v0, cost);
            __syncthreads();
            PHASE(7);
            if (w.K > 2) {
                if (t < V * G) {
                    const int a = which(x.found[0][r], E);
                    float cross = x.left[t] * reinterpret_cast<const float *>(&x.books[0][d / 4][a])[d % 4];
#pragma unroll
                    for (int offset = G / 2; offset > 0; offset /= 2) cross += __shfl_xor_sync(~0u, cross, offset);
                    const int4 found = x.found[1][r];
                    if (d == 0) x.cost[r] = unordered(min(found.x, found.z)) + x.norms[0][a] + cross;
                }
                __syncthreads();
                for (int o = t; o < count; o += THREADS) /* the states of a row, in order */
                    for (int v = max(o * w.states, tile); v < min((o + 1) * w.states, min(n, tile + V)); ++v) {
                        if (v - o * w.states >= states.size[o]) break;
                        const float sum = x.cost[v - tile] + states.cost[half + v];
                        if (v > o * w.states && !(sum < best[o])) continue;
                        best[o] = sum, best_at[3 * o] = v;
                        best_at[3 * o + 1] = which(x.found[0][v - tile], E);
                        best_at[3 * o + 2] = which(x.found[1][v - tile], E);
                    }
            }
        }
        if (w.K > 2) __syncthreads();
        if (mine) {
            uint16_t *codes = w.codes + (row * (w.in / G) + w.order[i]) * w.K;
            float sum = 0;
            if (w.K > 2 && !w.ldl && !(best[r] < before[r])) { /* as it was */
                for (int k = 0; k < w.K; ++k) sum += w.codebooks[(int64_t(k) * E + codes[k]) * G + d];
            } else {
                const int a = w.K > 2 ? best_at[3 * r + 1] : which(x.found[0][r], E);
                const int b = w.K > 2 ? best_at[3 * r + 2] : which(x.found[1][r], E);
                for (int k = 0; k < w.K - 2; ++k) {
                    const uint16_t code = states.codes[(half + best_at[3 * r]) * MOST_FREE + k];
                    sum += w.codebooks[(int64_t(k) * E + code) * G + d];
                    if (d == 0) codes[k] = code;
                }
                sum += reinterpret_cast<const float *>(&x.books[0][d / 4][a])[d % 4];
                sum += reinterpret_cast<const float *>(&x.books[1][d / 4][b])[d % 4];
                if (d == 0) codes[w.K - 2] = static_cast<uint16_t>(a), codes[w.K - 1] = static_cast<uint16_t>(b);
            }
            const float now = of_group - scale * sum;
            x.change[t] = w.ldl ? now : now - D_before;
            w.D[row * w.in + i * G + d] = now;
        }
        __syncthreads();
        PHASE(8);
        store();
        send_on<G>(T, x.change, w, i, count);
        __syncthreads();
    }
    PHASE(9);
}

template <int G, int V, int THREADS, int P>
int64_t memory_of(int64_t rows, int64_t states, int64_t columns, int64_t K) {
    const int64_t floats = rows * columns + (K > 2 ? state_floats<G>(rows * states, rows) + 5 * rows : 0);
    return static_cast<int64_t>(sizeof(typename Pairs<G, V, THREADS, P>::Shared)) + floats * 4;
}

template <int G, int V, int THREADS, int P> cudaError_t launch(const Walk &w, const Device &device, cudaStream_t stream) {
    if (const cudaError_t error = allow_shared_memory<pair_kernel<G, V, THREADS, P>>(device)) return error;
    const int64_t memory = memory_of<G, V, THREADS, P>(w.rows, w.states, w.columns(G), w.K);
    if (memory > device.shared_memory) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(divide_up(w.E, STRIP)), static_cast<unsigned>(w.count));
    table_kernel<G><<<grid, ENTRIES, 0, stream>>>(w);
    const auto blocks = static_cast<unsigned>(divide_up(w.out, w.rows));
    pair_kernel<G, V, THREADS, P><<<blocks, THREADS, static_cast<size_t>(memory), stream>>>(w);
    return cudaGetLastError();
}

} // namespace

/* Rows at a time: as many as keep the device busy, in as few blocks of threads as that takes. g = 8 has two kernels,
 * the others one: each takes ptxas long. */
int64_t rows_of_pairs(int64_t out, int states, int64_t g, const Device &device) {
    if (g != 8) return std::max(1, 16 / states);
    const int64_t rows = std::max(1, TILE / states);
    return divide_up(out, rows) >= device.sms * 3 / 4 ? rows : std::max(1, 4 / states);
}

int64_t columns_of_pairs(int64_t rows, int64_t E, int64_t g, const Device &device) {
    (void)E;
    const int64_t shared = g == 4   ? sizeof(Pairs<4, 16, 512, 4>::Shared)
                           : g == 8 ? sizeof(Pairs<8, TILE, TILE_THREADS, TILE_PAIRS>::Shared)
                           : g == 16 ? sizeof(Pairs<16, 16, 512, 4>::Shared)
                                     : sizeof(Pairs<32, 16, 512, 4>::Shared);
    const int64_t most = std::max<int64_t>(rows, 64); /* of states */
    const int64_t rest = shared + 4 * (2 * most * (1 + g + MOST_FREE / 2) + 6 * rows);
    return std::min<int64_t>((device.shared_memory - rest) / (4 * rows) / g * g, 512 / g * g);
}

int64_t size_of_table(int64_t E) { return E * table_pitch(static_cast<int>(E)); }

cudaError_t search_pairs(Walk w, int g, const Device &device, cudaStream_t stream) {
    switch (g) {
    case 4: return launch<4, 16, 512, 4>(w, device, stream);
    case 8:
        return w.rows * w.states > 7 ? launch<8, TILE, TILE_THREADS, TILE_PAIRS>(w, device, stream)
                                      : launch<8, 4, 256, 2>(w, device, stream);
    case 16: return launch<16, 16, 512, 4>(w, device, stream);
    case 32: return launch<32, 16, 512, 4>(w, device, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace aqlm_cuda
