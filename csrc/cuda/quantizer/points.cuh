/* points.cuh: the groups that k-means looks at, and what its kernels agree about without asking the host. */
#ifndef AQLM_CUDA_QUANTIZER_POINTS_CUH
#define AQLM_CUDA_QUANTIZER_POINTS_CUH

#include "cuda/common.cuh"

namespace aqlm_cuda {

/* Point p is group p / rows of row p % rows * stride. */
struct Points {
    float *residual;         /* [out, J, g], what the codebooks so far leave of w / scale */
    const float *weight_of;  /* [J, g] weight of each column's squared distance */
    const float *row_weight; /* [out] scale^2, so that every group counts by its size in W */
    int rows, stride, groups, g;
    bool uniform; /* weight_of is 1 everywhere */

    __host__ __device__ int count() const { return rows * groups; }
    __device__ int group(int p) const { return p / rows; }
    __device__ int row(int p) const { return p % rows * stride; }
    __device__ const float *at(int p) const { return residual + (int64_t(row(p)) * groups + group(p)) * g; }
};

/* What decides whether the kernels of a round do anything. */
struct Rounds {
    double error;        /* after the last round */
    int done;            /* the error fell by less than the tolerance */
    int all_have_points; /* no entry is to be seeded again */
};

} // namespace aqlm_cuda
#endif
