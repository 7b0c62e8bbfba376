/* matmul.cu: which path a product takes, and which products are one launch. */
#include <cstring>

#include "cuda/product/paths.h"

namespace aqlm_cuda {
namespace {

enum class Path { tables, gather, shards, plain };

/* Of up to 8 rows. */
Path path_of(const aqlm_weight &w, aqlm_dtype dtype, int64_t n_rows, const Device &device) {
    const bool gather = is_half(w, dtype) && can_gather(w.shape, device);
    if (can_look_up(w.shape, device) && (n_rows == 1 || !gather)) return Path::tables;
    if (!gather) return Path::plain;
    return can_shard(w.shape, n_rows, device) ? Path::shards : Path::gather;
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

cudaError_t run(const Launch &l) {
    switch (path_of(l.products->w, l.dtype, l.n_rows, l.device)) {
    case Path::tables: return run_tables(l);
    case Path::gather: return run_gather(l);
    case Path::shards: return run_shards(l);
    default: return run_plain(l);
    }
}

/* Bytes that run takes. */
size_t workspace_of(const aqlm_product *products, int count, aqlm_dtype dtype, int64_t n_rows, const Device &device) {
    const Path path = n_rows > 0 ? path_of(products->w, dtype, n_rows, device) : Path::plain;
    if (path == Path::shards) return shard_workspace(products->w.shape, device);
    TableCut cut;
    if (path != Path::tables || find_table_cut(cut, products, count, device) != cudaSuccess || cut.parts == 1)
        return 0; /* matmul will say why */
    int64_t outs = 0;
    for (int m = 0; m < count; ++m) outs += products[m].w.shape.out_features;
    return sizeof(float) * cut.parts * n_rows * outs;
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
    return for_each_launch(products, count, dtype, n_rows, device,
                           [&](const aqlm_product *some, int many, int64_t done, int rows) {
                               aqlm_product of_rows[MAX_GROUPED];
                               for (int m = 0; m < many; ++m) {
                                   of_rows[m] = some[m];
                                   of_rows[m].y = rows_of(some[m].y, done, some[m].w.shape.out_features);
                               }
                               const void *x_rows = rows_of(x, done, some->w.shape.in_features);
                               return run({of_rows, many, x_rows, dtype, rows, workspace, device, stream});
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
