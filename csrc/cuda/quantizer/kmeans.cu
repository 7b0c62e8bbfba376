/* kmeans.cu: residual k-means, the start of AQLM (arXiv 2401.06118, section 3.1), as core/quantizer/kmeans.c. */
#include <cfloat>
#include <cmath>
#include <vector>

#include "cuda/aqlm_cuda_quantizer.h"
#include "cuda/quantizer/nearest.cuh"
#include "cuda/quantizer/radix.cuh"

extern "C" {
#include "core/runtime/rng.h"
}

namespace aqlm_cuda {
namespace {

constexpr int64_t GROUPS_OF_ENTRY = 4096; /* POINTS of kmeans.c */
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int MANY = 1024; /* members of an entry, for which a block does better than a warp */

/* ---- kernels ---- */

__global__ void prepare_kernel(float *residual, float *row_weight, const float *weight, const float *scales,
                               const int64_t out, const int64_t in) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * 4, o = i / in;
    if (o >= out) return;
    const float scale = scales[o], inverse = fabsf(scale) >= FLT_MIN ? 1.0f / scale : 0.0f;
    const float4 w = *reinterpret_cast<const float4 *>(weight + i);
    *reinterpret_cast<float4 *>(residual + i) = make_float4(w.x * inverse, w.y * inverse, w.z * inverse, w.w * inverse);
    if (i % in == 0) row_weight[o] = scale * scale;
}

__global__ void fill_kernel(float *to, const float *from, const int count) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) to[i] = from ? from[i] : 1.0f;
}

/* picks: places in the order of rows. */
__global__ void seed_kernel(float *entries, Rounds *rounds, const int32_t *picks, const int count, const Points p) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i == 0) rounds->done = 0, rounds->all_have_points = 1;
    if (i >= count * p.g) return;
    const int pick = picks[i / p.g];
    entries[i] = p.at(pick % p.groups * p.rows + pick / p.groups)[i % p.g];
}

/* starts[entry]: of its members among the sorted keys; starts[entries]: their number. */
__global__ void starts_kernel(int32_t *starts, const uint32_t *keys, const int count, const int entries,
                              const int *skip) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (*skip || i > count) return;
    const int last = i < count ? static_cast<int>(keys[i]) : entries;
    for (int entry = i > 0 ? static_cast<int>(keys[i - 1]) + 1 : 0; entry <= last; ++entry) starts[entry] = i;
}

struct Mean {
    double sum, mass;

    /* Over members first, first + step, ... of begin .. end; lanes are their numbers d. */
    __device__ void add(const int32_t *members, int first, int end, int step, int d, const Points &p) {
#pragma unroll 4
        for (int i = first; i < end; i += step) {
            const int point = members[i];
            const double w = static_cast<double>(p.weight_of[p.group(point) * p.g + d]) * p.row_weight[p.row(point)];
            sum += w * p.at(point)[d];
            mass += w;
        }
    }
    /* Over lanes of equal d. */
    __device__ void reduce(int g) {
        for (int distance = 16; distance >= g; distance /= 2) {
            sum += __shfl_xor_sync(~0u, sum, distance);
            mass += __shfl_xor_sync(~0u, mass, distance);
        }
    }
    __device__ void store(float *entries, int32_t *empty, int entry, Rounds *rounds, int g) const {
        const int d = threadIdx.x % 32;
        double total = d < g ? mass : 0;
        for (int distance = 16; distance; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
        if (d < g && mass > 0) entries[entry * g + d] = static_cast<float>(sum / mass);
        if (d > 0) return;
        empty[entry] = !(total > 0);
        if (!(total > 0)) rounds->all_have_points = 0;
    }
};

/* Weighted means of the members, a warp each; of an entry that has many, the whole block. */
__global__ void __launch_bounds__(THREADS)
    mean_kernel(float *entries, int32_t *empty, Rounds *rounds, const int32_t *starts, const int32_t *members,
                const int count, const int entries_of_block, const Points p) {
    if (rounds->done) return;
    __shared__ Mean means[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = p.g;
    const int d = lane % g, member = lane / g, step = 32 / g, many = entries_of_block > 1 ? MANY : MANY / WARPS;
    for (int i = 0; i < entries_of_block; ++i) {
        const int entry = blockIdx.x * entries_of_block + i;
        if (entry >= count) return;
        const int begin = starts[entry], end = starts[entry + 1];
        Mean mean = {0, 0};
        if (end - begin <= many) {
            if (warp != i) continue;
            mean.add(members, begin + member, end, step, d, p);
            mean.reduce(g);
            mean.store(entries, empty, entry, rounds, g);
            continue;
        }
        mean.add(members, begin + warp * step + member, end, step * WARPS, d, p);
        mean.reduce(g);
        __syncthreads();
        means[warp][lane] = mean;
        __syncthreads();
        if (warp > 0) continue;
        for (int w = 1; w < WARPS; ++w) mean.sum += means[w][lane].sum, mean.mass += means[w][lane].mass;
        mean.store(entries, empty, entry, rounds, g);
    }
}

/* One block: entries without members move to the groups served worst, which come first in `worst`. */
__global__ void reseed_kernel(float *entries, Rounds *rounds, const int32_t *empty, const int32_t *worst,
                              const float *error, const int count, const Points p) {
    if (rounds->all_have_points) return;
    int before = 0;
    for (int first = 0; first < count; first += blockDim.x) {
        const int entry = first + threadIdx.x;
        uint32_t total;
        const bool move = entry < count && empty[entry];
        const int n = before + exclusive_sum(move, total);
        before += total;
        if (!move || n >= p.count()) continue;
        const int point = worst[n];
        if (!(error[point] > 0)) continue; /* every group is met exactly */
        for (int d = 0; d < p.g; ++d) entries[entry * p.g + d] = p.at(point)[d];
    }
    __syncthreads();
    if (threadIdx.x == 0) rounds->all_have_points = 1;
}

/* One block: whether there is another round. */
__global__ void decide_kernel(Rounds *rounds, const double *errors, const int count, const double tolerance,
                              const bool first) {
    if (rounds->done) return;
    __shared__ double sums[THREADS];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += errors[i];
    sums[threadIdx.x] = sum;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x > 0) return;
    if (!first && !(rounds->error - sums[0] > tolerance * rounds->error)) rounds->done = 1;
    rounds->error = sums[0];
}

/* Codes of codebook k, and what it leaves to the next. */
__global__ void advance_kernel(uint16_t *codes, float *residual, const int32_t *assigned, const float *entries,
                               const aqlm_shape s, const int64_t k) {
    const int64_t g = s.in_group_size, groups = s.in_features / g, parts = g / 4;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, group = i / parts, part = i % parts;
    if (group >= s.out_features * groups) return;
    const int32_t entry = assigned[group % groups * s.out_features + group / groups];
    if (part == 0) codes[group * s.num_codebooks + k] = static_cast<uint16_t>(entry);
    const float4 c = reinterpret_cast<const float4 *>(entries)[entry * parts + part];
    float4 *at = reinterpret_cast<float4 *>(residual) + i, x = *at;
    *at = make_float4(x.x - c.x, x.y - c.y, x.z - c.z, x.w - c.w);
}

/* ---- launches ---- */

/* Where things lie in the workspace; rows: one of `stride`, as kmeans.c chooses them. */
struct Memory {
    float *residual, *weight_of, *row_weight, *error;
    int32_t *picks, *assigned, *starts, *empty;
    double *errors;
    Rounds *rounds;
    int *never; /* 0: of what is not to be skipped */
    Sort sort;
    size_t size = 0;
    int64_t out, groups, entries, stride, rows;

    Memory(const aqlm_shape &s, void *workspace) : base(static_cast<char *>(workspace)) {
        out = s.out_features, groups = s.in_features / s.in_group_size, entries = int64_t(1) << s.nbits_per_codebook;
        const int64_t points = out * groups;
        stride = points > GROUPS_OF_ENTRY * entries ? points / (GROUPS_OF_ENTRY * entries) : 1;
        rows = divide_up(out, stride);
        const int64_t sorted = rows * groups, tiles = divide_up(sorted, SORT_TILE);
        take(residual, out * s.in_features);
        take(weight_of, s.in_features);
        take(row_weight, out);
        take(error, points);
        take(picks, s.num_codebooks * entries);
        take(assigned, points);
        take(starts, entries + 1);
        take(empty, entries);
        take(errors, points / Nearest<32>::POINTS + groups + 1); /* as many as there can be blocks */
        take(rounds, 1);
        take(never, 1);
        for (int half = 0; half < 2; ++half) take(sort.keys[half], sorted), take(sort.values[half], sorted);
        take(sort.starts, DIGITS * tiles);
        take(sort.totals, DIGITS);
    }

  private:
    char *base;
    template <class T> void take(T *&at, int64_t count) {
        at = base ? reinterpret_cast<T *>(base + size) : nullptr;
        size += static_cast<size_t>(divide_up(count * sizeof(T), 256) * 256);
    }
};

/* The prefix of a shuffle of 0 .. count - 1, of which only the places that moved are kept. */
class Shuffle {
    std::vector<int32_t> place, value;
    size_t mask;

    size_t find(int32_t at) const {
        size_t i = (static_cast<uint32_t>(at) * UINT64_C(0x9e3779b97f4a7c15) >> 32) & mask;
        while (place[i] >= 0 && place[i] != at) i = (i + 1) & mask;
        return i;
    }

  public:
    explicit Shuffle(int64_t entries)
        : place(static_cast<size_t>(4 * entries), -1), value(place.size()), mask(place.size() - 1) {}
    int32_t operator[](int32_t at) const {
        const size_t i = find(at);
        return place[i] < 0 ? at : value[i];
    }
    void set(int32_t at, int32_t to) {
        const size_t i = find(at);
        place[i] = at, value[i] = to;
    }
};

/* The groups that each codebook starts from, drawn as seed_entries of kmeans.c draws them. */
std::vector<int32_t> draw(int64_t codebooks, int64_t entries, int64_t points, uint64_t seed) {
    aqlm_rng rng = aqlm_rng_seed(seed);
    std::vector<int32_t> picks;
    for (int64_t k = 0; k < codebooks; ++k) {
        Shuffle order(entries);
        for (int64_t e = 0; e < entries; ++e) {
            if (e >= points) {
                picks.push_back(picks[k * entries + e % points]);
                continue;
            }
            const auto pick = static_cast<int32_t>(e + aqlm_rng_below(&rng, points - e));
            picks.push_back(order[pick]);
            order.set(pick, order[static_cast<int32_t>(e)]);
        }
    }
    return picks;
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>(divide_up(threads, THREADS)); }

template <int G> struct Kmeans {
    const Memory &m;
    cudaStream_t stream;
    int entries;

    void assign(float *codebook, const Points &p, const int *skip) const {
        nearest_kernel<G><<<nearest_blocks<G>(p), Nearest<G>::THREADS, 0, stream>>>(m.assigned, m.error, m.errors,
                                                                                    codebook, entries, p, skip);
    }
    void decide(const Points &p, double tolerance, bool first) const {
        const auto count = static_cast<int>(nearest_blocks<G>(p));
        decide_kernel<<<1, THREADS, 0, stream>>>(m.rounds, m.errors, count, tolerance, first);
    }
    void update(float *codebook, const Points &p, int bits) const {
        int half = m.sort.run(m.assigned, p.count(), bits, 0, &m.rounds->done, stream);
        starts_kernel<<<blocks_of(int64_t(p.count()) + 1), THREADS, 0, stream>>>(m.starts, m.sort.keys[half], p.count(),
                                                                                 entries, &m.rounds->done);
        const int together = p.count() / entries < MANY / WARPS ? WARPS : 1;
        mean_kernel<<<static_cast<unsigned>(divide_up(entries, together)), THREADS, 0, stream>>>(
            codebook, m.empty, m.rounds, m.starts, m.sort.values[half], entries, together, p);
        half = m.sort.run(m.error, p.count(), 32, ~0u, &m.rounds->all_have_points, stream);
        reseed_kernel<<<1, 1024, 0, stream>>>(codebook, m.rounds, m.empty, m.sort.values[half], m.error, entries, p);
    }
    void codebook(float *codebook, const int32_t *picks, const Points &p, const aqlm_shape &s, int64_t rounds,
                  double tolerance) const {
        seed_kernel<<<blocks_of(int64_t(entries) * G), THREADS, 0, stream>>>(codebook, m.rounds, picks, entries, p);
        assign(codebook, p, m.never);
        decide(p, tolerance, true);
        for (int64_t round = 0; round < rounds; ++round) {
            update(codebook, p, static_cast<int>(s.nbits_per_codebook));
            assign(codebook, p, &m.rounds->done);
            decide(p, tolerance, false);
        }
        Points all = p;
        all.rows = static_cast<int>(s.out_features), all.stride = 1;
        if (p.stride > 1) assign(codebook, all, m.never);
    }
};

template <int G>
void run(uint16_t *codes, float *codebooks, const Memory &m, const Points &p, const aqlm_shape &s, int64_t rounds,
         double tolerance, cudaStream_t stream) {
    const Kmeans<G> kmeans = {m, stream, static_cast<int>(m.entries)};
    for (int64_t k = 0; k < s.num_codebooks; ++k) {
        float *codebook = codebooks + k * m.entries * G;
        kmeans.codebook(codebook, m.picks + k * m.entries, p, s, rounds, tolerance);
        advance_kernel<<<blocks_of(s.out_features * s.in_features / 4), THREADS, 0, stream>>>(
            codes, m.residual, m.assigned, codebook, s, k);
    }
}

} // namespace
} // namespace aqlm_cuda

using namespace aqlm_cuda;

extern "C" size_t aqlm_cuda_kmeans_workspace(const aqlm_shape *shape) { return Memory(*shape, nullptr).size; }

extern "C" cudaError_t aqlm_cuda_residual_kmeans(uint16_t *codes, float *codebooks, const float *weight,
                                                 const float *scales, const float *column_weight,
                                                 const aqlm_shape *shape, int64_t init_max_iter, double tolerance,
                                                 uint64_t seed, void *workspace, cudaStream_t stream) {
    const aqlm_shape &s = *shape;
    const Memory m(s, workspace);
    if (s.out_group_size != 1 || init_max_iter < 1 || !(tolerance >= 0) || m.out * m.groups > INT32_MAX)
        return cudaErrorInvalidValue;
    const std::vector<int32_t> picks = draw(s.num_codebooks, m.entries, m.rows * m.groups, seed);
    cudaError_t error =
        cudaMemcpyAsync(m.picks, picks.data(), picks.size() * sizeof picks[0], cudaMemcpyDefault, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(m.never, 0, sizeof *m.never, stream);
    if (error != cudaSuccess) return error;
    const Points p = {m.residual,
                      m.weight_of,
                      m.row_weight,
                      static_cast<int>(m.rows),
                      static_cast<int>(m.stride),
                      static_cast<int>(m.groups),
                      static_cast<int>(s.in_group_size),
                      column_weight == nullptr};
    fill_kernel<<<blocks_of(s.in_features), THREADS, 0, stream>>>(m.weight_of, column_weight,
                                                                  static_cast<int>(s.in_features));
    prepare_kernel<<<blocks_of(s.out_features * s.in_features / 4), THREADS, 0, stream>>>(
        m.residual, m.row_weight, weight, scales, s.out_features, s.in_features);
    switch (s.in_group_size) {
    case 4: run<4>(codes, codebooks, m, p, s, init_max_iter, tolerance, stream); break;
    case 8: run<8>(codes, codebooks, m, p, s, init_max_iter, tolerance, stream); break;
    case 16: run<16>(codes, codebooks, m, p, s, init_max_iter, tolerance, stream); break;
    case 32: run<32>(codes, codebooks, m, p, s, init_max_iter, tolerance, stream); break;
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
