/* gather_launch.cuh: products by gathered entries, as the host sees them; kernels: gather.cuh. */
#ifndef AQLM_CUDA_PRODUCT_GATHER_LAUNCH_CUH
#define AQLM_CUDA_PRODUCT_GATHER_LAUNCH_CUH

#include "cuda/product/paths.cuh"

namespace aqlm_cuda {

constexpr int GATHER_WARPS = 16, GATHER_TILE = 16;
constexpr int SUM_TILES = 2; /* tiles between two sums over the warps, whose parts have two stages */
constexpr int PARTS_BYTES = 2 * SUM_TILES * GATHER_WARPS * 32 * 16;
constexpr int BOOK_PAIR_BYTES = 256 * 256; /* [256 entries][2 codebooks][8 copies][16 bytes] */
constexpr int SUM_BYTES = 128 * 4;         /* of a tile, between rounds */
constexpr int ROUTED_TILES = 32;           /* tiles that a block takes at a time where rows have weights of their own */

struct GatherWork {
    GatherProblem of[MAX_GROUPED];
    int tiles, first_tile[MAX_GROUPED]; /* of all, of a chunk of rows; INT_MAX: of none */
    int most_tiles, most_rows;          /* at a time */
    int copies, book_bytes;             /* of codebooks in shared memory, where they are not pairs; 0: none */
    int64_t y_stride;
    Routes routes;
};

struct GatherGrid {
    int64_t most_tiles; /* of all chunks of rows */
    Device device;
    cudaStream_t stream;
};

/* Entries of G numbers by codes of CODE bytes; each T and CODE a file of its own. K = 0: any K and out_group_size. */
template <class T, int CODE> cudaError_t launch_gather(GatherWork &work, const GatherGrid &grid, int K, int G);

} // namespace aqlm_cuda
#endif
