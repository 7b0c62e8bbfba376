/* pairs.cu: the best pair of the last two codebooks for each row of a group, after each state of a beam over the other
 * codebooks (core/quantizer/search.c, search_pairs).
 *
 * The cost of a pair is u_a + v_b + M_ab, M_ab = 2 c_a S c_b the same for all rows. A thread has one b, M_ab from its
 * own registers, and the smallest u_a + M_ab of each row in 16 bits, two rows in a register: one instruction for two
 * pairs (viaddmin.s16x2 of Hopper; others emulate it). 16 bits decide within 1/16,383 of the largest |M|, which is one
 * to three percent of a group's error where they err at all; then b is held while the best a is found in float, a held
 * while the best b is. Measured beside an all-float scan: the same error to 1e-4, 2.5 times as fast. The CPU prunes by
 * the triangle inequality instead, which threads in step could not use. */
#include <climits>

#include "cuda/quantizer/walk.cuh"

namespace aqlm_cuda {
namespace {

constexpr int MOST_FREE = 6; /* codebooks before the last two */
constexpr int LEVELS = 16383;

/* A state of the beam over the first K - 2 codebooks, of one row. */
struct States {
    float *cost;     /* [2, rows * most] */
    float *left;     /* [2, rows * most, G] target' - q S */
    uint16_t *codes; /* [2, rows * most, MOST_FREE] */
    int *size;       /* [rows] */
};

template <int G> __host__ __device__ int64_t state_floats(int64_t virtual_rows, int64_t rows) {
    return 2 * virtual_rows * (1 + G + MOST_FREE / 2) + rows;
}

template <int G, int V> __host__ __device__ int64_t pair_floats(int64_t E) {
    const int64_t threads = E < 64 ? 64 : E;
    return 2 * E * G + 2 * E + V * G + 4 * V + 64 + threads * V;
}

template <int G> __device__ float times(const float *S, const float *q, int d) { /* (q S)_d */
    float sum = 0;
#pragma unroll
    for (int p = 0; p < G; ++p) sum = fmaf(q[p], S[p * G + d], sum);
    return sum;
}

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

/* The warp's row: its `most` cheapest states of codebooks 0 .. free - 1, by `most` scans of all; ties to the earlier
 * state, then entry. norms [free, E] in shared memory. Leaves them in half free % 2 of `states`. */
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

/* Numbers of V rows in 16 bits, two rows in a word. */
template <int V> struct alignas(V * 2 < 16 ? V * 2 : 16) Quantized {
    uint32_t pair[V / 2];

    /* least = min(least, m + these) */
    __device__ void add_min(uint32_t m, uint32_t (&least)[V / 2]) const {
        if constexpr (V >= 8) {
#pragma unroll
            for (int v = 0; v < V / 2; v += 4) {
                const uint4 x = *reinterpret_cast<const uint4 *>(pair + v);
                least[v] = __viaddmin_s16x2(m, x.x, least[v]);
                least[v + 1] = __viaddmin_s16x2(m, x.y, least[v + 1]);
                least[v + 2] = __viaddmin_s16x2(m, x.z, least[v + 2]);
                least[v + 3] = __viaddmin_s16x2(m, x.w, least[v + 3]);
            }
        } else {
            const uint2 x = *reinterpret_cast<const uint2 *>(pair);
            least[0] = __viaddmin_s16x2(m, x.x, least[0]);
            least[1] = __viaddmin_s16x2(m, x.y, least[1]);
        }
    }
};

template <int G, int V> __global__ void __launch_bounds__(256) pair_kernel(const Walk w) {
    extern __shared__ __align__(128) float pair_memory[];
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, warps = blockDim.x / 32, E = w.E, threads = blockDim.x;
    const int n = w.rows * w.states; /* virtual rows: a row in one of its states */
    Rows<G> rows;
    float *memory = rows.place(pair_memory, w);
    float *c1 = memory, *c2 = c1 + E * G, *norm1 = c2 + E * G, *norm2 = norm1 + E, *left = norm2 + E;
    float *low = left + V * G, *found = low + V, *radius = found + 3 * V; /* found: [V] cost, a, b */
    float *scratch = radius + 64;                                         /* [V, threads] */
    auto *found_a = reinterpret_cast<int *>(found + V), *found_b = found_a + V;
    auto *quantized = reinterpret_cast<Quantized<V> *>(scratch); /* [E] */
    States states;                                               /* `left` first: it is read by fours */
    states.left = scratch + V * threads;
    states.cost = states.left + 2 * n * G;
    states.codes = reinterpret_cast<uint16_t *>(states.cost + 2 * n);
    states.size = reinterpret_cast<int *>(states.codes + 2 * n * MOST_FREE);
    float *before = w.K > 2 ? reinterpret_cast<float *>(states.size + w.rows) : states.left, *best = before + w.rows;
    auto *best_at = reinterpret_cast<int *>(best + w.rows); /* [rows, 3] state, a, b */
    float *norms = best + 4 * w.rows;                       /* [K - 2, E] */

    const float *book1 = w.codebooks + int64_t(w.K - 2) * E * G, *book2 = book1 + E * G;
    for (int at = t; at < E * G; at += threads) c1[at] = book1[at], c2[at] = book2[at];
    rows.load_T(w);
    __syncthreads();
    const int own = min(t, E - 1); /* of a thread beyond E: it finds nothing */
    const Entry<G> a(c1 + own * G), b(c2 + own * G);

    for (int i = w.first; i < w.first + w.count; ++i) {
        rows.load_targets(w, i);
        const float *S = rows.S;
        float M[G]; /* 2 c_b S */
#pragma unroll
        for (int d = 0; d < G; ++d) {
            float sum = 0;
#pragma unroll
            for (int p = 0; p < G; ++p) sum = fmaf(b.x[p], S[p * G + d], sum);
            M[d] = 2.0f * sum;
        }
        const float square1 = square_in<G>(S, a.x), square2 = 0.5f * b.dot(M);
        if (t < E) norm1[t] = square1, norm2[t] = square2;
        const float most1 = warp_max(square1), most2 = warp_max(square2);
        if (lane == 0) radius[warp] = most1, radius[32 + warp] = most2;
        for (int at = t; at < (w.K - 2) * E; at += threads)
            norms[at] = square_in<G>(S, Entry<G>(w.codebooks + int64_t(at) * G).x);
        __syncthreads();
        float reach1 = 0, reach2 = 0;
        for (int k = 0; k < warps; ++k) reach1 = fmaxf(reach1, radius[k]), reach2 = fmaxf(reach2, radius[32 + k]);
        const float step = fmaxf(2.0f * sqrtf(reach1) * sqrtf(reach2) / LEVELS, FLT_MIN), per_step = 1.0f / step;
#pragma unroll
        for (int d = 0; d < G; ++d) M[d] *= per_step;

        for (int r = warp; r < w.rows; r += warps) {
            if (w.K > 2) expand_row<G>(w, S, norms, rows.target + r * G, states, r, n);
            float cost = INFINITY; /* of the codes as they are; of two codebooks nothing is better than the best pair */
            if (w.K > 2 && !w.ldl && r < rows.count) {
                const uint16_t *code = rows.codes(w, r, i);
                float q[G] = {}, cross = 0;
                for (int k = 0; k < w.K; ++k) {
                    const float *entry = w.codebooks + (int64_t(k) * E + code[k]) * G;
#pragma unroll
                    for (int d = 0; d < G; ++d) q[d] += entry[d];
                }
#pragma unroll
                for (int d = 0; d < G; ++d) cross = fmaf(rows.target[r * G + d], q[d], cross);
                cost = square_in<G>(S, q) - 2.0f * cross;
            }
            if (lane == 0) before[r] = cost, best[r] = INFINITY;
        }
        const int half = (w.K - 2) % 2 * n;

        for (int tile = 0; tile < n; tile += V) {
            __syncthreads();
            for (int at = t; at < V * G; at += threads) {
                const int v = tile + at / G;
                left[at] = v >= n ? 0.0f : w.K > 2 ? states.left[(half + v) * G + at % G] : rows.target[tile * G + at];
            }
            __syncthreads();
            /* u_a of each row, and the smallest, which is where 16 bits begin */
            float u[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                u[v] = fmaf(-2.0f, a.dot(left + v * G), square1);
                scratch[v * threads + t] = t < E ? u[v] : INFINITY;
            }
            __syncthreads();
            for (int v = warp; v < V; v += warps) {
                float least = INFINITY;
                for (int e = lane; e < threads; e += 32) least = fminf(least, scratch[v * threads + e]);
                least = -warp_max(-least);
                if (lane == 0) low[v] = least;
            }
            __syncthreads();
            if (t < E) {
                Quantized<V> packed;
#pragma unroll
                for (int v = 0; v < V; v += 2) {
                    const int x = __float2int_rn(fminf((u[v] - low[v]) * per_step, 2.0f * LEVELS)) - LEVELS - 1;
                    const int y = __float2int_rn(fminf((u[v + 1] - low[v + 1]) * per_step, 2.0f * LEVELS)) - LEVELS - 1;
                    packed.pair[v / 2] = (x & 0xffff) | y << 16;
                }
                quantized[t] = packed;
            }
            __syncthreads();

            uint32_t least[V / 2];
#pragma unroll
            for (int v = 0; v < V / 2; ++v) least[v] = 0x7fff7fff;
#pragma unroll 2
            for (int e = 0; e < E; ++e) {
                float cross = 0;
                const float *entry = c1 + e * G;
#pragma unroll
                for (int d = 0; d < G; d += 4) {
                    const float4 c = *reinterpret_cast<const float4 *>(entry + d);
                    cross = fmaf(M[d], c.x, cross), cross = fmaf(M[d + 1], c.y, cross);
                    cross = fmaf(M[d + 2], c.z, cross), cross = fmaf(M[d + 3], c.w, cross);
                }
                /* 1.5 * 2^23 more, and the low bits are the number rounded; twice */
                const uint32_t m = __byte_perm(__float_as_uint(cross + 12582912.0f), 0, 0x1010);
                quantized[e].add_min(m, least);
            }
            __syncthreads(); /* `quantized` was read: scratch is costs now */
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int x = static_cast<int16_t>(v % 2 ? least[v / 2] >> 16 : least[v / 2] & 0xffff);
                const float cost = fmaf(-2.0f, b.dot(left + v * G), square2) + static_cast<float>(x) * step;
                scratch[v * threads + t] = t < E ? cost : INFINITY;
            }
            __syncthreads();

            /* In float: the best b of those costs, its best a, that one's best b */
            for (int v = warp; v < V && tile + v < n; v += warps) {
                float cost = INFINITY;
                int at_b = INT_MAX, at_a = INT_MAX;
                for (int e = lane; e < E; e += 32)
                    if (is_before(scratch[v * threads + e], e, cost, at_b)) cost = scratch[v * threads + e], at_b = e;
                warp_min(cost, at_b);
                at_b = at_b < E ? at_b : 0;
                Entry<G> linear;
#pragma unroll
                for (int d = 0; d < G; ++d) linear.x[d] = 2.0f * (times<G>(S, c2 + at_b * G, d) - left[v * G + d]);
                cost = INFINITY;
                for (int e = lane; e < E; e += 32) {
                    const float x = norm1[e] + linear.dot(c1 + e * G);
                    if (is_before(x, e, cost, at_a)) cost = x, at_a = e;
                }
                warp_min(cost, at_a);
                at_a = at_a < E ? at_a : 0;
#pragma unroll
                for (int d = 0; d < G; ++d) linear.x[d] = 2.0f * (times<G>(S, c1 + at_a * G, d) - left[v * G + d]);
                cost = INFINITY, at_b = INT_MAX;
                for (int e = lane; e < E; e += 32) {
                    const float x = norm2[e] + linear.dot(c2 + e * G);
                    if (is_before(x, e, cost, at_b)) cost = x, at_b = e;
                }
                warp_min(cost, at_b);
                at_b = at_b < E ? at_b : 0;
                if (lane == 0) {
                    float of_a = norm1[at_a];
                    for (int d = 0; d < G; ++d) of_a = fmaf(-2.0f * left[v * G + d], c1[at_a * G + d], of_a);
                    found[v] = cost + of_a, found_a[v] = at_a, found_b[v] = at_b;
                }
            }
            __syncthreads();
            for (int r = t; r < rows.count; r += threads) /* the states of a row, in order */
                for (int v = max(r * w.states, tile); v < min((r + 1) * w.states, min(n, tile + V)); ++v) {
                    if (w.K > 2 && v - r * w.states >= states.size[r]) break;
                    const float cost = found[v - tile] + (w.K > 2 ? states.cost[half + v] : 0.0f);
                    if (v > r * w.states && !(cost < best[r])) continue;
                    best[r] = cost;
                    best_at[3 * r] = v, best_at[3 * r + 1] = found_a[v - tile], best_at[3 * r + 2] = found_b[v - tile];
                }
        }
        __syncthreads();
        for (int r = t; r < rows.count; r += threads) {
            if (w.K > 2 && !w.ldl && !(best[r] < before[r])) continue;
            uint16_t *code = rows.codes(w, r, i);
            for (int k = 0; k < w.K - 2; ++k) code[k] = states.codes[(half + best_at[3 * r]) * MOST_FREE + k];
            code[w.K - 2] = static_cast<uint16_t>(best_at[3 * r + 1]);
            code[w.K - 1] = static_cast<uint16_t>(best_at[3 * r + 2]);
        }
        rows.send_on(w, i);
    }
}

template <int G, int V> int64_t memory_of(int64_t rows, int64_t states, int64_t columns, int64_t K, int64_t E) {
    const int64_t floats = Rows<G>::floats(static_cast<int>(rows), static_cast<int>(columns)) + pair_floats<G, V>(E) +
                           5 * rows + (K - 2) * E + (K > 2 ? state_floats<G>(rows * states, rows) : 0);
    return floats * 4;
}

template <int G, int V> cudaError_t launch(const Walk &w, const Device &device, cudaStream_t stream) {
    if (const cudaError_t error = allow_shared_memory<pair_kernel<G, V>>(device)) return error;
    const int64_t memory = memory_of<G, V>(w.rows, w.states, w.columns(G), w.K, w.E);
    if (memory > device.shared_memory) return cudaErrorInvalidConfiguration;
    const int threads = std::max(w.E, 64);
    const auto blocks = static_cast<unsigned>(divide_up(w.out, w.rows));
    pair_kernel<G, V><<<blocks, threads, static_cast<size_t>(memory), stream>>>(w);
    return cudaGetLastError();
}

} // namespace

/* Rows at a time: as many as keep the device busy, in as few blocks of threads as that takes. g = 8 has three kernels,
 * the others one: each takes ptxas long. */
int64_t rows_of_pairs(int64_t out, int states, int64_t g, const Device &device) {
    if (g != 8) return std::max(1, 16 / states);
    for (const int tile : {32, 16}) {
        const int64_t rows = std::max(1, tile / states);
        if (divide_up(out, rows) >= device.sms * 3 / 4) return rows;
    }
    return std::max(1, 4 / states);
}

int64_t columns_of_pairs(int64_t rows, int64_t E, int64_t g, const Device &device) {
    /* as in memory_of, with all that K > 2 takes, in 8 codebooks */
    const int64_t tile = g == 8 ? 32 : 16, rest = 4 * (g * g + 3 * rows * g + 2 * E * g + 2 * E + tile * (g + 4) + 64 +
                                                       std::max<int64_t>(E, 64) * tile + 5 * rows + 6 * E +
                                                       2 * std::max<int64_t>(rows, 64) * (1 + g + 3) + rows);
    const int64_t columns = (device.shared_memory - rest) / (4 * rows) / g * g;
    return std::min<int64_t>(columns, 512 / g * g);
}

cudaError_t search_pairs(Walk w, int g, const Device &device, cudaStream_t stream) {
    const int rows = w.rows * w.states;
    switch (g) {
    case 4: return launch<4, 16>(w, device, stream);
    case 8:
        return rows >= 32   ? launch<8, 32>(w, device, stream)
               : rows >= 16 ? launch<8, 16>(w, device, stream)
                            : launch<8, 4>(w, device, stream);
    case 16: return launch<16, 16>(w, device, stream);
    case 32: return launch<32, 16>(w, device, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace aqlm_cuda
