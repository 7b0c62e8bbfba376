/* gather.cu: which of the kernels by gathered entries makes a product, and with how much shared memory. */
#include <climits>

#include "cuda/product/gather_launch.cuh"

namespace aqlm_cuda {

template <> cudaError_t launch_gather<__half, 1>(GatherWork &, const GatherGrid &, int, int);
template <> cudaError_t launch_gather<__half, 2>(GatherWork &, const GatherGrid &, int, int);
template <> cudaError_t launch_gather<__nv_bfloat16, 1>(GatherWork &, const GatherGrid &, int, int);
template <> cudaError_t launch_gather<__nv_bfloat16, 2>(GatherWork &, const GatherGrid &, int, int);

namespace {

int64_t codebook_bytes(const aqlm_shape &s) {
    return s.num_codebooks * s.out_group_size * s.in_group_size * 2 << s.nbits_per_codebook;
}

/* The codebooks of the kernel for exactly this format, 0: of the kernel for any. */
int codebooks_of_kernel(const aqlm_shape &s, const Device &device) {
    const int64_t K = s.num_codebooks, bytes = s.nbits_per_codebook <= 8 ? 1 : 2, g = s.in_group_size;
    const bool has_kernel = s.out_group_size == 1 && ((g == 8 && K * bytes <= 4) || (g == 16 && K == 1 && bytes == 2));
    if (!has_kernel || s.in_features / g % (K * bytes <= 2 ? 8 : 4) != 0) return 0;
    if (bytes == 1 && (K + 1) / 2 * BOOK_PAIR_BYTES + PARTS_BYTES + 48 * 1024 > device.shared_memory) return 0;
    return static_cast<int>(K);
}

/* How often the codebooks of the kernel for any lie in shared memory: an entry at most once for each part of the
 * banks, 128 bytes; 0: they do not fit. */
int copies_of_codebooks(const aqlm_shape &s, const Device &device) {
    int64_t copies = 64 / s.in_group_size;
    while (copies > 0 && codebook_bytes(s) * copies + PARTS_BYTES + 16 * 1024 > device.shared_memory) copies /= 2;
    return static_cast<int>(copies);
}

} // namespace

bool can_gather(const aqlm_shape &s, const Device &device) {
    return codebook_bytes(s) < INT32_MAX / 16 && s.out_features < INT32_MAX / 2 &&
           s.in_features / s.in_group_size * s.num_codebooks < INT32_MAX / 2 &&
           device.shared_memory >= PARTS_BYTES + 48 * 1024;
}

bool gathers_best(const aqlm_shape &s, const Device &device) { return codebooks_of_kernel(s, device) > 0; }

GatherProblem gather_problem(const Launch &l, int m) {
    const auto &[y, w, bias] = l.products[m];
    return {y,
            l.x,
            static_cast<const unsigned char *>(w.codes),
            w.codebooks,
            w.scales,
            bias,
            static_cast<int>(w.shape.out_features),
            static_cast<int>(w.shape.in_features / w.shape.in_group_size),
            1 << w.shape.nbits_per_codebook,
            l.n_rows,
            static_cast<int>(w.shape.num_codebooks),
            static_cast<int>(w.shape.out_group_size)};
}

cudaError_t run_gather(const Launch &l) {
    const aqlm_shape &s = l.products->w.shape;
    GatherWork work = {};
    for (int m = 0; m < MAX_GROUPED; ++m) {
        work.first_tile[m] = INT_MAX;
        if (m >= l.count) continue;
        work.of[m] = gather_problem(l, m);
        work.first_tile[m] = work.tiles;
        work.tiles += static_cast<int>(divide_up(work.of[m].out, GATHER_TILE));
    }
    work.routes = l.routes;
    work.most_rows = std::min(l.n_rows, MAX_ROWS);
    work.y_stride = l.routes.index ? l.routes.y_stride : s.out_features;
    const int K = codebooks_of_kernel(s, l.device), G = static_cast<int>(s.in_group_size);
    const bool is_wide = s.nbits_per_codebook > 8;
    if (K == 0 && !is_wide) {
        work.copies = copies_of_codebooks(s, l.device);
        work.book_bytes = static_cast<int>(codebook_bytes(s)) * work.copies;
    }
    const int64_t chunks = l.routes.index ? l.routes.most_chunks : 1;
    const GatherGrid grid = {chunks * work.tiles, l.device, l.stream};
    if (l.dtype == AQLM_F16)
        return is_wide ? launch_gather<__half, 2>(work, grid, K, G) : launch_gather<__half, 1>(work, grid, K, G);
    return is_wide ? launch_gather<__nv_bfloat16, 2>(work, grid, K, G)
                   : launch_gather<__nv_bfloat16, 1>(work, grid, K, G);
}

} // namespace aqlm_cuda
