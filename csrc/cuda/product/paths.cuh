/* paths.cuh: the paths of a product with few rows, each in a file of its own, for matmul.cu to plan. */
#ifndef AQLM_CUDA_PRODUCT_PATHS_CUH
#define AQLM_CUDA_PRODUCT_PATHS_CUH

#include "cuda/launch.cuh"

namespace aqlm_cuda {

constexpr int MAX_ROWS = 8;    /* of a launch, but by tiles */
constexpr int MAX_GROUPED = 3; /* weights of a launch: q, k and v */

/* One launch, with up to MAX_ROWS rows of x; by tiles with all. */
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
    int out, groups, entries, n_rows;
};

/* Its loads of codes must be whole and aligned, its codebooks fit. */
bool can_gather(const aqlm_shape &s, const Device &device);
GatherProblem gather_problem(const Launch &);
cudaError_t run_gather(const Launch &);

/* The same where L1 cannot hold the codebook (shards.cu). */
bool can_shard(const aqlm_shape &s, int64_t n_rows, const Device &device);
size_t shard_workspace(const aqlm_shape &s, const Device &device);
cudaError_t run_shards(const Launch &);

/* Many rows by tiles (many_rows.cu): all rows of x at once, tile_rows of them in a tile. */
bool can_tile(const aqlm_shape &s, const Device &device);
int64_t most_tiled(const aqlm_shape &s); /* rows up to which that is faster than dense products */
int tile_rows_of(const aqlm_shape &s, int64_t n_rows);
size_t tile_workspace(const aqlm_shape &s, int64_t n_rows, int tile_rows, const Device &device);
cudaError_t run_tiles(const Launch &, int tile_rows);

} // namespace aqlm_cuda
#endif
