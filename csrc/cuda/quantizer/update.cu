/* update.cu: with the codes fixed, codebooks by conjugate gradients, scales in closed form, Adam, and the error; the
 * algorithms of core/quantizer/update.c. Rows are decoded, multiplied by H (gemm.cuh), and what an entry's members got
 * is summed, members in order: no float is added by an atomic, so every run gives the same bits. The steps of the
 * conjugate gradients are decided on the device, and nothing is waited for. */
#include <cfloat>

#include <cub/device/device_radix_sort.cuh>

#include "cuda/aqlm_cuda_quantizer.h"
#include "cuda/quantizer/arena.cuh"
#include "cuda/quantizer/gemm.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32, DOTS = 64;

unsigned blocks_for(int64_t n) { return static_cast<unsigned>(divide_up(n, THREADS)); }

struct Layer {
    const float *weight, *H, *scales, *codebooks;
    const uint16_t *codes;
    int64_t out, in, J, points; /* points = out J */
    int K, E, g;

    Layer(const float *weight_, const float *H_, const uint16_t *codes_, const float *codebooks_, const float *scales_,
          const aqlm_shape &s)
        : weight(weight_), H(H_), scales(scales_), codebooks(codebooks_), codes(codes_), out(s.out_features),
          in(s.in_features), J(in / s.in_group_size), points(out * J), K(static_cast<int>(s.num_codebooks)),
          E(1 << s.nbits_per_codebook), g(static_cast<int>(s.in_group_size)) {}
};

enum RowsOf { RESIDUAL, SCALED, PLAIN }; /* W - s q, s q, q */

/* rows [out, in]; a thread has 4 numbers of a group. */
__global__ void rows_kernel(float *rows, const Layer l, const RowsOf what) {
    const int quarters = l.g / 4;
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, point = at / quarters;
    if (point >= l.points) return;
    const int64_t row = point / l.J;
    const int d = static_cast<int>(at % quarters) * 4;
    float4 q = {0, 0, 0, 0};
    for (int k = 0; k < l.K && l.codes; ++k) {
        const int64_t entry = int64_t(k) * l.E + l.codes[point * l.K + k];
        const float4 c = *reinterpret_cast<const float4 *>(l.codebooks + entry * l.g + d);
        q.x += c.x, q.y += c.y, q.z += c.z, q.w += c.w;
    }
    if (what != PLAIN && l.codes) {
        const float scale = l.scales[row];
        q = {scale * q.x, scale * q.y, scale * q.z, scale * q.w};
    }
    if (what == RESIDUAL) {
        const float4 w = *reinterpret_cast<const float4 *>(l.weight + point * l.g + d);
        q = {w.x - q.x, w.y - q.y, w.z - q.z, w.w - q.w};
    }
    *reinterpret_cast<float4 *>(rows + point * l.g + d) = q;
}

__device__ double block_sum(double value) {
    __shared__ double part[WARPS];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += part[warp];
    return sum;
}

/* sums[out, 2]: <rows, rows H> and <W, rows H>; a block a row. */
__global__ void row_sums_kernel(double *sums, const float *rows, const float *product, const float *weight,
                                int64_t in) {
    const int64_t first = blockIdx.x * in;
    double own = 0, cross = 0;
    for (int64_t at = first + threadIdx.x; at < first + in; at += THREADS) {
        own += static_cast<double>(rows[at]) * product[at];
        cross += static_cast<double>(weight[at]) * product[at];
    }
    own = block_sum(own), cross = block_sum(cross);
    if (threadIdx.x == 0) sums[2 * blockIdx.x] = own, sums[2 * blockIdx.x + 1] = cross;
}

__global__ void total_kernel(double *total, const double *sums, int64_t out) {
    double sum = 0;
    for (int64_t o = threadIdx.x; o < out; o += THREADS) sum += sums[2 * o];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}

__global__ void scales_kernel(float *scales, const double *sums, int64_t out) {
    const int64_t o = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (o >= out || !(sums[2 * o] > 0.0)) return;
    const float scale = static_cast<float>(sums[2 * o + 1] / sums[2 * o]);
    if (isfinite(scale)) scales[o] = scale;
}

/* c[i] = the sum over parts of parts[part, i], in order. */
__global__ void add_parts_kernel(float *c, const float *parts, int count, int64_t n) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n) return;
    float sum = 0;
    for (int part = 0; part < count; ++part) sum += parts[part * n + at];
    c[at] = sum;
}

/* ---- members of entries ---------------------------------------------------------------------------- */

__global__ void keys_kernel(uint16_t *keys, uint32_t *places, const Layer l, int k) {
    const int64_t point = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (point < l.points) keys[point] = l.codes[point * l.K + k], places[point] = static_cast<uint32_t>(point);
}

/* start[e] = the first of the sorted keys that is not below e, e = 0..E. */
__global__ void start_kernel(uint32_t *start, const uint16_t *sorted, uint32_t points, int E) {
    const int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e > E) return;
    uint32_t low = 0, high = points;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (sorted[middle] < e) low = middle + 1;
        else high = middle;
    }
    start[e] = low;
}

/* Places of each entry's members, ascending: those of entry e of codebook k at member[k, start[k, e]..]. */
struct Members {
    uint32_t *start;  /* [K, E + 1] */
    uint32_t *member; /* [K, points] */
};

/* gathered[k, e] = the sum of s rows of its members; a block an entry, grid [E, K]. 8 numbers of a member at a time. */
template <int G> __global__ void gather_kernel(double *gathered, const float *rows, const Members m, const Layer l) {
    const int e = blockIdx.x, k = blockIdx.y;
    const uint32_t *start = m.start + int64_t(k) * (l.E + 1), *member = m.member + k * l.points;
    const uint32_t end = start[e + 1];
    float sum[G] = {};
    for (uint32_t at = start[e] + threadIdx.x; at < end; at += blockDim.x) {
        const int64_t point = member[at];
        const float scale = l.scales[point / l.J];
        const float *row = rows + point * G;
#pragma unroll
        for (int d = 0; d < G; d += 4) {
            const float4 x = *reinterpret_cast<const float4 *>(row + d);
            sum[d] = fmaf(scale, x.x, sum[d]), sum[d + 1] = fmaf(scale, x.y, sum[d + 1]);
            sum[d + 2] = fmaf(scale, x.z, sum[d + 2]), sum[d + 3] = fmaf(scale, x.w, sum[d + 3]);
        }
    }
    __shared__ double part[WARPS][G];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int d = 0; d < G; ++d) {
        double value = sum[d];
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
        if (lane == 0) part[warp][d] = value;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < G; d += blockDim.x) {
        double value = 0;
        for (int i = 0; i < warps; ++i) value += part[i][d];
        gathered[(int64_t(k) * l.E + e) * G + d] = value;
    }
}

/* sums[j] = the sum of s^2 over the members (of one entry) in column group j, in units that it returns: integers, whose
 * sums by atomics are the same in every order. 0: there is no such unit. Begins and ends with a barrier. */
__device__ float sum_by_group(unsigned long long *sums, const uint32_t *member, uint32_t begin, uint32_t end,
                              const Layer &l) {
    __shared__ int most;
    const auto J = static_cast<uint32_t>(l.J);
    if (threadIdx.x == 0) most = 0;
    for (uint32_t j = threadIdx.x; j < J; j += blockDim.x) sums[j] = 0;
    __syncthreads();
    float own = 0;
#pragma unroll 4
    for (uint32_t at = begin + threadIdx.x; at < end; at += blockDim.x) {
        const float scale = l.scales[member[at] / J];
        own = fmaxf(own, scale * scale);
    }
    atomicMax(&most, __float_as_int(own)); /* as integers positive floats have the same order */
    __syncthreads();
    const float unit = __int_as_float(most) * 0x1p-31f;
    if (!(unit >= FLT_MIN && unit <= FLT_MAX)) return 0;
#pragma unroll 4
    for (uint32_t at = begin + threadIdx.x; at < end; at += blockDim.x) {
        const uint32_t o = member[at] / J;
        const float scale = l.scales[o];
        atomicAdd(&sums[member[at] - o * J], __float2uint_rn(scale * scale / unit));
    }
    __syncthreads();
    return unit;
}

/* normal[k, e] = the sum over members of s^2 H_jj [g, g]; a block an entry, whose threads share out members and
 * numbers. by_group: there is memory [J] for sums of the s^2 of entries with more members than J. */
__global__ void normal_kernel(double *normal, const Members m, const Layer l, bool by_group) {
    extern __shared__ unsigned long long sums[];
    __shared__ double part[1024];
    const int e = blockIdx.x, k = blockIdx.y, square = l.g * l.g, slices = blockDim.x / square;
    const int number = threadIdx.x % square, slice = threadIdx.x / square, r = number / l.g, c = number % l.g;
    const uint32_t *start = m.start + int64_t(k) * (l.E + 1), *member = m.member + k * l.points;
    const uint32_t begin = start[e], end = start[e + 1];
    const float unit = by_group && end - begin > l.J ? sum_by_group(sums, member, begin, end, l) : 0.0f;
    double total = 0;
    float sum = 0;
    int count = 0;
    const auto add = [&](float weight, int64_t j) {
        sum = fmaf(weight, l.H[(j * l.g + r) * l.in + j * l.g + c], sum);
        if (++count % 64 == 0) total += sum, sum = 0;
    };
    if (slice < slices && unit > 0)
#pragma unroll 8
        for (int j = slice; j < l.J; j += slices) add(static_cast<float>(sums[j]) * unit, j);
    else if (slice < slices)
        for (uint32_t at = begin + slice; at < end; at += slices) {
            const float scale = l.scales[member[at] / l.J];
            add(scale * scale, member[at] % l.J);
        }
    part[threadIdx.x] = total + sum;
    __syncthreads();
    if (slice) return;
    for (int i = 1; i < slices; ++i) part[number] += part[i * square + number];
    normal[(int64_t(k) * l.E + e) * square + number] = part[number];
}

/* In place the lower Cholesky factor of each entry's matrix, slightly damped; one that is not positive starts with 0.
 */
__global__ void cholesky_kernel(double *normal, int64_t entries, int g) {
    const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (e >= entries) return;
    double *a = normal + e * g * g, trace = 0;
    for (int d = 0; d < g; ++d) trace += a[d * g + d];
    const double damp = 1e-6 * trace / g + 1e-30;
    bool positive = true;
    for (int i = 0; i < g && positive; ++i)
        for (int j = 0; j <= i; ++j) {
            double sum = a[i * g + j] + (i == j ? damp : 0.0);
            for (int p = 0; p < j; ++p) sum -= a[i * g + p] * a[j * g + p];
            if (i == j) {
                positive = sum > 0.0;
                a[i * g + i] = positive ? sqrt(sum) : 0.0;
            } else a[i * g + j] = sum / a[j * g + j];
        }
    if (!positive) a[0] = 0.0;
}

/* ---- conjugate gradients --------------------------------------------------------------------------- */

struct Cg {
    double *x, *r, *z, *p, *Ap; /* [n] */
    double *factor;             /* [K E, g, g] */
    double *dots;               /* [DOTS] */
    double *scalar;             /* rz, first, alpha, beta, done */
    float *direction;           /* [n] */
    int64_t n;
};
enum { RZ, FIRST, ALPHA, BETA, DONE, SCALARS };

__global__ void begin_kernel(const Cg cg, const float *codebooks) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < cg.n) cg.x[at] = codebooks[at];
    if (at < SCALARS) cg.scalar[at] = 0;
}

/* z = the entries' own normal matrices' solution for r; a thread an entry. */
__global__ void precondition_kernel(const Cg cg, const Members m, const Layer l) {
    const int64_t entry = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (entry >= int64_t(l.K) * l.E) return;
    const uint32_t *start = m.start + entry / l.E * (l.E + 1) + entry % l.E;
    const double *a = cg.factor + entry * l.g * l.g, *r = cg.r + entry * l.g;
    double *z = cg.z + entry * l.g;
    const int g = l.g;
    const bool used = start[1] > start[0] && a[0] > 0.0;
    for (int i = 0; i < g; ++i) {
        double sum = used ? r[i] : 0.0;
        for (int p = 0; p < i && used; ++p) sum -= a[i * g + p] * z[p];
        z[i] = used ? sum / a[i * g + i] : 0.0;
    }
    for (int i = g - 1; i >= 0 && used; --i) {
        double sum = z[i];
        for (int p = i + 1; p < g; ++p) sum -= a[p * g + i] * z[p];
        z[i] = sum / a[i * g + i];
    }
}

__global__ void dot_kernel(double *dots, const double *x, const double *y, int64_t n) {
    double sum = 0;
    for (int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x; at < n; at += int64_t(DOTS) * THREADS)
        sum += x[at] * y[at];
    sum = block_sum(sum);
    if (threadIdx.x == 0) dots[blockIdx.x] = sum;
}

__device__ double sum_dots(const double *dots) {
    double sum = 0;
    for (int i = 0; i < DOTS; ++i) sum += dots[i];
    return sum;
}

__global__ void beta_kernel(const Cg cg, bool first) {
    const double next = sum_dots(cg.dots);
    double *s = cg.scalar;
    if (first) s[FIRST] = next;
    if (!(next > 1e-14 * s[FIRST])) s[DONE] = 1;
    s[BETA] = first || s[DONE] != 0 ? 0.0 : next / s[RZ];
    s[RZ] = next;
}

__global__ void direction_kernel(const Cg cg) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= cg.n) return;
    const double beta = cg.scalar[BETA], p = cg.z[at] + (beta != 0.0 ? beta * cg.p[at] : 0.0);
    cg.p[at] = p;
    cg.direction[at] = static_cast<float>(p);
}

__global__ void alpha_kernel(const Cg cg) {
    const double curve = sum_dots(cg.dots);
    double *s = cg.scalar;
    if (!(curve > 0.0)) s[DONE] = 1;
    s[ALPHA] = s[DONE] != 0 ? 0.0 : s[RZ] / curve;
}

__global__ void step_kernel(const Cg cg) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const double alpha = cg.scalar[ALPHA];
    if (at >= cg.n || alpha == 0.0) return;
    cg.x[at] += alpha * cg.p[at];
    cg.r[at] -= alpha * cg.Ap[at];
}

__global__ void end_kernel(float *codebooks, const Cg cg) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < cg.n) codebooks[at] = static_cast<float>(cg.x[at]);
}

/* ---- Adam ------------------------------------------------------------------------------------------- */

__device__ void adam(float &x, double &moment, double &most, double gradient, double learning_rate, double correction) {
    moment = AQLM_ADAM_BETA2 * moment + (1.0 - AQLM_ADAM_BETA2) * gradient * gradient;
    if (moment > most) most = moment;
    x = static_cast<float>(x - learning_rate * gradient / (sqrt(most / correction) + AQLM_ADAM_EPS));
}

/* One number of codebooks [n], then of scales [out]. moments [2, n + out]. */
__global__ void adam_kernel(float *codebooks, float *scales, double *moments, const double *gathered,
                            const double *sums, int64_t n, int64_t out, double learning_rate, double correction) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, o = at - n;
    if (at >= n + out) return;
    const double factor = -2.0 / static_cast<double>(out);
    double gradient;
    if (at < n) gradient = factor * gathered[at];
    else gradient = scales[o] != 0.0f ? factor * (sums[2 * o + 1] - sums[2 * o]) / scales[o] : 0.0;
    adam(at < n ? codebooks[at] : scales[o], moments[at], moments[n + out + at], gradient, learning_rate, correction);
}

/* ---- a layer's products ---------------------------------------------------------------------------- */

struct Products {
    Layer l;
    Device device;
    cudaStream_t stream;
    float *rows, *product, *parts; /* [out, in] each, parts so many times */
    int count;                     /* of parts */
    double *sums;                  /* [out, 2] */

    Products(const Layer &layer, const Device &on, Arena &arena, cudaStream_t s) : l(layer), device(on), stream(s) {
        rows = arena.take<float>(l.out * l.in);
        product = arena.take<float>(l.out * l.in);
        count = gemm_parts(l.out, l.in, l.in, device);
        parts = arena.take<float>(count > 1 ? count * l.out * l.in : 0);
        sums = arena.take<double>(2 * l.out);
    }

    /* product = rows H of the rows that are asked for, with `codebooks` */
    cudaError_t multiply(RowsOf what, const float *codebooks) const {
        Layer given = l;
        given.codebooks = codebooks;
        rows_kernel<<<blocks_for(l.points * (l.g / 4)), THREADS, 0, stream>>>(rows, given, what);
        Gemm p = {count > 1 ? parts : product, rows, l.H};
        p.lda = p.ldb = p.ldc = l.in, p.c_part = l.out * l.in;
        p.m = static_cast<int>(l.out), p.n = p.k = static_cast<int>(l.in);
        if (const cudaError_t error = gemm<false, false>(p, count, device, stream)) return error;
        if (count > 1)
            add_parts_kernel<<<blocks_for(l.out * l.in), THREADS, 0, stream>>>(product, parts, count, l.out * l.in);
        return cudaGetLastError();
    }

    cudaError_t sum_rows() const {
        row_sums_kernel<<<static_cast<unsigned>(l.out), THREADS, 0, stream>>>(sums, rows, product, l.weight, l.in);
        return cudaGetLastError();
    }
};

struct Index : Members {
    uint16_t *keys;   /* [2, points] */
    uint32_t *places; /* [points] */
    void *temporary;
    size_t bytes = 0;

    Index(const Layer &l, Arena &arena) {
        start = arena.take<uint32_t>(int64_t(l.K) * (l.E + 1));
        member = arena.take<uint32_t>(l.K * l.points);
        keys = arena.take<uint16_t>(2 * l.points);
        places = arena.take<uint32_t>(l.points);
        cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys, keys, places, places, l.points);
        temporary = arena.take<char>(static_cast<int64_t>(bytes));
    }

    cudaError_t fill(const Layer &l, cudaStream_t stream) {
        int bits = 1;
        while (1 << bits < l.E) ++bits;
        for (int k = 0; k < l.K; ++k) {
            keys_kernel<<<blocks_for(l.points), THREADS, 0, stream>>>(keys, places, l, k);
            if (const cudaError_t error = cub::DeviceRadixSort::SortPairs(
                    temporary, bytes, keys, keys + l.points, places, member + k * l.points, l.points, 0, bits, stream))
                return error;
            start_kernel<<<blocks_for(l.E + 1), THREADS, 0, stream>>>(start + int64_t(k) * (l.E + 1), keys + l.points,
                                                                      static_cast<uint32_t>(l.points), l.E);
        }
        return cudaGetLastError();
    }
};

cudaError_t gather(double *gathered, const float *rows, const Members &m, const Layer &l, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(l.E), static_cast<unsigned>(l.K));
    const int threads = l.points / l.E >= 512 ? THREADS : 32; /* about as many as an entry has members, an eighth */
    switch (l.g) {
    case 4: gather_kernel<4><<<grid, threads, 0, stream>>>(gathered, rows, m, l); break;
    case 8: gather_kernel<8><<<grid, threads, 0, stream>>>(gathered, rows, m, l); break;
    case 16: gather_kernel<16><<<grid, threads, 0, stream>>>(gathered, rows, m, l); break;
    default: gather_kernel<32><<<grid, threads, 0, stream>>>(gathered, rows, m, l); break;
    }
    return cudaGetLastError();
}

Cg cg_of(const Layer &l, Arena &arena) {
    Cg cg;
    cg.n = int64_t(l.K) * l.E * l.g;
    double *vectors = arena.take<double>(5 * cg.n);
    cg.x = vectors, cg.r = vectors + cg.n, cg.z = vectors + 2 * cg.n, cg.p = vectors + 3 * cg.n,
    cg.Ap = vectors + 4 * cg.n;
    cg.factor = arena.take<double>(cg.n * l.g);
    cg.dots = arena.take<double>(DOTS);
    cg.scalar = arena.take<double>(SCALARS);
    cg.direction = arena.take<float>(cg.n);
    return cg;
}

cudaError_t dot(const Cg &cg, const double *x, const double *y, cudaStream_t stream) {
    dot_kernel<<<DOTS, THREADS, 0, stream>>>(cg.dots, x, y, cg.n);
    return cudaGetLastError();
}

/* One step from residual r and direction p; decided on the device. */
cudaError_t cg_step(const Cg &cg, const Products &products, const Members &m, bool first, cudaStream_t stream) {
    const Layer &l = products.l;
    precondition_kernel<<<blocks_for(int64_t(l.K) * l.E), THREADS, 0, stream>>>(cg, m, l);
    if (const cudaError_t error = dot(cg, cg.r, cg.z, stream)) return error;
    beta_kernel<<<1, 1, 0, stream>>>(cg, first);
    direction_kernel<<<blocks_for(cg.n), THREADS, 0, stream>>>(cg);
    if (const cudaError_t error = products.multiply(SCALED, cg.direction)) return error;
    if (const cudaError_t error = gather(cg.Ap, products.product, m, l, stream)) return error;
    if (const cudaError_t error = dot(cg, cg.p, cg.Ap, stream)) return error;
    alpha_kernel<<<1, 1, 0, stream>>>(cg);
    step_kernel<<<blocks_for(cg.n), THREADS, 0, stream>>>(cg);
    return cudaGetLastError();
}

__global__ void check_kernel(int32_t *outside, const uint16_t *codes, int64_t n, int bits) {
    bool any = false;
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < n; at += int64_t(gridDim.x) * blockDim.x)
        any |= codes[at] >> (bits - 1) >> 1 != 0;
    if (__syncthreads_or(any) && threadIdx.x == 0) *outside = 1;
}

} // namespace
} // namespace aqlm_cuda

using namespace aqlm_cuda;

extern "C" size_t aqlm_cuda_update_workspace(const aqlm_shape *shape) {
    Device device;
    if (current_device(device)) return 0;
    const Layer l(nullptr, nullptr, nullptr, nullptr, nullptr, *shape);
    Arena arena(nullptr);
    Products(l, device, arena, nullptr);
    Index(l, arena);
    cg_of(l, arena);
    return arena.used;
}

extern "C" cudaError_t aqlm_cuda_check_codes(int32_t *outside, const uint16_t *codes, const aqlm_shape *shape,
                                             cudaStream_t stream) {
    const int64_t n = shape->out_features * (shape->in_features / shape->in_group_size) * shape->num_codebooks;
    if (const cudaError_t error = cudaMemsetAsync(outside, 0, sizeof *outside, stream)) return error;
    check_kernel<<<static_cast<unsigned>(std::min<int64_t>(divide_up(n, THREADS), 1024)), THREADS, 0, stream>>>(
        outside, codes, n, static_cast<int>(shape->nbits_per_codebook));
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_quantization_error(double *error, const float *weight, const float *H,
                                                    const uint16_t *codes, const float *codebooks, const float *scales,
                                                    const aqlm_shape *shape, void *workspace, cudaStream_t stream) {
    Device device;
    if (const cudaError_t failed = current_device(device)) return failed;
    Arena arena(workspace);
    const Products products(Layer(weight, H, codes, codebooks, scales, *shape), device, arena, stream);
    if (const cudaError_t failed = products.multiply(RESIDUAL, codebooks)) return failed;
    if (const cudaError_t failed = products.sum_rows()) return failed;
    total_kernel<<<1, THREADS, 0, stream>>>(error, products.sums, products.l.out);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_update_scales(float *scales, const float *weight, const float *H,
                                               const uint16_t *codes, const float *codebooks, const aqlm_shape *shape,
                                               void *workspace, cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    Arena arena(workspace);
    const Products products(Layer(weight, H, codes, codebooks, scales, *shape), device, arena, stream);
    if (const cudaError_t error = products.multiply(PLAIN, codebooks)) return error;
    if (const cudaError_t error = products.sum_rows()) return error;
    scales_kernel<<<blocks_for(products.l.out), THREADS, 0, stream>>>(scales, products.sums, products.l.out);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_update_codebooks(float *codebooks, const float *weight, const float *H,
                                                  const uint16_t *codes, const float *scales, const aqlm_shape *shape,
                                                  int64_t cg_steps, void *workspace, cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    Arena arena(workspace);
    const Products products(Layer(weight, H, codes, codebooks, scales, *shape), device, arena, stream);
    const Layer &l = products.l;
    if (l.K * l.points > UINT32_MAX) return cudaErrorInvalidValue;
    Index index(l, arena);
    const Cg cg = cg_of(l, arena);
    if (const cudaError_t error = index.fill(l, stream)) return error;
    begin_kernel<<<blocks_for(std::max<int64_t>(cg.n, SCALARS)), THREADS, 0, stream>>>(cg, codebooks);
    if (const cudaError_t error = products.multiply(RESIDUAL, codebooks)) return error;
    if (const cudaError_t error = gather(cg.r, products.product, index, l, stream)) return error;
    const dim3 grid(static_cast<unsigned>(l.E), static_cast<unsigned>(l.K));
    const bool by_group = l.points / l.E > l.J && l.J <= 4096; /* 32 KB */
    const int threads = std::max(l.points / l.E >= 512 ? THREADS : 64, l.g * l.g);
    normal_kernel<<<grid, threads, by_group ? l.J * sizeof(unsigned long long) : 0, stream>>>(cg.factor, index, l,
                                                                                              by_group);
    cholesky_kernel<<<static_cast<unsigned>(divide_up(int64_t(l.K) * l.E, 32)), 32, 0, stream>>>(
        cg.factor, int64_t(l.K) * l.E, l.g);
    for (int64_t step = 0; step < cg_steps; ++step)
        if (const cudaError_t error = cg_step(cg, products, index, step == 0, stream)) return error;
    end_kernel<<<blocks_for(cg.n), THREADS, 0, stream>>>(codebooks, cg);
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_update_adam(float *codebooks, float *scales, double *moments, const float *weight,
                                             const float *H, const uint16_t *codes, const aqlm_shape *shape,
                                             int64_t steps, double learning_rate, int64_t steps_before, void *workspace,
                                             cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    Arena arena(workspace);
    const Products products(Layer(weight, H, codes, codebooks, scales, *shape), device, arena, stream);
    const Layer &l = products.l;
    if (l.K * l.points > UINT32_MAX) return cudaErrorInvalidValue;
    Index index(l, arena);
    const Cg cg = cg_of(l, arena);
    if (const cudaError_t error = index.fill(l, stream)) return error;
    for (int64_t step = 1; step <= steps; ++step) {
        if (const cudaError_t error = products.multiply(RESIDUAL, codebooks)) return error;
        if (const cudaError_t error = gather(cg.r, products.product, index, l, stream)) return error;
        if (const cudaError_t error = products.sum_rows()) return error;
        const double correction = 1.0 - pow(AQLM_ADAM_BETA2, static_cast<double>(steps_before + step));
        adam_kernel<<<blocks_for(cg.n + l.out), THREADS, 0, stream>>>(codebooks, scales, moments, cg.r, products.sums,
                                                                      cg.n, l.out, learning_rate, correction);
    }
    return cudaGetLastError();
}

extern "C" cudaError_t aqlm_cuda_square(float *square, const float *x, int64_t n, int64_t in, cudaStream_t stream) {
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    Gemm p = {square, x, x};
    p.lda = p.ldb = p.ldc = in;
    p.m = p.n = static_cast<int>(in), p.k = static_cast<int>(n);
    return gemm<true, true>(p, 1, device, stream);
}
