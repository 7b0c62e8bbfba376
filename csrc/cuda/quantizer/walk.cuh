/* walk.cuh: what the searches share: the walk of core/quantizer/search.c over the groups in `order`, with the same
 * metric and linear terms. What D contributes to a block of groups is one matrix product (gemm.cuh) before its kernel;
 * what changes inside the block a kernel adds itself, for a few rows of which each of its blocks of threads has all.
 * So one launch searches up to 512 columns, and nothing between blocks of threads is waited for. */
#ifndef AQLM_CUDA_WALK_CUH
#define AQLM_CUDA_WALK_CUH

#include <cfloat>

#include "cuda/aqlm_cuda_quantizer.h"
#include "cuda/launch.cuh"

namespace aqlm_cuda {

struct Walk {
    uint16_t *codes;                                   /* [out, J, K] */
    float *D;                                          /* [out, in] W - Wq in order space */
    const float *T;                                    /* [parts, out, columns], whose sum is what D contributes */
    const float *weight, *scales, *codebooks, *couple; /* couple [in, in] in order space: H, or the feedback F */
    const float *metric;                               /* [J, g, g] in order space */
    const int32_t *order, *books;                      /* [J]; [J, K] order of codebooks in a sweep's beam search */
    const float *norms; /* [groups of the block, K, E] of all entries in their groups' metric */
    const int16_t
        *tables; /* pairs: [groups, E, E] (table_pitch), in `steps` [groups]; else entries' halves [K, E, g, 2] */
    const float *steps;
    int out, in, K, E;
    int first, count; /* groups of this block, in order space */
    int parts, rows;  /* of T; outputs of a block of threads */
    int states, most; /* pairs: states of the beam that pairs are found for; hypotheses of a beam */
    bool ldl;

    __host__ __device__ int columns(int g) const { return count * g; }
};

/* Entries' numbers as float4: g is 4 at least and entries are aligned. */
template <int G> struct Entry {
    float x[G];

    __device__ Entry() {}
    __device__ explicit Entry(const float *p) {
#pragma unroll
        for (int d = 0; d < G; d += 4) {
            const float4 v = *reinterpret_cast<const float4 *>(p + d);
            x[d] = v.x, x[d + 1] = v.y, x[d + 2] = v.z, x[d + 3] = v.w;
        }
    }
    __device__ float dot(const float *p) const { /* p: shared memory */
        float sum = 0;
#pragma unroll
        for (int d = 0; d < G; d += 4) {
            const float4 v = *reinterpret_cast<const float4 *>(p + d);
            sum = fmaf(x[d], v.x, sum), sum = fmaf(x[d + 1], v.y, sum);
            sum = fmaf(x[d + 2], v.z, sum), sum = fmaf(x[d + 3], v.w, sum);
        }
        return sum;
    }
};

/* c S c */
template <int G> __device__ float square_in(const float *S, const float (&c)[G]) {
    float square = 0;
#pragma unroll
    for (int d = 0; d < G; ++d) {
        asm volatile("" ::: "memory"); /* else all of S is loaded at once, and spilled */
        float sum = 0;
#pragma unroll
        for (int p = 0; p < G; ++p) sum = fmaf(c[p], S[p * G + d], sum);
        square = fmaf(sum, c[d], square);
    }
    return square;
}

/* T [rows, columns] of the rows of a block of threads, `count` from `first` on: the sum of its parts, in order. */
template <int G> __device__ void load_T(float *T, const Walk &w, int first, int count) {
    const int columns = w.columns(G);
    for (int at = threadIdx.x; at < w.rows * columns; at += blockDim.x) {
        const int r = at / columns, c = at % columns;
        float sum = 0;
        for (int part = 0; part < w.parts && r < count; ++part)
            sum += w.T[(int64_t(part) * w.out + first + r) * columns + c];
        T[at] = sum;
    }
}

/* The rows of one block of threads: what they share in shared memory. */
template <int G> struct Rows {
    float *T;      /* [rows, columns] */
    float *S;      /* [G, G] the metric */
    float *base;   /* [rows, G] */
    float *target; /* [rows, G] target' / scale */
    float *change; /* [rows, G] */
    int first, count;

    static __host__ __device__ int64_t floats(int rows, int columns) {
        return int64_t(rows) * columns + G * G + 3 * int64_t(rows) * G;
    }
    __device__ float *place(float *memory, const Walk &w) {
        const int n = w.rows * G;
        S = memory;
        base = S + G * G;
        target = base + n;
        change = target + n;
        T = change + n;
        first = blockIdx.x * w.rows;
        count = min(w.rows, w.out - first);
        return T + w.rows * w.columns(G);
    }

    /* The metric, and of every row target' / scale; begins and ends with a barrier. i: in order space. */
    __device__ void load_targets(const Walk &w, int i) const {
        const int j = w.order[i], columns = w.columns(G);
        __syncthreads();
        for (int at = threadIdx.x; at < G * G; at += blockDim.x) S[at] = w.metric[int64_t(i) * G * G + at];
        for (int at = threadIdx.x; at < w.rows * G; at += blockDim.x) {
            const int r = at / G, d = at % G;
            const int64_t row = first + r;
            const float x = r < count ? w.weight[row * w.in + j * G + d] : 0.0f;
            const float D = r < count && !w.ldl ? w.D[row * w.in + i * G + d] : 0.0f;
            base[at] = w.ldl ? x + T[r * columns + (i - w.first) * G + d] : x - D;
        }
        __syncthreads();
        for (int at = threadIdx.x; at < w.rows * G; at += blockDim.x) {
            const int r = at / G, d = at % G;
            float sum = w.ldl ? 0.0f : T[r * columns + (i - w.first) * G + d];
#pragma unroll
            for (int p = 0; p < G; ++p) sum = fmaf(base[r * G + p], S[p * G + d], sum);
            const float scale = r < count ? w.scales[first + r] : 0.0f;
            target[at] = fabsf(scale) >= FLT_MIN ? sum / scale : 0.0f;
        }
        __syncthreads();
    }

    __device__ uint16_t *codes(const Walk &w, int r, int i) const {
        return w.codes + (int64_t(first + r) * (w.in / G) + w.order[i]) * w.K;
    }

    /* After the codes of group i: D, and what it changes in the block's later groups. Begins with a barrier. */
    __device__ void send_on(const Walk &w, int i) const {
        const int j = w.order[i], columns = w.columns(G);
        __syncthreads();
        for (int at = threadIdx.x; at < count * G; at += blockDim.x) {
            const int r = at / G, d = at % G;
            const uint16_t *code = codes(w, r, i);
            float q = 0;
            for (int k = 0; k < w.K; ++k) q += w.codebooks[(int64_t(k) * w.E + code[k]) * G + d];
            const int64_t row = first + r;
            const float now = w.weight[row * w.in + j * G + d] - w.scales[row] * q;
            float *D = w.D + row * w.in + i * G + d;
            change[at] = w.ldl ? now : now - *D;
            *D = now;
        }
        __syncthreads();
        for (int c = (i + 1 - w.first) * G + threadIdx.x; c < columns; c += blockDim.x) {
            float coupling[G];
#pragma unroll
            for (int p = 0; p < G; ++p) coupling[p] = w.couple[int64_t(i * G + p) * w.in + w.first * G + c];
            for (int r = 0; r < count; ++r) {
                float sum = T[r * columns + c];
#pragma unroll
                for (int p = 0; p < G; ++p) sum = fmaf(change[r * G + p], coupling[p], sum);
                T[r * columns + c] = sum;
            }
        }
    }
};

/* The smallest value of a warp's lanes with its index; ties to the lower index. All lanes get both. */
__device__ inline void warp_min(float &value, int &index) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(~0u, value, offset);
        const int at = __shfl_xor_sync(~0u, index, offset);
        if (other < value || (other == value && at < index)) value = other, index = at;
    }
}

__device__ inline float warp_max(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}

/* Whether (value, index) comes before (than, at). */
__device__ inline bool is_before(float value, int index, float than, int at) {
    return value < than || (value == than && index < at);
}

/* One block of groups; launchers of pairs.cu and beam.cu. */
cudaError_t search_pairs(Walk w, int g, const Device &device, cudaStream_t stream);
cudaError_t search_beam(Walk w, int g, const Device &device, cudaStream_t stream);
int64_t rows_of_pairs(int64_t out, int states, int64_t g, const Device &device); /* outputs of a block of threads */
int64_t size_of_table(int64_t E);                                                /* pairs: numbers of a group's table */
int64_t rows_of_beam(int64_t out, int most, int64_t E, int64_t g, const Device &device);
int64_t columns_of_pairs(int64_t out, int states, int64_t K, int64_t g,
                         const Device &device); /* of a block, multiple of g; 0: none */
int64_t columns_of_beam(int64_t rows, int64_t most, int64_t g, const Device &device);

} // namespace aqlm_cuda
#endif
