/* many_rows_sums.cuh: what becomes of sums: y, or parts that several blocks add up (many_rows.cuh). */
#ifndef AQLM_CUDA_PRODUCT_MANY_ROWS_SUMS_CUH
#define AQLM_CUDA_PRODUCT_MANY_ROWS_SUMS_CUH

#include "cuda/product/many_rows_work.cuh"

namespace aqlm_cuda {

/* What a thread of consumers holds of a tile of y: of every 8 rows two, of two outputs. */
template <class T, class L> struct Finish {
    T *to;
    const int out;
    int rows; /* from its first one on */
    bool second;
    float scale[2], bias[2];

    __device__ Finish(const ManyRowsProblem &p, uint32_t tile, int thread) : out(p.out) {
        const int row = tile % p.row_tiles * L::N + thread % 4 * 2, o = tile / p.row_tiles * L::OUTS + thread / 4 * 2;
        to = static_cast<T *>(p.y) + static_cast<size_t>(row) * out + o;
        rows = o < out ? p.n_rows - row : 0, second = o + 1 < out;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = min(o + i, out - 1);
            scale[i] = static_cast<float>(static_cast<const T *>(p.scales)[at]);
            bias[i] = p.bias ? static_cast<float>(static_cast<const T *>(p.bias)[at]) : 0.f;
        }
    }
    __device__ bool in_pairs() const { return out % 2 == 0; }

    template <bool PAIRS> __device__ void store(T *at, float low, float high) const {
        const float y0 = low * scale[0] + bias[0], y1 = high * scale[1] + bias[1];
        if constexpr (PAIRS) *reinterpret_cast<typename Pair<T>::type *>(at) = Pair<T>::from_floats(y0, y1);
        else {
            at[0] = static_cast<T>(y0);
            if (second) at[1] = static_cast<T>(y1);
        }
    }
    /* A fragment, of rows 8j .. 8j + 7. */
    template <bool PAIRS> __device__ void store8(int j, const float4 &v) const {
        T *const at = to + static_cast<size_t>(j) * 8 * out;
        if (8 * j < rows) store<PAIRS>(at, v.x, v.z);
        if (8 * j + 1 < rows) store<PAIRS>(at + out, v.y, v.w);
    }
    template <bool PAIRS> __device__ void store_all(const float (&c)[4 * L::FRAGMENTS]) const {
#pragma unroll
        for (int j = 0; j < L::FRAGMENTS; ++j) store8<PAIRS>(j, {c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]});
    }
};

__device__ inline unsigned load_acquire(const unsigned *from) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

/* Blocks that share a tile, one after the other; each finishes fragments begin .. end of all. */
template <class L> struct Sharers {
    static constexpr int THREADS = L::CONSUMERS, TILE = L::FRAGMENTS * THREADS;
    int count, own, begin, end;
    unsigned *arrived;
    const float4 *of_first, *of_second; /* the first one's part may be its second, that of others is their first */

    __device__ Sharers(const ManyRowsProblem &p, uint32_t tile) {
        const Shares &shares = p.shares;
        const uint32_t first_run = tile * shares.of_tile, first = shares.owner_of(first_run);
        count = shares.owner_of(first_run + shares.of_tile - 1) - first + 1, own = blockIdx.x - first;
        begin = L::FRAGMENTS * own / count, end = L::FRAGMENTS * (own + 1) / count;
        arrived = p.arrived + tile;
        const float4 *const parts = p.parts + static_cast<size_t>(first) * 2 * TILE + threadIdx.x;
        of_first = parts + (shares.first_of(first) < first_run) * TILE, of_second = parts + 2 * TILE;
    }
    __device__ float4 part(int s, int j) const {
        return __ldcg((s == 0 ? of_first : of_second + (s - 1) * 2 * TILE) + j * THREADS);
    }
    __device__ void arrive() const {
        sync_threads_of(1, THREADS);
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    }
    __device__ void await() const {
        if (threadIdx.x == 0)
            while (load_acquire(arrived) < static_cast<unsigned>(count)) {}
        sync_threads_of(1, THREADS);
    }
};

/* What becomes of sums at the end of a segment, and of the block's work. Sums that blocks share go through the
 * workspace; several are added up at once, for each waits for L2. KEEPS: what the block finishes of its last tile stays
 * in registers, where they suffice. */
template <class T, class L, bool KEEPS> struct Ends {
    static constexpr uint32_t NONE = ~0u;
    static constexpr int FEW = 4;                     /* blocks that share a tile */
    uint32_t first_shared = NONE, last_shared = NONE; /* tiles */

    __device__ void segment(const ManyRowsProblem &p, const float (&c)[4 * L::FRAGMENTS], const Work &work) {
        if (work.last - work.first == static_cast<uint32_t>(p.units)) {
            const Finish<T, L> finish(p, work.tile, threadIdx.x);
            if (finish.in_pairs()) finish.template store_all<true>(c);
            else finish.template store_all<false>(c);
            return;
        }
        const bool late = work.first == 0 && work.tile != Work(p).tile;
        const Sharers<L> sharers(p, work.tile);
        const bool keeps = KEEPS && work.left == 0 && sharers.count <= FEW;
        float4 *const to =
            p.parts + (static_cast<size_t>(blockIdx.x) * 2 + late) * (L::FRAGMENTS * L::CONSUMERS) + threadIdx.x;
#pragma unroll
        for (int j = 0; j < L::FRAGMENTS; ++j)
            if (!keeps || j < sharers.begin || j >= sharers.end)
                __stcg(to + j * L::CONSUMERS, float4{c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]});
        sharers.arrive();
        if constexpr (KEEPS)
            if (keeps) return add_to(p, c, sharers, work.tile);
        (late ? last_shared : first_shared) = work.tile;
    }
    /* What others have of sums that are still in registers. */
    __device__ void add_to(const ManyRowsProblem &p, const float (&c)[4 * L::FRAGMENTS], const Sharers<L> &sharers,
                           uint32_t tile) const {
        constexpr int SOME = L::FRAGMENTS < 8 ? L::FRAGMENTS : 8;
        const Finish<T, L> finish(p, tile, threadIdx.x);
        sharers.await();
#pragma unroll
        for (int i = 0; i < L::FRAGMENTS; i += SOME) {
            if (i + SOME <= sharers.begin || i >= sharers.end) continue;
            float4 sum[SOME];
#pragma unroll
            for (int k = 0; k < SOME; ++k) sum[k] = {0, 0, 0, 0};
#pragma unroll 1
            for (int s = 0; s < sharers.count; ++s)
#pragma unroll
                for (int k = 0; k < SOME; ++k) {
                    const int j = i + k;
                    float4 v = {c[4 * j], c[4 * j + 1], c[4 * j + 2], c[4 * j + 3]};
                    if (s != sharers.own && j >= sharers.begin && j < sharers.end) v = sharers.part(s, j);
                    sum[k].x += v.x, sum[k].y += v.y, sum[k].z += v.z, sum[k].w += v.w;
                }
#pragma unroll
            for (int k = 0; k < SOME; ++k)
                if (i + k >= sharers.begin && i + k < sharers.end) store8(finish, i + k, sum[k]);
        }
    }
    __device__ static void store8(const Finish<T, L> &finish, int j, const float4 &v) {
        if (finish.in_pairs()) finish.template store8<true>(j, v);
        else finish.template store8<false>(j, v);
    }
    /* SOME fragments and UNROLL blocks' parts at once. */
    template <int SOME, int UNROLL> __device__ static void add(const Finish<T, L> &finish, const Sharers<L> &sharers) {
#pragma unroll 1
        for (int i = sharers.begin; i < sharers.end; i += SOME) {
            float4 sum[SOME];
#pragma unroll
            for (int k = 0; k < SOME; ++k) sum[k] = sharers.part(0, min(i + k, sharers.end - 1));
#pragma unroll UNROLL
            for (int s = 1; s < sharers.count; ++s)
#pragma unroll
                for (int k = 0; k < SOME; ++k) {
                    const float4 v = sharers.part(s, min(i + k, sharers.end - 1));
                    sum[k].x += v.x, sum[k].y += v.y, sum[k].z += v.z, sum[k].w += v.w;
                }
#pragma unroll
            for (int k = 0; k < SOME; ++k)
                if (i + k < sharers.end) store8(finish, i + k, sum[k]);
        }
    }
    __device__ void block(const ManyRowsProblem &p) const {
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const uint32_t tile = i ? last_shared : first_shared;
            if (tile == NONE) continue;
            const Sharers<L> sharers(p, tile);
            const Finish<T, L> finish(p, tile, threadIdx.x);
            sharers.await();
            if constexpr (L::AT_ONCE == 1) add<1, 4>(finish, sharers);
            else if (sharers.count <= FEW)
                add<(L::AT_ONCE < L::FRAGMENTS ? L::AT_ONCE : L::FRAGMENTS), 1>(finish, sharers);
            else add<1, 16>(finish, sharers);
        }
    }
};

} // namespace aqlm_cuda
#endif
