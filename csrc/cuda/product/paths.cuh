/* paths.cuh: the paths of a product with few rows, each in a file of its own, for matmul.cu to plan. */
#ifndef AQLM_CUDA_PRODUCT_PATHS_CUH
#define AQLM_CUDA_PRODUCT_PATHS_CUH

#include "cuda/launch.cuh"

namespace aqlm_cuda {

constexpr int MAX_ROWS = 8;    /* of a launch, but by tiles */
constexpr int MAX_GROUPED = 3; /* weights of a launch: q, k and v */

/* Rows of y that each have one of several weights, one behind the other in memory (routes.cu). index NULL: all rows
 * have the same. */
struct Routes {
    const int64_t *index; /* [n_rows], the weight of each; another number: zeros */
    int weights;
    int rows_of_x;    /* rows of y in a row that have one row of x */
    int64_t y_stride; /* numbers from row to row of y */
    /* [1 + 3 * most_chunks + n_rows]: chunks of up to MAX_ROWS rows with one weight, how many there are; of each its
     * weight, or -1, its first place, how many rows; which row is in each place */
    int *table;
    int most_chunks;
};

/* One launch, with up to MAX_ROWS rows of x; by tiles, or with routes, with all. */
struct Launch {
    const aqlm_product *products;
    int count;
    const void *x;
    aqlm_dtype dtype;
    int n_rows;
    aqlm_cuda_cut cut; /* for tables */
    void *workspace;
    Device device;
    cudaStream_t stream;
    Routes routes = {nullptr, 1, 1, 0, nullptr, 0};
};

/* x and codebooks of one 16-bit dtype, for which there are matrix instructions. */
inline bool is_half(const aqlm_weight &w, aqlm_dtype dtype) { return dtype == w.dtype && dtype != AQLM_F32; }

/* Every format and mix of dtypes (plain.cu). */
cudaError_t run_plain(const Launch &);

/* Tables of products (tables.cu). The outputs are cut among clusters, and the row either into a slice for each block of
 * a cluster, or, if a cluster is one block, into parts of some slices each, whose sums another kernel adds up. */
bool can_look_up(const aqlm_shape &s, const Device &device);
/* The cheapest cut: a cluster with a block for each slice, or single blocks for all of the row or parts of it. It is
 * one for all dtypes. Shapes differ in `out` alone. */
cudaError_t find_table_cut(aqlm_cuda_cut &best, const aqlm_product *products, int count, const Device &device);
cudaError_t run_tables(const Launch &);

/* One product by gathered entries, of one 16-bit dtype (gather.cu). */
struct GatherProblem {
    void *y;
    const void *x;
    const unsigned char *codes;
    const void *codebooks, *scales, *bias;
    int out, groups, entries, n_rows, num_codebooks, out_group_size;
};

bool can_gather(const aqlm_shape &s, const Device &device);
/* Whether there is a kernel for exactly this format; else it is the one for any, which is slower. */
bool gathers_best(const aqlm_shape &s, const Device &device);
GatherProblem gather_problem(const Launch &, int m = 0);
cudaError_t run_gather(const Launch &);

/* Sorts rows by their weights into the table of routes; bytes of that (routes.cu). */
constexpr int MAX_WEIGHTS = 1024;
int most_chunks(int64_t n_rows, int64_t weights);
size_t route_workspace(int64_t n_rows, int64_t weights);
cudaError_t run_routes(const Routes &, int n_rows, const Device &device, cudaStream_t stream);

/* The same where L1 cannot hold the codebooks (shards.cu). */
bool can_shard(const aqlm_shape &s, int64_t n_rows, const Device &device);
size_t shard_workspace(const aqlm_shape &s, int64_t n_rows, const Device &device);
cudaError_t run_shards(const Launch &);

/* Many rows by tiles (many_rows.cu): all rows of x at once, tile_rows of them in a tile. */
bool can_tile(const aqlm_shape &s, const Device &device);
int64_t most_tiled(const aqlm_shape &s); /* rows up to which that is faster than dense products */
int tile_rows_of(const aqlm_shape &s, int64_t n_rows);
size_t tile_workspace(const aqlm_shape &s, int64_t n_rows, int tile_rows, const Device &device);
cudaError_t run_tiles(const Launch &, int tile_rows);

} // namespace aqlm_cuda
#endif
