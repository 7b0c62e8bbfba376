/* matmul.cu: the plan of a product, and its launches. */
#include <cstdlib>
#include <cstring>
#include <utility>

#include "cuda/product/paths.cuh"

namespace aqlm_cuda {
namespace {

/* How many of `count` outputs or groups, `width` numbers of W each, are dense at a time: enough for a GPU to be busy,
 * little beside a model. 4,096 rows of 8192x28672 in slices of 2,340 outputs took 2.4 times as long as in slices of
 * 2,048 (H100). Slices that stay in L2 did not pay: of 2^24 numbers, 3 to 20% slower with 64 rows, within 3% with
 * 4,096. */
int64_t slice_size(int64_t count, int64_t width, int64_t multiple) {
    constexpr int64_t MOST = int64_t{1} << 26;
    return std::min(count, divide_up(divide_up(count, divide_up(count * width, MOST)), multiple) * multiple);
}
constexpr int64_t DENSE_TILE = 128; /* widths that dense products are fast with */

/* Off by default: its parts ran in the ladder (benchmarks/many_rows) and in the tests of earlier commits, but not yet
 * as they stand together, and racecheck has not seen them. */
bool wants_tiles() {
    static const bool wants = [] {
        const char *wish = std::getenv("AQLM_C_TILES");
        return wish && std::strcmp(wish, "1") == 0;
    }();
    return wants;
}

/* Whether weights differ in `out` alone. */
bool are_alike(const aqlm_product *products, int64_t count) {
    const aqlm_weight &first = products->w;
    return std::all_of(products, products + count, [&](const aqlm_product &product) {
        aqlm_shape but_for_out = product.w.shape;
        but_for_out.out_features = first.shape.out_features;
        return std::memcmp(&but_for_out, &first.shape, sizeof but_for_out) == 0 && product.w.dtype == first.dtype;
    });
}

int64_t outs_of(const aqlm_product *products, int64_t count) {
    int64_t outs = 0;
    for (int64_t m = 0; m < count; ++m) outs += products[m].w.shape.out_features;
    return outs;
}

bool all_look_up(const aqlm_product *products, int64_t count, const Device &device) {
    return std::all_of(products, products + count,
                       [&](const aqlm_product &product) { return can_look_up(product.w.shape, device); });
}

/* Whether several products are one launch, which shares what is fixed in it: 2.0 times as fast for q, k and v of a 7B
 * (2x8g8, H100), 1.2 for gate and up. 70B's gate and up, 117M codes, took 4% longer than one after the other: many
 * codes wait for memory, and the cut that is best for one weight may not be for all. */
bool are_grouped(const aqlm_product *products, int64_t count, int64_t n_rows, const Device &device) {
    constexpr int64_t MOST_CODES = int64_t{1} << 26;
    if (n_rows != 1 || count > MAX_GROUPED || !are_alike(products, count)) return false;
    if (!all_look_up(products, count, device)) return false;
    const aqlm_shape &s = products->w.shape;
    return outs_of(products, count) * (s.in_features / s.in_group_size * s.num_codebooks) <= MOST_CODES;
}

/* The cut of products by tables, and what its sums take. */
cudaError_t plan_tables(aqlm_cuda_plan &plan, const aqlm_product *products, int64_t count, int64_t rows,
                        const Device &device) {
    if (const cudaError_t error = find_table_cut(plan.cut, products, static_cast<int>(count), device)) return error;
    if (plan.cut.parts > 1) plan.workspace = sizeof(float) * plan.cut.parts * rows * outs_of(products, count);
    return cudaSuccess;
}

/* Rows by tables read codes of their own, and take less time each: up to twice as many as there are weights (H200, gate
 * and up of Mixtral's 8 experts: 8 rows 93 us and by gathers 133, 16 rows 174 and 173). */
cudaError_t plan_routed(aqlm_cuda_plan &plan, const aqlm_product *products, int64_t count, aqlm_dtype dtype,
                        int64_t n_rows, const aqlm_cuda_routes &routes, const Device &device) {
    constexpr int64_t MOST_BLOCKS = 65535; /* of a grid, but for its first side */
    const aqlm_weight &w = products->w;
    const aqlm_shape &s = w.shape;
    if (count < 1 || count > MAX_GROUPED || routes.weights < 1 || routes.weights > MAX_WEIGHTS ||
        routes.rows_of_x < 1 || n_rows % routes.rows_of_x || n_rows < 1 || routes.y_stride > INT32_MAX ||
        !are_alike(products, count))
        return cudaErrorInvalidValue;
    const bool half = is_half(w, dtype);
    const int64_t K = s.num_codebooks, codes = s.in_features / s.in_group_size * K * (s.nbits_per_codebook > 8 ? 2 : 1);
    if (half && n_rows < 2 * routes.weights && (K == 1 || K == 2 || K == 4) && all_look_up(products, count, device)) {
        plan.path = plan.last_path = AQLM_CUDA_TABLES;
        if (const cudaError_t error = plan_tables(plan, products, count, n_rows, device)) return error;
        if (plan.cut.parts * n_rows <= MOST_BLOCKS) return cudaSuccess;
        plan = {};
    }
    const int64_t tiles = outs_of(products, count) / 16 + count; /* of gathers, or more */
    const bool aligned = std::all_of(products, products + count, [&](const aqlm_product &product) {
        return product.w.shape.out_features / s.out_group_size * codes % 16 == 0;
    });
    if (half && aligned && n_rows < INT32_MAX / 2 && can_gather(s, device) &&
        tiles * most_chunks(n_rows, routes.weights) < INT32_MAX / 2) {
        plan.path = plan.last_path = AQLM_CUDA_GATHER;
        plan.workspace = route_workspace(n_rows, routes.weights);
        return cudaSuccess;
    }
    plan.path = plan.last_path = AQLM_CUDA_PLAIN;
    return n_rows <= MOST_BLOCKS ? cudaSuccess : cudaErrorInvalidValue;
}

/* Rows up to which tables, that read codes for each row, are faster than gathers (H200, 4096x4096: two rows of
 * 2x8g16 7.4 and 10.9 us, four 14.4 and 11.7; two of 2x8g32 11.7 and 9.5; four of 8x8g8 31 and 41). */
int64_t most_looked_up(const aqlm_shape &s, bool gathers, bool best) {
    if (!gathers) return MAX_ROWS;
    if (best || s.in_group_size == 32) return 1;
    return s.in_group_size == 8 && s.num_codebooks > 4 ? 4 : 2;
}

/* Whether planes are faster than gathers: with many codes (H200, one row of 1x16g8: 1024x4096 11.4 and 8.1 us,
 * 4096x4096 15.9 and 17.1, 13824x5120 36.5 and 65.9; eight 14.5 and 8.4, 20.5 and 17.5, 51.9 and 67.3. 2x16g8, one
 * row: 33.8 and 31.7 for 4096x4096, 97 and 124 for 13824x5120, eight 122 and 125). */
bool shards_best(const aqlm_shape &s, int64_t rows) {
    const int64_t groups = s.out_features * (s.in_features / s.in_group_size);
    if (s.num_codebooks > 1) return rows <= 4 && groups >= 3000000;
    return groups >= (rows <= 2 ? 1500000 : rows <= 4 ? 2000000 : 3000000);
}

/* Of more rows, 8 at a time, decoding W for a dense product is faster. Codebooks that L1 holds are gathered as fast as
 * those in shared memory; entries of 16 numbers and more, a fraction of the gathers. */
int64_t most_gathered(const aqlm_shape &s, bool best) {
    const int64_t K = s.num_codebooks, g = s.in_group_size;
    if (best && s.nbits_per_codebook <= 8) return 3 * MAX_ROWS;
    const bool in_l1 = s.nbits_per_codebook > 8 && K * s.out_group_size * g * 2 << s.nbits_per_codebook <= 128 * 1024;
    return K * 8 <= g && (in_l1 || g > 8) ? 2 * MAX_ROWS : MAX_ROWS;
}

cudaError_t plan_matmul(aqlm_cuda_plan &plan, const aqlm_product *products, int64_t count, aqlm_dtype dtype,
                        int64_t n_rows, const Device &device) {
    if (count > 1 && !are_grouped(products, count, n_rows, device)) {
        plan.path = plan.last_path = AQLM_CUDA_SEPARATE;
        return cudaSuccess;
    }

    const aqlm_weight &w = products->w;
    const aqlm_shape &s = w.shape;
    const bool gathers = is_half(w, dtype) && can_gather(s, device), looks_up = can_look_up(s, device);
    const bool best = gathers && gathers_best(s, device);
    const int64_t not_tiled = gathers ? MAX_ROWS : looks_up ? MAX_ROWS / 2 : 0;
    if (wants_tiles() && n_rows > not_tiled && n_rows <= most_tiled(s) && is_half(w, dtype) && can_tile(s, device)) {
        if (s.out_features > INT32_MAX / 2 || s.in_features > INT32_MAX / 16) return cudaErrorInvalidValue;
        plan.path = plan.last_path = AQLM_CUDA_TILES;
        plan.tile_rows = tile_rows_of(s, n_rows);
        plan.workspace = tile_workspace(s, n_rows, plan.tile_rows, device);
        return cudaSuccess;
    }
    if (n_rows > (gathers ? most_gathered(s, best) : MAX_ROWS / 2)) {
        plan.path = plan.last_path = AQLM_CUDA_DENSE;
        plan.slice_size = slice_size(s.out_features, s.in_features, DENSE_TILE);
        return cudaSuccess;
    }

    for (int64_t m = 0; m < count; ++m)
        if (products[m].w.shape.out_features > INT32_MAX / 2 || s.in_features > INT32_MAX / 16)
            return cudaErrorInvalidValue;
    const auto path_of = [&](int64_t rows) {
        if (looks_up && rows <= most_looked_up(s, gathers, best)) return AQLM_CUDA_TABLES;
        if (!gathers) return AQLM_CUDA_PLAIN;
        return can_shard(s, rows, device) && shards_best(s, rows) ? AQLM_CUDA_SHARDS : AQLM_CUDA_GATHER;
    };
    const int64_t rows = std::min<int64_t>(n_rows, MAX_ROWS), last_rows = n_rows > rows ? n_rows % MAX_ROWS : 0;
    plan.path = path_of(rows);
    plan.last_path = last_rows > 0 ? path_of(last_rows) : plan.path;
    for (const auto &[path, of] : {std::pair{plan.path, rows}, {plan.last_path, last_rows}})
        if (path == AQLM_CUDA_SHARDS && of > 0)
            plan.workspace = std::max(plan.workspace, shard_workspace(s, of, device));
    if (plan.path == AQLM_CUDA_TABLES || plan.last_path == AQLM_CUDA_TABLES)
        return plan_tables(plan, products, count, plan.path == AQLM_CUDA_TABLES ? rows : last_rows, device);
    return cudaSuccess;
}

cudaError_t run(aqlm_cuda_path path, const Launch &launch) {
    switch (path) {
    case AQLM_CUDA_PLAIN: return run_plain(launch);
    case AQLM_CUDA_TABLES: return run_tables(launch);
    case AQLM_CUDA_GATHER: return run_gather(launch);
    case AQLM_CUDA_SHARDS: return run_shards(launch);
    default: return cudaErrorInvalidValue; /* it is the caller's */
    }
}

} // namespace
} // namespace aqlm_cuda

using namespace aqlm_cuda;

extern "C" cudaError_t aqlm_cuda_matmul_plan(aqlm_cuda_plan *plan, const aqlm_product *products, int64_t count,
                                             aqlm_dtype dtype, int64_t n_rows) {
    *plan = {};
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    return plan_matmul(*plan, products, count, dtype, n_rows, device);
}

extern "C" cudaError_t aqlm_cuda_matmul_backward_plan(aqlm_cuda_plan *plan, const aqlm_weight *w) {
    const aqlm_shape &s = w->shape;
    *plan = {};
    plan->path = plan->last_path = AQLM_CUDA_DENSE;
    plan->slice_size =
        slice_size(s.in_features / s.in_group_size, s.out_features * s.in_group_size, DENSE_TILE / s.in_group_size);
    return cudaSuccess;
}

extern "C" cudaError_t aqlm_cuda_matmul(const aqlm_product *products, int64_t count, const void *x, aqlm_dtype dtype,
                                        int64_t n_rows, const aqlm_cuda_plan *plan, void *workspace,
                                        cudaStream_t stream) {
    if (count > MAX_GROUPED || (plan->workspace > 0 && !workspace)) return cudaErrorInvalidValue;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const auto offset = [&](int64_t row, int64_t width) { return row * width * (dtype == AQLM_F32 ? 4 : 2); };
    if (plan->path == AQLM_CUDA_TILES) {
        const auto rows = static_cast<int>(n_rows);
        return run_tiles({products, 1, x, dtype, rows, plan->cut, workspace, device, stream}, plan->tile_rows);
    }
    for (int64_t done = 0; done < n_rows; done += MAX_ROWS) {
        const int rows = static_cast<int>(std::min<int64_t>(MAX_ROWS, n_rows - done));
        aqlm_product of_rows[MAX_GROUPED];
        for (int64_t m = 0; m < count; ++m) {
            of_rows[m] = products[m];
            of_rows[m].y = static_cast<char *>(products[m].y) + offset(done, products[m].w.shape.out_features);
        }
        const void *x_rows = static_cast<const char *>(x) + offset(done, products->w.shape.in_features);
        const Launch launch = {of_rows, static_cast<int>(count), x_rows, dtype, rows, plan->cut, workspace, device,
                               stream};
        const bool is_last = done > 0 && rows < MAX_ROWS;
        if (const cudaError_t error = run(is_last ? plan->last_path : plan->path, launch)) return error;
    }
    return cudaSuccess;
}

extern "C" cudaError_t aqlm_cuda_routed_plan(aqlm_cuda_plan *plan, const aqlm_product *products, int64_t count,
                                             aqlm_dtype dtype, int64_t n_rows, const aqlm_cuda_routes *routes) {
    *plan = {};
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    return plan_routed(*plan, products, count, dtype, n_rows, *routes, device);
}

extern "C" cudaError_t aqlm_cuda_routed(const aqlm_product *products, int64_t count, const void *x, aqlm_dtype dtype,
                                        int64_t n_rows, const aqlm_cuda_routes *routes, const aqlm_cuda_plan *plan,
                                        void *workspace, cudaStream_t stream) {
    if (count > MAX_GROUPED || (plan->workspace > 0 && !workspace)) return cudaErrorInvalidValue;
    Device device;
    if (const cudaError_t error = current_device(device)) return error;
    const auto rows = static_cast<int>(n_rows);
    const Routes on_device = {
        routes->index,    static_cast<int>(routes->weights), static_cast<int>(routes->rows_of_x),
        routes->y_stride, static_cast<int *>(workspace),     most_chunks(n_rows, routes->weights)};
    if (plan->path == AQLM_CUDA_GATHER)
        if (const cudaError_t error = run_routes(on_device, rows, device, stream)) return error;
    return run(plan->path,
               {products, static_cast<int>(count), x, dtype, rows, plan->cut, workspace, device, stream, on_device});
}
