/* beam.cu: the search that replaces one code after another (core/quantizer/search.c, search_beam): by the nearest entry
 * of each codebook in turn for a beam of 1, which is all there is to find for one codebook; by a beam otherwise.
 *
 * Distances and their minimum are one kernel: entries come from L2, each thread holds a few and takes them past all its
 * rows, whose targets lie in shared memory; a minimum is kept, not where it is: that is found again afterwards among
 * the entries of the one thread that met it. For g = 8 and many rows the matrix units find it, as in nearest.cuh; their
 * sums begin with the norms. */
#include <climits>

#include "cuda/quantizer/gemm.cuh"
#include "cuda/quantizer/walk.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, MOST_K = 8;

constexpr int MANY = 32; /* rows of a block of threads, where there are as many */

template <int G> struct Held { /* entries of a thread at a time */
    static constexpr int count = G == 4 ? 8 : G == 8 ? 4 : G == 16 ? 2 : 1;
};

/* norms[group, k, e] = c S c; grid (entries of all codebooks, groups of the block). */
template <int G> __global__ void norm_kernel(float *norms, const Walk w) {
    const int entries = w.K * w.E, at = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;
    __shared__ __align__(16) float S[G * G];
    for (int d = threadIdx.x; d < G * G; d += blockDim.x) S[d] = w.metric[int64_t(w.first + i) * G * G + d];
    __syncthreads();
    if (at >= entries) return;
    norms[int64_t(i) * entries + at] = square_in<G>(S, Entry<G>(w.codebooks + int64_t(at) * G).x);
}

/* Of R rows with left [R, G] in shared memory the entry of `book` with the smallest norm - 2 left c, ties to the lower:
 * index [R] in shared memory. low: [R, WARPS] floats, who: [R, WARPS] threads. */
template <int G, int R>
__device__ void nearest(int *index, const float *book, const float *norms, const float *left, int E, float *low,
                        int *who) {
    constexpr int N = Held<G>::count;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    float best[R];
#pragma unroll
    for (int r = 0; r < R; ++r) best[r] = INFINITY;
    for (int e0 = 0; e0 < E; e0 += N * THREADS) {
        Entry<G> c[N];
        float norm[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int e = e0 + n * THREADS + t;
            if (e < E) c[n] = Entry<G>(book + int64_t(e) * G);
            else
#pragma unroll
                for (int d = 0; d < G; ++d) c[n].x[d] = 0;
            norm[n] = e < E ? norms[e] : INFINITY;
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (r % 4 == 0) asm volatile("" ::: "memory"); /* else all rows are loaded at once, and spilled */
            const Entry<G> x(left + r * G);                /* -2 left */
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float cost = norm[n];
#pragma unroll
                for (int d = 0; d < G; ++d) cost = fmaf(x.x[d], c[n].x[d], cost);
                best[r] = fminf(best[r], cost);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float value = best[r];
        int at = t;
        warp_min(value, at);
        if (lane == 0) low[r * WARPS + warp] = value, who[r * WARPS + warp] = at;
    }
    __syncthreads();
    for (int r = warp; r < R; r += WARPS) {
        float value = lane < WARPS ? low[r * WARPS + lane] : INFINITY;
        int at = lane < WARPS ? who[r * WARPS + lane] : INT_MAX;
        warp_min(value, at);
        at = at < THREADS ? at : 0;
        const Entry<G> x(left + r * G);
        value = INFINITY;
        int found = INT_MAX;
        for (int e = at + lane * THREADS; e < E; e += 32 * THREADS) {
            const Entry<G> c(book + int64_t(e) * G);
            float cost = norms[e];
#pragma unroll
            for (int d = 0; d < G; ++d) cost = fmaf(x.x[d], c.x[d], cost);
            if (is_before(cost, e, value, found)) value = cost, found = e;
        }
        warp_min(value, found);
        if (lane == 0) index[r] = found < E ? found : 0;
    }
    __syncthreads();
}

constexpr int CHUNK = 64; /* entries of which a thread, who sees a quarter, remembers the lowest */

/* halves[k, e, pair]: two numbers of an entry, high and low as bf16; g = 8. A thread has four numbers. */
__global__ void halves_kernel(uint4 *halves, const Walk w) {
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= w.K * w.E * 2) return;
    uint2 high, low;
    split_bf16(reinterpret_cast<const float4 *>(w.codebooks)[at], high, low);
    halves[at] = {high.x, low.x, high.y, low.y};
}

/* Entries that a thread multiplies, of one chunk. */
struct Chunk {
    static constexpr int STEPS = CHUNK / 8;
    uint2 half[STEPS];
    float2 norm[STEPS];

    __device__ void load(const uint2 *halves, const float *norms, int chunk) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < STEPS; ++n) {
            const int e = chunk * CHUNK + n * 8;
            half[n] = __ldg(halves + e * 4 + lane);
            norm[n] = __ldg(reinterpret_cast<const float2 *>(norms + e) + lane % 4);
        }
    }
};

/* As `nearest`, for g = 8 and a multiple of CHUNK entries. */
template <int R>
__device__ void nearest_by_halves(int *index, const float *book, const uint2 *halves, const float *norms,
                                  const float *left, int E, float *low, int *who) {
    constexpr int TILES = R / 16;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, chunks = E / CHUNK;
    uint32_t a[TILES][4];
    float best[2 * TILES];
    int where[2 * TILES] = {};
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        const float *x = left + (i * 8 + lane / 4) * 8 + lane % 4 * 2;
        uint2 high, rest;
        split_bf16({x[0], x[1], 0, 0}, high, rest);
        a[i / 2][i % 2] = high.x, a[i / 2][i % 2 + 2] = rest.x;
        best[i] = INFINITY;
    }
    Chunk next;
    next.load(halves, norms, min(warp, chunks - 1));
    for (int chunk = warp; chunk < chunks; chunk += WARPS) {
        const Chunk now = next;
        next.load(halves, norms, min(chunk + WARPS, chunks - 1));
        float lowest[2 * TILES];
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) lowest[i] = INFINITY;
#pragma unroll
        for (int n = 0; n < Chunk::STEPS; ++n)
#pragma unroll
            for (int i = 0; i < TILES;
                 ++i) { /* high high, low high and high low; what is left out is 2^-16 of a term */
                const float2 norm = now.norm[n];
                const uint2 half = now.half[n];
                float c[4] = {norm.x, norm.y, norm.x, norm.y};
                mma_k16<__nv_bfloat16>(c, a[i][0], a[i][1], a[i][2], a[i][3], half.x, half.x);
                mma_k8<__nv_bfloat16>(c, a[i][0], a[i][1], half.y);
                lowest[2 * i] = fminf(lowest[2 * i], fminf(c[0], c[1]));
                lowest[2 * i + 1] = fminf(lowest[2 * i + 1], fminf(c[2], c[3]));
            }
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i)
            if (lowest[i] < best[i]) best[i] = lowest[i], where[i] = chunk;
    }
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
        int part = where[i] * 4 + lane % 4;
        for (int distance = 1; distance < 4; distance *= 2) {
            const float other = __shfl_xor_sync(~0u, best[i], distance);
            const int at = __shfl_xor_sync(~0u, part, distance);
            if (is_before(other, at, best[i], part)) best[i] = other, part = at;
        }
        const int r = i * 8 + lane / 4;
        if (lane % 4 == 0) low[r * WARPS + warp] = best[i], who[r * WARPS + warp] = part;
    }
    __syncthreads();
    for (int r = warp; r < R; r += WARPS) { /* among 16 entries, in float */
        float value = lane < WARPS ? low[r * WARPS + lane] : INFINITY;
        int part = lane < WARPS ? who[r * WARPS + lane] : INT_MAX;
        warp_min(value, part);
        part = part < INT_MAX ? part : 0;
        const int e = part / 4 * CHUNK + part % 4 * 2 + lane % 16 / 2 * 8 + lane % 2;
        const Entry<8> x(left + r * 8), c(book + int64_t(e) * 8);
        int found = e;
        value = norms[e];
#pragma unroll
        for (int d = 0; d < 8; ++d) value = fmaf(x.x[d], c.x[d], value);
        warp_min(value, found);
        if (lane == 0) index[r] = found;
    }
    __syncthreads();
}

/* The sum of a row's entries without the codebooks in left_out, a number d of it. */
__device__ inline float sum_without(const Walk &w, const uint16_t *codes, uint32_t left_out, int G, int d) {
    float sum = 0;
    for (int k = 0; k < w.K; ++k)
        if (!(left_out >> k & 1)) sum += w.codebooks[(int64_t(k) * w.E + codes[k]) * G + d];
    return sum;
}

/* q S q - 2 target q of the entries that `codes` name; one thread. */
template <int G> __device__ float cost_of(const Walk &w, const float *S, const float *target, const uint16_t *codes) {
    float square = 0, cross = 0;
    for (int d = 0; d < G; ++d) {
        const float q = sum_without(w, codes, 0, G, d);
        float sum = 0;
        for (int p = 0; p < G; ++p) sum = fmaf(sum_without(w, codes, 0, G, p), S[p * G + d], sum);
        square = fmaf(sum, q, square), cross = fmaf(target[d], q, cross);
    }
    return square - 2.0f * cross;
}

constexpr int64_t nearest_floats(int64_t rows, int64_t g) { return rows * (g + 2 * WARPS + 1 + MOST_K / 2); }

template <int G, int R> __global__ void __launch_bounds__(THREADS) nearest_kernel(const Walk w) {
    extern __shared__ __align__(128) float nearest_memory[];
    Rows<G> rows;
    float *left = rows.place(nearest_memory, w), *low = left + R * G;               /* [R, G], [R, WARPS] */
    auto *who = reinterpret_cast<int *>(low + R * WARPS), *index = who + R * WARPS; /* [R, WARPS], [R] */
    auto(*trial)[MOST_K] = reinterpret_cast<uint16_t (*)[MOST_K]>(index + R);       /* [R, MOST_K] */
    load_T<G>(rows.T, w, rows.first, rows.count);
    for (int i = w.first; i < w.first + w.count; ++i) {
        rows.load_targets(w, i);
        for (int at = threadIdx.x; at < R * w.K; at += THREADS) {
            const int r = at / w.K, k = at % w.K;
            trial[r][k] = r < rows.count && !w.ldl ? rows.codes(w, r, i)[k] : uint16_t(0);
        }
        __syncthreads();
        /* From scratch each codebook is first added to those before, then each is replaced once. */
        const int steps = w.ldl && w.K > 1 ? 2 * w.K : w.K;
        for (int step = 0; step < steps; ++step) {
            const int k = w.ldl ? step % w.K : w.books[i * w.K + step];
            const uint32_t left_out = w.ldl && step < w.K ? ~0u << k : 1u << k;
            for (int at = threadIdx.x; at < R * G; at += THREADS) {
                const int r = at / G, d = at % G;
                float sum = rows.target[at];
                for (int p = 0; p < G && w.K > 1; ++p)
                    sum = fmaf(-sum_without(w, trial[r], left_out, G, p), rows.S[p * G + d], sum);
                left[at] = -2.0f * sum;
            }
            __syncthreads();
            const float *book = w.codebooks + int64_t(k) * w.E * G;
            const float *norms = w.norms + (int64_t(i - w.first) * w.K + k) * w.E;
            if constexpr (G == 8 && R == MANY)
                nearest_by_halves<R>(index, book, reinterpret_cast<const uint2 *>(w.tables) + int64_t(k) * w.E * 4,
                                     norms, left, w.E, low, who);
            else nearest<G, R>(index, book, norms, left, w.E, low, who);
            for (int r = threadIdx.x; r < R; r += THREADS) trial[r][k] = static_cast<uint16_t>(index[r]);
            __syncthreads();
        }
        for (int r = threadIdx.x; r < rows.count; r += THREADS) {
            uint16_t *code = rows.codes(w, r, i);
            const float *target = rows.target + r * G;
            if (!w.ldl && !(cost_of<G>(w, rows.S, target, trial[r]) < cost_of<G>(w, rows.S, target, code))) continue;
            for (int k = 0; k < w.K; ++k) code[k] = trial[r][k];
        }
        rows.send_on(w, i);
    }
}

/* Hypotheses of a warp's row, in shared memory, in two halves. */
template <int G> struct Hypotheses {
    float *cost, *sum; /* [2, most], [2, most, G] */
    uint16_t *codes;   /* [2, most, MOST_K] */

    static __host__ __device__ int64_t floats(int64_t most) { return 2 * most * (1 + G + MOST_K / 2); }
    __device__ Hypotheses(float *memory, int most)
        : cost(memory), sum(cost + 2 * most), codes(reinterpret_cast<uint16_t *>(sum + 2 * most * G)) {}
};

/* A warp searches a row: `most` scans of all candidates keep the `most` cheapest. Right for any size, fast for none. */
template <int G> __global__ void __launch_bounds__(THREADS) beam_kernel(const Walk w) {
    extern __shared__ __align__(128) float beam_memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, most = w.most;
    Rows<G> rows;
    float *memory = rows.place(beam_memory, w);
    const Hypotheses<G> hypotheses(memory + warp * Hypotheses<G>::floats(most), most);
    float *const cost = hypotheses.cost, *const sum = hypotheses.sum;
    uint16_t *const codes = hypotheses.codes;
    load_T<G>(rows.T, w, rows.first, rows.count);
    for (int i = w.first; i < w.first + w.count; ++i) {
        rows.load_targets(w, i);
        const float *S = rows.S;
        for (int r = warp; r < rows.count; r += WARPS) {
            uint16_t *own = rows.codes(w, r, i);
            const float *target = rows.target + r * G;
            int size = 1, half = 0;
            if (lane == 0) cost[0] = 0;
            if (lane < MOST_K) codes[lane] = w.ldl || lane >= w.K ? uint16_t(0) : own[lane];
            __syncwarp();
            if (lane < G) sum[lane] = w.ldl ? 0.0f : sum_without(w, codes, 0, G, lane);
            __syncwarp();
            const int steps = w.ldl && w.K > 1 ? 2 * w.K : w.K;
            for (int step = 0; step < steps; ++step) {
                const int k = w.ldl ? step % w.K : w.books[i * w.K + step];
                int from = half * most;
                const int to = most - from;
                if (!w.ldl ||
                    step >= w.K) { /* takes code k out of every hypothesis; those that then coincide are one */
                    int kept = 0;
                    for (int h = 0; h < size; ++h) {
                        bool seen = false;
                        for (int x = 0; x < kept && !seen; ++x) {
                            seen = true;
                            for (int c = 0; c < w.K; ++c)
                                seen = seen &&
                                       (c == k || codes[(from + x) * MOST_K + c] == codes[(from + h) * MOST_K + c]);
                        }
                        if (seen) continue;
                        const uint16_t code = lane < MOST_K ? codes[(from + h) * MOST_K + lane] : uint16_t(0);
                        __syncwarp();
                        if (lane < MOST_K) codes[(from + kept) * MOST_K + lane] = code;
                        __syncwarp();
                        if (lane < G)
                            sum[(from + kept) * G + lane] =
                                sum_without(w, codes + (from + kept) * MOST_K, 1u << k, G, lane);
                        __syncwarp();
                        if (lane == 0) {
                            float square = 0, cross = 0;
                            const float *q = sum + (from + kept) * G;
                            for (int d = 0; d < G; ++d) {
                                float x = 0;
                                for (int p = 0; p < G; ++p) x = fmaf(q[p], S[p * G + d], x);
                                square = fmaf(x, q[d], square), cross = fmaf(target[d], q[d], cross);
                            }
                            cost[from + kept] = square - 2.0f * cross;
                        }
                        ++kept;
                        __syncwarp();
                    }
                    size = kept;
                }
                const float *book = w.codebooks + int64_t(k) * w.E * G;
                const float *norms = w.norms + (int64_t(i - w.first) * w.K + k) * w.E;
                const int64_t all = int64_t(size) * w.E;
                const int keeps = all < most ? static_cast<int>(all) : most;
                float last = -INFINITY;
                int last_at = -1;
                for (int kept = 0; kept < keeps; ++kept) {
                    float best = INFINITY;
                    int best_at = INT_MAX;
                    for (int h = 0; h < size; ++h) {
                        Entry<G> left;
                        const float *q = sum + (from + h) * G;
#pragma unroll
                        for (int d = 0; d < G; ++d) {
                            float x = target[d];
#pragma unroll
                            for (int p = 0; p < G; ++p) x = fmaf(-q[p], S[p * G + d], x);
                            left.x[d] = -2.0f * x;
                        }
                        for (int e = lane; e < w.E; e += 32) {
                            const Entry<G> c(book + int64_t(e) * G);
                            float value = norms[e];
#pragma unroll
                            for (int d = 0; d < G; ++d) value = fmaf(left.x[d], c.x[d], value);
                            value += cost[from + h];
                            const int at = h * w.E + e;
                            if (is_before(last, last_at, value, at) && is_before(value, at, best, best_at))
                                best = value, best_at = at;
                        }
                    }
                    warp_min(best, best_at);
                    last = best, last_at = best_at;
                    if (best_at == INT_MAX) best_at = 0;
                    const int h = best_at / w.E, e = best_at % w.E;
                    if (lane == 0) cost[to + kept] = best;
                    if (lane < G)
                        sum[(to + kept) * G + lane] = sum[(from + h) * G + lane] + book[int64_t(e) * G + lane];
                    if (lane < MOST_K)
                        codes[(to + kept) * MOST_K + lane] =
                            lane == k ? static_cast<uint16_t>(e) : codes[(from + h) * MOST_K + lane];
                }
                size = keeps;
                half ^= 1;
                __syncwarp();
            }
            const uint16_t *best = codes + half * most * MOST_K;
            bool better = true;
            if (!w.ldl) better = cost_of<G>(w, S, target, best) < cost_of<G>(w, S, target, own);
            __syncwarp();
            if (better && lane < w.K) own[lane] = best[lane];
            __syncwarp();
        }
        rows.send_on(w, i);
    }
}

template <int G> cudaError_t norms_of(const Walk &w, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(divide_up(int64_t(w.K) * w.E, 256)), static_cast<unsigned>(w.count));
    norm_kernel<G><<<grid, 256, 0, stream>>>(const_cast<float *>(w.norms), w);
    return cudaGetLastError();
}

template <int G, int R> cudaError_t launch_nearest(const Walk &w, const Device &device, cudaStream_t stream) {
    if (const cudaError_t error = allow_shared_memory<nearest_kernel<G, R>>(device)) return error;
    const size_t memory = (Rows<G>::floats(w.rows, w.columns(G)) + nearest_floats(R, G)) * 4;
    nearest_kernel<G, R><<<static_cast<unsigned>(divide_up(w.out, R)), THREADS, memory, stream>>>(w);
    return cudaGetLastError();
}

template <int G> cudaError_t launch(const Walk &w, const Device &device, cudaStream_t stream) {
    if (const cudaError_t error = norms_of<G>(w, stream)) return error;
    if constexpr (G == 8)
        if (w.rows == MANY) {
            const auto blocks = static_cast<unsigned>(divide_up(int64_t(w.K) * w.E * 2, THREADS));
            halves_kernel<<<blocks, THREADS, 0, stream>>>(reinterpret_cast<uint4 *>(const_cast<int16_t *>(w.tables)),
                                                          w);
            return launch_nearest<G, MANY>(w, device, stream);
        }
    if (w.most == 1) return launch_nearest<G, 8>(w, device, stream);
    if (const cudaError_t error = allow_shared_memory<beam_kernel<G>>(device)) return error;
    const int64_t floats = Rows<G>::floats(w.rows, w.columns(G)) + WARPS * Hypotheses<G>::floats(w.most);
    beam_kernel<G>
        <<<static_cast<unsigned>(divide_up(w.out, w.rows)), THREADS, static_cast<size_t>(floats * 4), stream>>>(w);
    return cudaGetLastError();
}

} // namespace

int64_t rows_of_beam(int64_t out, int most, int64_t E, int64_t g, const Device &device) {
    return g == 8 && most == 1 && E >= 256 && divide_up(out, MANY) >= device.sms * 3 / 4 ? MANY : 8;
}

int64_t columns_of_beam(int64_t rows, int64_t most, int64_t g, const Device &device) {
    const int64_t hypotheses = most > 1 ? WARPS * 2 * most * (1 + g + MOST_K / 2) : nearest_floats(rows, g);
    const int64_t rest = 4 * (g * g + 3 * rows * g + hypotheses);
    return std::min<int64_t>((device.shared_memory - rest) / (4 * rows) / g * g, 512 / g * g);
}

cudaError_t search_beam(Walk w, int g, const Device &device, cudaStream_t stream) {
    switch (g) {
    case 4: return launch<4>(w, device, stream);
    case 8: return launch<8>(w, device, stream);
    case 16: return launch<16>(w, device, stream);
    case 32: return launch<32>(w, device, stream);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace aqlm_cuda
