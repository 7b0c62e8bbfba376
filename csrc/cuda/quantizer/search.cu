/* search.cu: the searches as launches: for each block of groups the product of what is left of W with H or F, then the
 * kernel that finds the block's codes (pairs.cu, beam.cu). */
#include <algorithm>
#include <iterator>
#include <vector>

#include "core/quantizer/working.h"
#include "cuda/quantizer/arena.cuh"
#include "cuda/quantizer/gemm.cuh"
#include "cuda/quantizer/walk.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256;

/* to[i, j] = H[order i, order j] by groups, and the blocks of its diagonal. Grid: rows of `to`. */
__global__ void permute_kernel(float *to, float *metric, const float *H, const int32_t *order, int in, int g) {
    const int row = blockIdx.x, i = row / g;
    const float *from = H + int64_t(order[i] * g + row % g) * in;
    for (int column = threadIdx.x; column < in; column += blockDim.x) {
        const float value = from[order[column / g] * g + column % g];
        to[int64_t(row) * in + column] = value;
        if (column / g == i) metric[row * g + column % g] = value;
    }
}

/* D[row, i g + d] = w - s q of group order[i]; a thread a group. */
__global__ void residual_kernel(float *D, const Walk w, int g) {
    const int64_t groups = w.in / g, at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= w.out * groups) return;
    const int64_t row = at / groups, i = at % groups, j = w.order[i];
    const uint16_t *code = w.codes + (row * groups + j) * w.K;
    const float scale = w.scales[row];
    for (int d = 0; d < g; d += 4) {
        float4 q = {0, 0, 0, 0};
        for (int k = 0; k < w.K; ++k) {
            const float4 c = *reinterpret_cast<const float4 *>(w.codebooks + (int64_t(k) * w.E + code[k]) * g + d);
            q.x += c.x, q.y += c.y, q.z += c.z, q.w += c.w;
        }
        const float4 x = *reinterpret_cast<const float4 *>(w.weight + row * w.in + j * g + d);
        *reinterpret_cast<float4 *>(D + row * w.in + i * g + d) = {x.x - scale * q.x, x.y - scale * q.y,
                                                                   x.z - scale * q.z, x.w - scale * q.w};
    }
}

/* An order short enough to be an argument: no memory of the host is read then, and a CUDA graph can hold it. */
struct ShortOrder {
    int32_t values[64];
};

__global__ void order_kernel(int32_t *to, const ShortOrder order, int n) {
    if (threadIdx.x < n) to[threadIdx.x] = order.values[threadIdx.x];
}

cudaError_t copy_order(int32_t *to, const std::vector<int32_t> &order, cudaStream_t stream) {
    ShortOrder few;
    if (order.size() > std::size(few.values)) /* pageable memory: it is read before this returns */
        return cudaMemcpyAsync(to, order.data(), order.size() * sizeof(int32_t), cudaMemcpyHostToDevice, stream);
    std::copy(order.begin(), order.end(), few.values);
    order_kernel<<<1, static_cast<unsigned>(std::size(few.values)), 0, stream>>>(to, few,
                                                                                 static_cast<int>(order.size()));
    return cudaGetLastError();
}

/* How a search is cut, with the defaults put in. */
struct Cut {
    bool pairs;
    int states, most;
    int64_t rows, groups; /* of a block */
    int parts;            /* of its product */

    Cut(const aqlm_search &s, const Device &device) {
        const aqlm_shape &shape = s.shape;
        const int64_t K = shape.num_codebooks, E = int64_t{1} << shape.nbits_per_codebook, g = shape.in_group_size;
        pairs = s.pairs || s.beam_size == 0;
        most = static_cast<int>(s.beam_size ? s.beam_size : AQLM_PAIR_BEAM);
        states = pairs && K > 2 ? most : 1;
        rows = pairs ? rows_of_pairs(shape.out_features, states, g, device)
                     : rows_of_beam(shape.out_features, most, E, g, device);
        int64_t columns =
            pairs ? columns_of_pairs(shape.out_features, states, K, g, device) : columns_of_beam(rows, most, g, device);
        if (!pairs) /* norms of all entries in each of the block's groups: at most 64 MB of them */
            columns = std::min(columns, std::max<int64_t>(1, (int64_t{1} << 24) / (K * E)) * g);
        groups = std::max<int64_t>(0, std::min(columns, shape.in_features) / g);
        parts = groups ? gemm_parts(shape.out_features, groups * g, shape.in_features, device) : 1;
    }
};

struct Memory {
    float *D, *T, *norms, *steps, *couple, *metric;
    int16_t *tables;
    int32_t *order;

    Memory(Arena &arena, const aqlm_search &s, const Cut &cut) {
        const aqlm_shape &shape = s.shape;
        const int64_t in = shape.in_features, g = shape.in_group_size, K = shape.num_codebooks;
        D = arena.take<float>(shape.out_features * in);
        T = arena.take<float>(cut.parts * shape.out_features * cut.groups * g);
        norms = arena.take<float>(cut.groups * K << shape.nbits_per_codebook);
        const int64_t E = int64_t{1} << shape.nbits_per_codebook;
        tables = arena.take<int16_t>(cut.pairs ? cut.groups * size_of_table(E) : K * E * g * 2);
        steps = arena.take<float>(cut.pairs ? cut.groups : 0);
        couple = arena.take<float>(in * in); /* these three for sweeps alone */
        metric = arena.take<float>(in * g);
        order = arena.take<int32_t>(in / g * (1 + K));
    }
};

cudaError_t walk_all(Walk w, const Memory &memory, const Cut &cut, int g, const Device &device, cudaStream_t stream) {
    if (cut.groups == 0) return cudaErrorInvalidConfiguration;
    const int groups = w.in / g;
    for (w.first = 0; w.first < groups; w.first += static_cast<int>(cut.groups)) {
        w.count = std::min(static_cast<int>(cut.groups), groups - w.first);
        const int begin = w.first * g, columns = w.columns(g), depth = w.ldl ? begin : w.in;
        w.parts = depth ? std::min(cut.parts, std::max(1, depth / GEMM_TILE)) : 0;
        if (depth) {
            Gemm p = {memory.T, w.D, w.couple + (w.ldl ? begin : int64_t(begin) * w.in)};
            p.lda = p.ldb = w.in, p.ldc = columns, p.c_part = int64_t(w.out) * columns;
            p.m = w.out, p.n = columns, p.k = depth;
            const cudaError_t error = w.ldl ? gemm<false, true>(p, w.parts, device, stream)
                                            : gemm<false, false>(p, w.parts, device, stream); /* H is symmetric */
            if (error) return error;
        }
        const cudaError_t error = cut.pairs ? search_pairs(w, g, device, stream) : search_beam(w, g, device, stream);
        if (error) return error;
    }
    return cudaSuccess;
}

Walk walk_of(uint16_t *codes, const aqlm_search &s, const Memory &memory, const Cut &cut) {
    Walk w = {};
    w.codes = codes, w.D = memory.D, w.T = memory.T, w.norms = memory.norms, w.tables = memory.tables,
    w.steps = memory.steps;
    w.weight = s.weight, w.scales = s.scales, w.codebooks = s.codebooks;
    w.out = static_cast<int>(s.shape.out_features), w.in = static_cast<int>(s.shape.in_features);
    w.K = static_cast<int>(s.shape.num_codebooks), w.E = 1 << s.shape.nbits_per_codebook;
    w.rows = static_cast<int>(cut.rows), w.states = cut.states, w.most = cut.most;
    return w;
}

} // namespace
} // namespace aqlm_cuda

using namespace aqlm_cuda;

extern "C" size_t aqlm_cuda_search_workspace(const aqlm_search *s) {
    Device device;
    if (current_device(device)) return 0;
    Arena arena(nullptr);
    Memory(arena, *s, Cut(*s, device));
    return arena.used;
}

extern "C" cudaError_t aqlm_cuda_search_ldl(uint16_t *codes, const aqlm_search *s, const int32_t *order,
                                            const float *feedback, const float *metric, void *workspace,
                                            cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const Cut cut(*s, device);
    Arena arena(workspace);
    const Memory memory(arena, *s, cut);
    Walk w = walk_of(codes, *s, memory, cut);
    w.order = order, w.couple = feedback, w.metric = metric, w.ldl = true;
    return walk_all(w, memory, cut, static_cast<int>(s->shape.in_group_size), device, stream);
}

extern "C" cudaError_t aqlm_cuda_search_sweep(uint16_t *codes, const aqlm_search *s, const float *H, void *workspace,
                                              cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const Cut cut(*s, device);
    Arena arena(workspace);
    const Memory memory(arena, *s, cut);
    Walk w = walk_of(codes, *s, memory, cut);
    const int64_t g = s->shape.in_group_size, groups = w.in / g;
    std::vector<int32_t> order(groups * (1 + w.K));
    aqlm_sweep_order(order.data(), groups, w.K, s->seed);
    if (const cudaError_t error = copy_order(memory.order, order, stream)) return error;
    w.order = memory.order, w.books = memory.order + groups, w.couple = memory.couple, w.metric = memory.metric;
    permute_kernel<<<static_cast<unsigned>(w.in), THREADS, 0, stream>>>(memory.couple, memory.metric, H, memory.order,
                                                                        w.in, static_cast<int>(g));
    residual_kernel<<<static_cast<unsigned>(divide_up(w.out * groups, THREADS)), THREADS, 0, stream>>>(
        memory.D, w, static_cast<int>(g));
    if (const cudaError_t error = cudaGetLastError()) return error;
    return walk_all(w, memory, cut, static_cast<int>(g), device, stream);
}
