/* many_rows.cu: products of many rows by tiles: which formats there are, and how many rows a tile has. */
#include "cuda/product/many_rows_launch.cuh"
#include "cuda/product/paths.cuh"

namespace aqlm_cuda {

#define AQLM_DECLARE(T, CODE, G)                                                                                       \
    template <>                                                                                                        \
    cudaError_t launch_tiles<T, CODE, G>(const ManyRowsProblem &, int, int, void *, const Device &, cudaStream_t);
#define AQLM_DECLARE_ALL(T)                                                                                            \
    AQLM_DECLARE(T, 1, 4)                                                                                              \
    AQLM_DECLARE(T, 1, 8)                                                                                              \
    AQLM_DECLARE(T, 1, 16)                                                                                             \
    AQLM_DECLARE(T, 1, 32)                                                                                             \
    AQLM_DECLARE(T, 2, 8)                                                                                              \
    AQLM_DECLARE(T, 2, 16)
AQLM_DECLARE_ALL(__half)
AQLM_DECLARE_ALL(__nv_bfloat16)
#undef AQLM_DECLARE_ALL
#undef AQLM_DECLARE

namespace {

template <class T> cudaError_t launch(const Launch &l, int tile_rows) {
    const auto &[y, w, bias] = *l.products;
    const aqlm_shape &s = w.shape;
    ManyRowsProblem p = {};
    p.y = y, p.x = l.x, p.codes = static_cast<const unsigned char *>(w.codes), p.codebooks = w.codebooks;
    p.scales = w.scales, p.bias = bias;
    p.out = static_cast<int>(s.out_features), p.in = static_cast<int>(s.in_features), p.n_rows = l.n_rows;
    p.entries = 1 << s.nbits_per_codebook;
    const int K = static_cast<int>(s.num_codebooks);
    const auto go = [&](auto launcher) { return launcher(p, K, tile_rows, l.workspace, l.device, l.stream); };
    if (s.nbits_per_codebook > 8) return s.in_group_size == 8 ? go(launch_tiles<T, 2, 8>) : go(launch_tiles<T, 2, 16>);
    switch (s.in_group_size) {
    case 4: return go(launch_tiles<T, 1, 4>);
    case 8: return go(launch_tiles<T, 1, 8>);
    case 16: return go(launch_tiles<T, 1, 16>);
    default: return go(launch_tiles<T, 1, 32>);
    }
}

} // namespace

bool can_tile(const aqlm_shape &s, const Device &device) {
    const int64_t K = s.num_codebooks, g = s.in_group_size;
    if (!device.wgmma || device.shared_memory < 227 * 1024 || s.out_group_size != 1 || s.in_features % 64 != 0)
        return false;
    if (s.nbits_per_codebook > 8) return (g == 8 && K <= 2) || (g == 16 && K == 1);
    return (g == 8 && K <= 8) || ((g == 4 || g == 16) && K <= 4) || (g == 32 && (K <= 2 || K == 4));
}

/* H200: with 512 rows and 2x8g8 0.92 of cuBLAS for 28672x8192, where decoding first has 0.69, but 0.54 and 0.66 for
 * 4096x4096. */
int64_t most_tiled(const aqlm_shape &s) {
    if (s.num_codebooks > 4) return 64;
    return s.out_features * s.in_features >= int64_t{1} << 26 ? 512 : 256;
}

int tile_rows_of(const aqlm_shape &s, int64_t n_rows) {
    const bool finer = s.in_group_size == 8;
    if (s.num_codebooks > 4) return 64;
    if (n_rows <= 16) return 16;
    if (finer && n_rows <= 32) return 32;
    if (n_rows <= 64) return 64;
    return finer && n_rows <= 128 ? 128 : 256;
}

size_t tile_workspace(const aqlm_shape &s, int64_t n_rows, int tile_rows, const Device &device) {
    ManyRowsProblem p = {};
    p.out = static_cast<int>(s.out_features), p.in = static_cast<int>(s.in_features);
    p.n_rows = static_cast<int>(n_rows);
    return static_cast<size_t>(ManyRowsCut(p, tile_rows, TILE_OUTS, is_aligned(tile_rows), device.sms).bytes);
}

cudaError_t run_tiles(const Launch &l, int tile_rows) {
    return l.dtype == AQLM_F16 ? launch<__half>(l, tile_rows) : launch<__nv_bfloat16>(l, tile_rows);
}

} // namespace aqlm_cuda
