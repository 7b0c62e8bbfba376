/* many_rows_launch.cuh: which tilings there are, for many_rows.cu to choose from and for the files that hold them. */
#ifndef AQLM_CUDA_PRODUCT_MANY_ROWS_LAUNCH_CUH
#define AQLM_CUDA_PRODUCT_MANY_ROWS_LAUNCH_CUH

#include "cuda/product/many_rows.cuh"

namespace aqlm_cuda {

/* How many copies of an entry's piece of codebooks fit: two planes of shared memory are for codebooks. */
template <int K, int G> constexpr int copies_of() {
    constexpr int PIECES = K * (G == 4 ? 1 : G / 8), ALL = G == 4 ? 16 : 8; /* of all codebooks */
    return PIECES <= 4 ? ALL : PIECES <= 8 ? ALL / 2 : PIECES <= 16 ? ALL / 4 : ALL / 8;
}

constexpr int TILE_WARPGROUPS = 2, TILE_OUTS = 64 * TILE_WARPGROUPS;

/* From so many rows of a tile on, blocks' shares end where tiles do: what they add up is much. */
constexpr bool is_aligned(int tile_rows) { return tile_rows >= 128; }

/* Of what codebooks leave of shared memory, four units of codes where they fit, of 2x8g8; the rest is stages of x. */
template <class B, int N> struct TilingOf {
    template <int AHEAD, int STAGES> using Tiling = ManyRowsTiling<N, TILE_WARPGROUPS, STAGES, AHEAD, is_aligned(N)>;
    static constexpr int AHEAD = is_aligned(N) && B::CODE == 1 && B::K <= 2 && B::G == 8 ? 4 : 0;
    using One = Tiling<AHEAD, 1>;
    static constexpr int MOST = (227 * 1024 - B::BOOKS - CodeStream<B, One>::BYTES) / One::BYTES;
    static constexpr int STAGES = MOST < 8 ? MOST : 8;
    static_assert(STAGES >= 2);
    using type = Tiling<AHEAD, STAGES>;
};

template <class T, class B, int N>
cudaError_t launch_tiling(const ManyRowsProblem &p, void *workspace, const Device &device, cudaStream_t stream) {
    return launch_many_rows<T, B, typename TilingOf<B, N>::type>(p, workspace, device, stream);
}

template <class T, class B>
cudaError_t launch_rows(const ManyRowsProblem &p, int tile_rows, void *workspace, const Device &device,
                        cudaStream_t stream) {
    if (tile_rows == 64) return launch_tiling<T, B, 64>(p, workspace, device, stream);
    if constexpr (B::K <= 4) {
        if (tile_rows == 16) return launch_tiling<T, B, 16>(p, workspace, device, stream);
        if (tile_rows == 256) return launch_tiling<T, B, 256>(p, workspace, device, stream);
    }
    if constexpr (B::G == 8 && B::K <= 4) { /* the most used: finer */
        if (tile_rows == 32) return launch_tiling<T, B, 32>(p, workspace, device, stream);
        if (tile_rows == 128) return launch_tiling<T, B, 128>(p, workspace, device, stream);
    }
    return cudaErrorInvalidValue;
}

/* Entries of G numbers by K codes of CODE bytes; each a file of its own. */
template <class T, int CODE, int G>
cudaError_t launch_tiles(const ManyRowsProblem &p, int num_codebooks, int tile_rows, void *workspace,
                         const Device &device, cudaStream_t stream);

#define AQLM_TILES(T, CODE, G, ...)                                                                                    \
    template <>                                                                                                        \
    cudaError_t launch_tiles<T, CODE, G>(const ManyRowsProblem &p, int num_codebooks, int tile_rows, void *workspace,  \
                                         const Device &device, cudaStream_t stream) {                                  \
        return launch_books<T, CODE, G, __VA_ARGS__>(p, num_codebooks, tile_rows, workspace, device, stream);          \
    }

/* The one of Ks that num_codebooks is. */
template <class T, int CODE, int G, int... Ks>
cudaError_t launch_books(const ManyRowsProblem &p, int num_codebooks, int tile_rows, void *workspace,
                         const Device &device, cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    ((num_codebooks == Ks && (error = launch_rows<T, Entries<T, Ks, CODE, G, CODE == 1 ? copies_of<Ks, G>() : 8>>(
                                  p, tile_rows, workspace, device, stream),
                              true)) ||
     ...);
    return error;
}

} // namespace aqlm_cuda
#endif
