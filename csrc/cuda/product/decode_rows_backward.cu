/* decode_rows_backward.cu: gradients to codebooks and scales, codes held. Every sum has one fixed order.
 *
 * Codebooks that fit shared memory several times (in passes of a few of them): each warp adds the groups it reads to a
 * copy of its own, copies are summed to one for each block, a second kernel sums those of the blocks. Larger ones: the
 * groups are sorted by code beforehand (aqlm_cuda_index_codes), a warp sums those of an entry. Lanes hold two numbers
 * of a group each, so that a warp takes SLOTS groups of a row in a step. */
#include "cuda/launch.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256, MAX_WARPS = 16, MAX_PASS = 4;
constexpr int BATCH = 32, UNIT = 4; /* groups of a batch, batches of a unit: a warp's share of <q, G> of a row */
constexpr uint32_t NONE = 255;      /* rank of a group that is not there */

template <int G> struct Lanes {
    static constexpr int OF_GROUP = G / 2, SLOTS = 32 / OF_GROUP, STEPS = BATCH / SLOTS;
};

/* What the kernels share. `pass`: codebooks of blockIdx.y; the row of a group of og is blockIdx.z. */
struct Work {
    aqlm_weight w;
    aqlm_dtype row_dtype;
    int64_t outs; /* O */
    int groups, num_codebooks, entries, og, units, pass, passes;
};

/* Two neighbours, as they lie in memory. */
__device__ float2 to_float2(float2 pair, aqlm_dtype) { return pair; }
__device__ float2 to_float2(uint32_t pair, aqlm_dtype dtype) {
    if (dtype == AQLM_BF16) return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
}

__device__ float2 load_pair(const void *p, size_t pair, aqlm_dtype dtype) {
    if (dtype == AQLM_F32) return static_cast<const float2 *>(p)[pair];
    return to_float2(static_cast<const uint32_t *>(p)[pair], dtype);
}

/* Pair 0 of an entry's row, in pairs. */
template <int G> __device__ size_t pairs_at(const Work &p, int64_t k, int64_t code, int row) {
    return ((k * p.entries + code) * p.og + row) * (G / 2);
}

__device__ float warp_sum(float value) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}

/* Where <q, G> of a unit goes. */
__device__ size_t dot_at(const Work &p, int64_t out, int batch) {
    return ((static_cast<int64_t>(blockIdx.y) * p.og + blockIdx.z) * p.outs + out) * p.units + batch / UNIT;
}

/* A batch of groups of a row: each lane has the codes of one, and of each step two numbers of the gradient. */
template <class T, int G, int PASS> struct Batch {
    static constexpr int LANES = Lanes<G>::OF_GROUP, SLOTS = Lanes<G>::SLOTS, STEPS = Lanes<G>::STEPS;
    uint32_t codes[PASS];
    T rows[STEPS];
    float scale;
    bool there; /* this lane's group */

    __device__ void load(const Work &p, const T *from, int64_t out, int batch, int lane) {
        const int first = batch * BATCH, first_k = blockIdx.y * PASS;
        const bool wide = p.w.shape.nbits_per_codebook > 8;
        there = first + lane < p.groups;
#pragma unroll
        for (int k = 0; k < PASS; ++k)
            if (there && first_k + k < p.num_codebooks)
                codes[k] = load_code(p.w.codes, (out * p.groups + first + lane) * p.num_codebooks + first_k + k, wide,
                                     p.entries - 1);
            else codes[k] = 0x10000u + lane; /* equal to none */
        from += ((out * p.og + blockIdx.z) * p.groups + first) * LANES + lane;
#pragma unroll
        for (int t = 0; t < STEPS; ++t) {
            rows[t] = T{};
            if (first + t * SLOTS + lane / LANES < p.groups) rows[t] = __ldcs(from + t * 32);
        }
        scale = load_float(p.w.scales, out, p.w.dtype);
    }
};

/* How many groups before this one, in the same step, have its code. */
template <int SLOTS> __device__ uint32_t rank_of(uint32_t code, int lane) {
    const int slot = lane % SLOTS;
    if constexpr (SLOTS > 8) {
        const uint32_t same = __match_any_sync(~0u, code) & ((1u << lane) - 1);
        return __popc(same >> (lane - slot));
    } else {
        uint32_t rank = 0;
#pragma unroll
        for (int d = 1; d < SLOTS; ++d) {
            const uint32_t other = __shfl_up_sync(~0u, code, d);
            rank += slot >= d && other == code;
        }
        return rank;
    }
}

/* Adds a batch's groups to the warp's own sums, and <q, G> to dot. Groups of one step with the same code take turns. */
template <class T, int G, int PASS>
__device__ void add_batch(float2 *own, const float2 *book, float &dot, const Batch<T, G, PASS> &batch, const Work &p,
                          int lane) {
    constexpr int LANES = Lanes<G>::OF_GROUP, SLOTS = Lanes<G>::SLOTS, STEPS = Lanes<G>::STEPS;
    uint32_t state[PASS], turns[PASS];
#pragma unroll
    for (int k = 0; k < PASS; ++k) {
        const bool there = batch.codes[k] < 0x10000u;
        const uint32_t rank = rank_of<SLOTS>(batch.codes[k], lane);
        turns[k] = __ballot_sync(~0u, there && rank > 0);
        state[k] = there ? batch.codes[k] | rank << 16 : NONE << 16;
    }
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
        const float2 row = to_float2(batch.rows[t], p.row_dtype);
        const float2 add = {batch.scale * row.x, batch.scale * row.y};
        uint32_t rank[PASS];
        float2 sum[PASS], *at[PASS];
#pragma unroll
        for (int k = 0; k < PASS; ++k) {
            const uint32_t of_slot = __shfl_sync(~0u, state[k], t * SLOTS + lane / LANES);
            const int where = (k * p.entries + static_cast<int>(of_slot & 0xffff)) * LANES + lane % LANES;
            rank[k] = of_slot >> 16, at[k] = own + where;
            if (rank[k] == NONE) continue;
            const float2 q = book[where];
            dot = fmaf(q.x, row.x, fmaf(q.y, row.y, dot));
        }
#pragma unroll
        for (int k = 0; k < PASS; ++k)
            if (rank[k] == 0) sum[k] = *at[k];
#pragma unroll
        for (int k = 0; k < PASS; ++k)
            if (rank[k] == 0) *at[k] = {sum[k].x + add.x, sum[k].y + add.y};
#pragma unroll
        for (int k = 0; k < PASS; ++k)
            if (turns[k] >> (t * SLOTS) & ((1u << SLOTS) - 1))
                for (uint32_t turn = 1; __any_sync(~0u, rank[k] >= turn && rank[k] != NONE); ++turn) {
                    __syncwarp();
                    if (rank[k] == turn) *at[k] = {at[k]->x + add.x, at[k]->y + add.y};
                }
        __syncwarp();
    }
}

/* grid [blocks, passes, og]: sums[passes, og, blocks, PASS * E * G] over each block's units, and dots. */
template <class T, int G, int PASS>
__global__ void __launch_bounds__(MAX_WARPS * 32) sums_kernel(float2 *sums, float *dots, const T *rows, const Work p) {
    extern __shared__ float2 shared[]; /* the codebooks, then a copy for each warp */
    constexpr int LANES = Lanes<G>::OF_GROUP;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int size = PASS * p.entries * LANES, first_k = blockIdx.y * PASS;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const int k = first_k + i / LANES / p.entries;
        shared[i] = {0, 0};
        if (k < p.num_codebooks)
            shared[i] =
                load_pair(p.w.codebooks, pairs_at<G>(p, k, i / LANES % p.entries, blockIdx.z) + i % LANES, p.w.dtype);
    }
    for (int i = threadIdx.x; i < size * warps; i += blockDim.x) shared[size + i] = {0, 0};
    __syncthreads();

    const int64_t all = p.outs * p.units, me = static_cast<int64_t>(blockIdx.x) * warps + warp;
    const int64_t of = static_cast<int64_t>(gridDim.x) * warps, end = all * (me + 1) / of;
    const int batches = static_cast<int>(divide_up(p.groups, BATCH));
    int64_t unit = all * me / of, out = unit / p.units;
    int batch = static_cast<int>(unit % p.units) * UNIT;
    float dot = 0;
    Batch<T, G, PASS> next;
    if (unit < end) next.load(p, rows, out, batch, lane);
    while (unit < end) {
        const auto now = next;
        const int64_t this_out = out;
        const int this_batch = batch;
        if (++batch == batches) ++out, batch = 0;
        const bool unit_ends = batch % UNIT == 0;
        unit += unit_ends;
        if (unit < end) next.load(p, rows, out, batch, lane);
        add_batch<T, G, PASS>(shared + size * (1 + warp), shared, dot, now, p, lane);
        if (!unit_ends) continue;
        dot = warp_sum(dot);
        if (lane == 0) dots[dot_at(p, this_out, this_batch)] = dot;
        dot = 0;
    }
    __syncthreads();
    sums += ((static_cast<int64_t>(blockIdx.y) * p.og + blockIdx.z) * gridDim.x + blockIdx.x) * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        float2 sum = {0, 0};
        for (int copy = 1; copy <= warps; ++copy) {
            const float2 part = shared[size * copy + i];
            sum.x += part.x, sum.y += part.y;
        }
        sums[i] = sum;
    }
}

/* Sums of the blocks' sums, THREADS / 8 numbers in a block; sums null: none. Then of the units' dots, an output for
 * each thread. `of_pass`: numbers of a pass of a block. */
__global__ void __launch_bounds__(THREADS)
    finish_kernel(void *grad_codebooks, void *grad_scales, const float *sums, const float *dots, const Work p,
                  const int of_pass, const int blocks, const int book_blocks) {
    __shared__ float parts[8][32];
    const int64_t g = p.w.shape.in_group_size;
    if (static_cast<int>(blockIdx.x) >= book_blocks) {
        const int64_t out = static_cast<int64_t>(blockIdx.x - book_blocks) * THREADS + threadIdx.x;
        if (out >= p.outs) return;
        float sum = 0;
        for (int64_t pass = 0; pass < p.passes * p.og; ++pass)
            for (int unit = 0; unit < p.units; ++unit) sum += dots[(pass * p.outs + out) * p.units + unit];
        store_float(grad_scales, out, p.w.dtype, sum);
        return;
    }
    const int column = threadIdx.x % 32, part = threadIdx.x / 32;
    const int64_t all = static_cast<int64_t>(p.passes) * p.og * of_pass;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 32 + column;
    const int64_t pass = at / of_pass, local = at % of_pass; /* pass: and row, of a group of og */
    float sum = 0;
    if (at < all)
#pragma unroll 4
        for (int block = part; block < blocks; block += 8) sum += sums[(pass * blocks + block) * of_pass + local];
    parts[part][column] = sum;
    __syncthreads();
    if (part > 0 || at >= all) return;
    for (int i = 1; i < 8; ++i) sum += parts[i][column];
    const int64_t entry = pass / p.og * p.pass * p.entries + local / g; /* of all codebooks */
    if (entry < static_cast<int64_t>(p.num_codebooks) * p.entries)
        store_float(grad_codebooks, (entry * p.og + pass % p.og) * g + local % g, p.w.dtype, sum);
}

/* grid [., 1, og]: <q, G> of each unit, codebooks read from L2. */
template <class T, int G>
__global__ void __launch_bounds__(THREADS) dots_kernel(float *dots, const T *rows, const Work p) {
    constexpr int LANES = Lanes<G>::OF_GROUP, SLOTS = Lanes<G>::SLOTS;
    const int lane = threadIdx.x % 32;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (unit >= p.outs * p.units) return;
    const int64_t out = unit / p.units;
    const int first = static_cast<int>(unit % p.units) * UNIT * BATCH, last = min(first + UNIT * BATCH, p.groups);
    const bool wide = p.w.shape.nbits_per_codebook > 8;
    float dot = 0;
#pragma unroll 4
    for (int j = first + lane / LANES; j < last; j += SLOTS) {
        const int64_t group = out * p.groups + j;
        const float2 row =
            to_float2(__ldcs(rows + ((out * p.og + blockIdx.z) * p.groups + j) * LANES + lane % LANES), p.row_dtype);
        for (int k = 0; k < p.num_codebooks; ++k) {
            const uint32_t code = load_code(p.w.codes, group * p.num_codebooks + k, wide, p.entries - 1);
            const float2 q = load_pair(p.w.codebooks, pairs_at<G>(p, k, code, blockIdx.z) + lane % LANES, p.w.dtype);
            dot = fmaf(q.x, row.x, fmaf(q.y, row.y, dot));
        }
    }
    dot = warp_sum(dot);
    if (lane == 0) dots[dot_at(p, out, first / BATCH)] = dot;
}

/* Two numbers of a lane's share of an entry's members, from `begin` in steps. */
template <class T, int G>
__device__ float2 sum_of_members(const T *rows, const int32_t *members, int begin, int end, int step, const Work &p,
                                 int pair) {
    const uint32_t last = static_cast<uint32_t>(p.outs) * p.groups - 1;
    float2 sum = {0, 0};
#pragma unroll 4
    for (int i = begin; i < end; i += step) {
        const int member = static_cast<int>(min(static_cast<uint32_t>(members[i]), last)), out = member / p.groups,
                  j = member % p.groups;
        const float2 row =
            to_float2(__ldg(rows + ((static_cast<int64_t>(out) * p.og + blockIdx.z) * p.groups + j) * (G / 2) + pair),
                      p.row_dtype);
        const float scale = load_float(p.w.scales, out, p.w.dtype);
        sum.x = fmaf(scale, row.x, sum.x), sum.y = fmaf(scale, row.y, sum.y);
    }
    for (int distance = 16; distance >= G / 2; distance /= 2) {
        sum.x += __shfl_xor_sync(~0u, sum.x, distance);
        sum.y += __shfl_xor_sync(~0u, sum.y, distance);
    }
    return sum;
}

/* grid [., 1, og]: a warp sums the groups of an entry of one of K * E; all of the block one that has many. */
template <class T, int G>
__global__ void __launch_bounds__(THREADS)
    members_kernel(void *grad, const T *rows, const int32_t *index, const Work p) {
    constexpr int LANES = Lanes<G>::OF_GROUP, SLOTS = Lanes<G>::SLOTS, WARPS = THREADS / 32, MANY = 2048;
    __shared__ float2 parts[WARPS][LANES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * WARPS,
                  all = static_cast<int64_t>(p.num_codebooks) * p.entries;
    const int64_t of_codebook = p.entries + 1 + p.outs * p.groups;
    const auto store = [&](int64_t entry, float2 sum) {
        const size_t at = (entry * p.og + blockIdx.z) * G + 2 * lane;
        store_float(grad, at, p.w.dtype, sum.x), store_float(grad, at + 1, p.w.dtype, sum.y);
    };
    for (int i = 0; i < WARPS && first + i < all; ++i) {
        const int64_t entry = first + i;
        const int32_t *starts = index + entry / p.entries * of_codebook, *members = starts + p.entries + 1;
        const int count = static_cast<int>(p.outs) * p.groups; /* whatever an index says, no other memory is read */
        const int begin = max(starts[entry % p.entries], 0), end = min(starts[entry % p.entries + 1], count);
        if (end - begin <= MANY) {
            if (i != warp) continue;
            const float2 sum = sum_of_members<T, G>(rows, members, begin + lane / LANES, end, SLOTS, p, lane % LANES);
            if (lane < LANES) store(entry, sum);
            continue;
        }
        const float2 part = sum_of_members<T, G>(rows, members, begin + warp * SLOTS + lane / LANES, end, WARPS * SLOTS,
                                                 p, lane % LANES);
        if (lane < LANES) parts[warp][lane] = part;
        __syncthreads();
        if (threadIdx.x < LANES) {
            float2 sum = part;
            for (int other = 1; other < WARPS; ++other) sum.x += parts[other][lane].x, sum.y += parts[other][lane].y;
            store(entry, sum);
        }
        __syncthreads();
    }
}

/* Codes of codebook k as numbers of 16 bits in the same order. */
__global__ void keys_kernel(int16_t *keys, const aqlm_weight w, const int64_t k, const int64_t count) {
    const int64_t group = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (group >= count) return;
    const uint32_t code = load_code(w.codes, group * w.shape.num_codebooks + k, w.shape.nbits_per_codebook > 8,
                                    (1u << w.shape.nbits_per_codebook) - 1);
    keys[group] = static_cast<int16_t>(static_cast<int>(code) - 32768);
}

/* From sorted keys, start[E + 1], the first place of each code, and member[O * J] behind it. */
__global__ void index_kernel(int32_t *index, const int16_t *sorted, const int64_t *order, const int64_t count,
                             const int entries) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at > count) return;
    const int before = at == 0 ? -1 : sorted[at - 1] + 32768, here = at == count ? entries : sorted[at] + 32768;
    for (int code = before + 1; code <= here; ++code) index[code] = static_cast<int32_t>(at);
    if (at < count) index[entries + 1 + at] = static_cast<int32_t>(order[at]);
}

int64_t groups_of(const aqlm_shape &s) { return s.out_features / s.out_group_size * (s.in_features / s.in_group_size); }

Work work_of(const aqlm_weight &w, aqlm_dtype row_dtype, const aqlm_cuda_gradient_plan &plan) {
    const aqlm_shape &s = w.shape;
    Work p = {w, row_dtype};
    p.outs = s.out_features / s.out_group_size;
    p.groups = static_cast<int>(s.in_features / s.in_group_size);
    p.num_codebooks = static_cast<int>(s.num_codebooks);
    p.entries = 1 << s.nbits_per_codebook;
    p.og = static_cast<int>(s.out_group_size);
    p.units = static_cast<int>(divide_up(p.groups, BATCH * UNIT));
    p.pass = plan.pass > 0 ? plan.pass : p.num_codebooks;
    p.passes = static_cast<int>(divide_up(p.num_codebooks, p.pass));
    return p;
}

int64_t dots_of(const Work &p) { return p.outs * p.og * p.passes * p.units; }

/* The arguments of the launch, and what the types of its kernels follow from. */
struct Launch {
    void *grad_codebooks, *grad_scales;
    const void *rows;
    const int32_t *index;
    float *dots, *sums;
    Work work;
    aqlm_cuda_gradient_plan plan;
    Device device;
    cudaStream_t stream;
};

template <class T, int G, int PASS> cudaError_t launch_sums(const Launch &l) {
    if (const cudaError_t error = allow_shared_memory<sums_kernel<T, G, PASS>>(l.device)) return error;
    const Work &p = l.work;
    const size_t copy = size_t(PASS) * p.entries * G * sizeof(float);
    const dim3 grid(l.plan.blocks, p.passes, p.og);
    sums_kernel<T, G, PASS><<<grid, l.plan.warps * 32, copy * (1 + l.plan.warps), l.stream>>>(
        reinterpret_cast<float2 *>(l.sums), l.dots, static_cast<const T *>(l.rows), p);
    return cudaGetLastError();
}

template <class T, int G> cudaError_t launch(const Launch &l) {
    const auto *rows = static_cast<const T *>(l.rows);
    const Work &p = l.work;
    switch (l.plan.pass) {
    case 1: return launch_sums<T, G, 1>(l);
    case 2: return launch_sums<T, G, 2>(l);
    case 3: return launch_sums<T, G, 3>(l);
    case 4: return launch_sums<T, G, 4>(l);
    }
    const auto blocks = [&](int64_t warps) {
        return dim3(static_cast<unsigned>(divide_up(warps, THREADS / 32)), 1, p.og);
    };
    if (l.grad_codebooks)
        members_kernel<T, G><<<blocks(static_cast<int64_t>(p.num_codebooks) * p.entries), THREADS, 0, l.stream>>>(
            l.grad_codebooks, rows, l.index, p);
    if (l.grad_scales) dots_kernel<T, G><<<blocks(p.outs * p.units), THREADS, 0, l.stream>>>(l.dots, rows, p);
    return cudaGetLastError();
}

template <class T> cudaError_t launch(const Launch &l) {
    switch (l.work.w.shape.in_group_size) {
    case 4: return launch<T, 4>(l);
    case 8: return launch<T, 8>(l);
    case 16: return launch<T, 16>(l);
    default: return launch<T, 32>(l);
    }
}

} // namespace
} // namespace aqlm_cuda

using namespace aqlm_cuda;

extern "C" cudaError_t aqlm_cuda_decode_rows_backward_plan(aqlm_cuda_gradient_plan *plan, const aqlm_weight *w) {
    *plan = {};
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const aqlm_shape &s = w->shape;
    if (groups_of(s) > INT32_MAX || s.out_group_size > 65535) return cudaErrorInvalidValue;
    const int64_t one = (int64_t{4} << s.nbits_per_codebook) * s.in_group_size; /* bytes of a codebook's sums */
    const auto copies_of = [&](int64_t pass) { return device.shared_memory / (one * pass) - 1; };
    int64_t passes = divide_up(s.num_codebooks, MAX_PASS);
    while (passes < s.num_codebooks && copies_of(divide_up(s.num_codebooks, passes)) < 4) ++passes;
    const int64_t pass = divide_up(s.num_codebooks, passes);
    if (copies_of(pass) >= 2) {
        plan->pass = static_cast<int32_t>(pass);
        plan->warps = static_cast<int32_t>(std::min<int64_t>(copies_of(pass), MAX_WARPS));
    }
    const Work p = work_of(*w, w->dtype, *plan);
    if (plan->pass > 0)
        plan->blocks = static_cast<int32_t>(std::min<int64_t>(divide_up(p.outs * p.units, plan->warps), device.sms));
    plan->workspace = sizeof(float) * divide_up(dots_of(p), 4) * 4;
    plan->workspace += size_t(plan->blocks) * p.passes * p.og * plan->pass * one;
    return cudaSuccess;
}

extern "C" cudaError_t aqlm_cuda_code_keys(int16_t *keys, const aqlm_weight *w, int64_t k, cudaStream_t stream) {
    const int64_t count = groups_of(w->shape);
    keys_kernel<<<static_cast<unsigned>(divide_up(count, THREADS)), THREADS, 0, stream>>>(keys, *w, k, count);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_index_codes(int32_t *index, const int16_t *sorted, const int64_t *order,
                                             const aqlm_weight *w, int64_t k, cudaStream_t stream) {
    const int64_t count = groups_of(w->shape);
    const int entries = 1 << w->shape.nbits_per_codebook;
    index_kernel<<<static_cast<unsigned>(divide_up(count + 1, THREADS)), THREADS, 0, stream>>>(
        index + k * (entries + 1 + count), sorted, order, count, entries);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_decode_rows_backward(void *grad_codebooks, void *grad_scales, const void *grad_rows,
                                                      aqlm_dtype row_dtype, const aqlm_weight *w, const int32_t *index,
                                                      const aqlm_cuda_gradient_plan *plan, void *workspace,
                                                      cudaStream_t stream) {
    Launch l = {grad_codebooks, grad_scales, grad_rows, index, static_cast<float *>(workspace)};
    l.work = work_of(*w, row_dtype, *plan), l.plan = *plan, l.stream = stream;
    const Work &p = l.work;
    l.sums = l.dots + divide_up(dots_of(p), 4) * 4;
    if (const cudaError_t error = current_device(l.device)) return error;
    if (plan->pass == 0 && grad_codebooks && !index) return cudaErrorInvalidValue;
    if (const cudaError_t error = row_dtype == AQLM_F32 ? launch<float2>(l) : launch<uint32_t>(l)) return error;
    const int of_pass = plan->pass * p.entries * static_cast<int>(w->shape.in_group_size);
    const bool sums = plan->pass > 0 && grad_codebooks;
    const auto books = static_cast<int>(sums ? divide_up(int64_t{1} * p.passes * p.og * of_pass, 32) : 0);
    const auto blocks = static_cast<unsigned>(books + (grad_scales ? divide_up(p.outs, THREADS) : 0));
    if (blocks > 0)
        finish_kernel<<<blocks, THREADS, 0, stream>>>(grad_codebooks, grad_scales, l.sums, l.dots, p, of_pass,
                                                      plan->blocks, books);
    return cudaGetLastError();
}
