/* cluster.cuh: blocks that run at the same time and write to each other's shared memory (sm_90 and later; before that,
 * a cluster is one block). */
#ifndef AQLM_CUDA_CLUSTER_CUH
#define AQLM_CUDA_CLUSTER_CUH

#include "cuda/common.cuh"

namespace aqlm_cuda {

constexpr int MAX_CLUSTER = 16;

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

__device__ inline int cluster_index() {
#if __CUDA_ARCH__ >= 900
    int index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
#else
    return blockIdx.x;
#endif
}

/* Barriers in shared memory that count bytes, used once: one thread opens it and says how many will come. */
__device__ inline void open_barrier(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1;\n"
                 "fence.mbarrier_init.release.cluster;" ::"r"(barrier)
                 : "memory");
#endif
}
__device__ inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ inline void wait_for_bytes(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n"
                 "@!done bra again; }" ::"r"(barrier)
                 : "memory");
#endif
}

/* All threads: after barriers are opened, and before anything is sent to other blocks. */
__device__ inline void announce() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void await_others() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

/* Sums of a cluster's blocks go to the block that finishes those outputs: each block has a mailbox of 4-byte values and
 * a barrier in shared memory that counts the bytes which arrived. */
struct Mailbox {
    uint32_t barrier, values; /* addresses in shared memory */

    __device__ void open(int bytes) const { open_barrier(barrier), expect_bytes(barrier, bytes); }
    __device__ void send(float value, int rank, int index) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .u32 to, at;\n"
                     "mapa.shared::cluster.u32 to, %0, %3;\n"
                     "mapa.shared::cluster.u32 at, %1, %3;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %2, [at]; }" ::"r"(
                         values + index * 4),
                     "r"(barrier), "r"(__float_as_uint(value)), "r"(rank)
                     : "memory");
#endif
    }
    __device__ void wait() const { wait_for_bytes(barrier); }
};

/* One thread of each of a cluster's `size` blocks, when all have opened their `barrier`, which counts the bytes: a
 * multiple of 16 * size of them from `from` to `to` in the shared memory of every block. sm_90: each fetches a part for
 * all, which is slow on later GPUs. */
__device__ inline void fetch_into_all(uint32_t to, const void *from, uint32_t bytes, int size, uint32_t barrier) {
#if __CUDA_ARCH__ == 900
    const uint32_t part = bytes / size, begin = part * cluster_rank();
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(to + begin),
                 "l"(static_cast<const char *>(from) + begin), "r"(part), "r"(barrier),
                 "h"(static_cast<uint16_t>((1 << size) - 1))
                 : "memory");
#elif __CUDA_ARCH__ > 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
#endif
}

/* How many clusters of `size` blocks run at a time; asks the driver once for each device and size. */
template <auto kernel> cudaError_t resident_clusters(int &clusters, int size, int threads, const Device &device) {
    static std::atomic<int> known[MAX_DEVICES][MAX_CLUSTER + 1]; /* and one more: none is an answer too */
    clusters = known[device.index][size].load(std::memory_order_relaxed) - 1;
    if (clusters >= 0) return cudaSuccess;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = device.shared_memory;
    config.attrs = &cluster;
    config.numAttrs = 1;
    if (const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return error;
    known[device.index][size].store(clusters + 1, std::memory_order_relaxed);
    return cudaSuccess;
}

/* A launch of clusters of `size` blocks which may start before the last one finishes (wait_for_kernels_before). */
template <auto kernel, class Problem, class... More>
cudaError_t launch_early(const Problem &p, dim3 grid, unsigned size, unsigned threads, size_t shared_memory,
                         const Device &device, cudaStream_t stream, const More &...more) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_memory;
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {size, 1, 1};
    config.attrs = attributes;
    config.numAttrs = !device.clusters ? 0 : size > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, p, more...);
}

} // namespace aqlm_cuda
#endif
