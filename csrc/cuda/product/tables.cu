/* tables.cu: how a product by tables is cut, and which of their kernels makes it. */
#include <climits>

#include "cuda/product/tables_launch.cuh"

namespace aqlm_cuda {
namespace {

int64_t clusters_of(const aqlm_product *products, int count, int64_t outs_of_cluster) {
    int64_t clusters = 0;
    for (int m = 0; m < count; ++m) clusters += divide_up(products[m].w.shape.out_features, outs_of_cluster);
    return clusters;
}

template <class T> cudaError_t launch_half_tables(const TableLaunch &l) {
    switch (l.problem.in_group_size) {
    case 4: return launch_tables<T, 4>(l);
    case 8: return launch_tables<T, 8>(l);
    case 16: return launch_tables<T, 16>(l);
    default: return launch_tables<T, 32>(l);
    }
}

} // namespace

bool can_look_up(const aqlm_shape &s, const Device &device) {
    return s.nbits_per_codebook <= 8 && s.out_group_size == 1 && s.out_features >= BATCH &&
           s.out_features < 1 << 28 && /* the grid's limit */
           s.in_features / s.in_group_size * s.num_codebooks % 4 == 0 &&
           device.shared_memory >= TABLE_BYTES + 16 * 1024;
}

cudaError_t find_table_cut(aqlm_cuda_cut &best, const aqlm_product *products, int count, const Device &device) {
    /* Parts, summed by a second kernel, cost 1.1 to 1.4 us and save making tables again: 8x8g8 at 4096x11008 took 30 us
     * in clusters of 16, each block with tables of six slices, and 22 in parts.
     *
     * In outputs looked up (H100): of making tables, and of the kernel that sums parts; and the outputs that all blocks
     * look up at a time, more of which would wait for memory */
    constexpr int TABLES_COST = 480, SUM_COST = 250, PART_COST = 2, AT_A_TIME = 110, MOST_ROUNDS = 8;
    constexpr int64_t MOST_PARTS = 1024;
    const aqlm_shape &s = products->w.shape;
    int64_t all_outs = 0;
    for (int m = 0; m < count; ++m) all_outs += products[m].w.shape.out_features;
    const auto slices =
        static_cast<int>(divide_up(s.in_features / s.in_group_size * s.num_codebooks, int64_t{TABLE_CODES}));
    int64_t least = INT64_MAX;
    const auto consider = [&](int size, int clusters, int slices_of_part) {
        const auto parts = static_cast<int>(divide_up(slices, slices_of_part));
        const int at_once = std::max(count, clusters / parts);
        /* even, so that the barrier behind the sums is aligned */
        const auto even = [](int64_t n) { return divide_up(n, 2) * 2; };
        const int64_t most = (device.shared_memory - TABLE_BYTES - 8) / 4 / size / 2 * 2;
        int64_t share = std::min(most, even(divide_up(all_outs, int64_t{at_once} * size)));
        int64_t wanted = clusters_of(products, count, share * size);
        for (; wanted > at_once && share < most; wanted = clusters_of(products, count, share * size))
            share = std::min(most, even(share + 1 + share / 64)); /* none has outputs of two weights */
        const int64_t waves = divide_up(wanted * parts, clusters), rounds = slices_of_part / size;
        const int64_t cost = waves * rounds * TABLES_COST +
                             std::max(waves * rounds * share * size, all_outs * slices / AT_A_TIME) +
                             (parts > 1 ? SUM_COST + parts * PART_COST : 0);
        if (cost >= least) return;
        least = cost, best = {parts, slices_of_part, size, static_cast<int>(share)};
    };
    consider(1, device.sms, slices);
    for (int rounds = 1; rounds <= MOST_ROUNDS && rounds < slices; ++rounds)
        if (divide_up(slices, rounds) <= MOST_PARTS) consider(1, device.sms, rounds);
    if (slices > 1 && slices <= MAX_CLUSTER && device.clusters) {
        int clusters;
        if (const cudaError_t error = resident_table_clusters(clusters, slices, device)) return error;
        if (clusters > 0) consider(slices, clusters, slices);
    }
    return cudaSuccess;
}

cudaError_t run_tables(const Launch &launch) {
    const aqlm_weight &first = launch.products->w;
    const aqlm_shape &s = first.shape;
    TableLaunch l = {};
    l.count = launch.count, l.n_rows = launch.n_rows, l.device = launch.device, l.stream = launch.stream;
    TableProblem &p = l.problem;
    p.x = launch.x, p.dtype = launch.dtype, p.weight_dtype = first.dtype;
    p.in_group_size = static_cast<int>(s.in_group_size), p.groups = static_cast<int>(s.in_features / s.in_group_size);
    p.num_codebooks = static_cast<int>(s.num_codebooks), p.entries = 1 << s.nbits_per_codebook, p.cut = launch.cut;
    p.codebook_bytes = p.num_codebooks * p.entries * p.in_group_size * (first.dtype == AQLM_F32 ? 4 : 2);
    p.routes = launch.routes;
    auto *sums = static_cast<float *>(launch.workspace);
    for (int m = 0; m < MAX_GROUPED; ++m) {
        TableWeight &of = l.weights.of[m];
        of.first_cluster = INT_MAX;
        if (m >= launch.count) continue;
        const auto &[y, w, bias] = launch.products[m];
        const auto out = static_cast<int>(w.shape.out_features);
        of = {y,    sums,        w.scales,
              bias, w.codebooks, static_cast<const uint8_t *>(w.codes),
              out,  l.clusters,  launch.routes.index ? static_cast<int>(launch.routes.y_stride) : out};
        sums += static_cast<size_t>(p.cut.parts) * launch.n_rows * out;
        l.clusters += static_cast<int>(divide_up(out, p.cut.share * p.cut.cluster_size));
        l.most_outs = std::max(l.most_outs, out);
    }
    if (!is_half(first, p.dtype)) return launch_tables<float, 0>(l);
    return p.dtype == AQLM_F16 ? launch_half_tables<__half>(l) : launch_half_tables<__nv_bfloat16>(l);
}

} // namespace aqlm_cuda
