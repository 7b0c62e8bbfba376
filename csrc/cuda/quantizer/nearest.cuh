/* nearest.cuh: the nearest entry of each point. Distances less the points' squares are products of matrices: of bf16,
 * where each number is a sum of two. The lowest of them says where to look; there distances are fp32. */
#ifndef AQLM_CUDA_QUANTIZER_NEAREST_CUH
#define AQLM_CUDA_QUANTIZER_NEAREST_CUH

#include "cuda/quantizer/points.cuh"

namespace aqlm_cuda {

/* Of a point x and an entry c with weights w, p = -2 w c, square = sum w c^2, numbers as high + low (+ lower):
 *   x_high p_high + x_low p_high + x_high p_low + 1 square_high + 1 square_low + 1 square_lower
 * are 3 g + 3 terms, two of them a word, 16 a step of the matrix units; what is left out is 2^-16 of |x| |p|. */
template <int G> struct Nearest {
    static constexpr int STEPS = (3 * G + 3 + 15) / 16;
    static constexpr int TILES = G <= 8 ? 4 : 2; /* of 16 points, a warp's */
    static constexpr int THREADS = 256, WARPS = THREADS / 32, POINTS = WARPS * TILES * 16;
    static constexpr int ENTRIES = G <= 16 ? 128 : 64; /* in shared memory at a time */
    static constexpr int CHUNK = 64; /* entries of which a thread, who sees a quarter, remembers the lowest */
    static constexpr int PAIRS = G / 2, LOADS = ENTRIES * PAIRS / THREADS;
    static constexpr int WORDS = ENTRIES * STEPS * 8;

    struct Shared {
        uint32_t words[2][WORDS]; /* [entries / 8, step, 32 lanes, 2], as fragments lie */
        float weights[G];
        double error[WARPS];
    };
};

__device__ inline uint32_t bf16_pair(float a, float b) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t *>(&pair);
}
__device__ inline float bf16_rest(float a) { return a - __bfloat162float(__float2bfloat16_rn(a)); }

/* Terms term and term + 1 of a point. */
template <int G> __device__ inline uint32_t point_word(const float *x, int term) {
    if (term >= 3 * G) return term == 3 * G ? bf16_pair(1, 1) : term == 3 * G + 2 ? bf16_pair(1, 0) : 0;
    const float2 v = *reinterpret_cast<const float2 *>(x + term % G);
    return term / G == 1 ? bf16_pair(bf16_rest(v.x), bf16_rest(v.y)) : bf16_pair(v.x, v.y);
}

/* Where word `pair` of an entry lies. */
template <int G> __device__ inline int entry_word(int entry, int pair) {
    const int step = pair / 8, lane = entry % 8 * 4 + pair % 4, half = pair % 8 / 4;
    return ((entry / 8 * Nearest<G>::STEPS + step) * 32 + lane) * 2 + half;
}

template <int G>
__device__ inline void load_entries(float2 (&raw)[Nearest<G>::LOADS], const float *entries, int first, int count) {
    using N = Nearest<G>;
#pragma unroll
    for (int n = 0; n < N::LOADS; ++n) {
        const int i = n * N::THREADS + threadIdx.x, entry = first + i / N::PAIRS;
        raw[n] = entry < count ? reinterpret_cast<const float2 *>(entries)[entry * N::PAIRS + i % N::PAIRS]
                               : make_float2(0, 0);
    }
}

template <int G>
__device__ inline void store_entries(uint32_t *words, const float2 (&raw)[Nearest<G>::LOADS], const float *weights,
                                     int first, int count) {
    using N = Nearest<G>;
#pragma unroll
    for (int n = 0; n < N::LOADS; ++n) {
        const int i = n * N::THREADS + threadIdx.x, entry = i / N::PAIRS, pair = i % N::PAIRS;
        const float2 c = raw[n], w = *reinterpret_cast<const float2 *>(weights + 2 * pair);
        const float a = -2 * w.x * c.x, b = -2 * w.y * c.y;
        const uint32_t high = bf16_pair(a, b);
        words[entry_word<G>(entry, pair)] = high;
        words[entry_word<G>(entry, pair + N::PAIRS)] = high;
        words[entry_word<G>(entry, pair + 2 * N::PAIRS)] = bf16_pair(bf16_rest(a), bf16_rest(b));
        float square = w.x * c.x * c.x + w.y * c.y * c.y;
        for (int distance = N::PAIRS / 2; distance; distance /= 2) square += __shfl_xor_sync(~0u, square, distance);
        if (first + entry >= count) square = 3e38f; /* of no entry */
        if (pair == 0) {
            const float rest = bf16_rest(square);
            words[entry_word<G>(entry, 3 * N::PAIRS)] = bf16_pair(square, rest);
            words[entry_word<G>(entry, 3 * N::PAIRS + 1)] = bf16_pair(bf16_rest(rest), 0);
        }
    }
}

/* The nearest of the 16 entries that one thread of four saw in a chunk; the four look again. part: chunk * 4 + thread.
 */
template <int G>
__device__ inline void look_again(float &low, int &index, const float *x, const float *weights, const float *entries,
                                  int part, int count) {
    const int thread = threadIdx.x % 4, first = part / 4 * Nearest<G>::CHUNK + part % 4 * 2;
    float4 point[G / 4];
#pragma unroll
    for (int d = 0; d < G / 4; ++d) point[d] = reinterpret_cast<const float4 *>(x)[d];
    low = INFINITY;
    index = min(first, count - 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int entry = first + (thread + i / 2 * 4) * 8 + i % 2;
        if (entry >= count) continue;
        float sum = 0;
#pragma unroll
        for (int d = 0; d < G / 4; ++d) {
            const float4 c = reinterpret_cast<const float4 *>(entries)[entry * (G / 4) + d];
            const float4 w = reinterpret_cast<const float4 *>(weights)[d];
            const float a = point[d].x - c.x, b = point[d].y - c.y, e = point[d].z - c.z, f = point[d].w - c.w;
            sum += w.x * a * a + w.y * b * b + w.z * e * e + w.w * f * f;
        }
        if (sum < low) low = sum, index = entry;
    }
    for (int distance = 1; distance < 4; distance *= 2) {
        const float other = __shfl_xor_sync(~0u, low, distance);
        const int at = __shfl_xor_sync(~0u, index, distance);
        if (other < low || (other == low && at < index)) low = other, index = at;
    }
}

/* best[]: of each of a thread's points (two a tile), among the entries in its columns; where: chunk * 4 + thread. */
template <int G>
__device__ inline void multiply(float (&best)[2 * Nearest<G>::TILES], int (&where)[2 * Nearest<G>::TILES],
                                const uint32_t (&a)[Nearest<G>::TILES][Nearest<G>::STEPS][4], const uint32_t *words,
                                int first_chunk) {
    using N = Nearest<G>;
    const int lane = threadIdx.x % 32;
    for (int chunk = 0; chunk < N::ENTRIES / N::CHUNK; ++chunk) {
        float low[2 * N::TILES];
#pragma unroll
        for (int i = 0; i < 2 * N::TILES; ++i) low[i] = INFINITY;
#pragma unroll
        for (int n = 0; n < N::CHUNK / 8; ++n) {
            const uint2 *fragments =
                reinterpret_cast<const uint2 *>(words) + (chunk * (N::CHUNK / 8) + n) * N::STEPS * 32 + lane;
            float c[N::TILES][4] = {};
#pragma unroll
            for (int step = 0; step < N::STEPS; ++step) {
                const uint2 b = fragments[step * 32];
#pragma unroll
                for (int t = 0; t < N::TILES; ++t)
                    mma_k16<__nv_bfloat16>(c[t], a[t][step][0], a[t][step][1], a[t][step][2], a[t][step][3], b.x, b.y);
            }
#pragma unroll
            for (int t = 0; t < N::TILES; ++t) {
                low[2 * t] = fminf(low[2 * t], fminf(c[t][0], c[t][1]));
                low[2 * t + 1] = fminf(low[2 * t + 1], fminf(c[t][2], c[t][3]));
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * N::TILES; ++i)
            if (low[i] < best[i]) best[i] = low[i], where[i] = (first_chunk + chunk) * 4 + lane % 4;
    }
}

/* Points first .. last of one column group, or of all if weights are uniform. */
struct Range {
    int first, last;
};
template <int G> __device__ inline Range points_of_block(const Points &p) {
    constexpr int POINTS = Nearest<G>::POINTS;
    const int rows = p.uniform ? p.count() : p.rows, blocks = (rows + POINTS - 1) / POINTS;
    const int group = blockIdx.x / blocks, first = blockIdx.x % blocks * POINTS;
    return {group * rows + first, group * rows + min(first + POINTS, rows)};
}
template <int G> unsigned nearest_blocks(const Points &p) {
    constexpr int POINTS = Nearest<G>::POINTS;
    return static_cast<unsigned>(p.uniform ? divide_up(p.count(), POINTS) : p.groups * divide_up(p.rows, POINTS));
}

/* assigned[points], error[points] weighted by row; errors[block] their sums. Does nothing where *skip. */
template <int G>
__global__ void __launch_bounds__(256, 2)
    nearest_kernel(int32_t *assigned, float *error, double *errors, const float *entries, const int count,
                   const Points p, const int *skip) {
    using N = Nearest<G>;
    if (*skip) return;
    __shared__ __align__(16) typename N::Shared shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Range range = points_of_block<G>(p);
    if (threadIdx.x < G) shared.weights[threadIdx.x] = p.weight_of[p.group(range.first) * G + threadIdx.x];
    for (int i = threadIdx.x; i < 2 * N::WORDS; i += N::THREADS) (&shared.words[0][0])[i] = 0;
    const int mine = range.first + warp * N::TILES * 16 + lane / 4; /* and the one 8 behind, of each tile */
    const bool busy = range.first + warp * N::TILES * 16 < range.last;
    uint32_t a[N::TILES][N::STEPS][4];
    float best[2 * N::TILES];
    int where[2 * N::TILES];
#pragma unroll
    for (int i = 0; i < 2 * N::TILES; ++i) {
        const float *x = p.at(min(mine + i * 8, range.last - 1));
#pragma unroll
        for (int step = 0; step < N::STEPS; ++step) {
            /* | 0, which the compiler does not know: x_high twice, or each step would copy it to beside its others. */
            const uint32_t apart = step > 0 ? threadIdx.y : 0;
            a[i / 2][step][i % 2] = point_word<G>(x, step * 16 + lane % 4 * 2) | apart;
            a[i / 2][step][i % 2 + 2] = point_word<G>(x, step * 16 + 8 + lane % 4 * 2) | apart;
        }
        best[i] = INFINITY, where[i] = lane % 4;
    }
    float2 raw[N::LOADS];
    load_entries<G>(raw, entries, 0, count);
    __syncthreads();
    store_entries<G>(shared.words[0], raw, shared.weights, 0, count);
    __syncthreads();
    for (int first = 0, half = 0; first < count; first += N::ENTRIES, half ^= 1) {
        const int next = first + N::ENTRIES;
        if (next < count) load_entries<G>(raw, entries, next, count);
        if (busy) multiply<G>(best, where, a, shared.words[half], first / N::CHUNK);
        if (next < count) store_entries<G>(shared.words[half ^ 1], raw, shared.weights, next, count);
        __syncthreads();
    }
    double sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * N::TILES; ++i) {
        for (int distance = 1; distance < 4; distance *= 2) {
            const float other = __shfl_xor_sync(~0u, best[i], distance);
            const int at = __shfl_xor_sync(~0u, where[i], distance);
            if (other < best[i] || (other == best[i] && at < where[i])) best[i] = other, where[i] = at;
        }
        const int point = mine + i * 8, known = min(point, range.last - 1);
        float low;
        int index;
        look_again<G>(low, index, p.at(known), shared.weights, entries, where[i], count);
        if (lane % 4 > 0 || point >= range.last) continue;
        low *= p.row_weight[p.row(point)];
        assigned[point] = index;
        error[point] = low;
        sum += low;
    }
    for (int distance = 16; distance; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
    if (lane == 0) shared.error[warp] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < N::WARPS; ++w) sum += shared.error[w];
    errors[blockIdx.x] = sum;
}

} // namespace aqlm_cuda
#endif
