/* tables_any.cu: tables of any K, g and dtypes. */
#include "cuda/product/tables.cuh"

namespace aqlm_cuda {

template <> cudaError_t launch_tables<float, 0>(const TableLaunch &l) {
    return launch_table_kernel<float, 0, ANY_PERIOD>(l);
}

cudaError_t resident_table_clusters(int &clusters, int size, const Device &device) {
    constexpr auto kernel = table_kernel<float, 0, ANY_PERIOD, false>;
    if (const cudaError_t error = allow_shared_memory<kernel>(device)) return error;
    return resident_clusters<kernel>(clusters, size, 32 * TABLE_WARPS, device);
}

} // namespace aqlm_cuda
