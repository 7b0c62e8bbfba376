#include "cuda/product/tables.cuh"

template cudaError_t aqlm_cuda::launch_tables<__half, 8>(const TableLaunch &);
