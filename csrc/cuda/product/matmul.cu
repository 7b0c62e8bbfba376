/* matmul.cu: which kernel a product takes, which products are one launch, and the kernel that takes anything. */
#include <cstring>

#include "cuda/product/gather.cuh"
#include "cuda/product/shards.cuh"
#include "cuda/product/tables.cuh"

namespace aqlm_cuda {
namespace {

constexpr int PLAIN_WARPS = 8;

/* Every format and mix of dtypes: a warp sums one output of up to 8 rows, a lane every 32nd group. */
__global__ void plain_kernel(void *y, const void *x, const aqlm_weight w, const void *bias, const aqlm_dtype dtype,
                             const int n_rows) {
    const int64_t o = static_cast<int64_t>(blockIdx.x) * PLAIN_WARPS + threadIdx.x / 32;
    if (o >= w.shape.out_features) return;
    const int g = w.shape.in_group_size, og = w.shape.out_group_size;
    const int64_t in = w.shape.in_features, groups = in / g;
    float sums[MAX_ROWS] = {};
    for (int64_t j = threadIdx.x % 32; j < groups; j += 32) {
        float of_group[MAX_ROWS] = {}; /* long rows would lose bits in one sum */
        for (int i = 0; i < g; ++i) {
            const float value = weight_at(w, o / og, o % og, j, i);
#pragma unroll
            for (int n = 0; n < MAX_ROWS; ++n)
                if (n < n_rows) of_group[n] = fmaf(value, load_float(x, n * in + j * g + i, dtype), of_group[n]);
        }
#pragma unroll
        for (int n = 0; n < MAX_ROWS; ++n) sums[n] += of_group[n];
    }
#pragma unroll
    for (int n = 0; n < MAX_ROWS; ++n) {
        if (n >= n_rows) break;
        for (int distance = 16; distance; distance /= 2) sums[n] += __shfl_xor_sync(~0u, sums[n], distance);
        float total = sums[n] * load_float(w.scales, o / og, w.dtype);
        if (bias) total += load_float(bias, o, dtype);
        if (threadIdx.x % 32 == 0) store_float(y, n * w.shape.out_features + o, dtype, total);
    }
}

struct Problem {
    const aqlm_product *products;
    int count; /* of products: those of one launch */
    const void *x;
    aqlm_dtype dtype;
    int n_rows;
    float *workspace;
    Device device;
    cudaStream_t stream;
};

/* Whether a product by gathers takes shards: a codebook that L1 cannot hold. */
bool takes_shards(const aqlm_shape &s, int64_t n_rows, const Device &device) {
    return n_rows == 1 && s.num_codebooks == 1 && s.nbits_per_codebook > 13 && device.clusters &&
           device.shared_memory > 200 * 1024 && units_fit(s.out_features, s.in_features / 8, device);
}

cudaError_t find_table_cut(TableCut &cut, const aqlm_product *products, int count, const Device &device) {
    int outs[MAX_GROUPED];
    for (int m = 0; m < count; ++m) outs[m] = static_cast<int>(products[m].w.shape.out_features);
    return find_table_cut(cut, products->w.shape, outs, count, device);
}

template <class T, int G> auto table_launcher(int64_t num_codebooks) {
    switch (num_codebooks) {
    case 1:
    case 2:
    case 4: return launch_table_kernel<T, G, 1>;
    case 8: return launch_table_kernel<T, G, 2>;
    case 3:
    case 6: return launch_table_kernel<T, G, 3>;
    }
    if constexpr (G == 8) return num_codebooks == 5 ? launch_table_kernel<T, G, 5> : launch_table_kernel<T, G, 7>;
    else return launch_table_kernel<float, 0, ANY_PERIOD>;
}

template <class T> cudaError_t run_tables(const Problem &p) {
    const aqlm_weight &first = p.products->w;
    const aqlm_shape &s = first.shape;
    TableProblem t = {};
    TableWeights weights = {};
    t.x = p.x, t.dtype = p.dtype, t.weight_dtype = first.dtype;
    t.in_group_size = static_cast<int>(s.in_group_size), t.groups = static_cast<int>(s.in_features / s.in_group_size);
    t.num_codebooks = static_cast<int>(s.num_codebooks), t.entries = 1 << s.nbits_per_codebook;
    t.codebook_bytes = t.num_codebooks * t.entries * t.in_group_size * (first.dtype == AQLM_F32 ? 4 : 2);
    if (const cudaError_t error = find_table_cut(t.cut, p.products, p.count, p.device)) return error;
    if (t.cut.parts > 1 && !p.workspace) return cudaErrorInvalidValue;
    float *sums = p.workspace;
    for (int m = 0; m < p.count; ++m) {
        const auto &[y, w, bias] = p.products[m];
        const auto out = static_cast<int>(w.shape.out_features);
        weights.of[m] = {y, sums, w.scales, bias, w.codebooks, static_cast<const uint8_t *>(w.codes), out, 0};
        sums += static_cast<size_t>(t.cut.parts) * p.n_rows * out;
    }
    const auto launch = [&](auto kernel) { return kernel(t, weights, p.count, p.n_rows, p.device, p.stream); };
    if constexpr (std::is_same_v<T, float>) return launch(launch_table_kernel<float, 0, ANY_PERIOD>);
    else switch (s.in_group_size) {
        case 4: return launch(table_launcher<T, 4>(s.num_codebooks));
        case 8: return launch(table_launcher<T, 8>(s.num_codebooks));
        case 16: return launch(table_launcher<T, 16>(s.num_codebooks));
        default: return launch(table_launcher<T, 32>(s.num_codebooks));
        }
}

template <class T> cudaError_t run_gather(const Problem &p) {
    const auto &[y, w, bias] = *p.products;
    const aqlm_shape &s = w.shape;
    const GatherProblem g = {y,
                             p.x,
                             static_cast<const unsigned char *>(w.codes),
                             w.codebooks,
                             w.scales,
                             bias,
                             static_cast<int>(s.out_features),
                             static_cast<int>(s.in_features / s.in_group_size),
                             1 << s.nbits_per_codebook,
                             p.n_rows};
    if (takes_shards(s, p.n_rows, p.device)) return launch_shard_kernel<T>(g, p.workspace, p.device, p.stream);
    if (s.nbits_per_codebook > 8)
        return s.num_codebooks == 1 ? launch_gather_kernel<T, 1, 2>(g, p.device, p.stream)
                                    : launch_gather_kernel<T, 2, 2>(g, p.device, p.stream);
    switch (s.num_codebooks) {
    case 1: return launch_gather_kernel<T, 1, 1>(g, p.device, p.stream);
    case 2: return launch_gather_kernel<T, 2, 1>(g, p.device, p.stream);
    case 3: return launch_gather_kernel<T, 3, 1>(g, p.device, p.stream);
    default: return launch_gather_kernel<T, 4, 1>(g, p.device, p.stream);
    }
}

/* Whether the gather kernel can do it: its loads of codes must be whole and aligned, its codebooks fit. */
bool can_gather(const aqlm_shape &s, const Device &device) {
    const int64_t K = s.num_codebooks, bytes = s.nbits_per_codebook <= 8 ? 1 : 2;
    if (s.in_group_size != 8 || s.out_group_size != 1 || K * bytes > 4) return false;
    if (bytes == 1 && (K + 1) / 2 * BOOK_PAIR_BYTES + PARTS_BYTES + 48 * 1024 > device.shared_memory) return false;
    return s.in_features / 8 % (K * bytes <= 2 ? 8 : 4) == 0;
}

bool can_look_up(const aqlm_shape &s, const Device &device) {
    return s.nbits_per_codebook <= 8 && s.out_group_size == 1 && s.out_features >= BATCH &&
           s.out_features < 1 << 28 && /* the grid's limit */
           s.in_features / s.in_group_size * s.num_codebooks % 4 == 0 &&
           device.shared_memory >= TABLE_BYTES + 16 * 1024;
}

cudaError_t run_plain(const Problem &p) {
    const auto &[y, w, bias] = *p.products;
    const auto blocks = static_cast<unsigned>(divide_up(w.shape.out_features, PLAIN_WARPS));
    plain_kernel<<<blocks, 32 * PLAIN_WARPS, 0, p.stream>>>(y, p.x, w, bias, p.dtype, p.n_rows);
    return cudaGetLastError();
}

/* x and codebooks of one 16-bit dtype, for which there are matrix instructions. */
bool is_half(const aqlm_weight &w, aqlm_dtype dtype) { return dtype == w.dtype && dtype != AQLM_F32; }

enum class Path { tables, gather, plain };

/* Of up to 8 rows. */
Path path_of(const aqlm_weight &w, aqlm_dtype dtype, int64_t n_rows, const Device &device) {
    const bool gather = is_half(w, dtype) && can_gather(w.shape, device);
    if (can_look_up(w.shape, device) && (n_rows == 1 || !gather)) return Path::tables;
    return gather ? Path::gather : Path::plain;
}

/* Whether products are one launch. Of more codes it could be slower than several (H100): they wait for memory, and what
 * is best for one weight may not be for all. */
constexpr int64_t MAX_GROUPED_CODES = int64_t{1} << 26;

bool are_grouped(const aqlm_product *products, int64_t count, aqlm_dtype dtype, int64_t n_rows, const Device &device) {
    if (count < 2 || count > MAX_GROUPED) return false;
    const aqlm_shape &s = products->w.shape;
    int64_t outs = 0;
    for (int64_t m = 0; m < count; ++m) {
        const aqlm_weight &w = products[m].w;
        aqlm_shape but_for_out = w.shape;
        but_for_out.out_features = s.out_features;
        if (std::memcmp(&but_for_out, &s, sizeof s) || w.dtype != products->w.dtype ||
            path_of(w, dtype, n_rows, device) != Path::tables)
            return false;
        outs += w.shape.out_features;
    }
    return outs * (s.in_features / s.in_group_size * s.num_codebooks) <= MAX_GROUPED_CODES;
}

/* Products of one launch. */
cudaError_t run(const Problem &p) {
    const bool half = p.dtype == AQLM_F16, is_half_weight = is_half(p.products->w, p.dtype);
    switch (path_of(p.products->w, p.dtype, p.n_rows, p.device)) {
    case Path::tables:
        if (!is_half_weight) return run_tables<float>(p);
        return half ? run_tables<__half>(p) : run_tables<__nv_bfloat16>(p);
    case Path::gather: return half ? run_gather<__half>(p) : run_gather<__nv_bfloat16>(p);
    default: return run_plain(p);
    }
}

/* Bytes that run takes. */
size_t workspace_of(const aqlm_product *products, int count, aqlm_dtype dtype, int64_t n_rows, const Device &device) {
    const aqlm_shape &s = products->w.shape;
    const Path path = n_rows > 0 ? path_of(products->w, dtype, n_rows, device) : Path::plain;
    if (path == Path::tables) {
        TableCut cut;
        if (find_table_cut(cut, products, count, device) != cudaSuccess || cut.parts == 1)
            return 0; /* matmul will say why */
        int64_t outs = 0;
        for (int m = 0; m < count; ++m) outs += products[m].w.shape.out_features;
        return sizeof(float) * cut.parts * n_rows * outs;
    }
    if (path != Path::gather || !takes_shards(s, n_rows, device)) return 0;
    GatherProblem g = {};
    g.out = static_cast<int>(s.out_features), g.groups = static_cast<int>(s.in_features / 8);
    g.entries = 1 << s.nbits_per_codebook;
    size_t memory, bytes;
    plan_shards(g, device, memory, bytes);
    return bytes;
}

/* launch(products, how many, first row, how many) for those of one launch, by up to MAX_ROWS rows, until it fails. */
template <class Launch>
cudaError_t for_each_launch(const aqlm_product *products, int64_t count, aqlm_dtype dtype, int64_t n_rows,
                            const Device &device, const Launch &launch) {
    for (int64_t done = 0; done < n_rows; done += MAX_ROWS) {
        const int rows = static_cast<int>(std::min<int64_t>(MAX_ROWS, n_rows - done));
        const bool grouped = are_grouped(products, count, dtype, rows, device);
        for (int64_t m = 0; m < count; m += grouped ? count : 1)
            if (const cudaError_t error = launch(products + m, grouped ? static_cast<int>(count) : 1, done, rows))
                return error;
    }
    return cudaSuccess;
}

} // namespace
} // namespace aqlm_cuda

extern "C" cudaError_t aqlm_cuda_matmul(const aqlm_product *products, int64_t count, const void *x, aqlm_dtype dtype,
                                        int64_t n_rows, void *workspace, cudaStream_t stream) {
    using namespace aqlm_cuda;
    for (int64_t m = 0; m < count; ++m) {
        const aqlm_shape &s = products[m].w.shape;
        if (s.out_features > INT32_MAX / 2 || s.in_features > INT32_MAX / 16 ||
            s.in_features != products->w.shape.in_features)
            return cudaErrorInvalidValue;
    }
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const size_t bytes = dtype == AQLM_F32 ? 4 : 2;
    const auto rows_of = [&](const void *of, int64_t row, int64_t length) {
        return static_cast<char *>(const_cast<void *>(of)) + row * length * bytes;
    };
    return for_each_launch(
        products, count, dtype, n_rows, device, [&](const aqlm_product *some, int many, int64_t done, int rows) {
            aqlm_product of_rows[MAX_GROUPED];
            for (int m = 0; m < many; ++m) {
                of_rows[m] = some[m];
                of_rows[m].y = rows_of(some[m].y, done, some[m].w.shape.out_features);
            }
            const void *x_rows = rows_of(x, done, some->w.shape.in_features);
            return run({of_rows, many, x_rows, dtype, rows, static_cast<float *>(workspace), device, stream});
        });
}

extern "C" int64_t aqlm_cuda_matmul_rows(const aqlm_weight *w, aqlm_dtype dtype) {
    using namespace aqlm_cuda;
    Device device;
    if (current_device(device) != cudaSuccess) return INT64_MAX; /* aqlm_cuda_matmul will say why */
    const bool gathers = is_half(*w, dtype) && can_gather(w->shape, device);
    return gathers && w->shape.nbits_per_codebook <= 8 ? 3 * MAX_ROWS : gathers ? MAX_ROWS : MAX_ROWS / 2;
}

extern "C" size_t aqlm_cuda_matmul_workspace(const aqlm_product *products, int64_t count, aqlm_dtype dtype,
                                             int64_t n_rows) {
    using namespace aqlm_cuda;
    Device device;
    if (current_device(device) != cudaSuccess) return 0; /* aqlm_cuda_matmul will say why */
    size_t most = 0;
    for_each_launch(products, count, dtype, n_rows, device, [&](const aqlm_product *some, int many, int64_t, int rows) {
        most = std::max(most, workspace_of(some, many, dtype, rows, device));
        return cudaSuccess;
    });
    return most;
}
