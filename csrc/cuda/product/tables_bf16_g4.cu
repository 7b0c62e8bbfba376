#include "cuda/product/tables.cuh"

template cudaError_t aqlm_cuda::launch_tables<__nv_bfloat16, 4>(const TableLaunch &);
