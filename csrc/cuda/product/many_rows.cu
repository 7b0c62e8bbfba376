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

/* H200, 2x8g8, times cuBLAS, by tiles and decoding first: 4096x4096 .71 and .68 with 512 rows, .88 and .89 with 2,048;
 * 8192x8192 .95 and .70, .96 and .90; 11008x4096 .79 and .70, .96 and .93; 1024x4096 .50 and .65 with 512. Three and
 * more codebooks, and large ones, are slower to decode for each tile of rows. */
int64_t most_tiled(const aqlm_shape &s) {
    if (s.num_codebooks > 4) return 64;
    const int64_t numbers = s.out_features * s.in_features;
    if (s.out_features <= 1024) return numbers <= int64_t{1} << 22 ? 128 : 256;
    if (s.nbits_per_codebook > 8 || s.num_codebooks > 2) return 256;
    return numbers <= int64_t{1} << 24 ? 1024 : 2048;
}

/* 28672x8192, 2x8g8, H200: tiles of 16 rows take 58 us, of 32 68, of 64 81, of 128 107, of 256 175. Few outputs are
 * shared by so many blocks that two tiles of 64 rows are faster than one of 128 (1024x4096: 9.2 and 14.4 us), and where
 * there are not many, what blocks add up is less with 128 rows (4096x4096, 256 rows: 25 and 29 us). */
int tile_rows_of(const aqlm_shape &s, int64_t n_rows) {
    const bool finer = s.in_group_size == 8; /* sizes of other formats are fewer */
    if (s.num_codebooks > 4) return 64;
    if (n_rows <= 16) return 16;
    if (finer && n_rows <= 32) return 32;
    if (n_rows <= 64 || s.out_features <= 1024) return 64;
    if (!finer) return 256;
    const bool few_tiles = n_rows <= 512 && s.out_features * s.in_features <= int64_t{1} << 24;
    return few_tiles || divide_up(n_rows, 128) * 107 < divide_up(n_rows, 256) * 175 ? 128 : 256;
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
