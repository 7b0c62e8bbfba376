/* pairs.cu: the best pair of the last two codebooks for each row of a group, after each state of a beam over the other
 * codebooks (core/quantizer/search.c, search_pairs).
 *
 * The cost of a pair is u_a + v_b + M_ab, M_ab = 2 c_a S c_b the same for all rows: tables of all groups of a launch
 * are made before it, in 16 bits. The smallest u_a + M_ab of each row and b is a product of matrices with min for + and
 * + for x, in 16 bits, two rows in a register: one instruction for two pairs (viaddmin.s16x2 of Hopper; others emulate
 * it). 16 bits decide within 1/16,383 of the largest |M|, which is one to three percent of a group's error where they
 * err at all; then b is held while the best a is found in float, a held while the best b is. Tests hold the error
 * beside that of the CPU's exact search, which prunes by the triangle inequality: threads in step could not use that.
 */
#include <climits>

#include "cuda/quantizer/walk.cuh"

namespace aqlm_cuda {
namespace {

constexpr int MOST_FREE = 6; /* codebooks before the last two */
constexpr int LEVELS = 16383;
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ENTRIES = 256, QUADS = ENTRIES / 4; /* places for entries; beyond E they cost infinity */

/* ---- tables -------------------------------------------------------------------------------------------- */

constexpr int STRIP = 32; /* entries a of a block of threads */

__host__ __device__ constexpr int table_pitch(int E) { return E < 4 ? 4 : E; }

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
        asm volatile("" ::: "memory");
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

/* ---- scans ---------------------------------------------------------------------------------------------- */

/* How a block of threads shares V rows: for the search in 16 bits, 4 entries b and 2 P rows each, and a slice of the
 * entries a; for scans of a codebook, 4 entries and R rows. */
template <int G, int V> struct Pairs {
    static constexpr int P = V / 2 < 8 ? V / 2 : 8, TEAMS = V / 2 / P, SLICES = THREADS / QUADS / TEAMS;
    static constexpr int R = V * QUADS / THREADS;
    static_assert(V * G <= THREADS && V * G % 32 == 0 && TEAMS * P * 2 == V && SLICES >= 2 && R >= 1);

    struct alignas(4 * P) Words { /* of 2 P rows, 16 bits each */
        uint32_t pair[P];
    };
    struct Shared {
        float S[G * G];
        float4 books[2][G / 4][ENTRIES]; /* the last two */
        float norms[2][ENTRIES];
        float left[V * G], linear[V * G]; /* -2 (target' - q S) of each row, and that + 2 c S */
        float change[V * G];
        int4 found[2][V]; /* the lowest cost of two warps and whose: of a, of b */
        int low[V];
        float cost[V];
        Words sums[TEAMS][ENTRIES];             /* u_a */
        uint32_t least[SLICES][V / 2][ENTRIES]; /* of u_a + M_ab; before, the costs of V states and an entry each */
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

/* ---- states: a beam over the codebooks before the last two ------------------------------------------- */

/* Of each row the cheapest codes of the first codebooks, in two halves: n rows' states each. */
struct States {
    float *left;     /* [2, n, G] -2 (target' - q S) */
    float *sum;      /* [2, n, G] q */
    float *cost;     /* [2, n] */
    int2 *kept;      /* [2, n] cost as an ordered integer, state E + entry */
    uint16_t *codes; /* [2, n, MOST_FREE] */

    template <int G> static __host__ __device__ constexpr int64_t floats(int64_t n) {
        return 2 * n * (2 * G + 1 + 2 + MOST_FREE / 2);
    }
    template <int G> __device__ float *place(float *memory, int n) {
        left = memory;
        sum = left + 2 * n * G;
        kept = reinterpret_cast<int2 *>(sum + 2 * n * G);
        codes = reinterpret_cast<uint16_t *>(kept + 2 * n);
        cost = memory + (4 * G + 4 + MOST_FREE) * n;
        return cost + 2 * n;
    }
};

/* A warp merges `size` costs, the first of which is of candidate `first`, into the `length` cheapest candidates of a
 * row so far: to[0 .. most), ties to the earlier. */
__device__ inline void keep_cheapest(int2 *to, const int2 *so_far, int length, int most, const float *costs, int size,
                                     int first) {
    constexpr int N = ENTRIES / 32; /* costs of a lane, in registers */
    const int lane = threadIdx.x % 32;
    float cost[N], low;
    int at;
#pragma unroll
    for (int i = 0; i < N; ++i) cost[i] = lane + 32 * i < size ? costs[lane + 32 * i] : INFINITY;
    __syncwarp(); /* so_far may be what the last call wrote */
    /* For the lowest of the lane's own. */
    const auto look = [&] {
        low = INFINITY, at = INT_MAX;
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (cost[i] < low) low = cost[i], at = lane + 32 * i;
    };
    look();
    for (int kept = 0, used = 0; kept < most; ++kept) {
        const int key = ordered(low), least = __reduce_min_sync(~0u, key);
        const int who = __reduce_min_sync(~0u, key == least ? at : INT_MAX);
        const bool is_old = used < length && so_far[used].x <= least;
        if (lane == 0) to[kept] = is_old ? so_far[used] : int2{least, first + min(who, size - 1)}; /* NaN: any */
        if (is_old) ++used;
        else if (at == who) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (lane + 32 * i == who) cost[i] = INFINITY;
            look();
        }
    }
}

/* The `w.states` cheapest of all codes of the codebooks before the last two, of each of the block's rows whose targets
 * are the first of `states.left`; ties to the earlier state, then entry. Leaves them in half w.K % 2 of `states`;
 * returns how many they are. costs: [V, E]. Begins and ends with a barrier. */
template <int G, int V>
__device__ int expand(const Walk &w, const float *S, const float *norms, const States &states, float *costs) {
    const int t = threadIdx.x, lane = t % 32, n = w.rows * w.states, E = w.E, bits = __ffs(E) - 1;
    const int most_at_once = V / w.rows; /* states of a row */
    int size = 1;
    for (int k = 0; k < w.K - 2; ++k) {
        const int from = k % 2 * n, to = n - from, all = min(w.states, size * E);
        const float *book = w.codebooks + int64_t(k) * E * G;
        const Entry<G> c(book + min(t, E - 1) * G);
        const float norm = norms[k * E + min(t, E - 1)];
        const auto kept_of = [&](int state, int o) { return states.kept + state % 2 * n + o * w.states; };
        for (int first = 0; first < size; first += most_at_once) {
            const int count = min(most_at_once, size - first);
            __syncthreads();
            for (int o = 0; o < w.rows && t < E; ++o)
#pragma unroll 4
                for (int h = 0; h < count; ++h) {
                    const int state = from + o * w.states + first + h;
                    costs[(o * most_at_once + h) * E + t] =
                        states.cost[state] + (norm + c.dot(states.left + state * G));
                }
            __syncthreads();
            for (int o = t / 32; o < w.rows; o += WARPS)
                for (int h = first; h < first + count; ++h)
                    keep_cheapest(kept_of(h, o), kept_of(h + 1, o), min(all, h * E), min(all, (h + 1) * E),
                                  costs + (o * most_at_once + h - first) * E, E, h * E);
        }
        __syncwarp();
        for (int o = t / 32; o < w.rows; o += WARPS) {
            const int2 *kept = kept_of(size - 1, o);
            const int row_from = from + o * w.states, row_to = to + o * w.states;
            for (int base = 0; base < all * G; base += 32) {
                const int i = min((base + lane) / G, all - 1), d = lane % G;
                const int old = row_from + (kept[i].y >> bits), now = row_to + i;
                const float number = book[(kept[i].y & (E - 1)) * G + d];
                const float left = add_entry<G>(states.left[old * G + d], number, S);
                const float sum = k > 0 ? states.sum[old * G + d] + number : number;
                if (base + lane >= all * G) continue;
                states.left[now * G + d] = left, states.sum[now * G + d] = sum;
                if (d == 0) states.cost[now] = unordered(kept[i].x);
            }
            for (int at = lane; at < all * MOST_FREE; at += 32) {
                const int i = at / MOST_FREE, m = at % MOST_FREE, old = row_from + (kept[i].y >> bits);
                states.codes[(row_to + i) * MOST_FREE + m] =
                    m == k ? static_cast<uint16_t>(kept[i].y & (E - 1)) : states.codes[old * MOST_FREE + m];
            }
        }
        size = all;
    }
    __syncthreads();
    return size;
}

/* ---- the kernel ---------------------------------------------------------------------------------------- */

/* What the changes of group i [count, G] are for the block's later groups: T [rows, columns] += change coupling. */
template <int G> __device__ void send_on(float *T, const float *change, const Walk &w, int i, int count) {
    const int columns = w.columns(G), begin = (i + 1 - w.first) * G, quads = (columns - begin) / 4;
    if (quads == 0) return;
    const int teams = max(1, THREADS / quads), team = threadIdx.x / quads;
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

template <int G, int V> __global__ void __launch_bounds__(THREADS, 2) pair_kernel(const Walk w) {
    using Q = Pairs<G, V>;
    constexpr int P = Q::P, R = Q::R, SQUARES = (G * G + THREADS - 1) / THREADS, NORMS = 2 * ENTRIES / THREADS;
    extern __shared__ __align__(128) float pair_memory[];
    auto &x = *reinterpret_cast<typename Q::Shared *>(pair_memory);
    float *T = pair_memory + sizeof(typename Q::Shared) / 4; /* [rows, columns] */
    const int t = threadIdx.x, lane = t % 32, E = w.E, pitch = table_pitch(E), columns = w.columns(G);
    const int first = blockIdx.x * w.rows, count = min(w.rows, w.out - first);
    const int n = w.rows * w.states; /* virtual rows: a row in one of its states */
    States states;
    float *best = states.place<G>(T + w.rows * columns, n); /* [rows] */
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
    load_T<G>(T, w, first, count);
    store();
    __syncthreads();
    const int q = t % QUADS, team = t / QUADS % Q::TEAMS, slice = t / QUADS / Q::TEAMS;
    const int v0 = t / QUADS * R; /* the first of R rows in scans */

    for (int i = w.first; i < w.first + w.count; ++i) {
        const float of_group = weight, D_before = D;
        if (i + 1 < w.first + w.count) load(i + 1);
        float as_is = INFINITY; /* cost of the codes as they are */
        {
            const float t0 = mine ? T[r * columns + (i - w.first) * G + d] : 0.0f;
            const float base = w.ldl ? of_group + t0 : of_group - D_before;
            float sum = w.ldl ? 0.0f : t0;
            if (t < V * G) {
#pragma unroll
                for (int p = 0; p < G; ++p) sum = fmaf(__shfl_sync(~0u, base, p, G), x.S[p * G + d], sum);
                const bool usable = fabsf(scale) >= FLT_MIN;
                const float left = usable ? -2.0f * (sum / scale) : 0.0f;
                if (w.K == 2) x.left[t] = left;
                else if (r < w.rows) states.left[r * w.states * G + d] = left;
                if (w.K > 2 && !w.ldl) {
                    const float q = usable ? (of_group - D_before) / scale : 0.0f;
                    as_is = q * (left + 0.5f * add_entry<G>(0.0f, q, x.S));
#pragma unroll
                    for (int offset = G / 2; offset > 0; offset /= 2) as_is += __shfl_xor_sync(~0u, as_is, offset);
                }
                if (t < V) x.low[t] = INT_MAX;
            }
        }
        const float step = w.steps[i - w.first], per_step = 1.0f / step;
        const int half = (w.K - 2) % 2 * n;
        int size = 1; /* states of each row */
        if (w.K > 2) {
            if (t < w.rows) states.cost[t * w.states] = 0, best[t] = INFINITY;
            size = expand<G, V>(w, x.S, w.norms + int64_t(i - w.first) * w.K * E, states,
                                reinterpret_cast<float *>(x.least));
        }
        for (int tile = 0; tile < n; tile += V) {
            if (w.K > 2) {
                if (tile > 0) __syncthreads();
                if (t < V * G) x.left[t] = tile + r < n ? states.left[(half + tile) * G + t] : 0.0f;
                if (t < V) x.low[t] = INT_MAX;
            }
            __syncthreads();
            float cost[4][R];
            scan<G, R>(cost, x.norms[0], x.books[0], x.left + v0 * G);
#pragma unroll
            for (int v = 0; v < R; ++v) {
                const float least = fminf(fminf(cost[0][v], cost[1][v]), fminf(cost[2][v], cost[3][v]));
                const int low = __reduce_min_sync(~0u, ordered(least));
                if (lane == 0) atomicMin(&x.low[v0 + v], low);
            }
            __syncthreads();
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
            if (t < V * G) {
                const int b = which(x.found[1][r], E);
                const float c = reinterpret_cast<const float *>(&x.books[1][d / 4][b])[d % 4];
                x.linear[t] = add_entry<G>(x.left[t], c, x.S);
            }
            __syncthreads();
            scan<G, R>(cost, x.norms[0], x.books[0], x.linear + v0 * G);
            keep_lowest<R>(x.found[0] + v0, cost);
            __syncthreads();
            if (t < V * G) {
                const int a = which(x.found[0][r], E);
                const float c = reinterpret_cast<const float *>(&x.books[0][d / 4][a])[d % 4];
                x.linear[t] = add_entry<G>(x.left[t], c, x.S);
            }
            __syncthreads();
            scan<G, R>(cost, x.norms[1], x.books[1], x.linear + v0 * G);
            keep_lowest<R>(x.found[1] + v0, cost);
            __syncthreads();
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
                        if (v - o * w.states >= size) break;
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
            float now = D_before;
            if (w.K == 2 || w.ldl || best[r] < as_is) {
                const int state = half + (w.K > 2 ? best_at[3 * r] : 0);
                const int a = w.K > 2 ? best_at[3 * r + 1] : which(x.found[0][r], E);
                const int b = w.K > 2 ? best_at[3 * r + 2] : which(x.found[1][r], E);
                float sum = w.K > 2 ? states.sum[state * G + d] : 0.0f;
                sum += reinterpret_cast<const float *>(&x.books[0][d / 4][a])[d % 4];
                sum += reinterpret_cast<const float *>(&x.books[1][d / 4][b])[d % 4];
                now = of_group - scale * sum;
                if (d == 0) {
                    for (int k = 0; k < w.K - 2; ++k) codes[k] = states.codes[state * MOST_FREE + k];
                    codes[w.K - 2] = static_cast<uint16_t>(a), codes[w.K - 1] = static_cast<uint16_t>(b);
                }
            }
            x.change[t] = w.ldl ? now : now - D_before;
            w.D[row * w.in + i * G + d] = now;
        }
        __syncthreads();
        store();
        send_on<G>(T, x.change, w, i, count);
        __syncthreads();
    }
}

/* Bytes of shared memory of a block of threads, less those for T. */
template <int G, int V> int64_t memory_of(int64_t rows, int64_t states, int64_t K) {
    const int64_t floats = K > 2 ? States::floats<G>(rows * states) + 4 * rows : 0;
    return static_cast<int64_t>(sizeof(typename Pairs<G, V>::Shared)) + floats * 4;
}

template <int G, int V> cudaError_t launch(const Walk &w, const Device &device, cudaStream_t stream) {
    if (const cudaError_t error = allow_shared_memory<pair_kernel<G, V>>(device)) return error;
    const int64_t memory = memory_of<G, V>(w.rows, w.states, w.K) + 4 * int64_t(w.rows) * w.columns(G);
    if (memory > device.shared_memory) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(divide_up(w.E, STRIP)), static_cast<unsigned>(w.count));
    table_kernel<G><<<grid, ENTRIES, 0, stream>>>(w);
    const auto blocks = static_cast<unsigned>(divide_up(w.out, w.rows));
    pair_kernel<G, V><<<blocks, THREADS, static_cast<size_t>(memory), stream>>>(w);
    return cudaGetLastError();
}

/* V, the rows in their states that a block of threads takes at a time. For g = 8 there are three kernels, and the one
 * that an H100 is soonest done with; for the others one: each takes ptxas long. Tried for K > 2: V = 16 with three
 * blocks on a multiprocessor, 0.74 s for 4096x4096 at 3x8g8 where V = 32 takes 0.66. */
int tile_of(int64_t out, int states, int64_t g, const Device &device) {
    if (g != 8) return g == 32 ? 8 : 16;
    constexpr int TILES[] = {32, 16, 4}, CYCLES[] = {42, 25, 14}; /* measured: thousands a group */
    int found = 0;
    int64_t least = INT64_MAX;
    for (int i = 0; i < 3; ++i) {
        const int64_t rows = std::max(1, TILES[i] / states), blocks = divide_up(out, rows);
        const int64_t cycles = divide_up(blocks, 2 * device.sms) * divide_up(rows * states, TILES[i]) * CYCLES[i];
        if (cycles < least) least = cycles, found = TILES[i];
    }
    return found;
}

} // namespace

int64_t rows_of_pairs(int64_t out, int states, int64_t g, const Device &device) {
    return std::max(1, tile_of(out, states, g, device) / states);
}

int64_t columns_of_pairs(int64_t out, int states, int64_t K, int64_t g, const Device &device) {
    const int V = tile_of(out, states, g, device);
    const int64_t rows = rows_of_pairs(out, states, g, device);
    const int64_t taken = g == 4    ? memory_of<4, 16>(rows, states, K)
                          : g == 16 ? memory_of<16, 16>(rows, states, K)
                          : g == 32 ? memory_of<32, 8>(rows, states, K)
                          : V == 32 ? memory_of<8, 32>(rows, states, K)
                          : V == 16 ? memory_of<8, 16>(rows, states, K)
                                    : memory_of<8, 4>(rows, states, K);
    const auto columns = [&](int64_t memory) { return (memory - taken) / (4 * rows) / g * g; };
    const int64_t of_two = columns(device.shared_memory / 2 - 512); /* blocks on a multiprocessor, 1 KB more each */
    return std::min(of_two >= 128 ? of_two : columns(device.shared_memory), 512 / g * g);
}

int64_t size_of_table(int64_t E) { return E * table_pitch(static_cast<int>(E)); }

cudaError_t search_pairs(Walk w, int g, const Device &device, cudaStream_t stream) {
    const int V = tile_of(w.out, w.states, g, device);
    switch (g) {
    case 4: return launch<4, 16>(w, device, stream);
    case 8:
        return V == 32   ? launch<8, 32>(w, device, stream)
               : V == 16 ? launch<8, 16>(w, device, stream)
                         : launch<8, 4>(w, device, stream);
    case 16: return launch<16, 16>(w, device, stream);
    case 32: return launch<32, 8>(w, device, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace aqlm_cuda
