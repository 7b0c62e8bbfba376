/* tables_launch.cuh: products by tables, as the host sees them; kernels: tables.cuh. */
#ifndef AQLM_CUDA_PRODUCT_TABLES_LAUNCH_CUH
#define AQLM_CUDA_PRODUCT_TABLES_LAUNCH_CUH

#include "cuda/product/paths.cuh"

namespace aqlm_cuda {

constexpr int TABLE_WARPS = 16, TABLE_CODES = 128, TABLE_BYTES = TABLE_CODES * 256 * 4;
constexpr int BATCH = 16; /* outputs a warp sums at a time */

struct TableProblem {
    const void *x; /* [n_rows, in] */
    int codebook_bytes, groups, num_codebooks, entries;
    aqlm_cuda_cut cut;
    int in_group_size;
    aqlm_dtype dtype, weight_dtype;
    Routes routes;
};

/* Aligned: a line of the constants each. */
struct alignas(64) TableWeight {
    void *y;                /* [n_rows, out] */
    float *sums;            /* [n_rows, parts, out], if there are several parts */
    const void *scales;     /* [out] */
    const void *bias;       /* [out] or NULL */
    const void *codebooks;  /* [K, E, g] */
    const uint8_t *codes;   /* [out, J, K] */
    int out, first_cluster; /* INT_MAX: of no cluster */
    int y_stride;           /* numbers from row to row of y */
};

struct TableWeights {
    TableWeight of[MAX_GROUPED];
};

/* One launch. */
struct TableLaunch {
    TableProblem problem;
    TableWeights weights;
    int count, n_rows, clusters, most_outs; /* of weights, of rows, of clusters; of a weight's outputs */
    Device device;
    cudaStream_t stream;
};

/* T and G: dtype of x and weights, and in_group_size; float and 0: any of both. Each pair but that is compiled in a
 * file of its own, since these kernels are what a build waits for; K = 5 and 7 are for G = 8 alone. */
template <class T, int G> cudaError_t launch_tables(const TableLaunch &);
template <> cudaError_t launch_tables<float, 0>(const TableLaunch &);

/* How many clusters of `size` blocks run at a time, whatever T and G. */
cudaError_t resident_table_clusters(int &clusters, int size, const Device &device);

} // namespace aqlm_cuda
#endif
