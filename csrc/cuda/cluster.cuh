/* cluster.cuh: blocks that run at the same time and write to each other's shared memory (sm_90 and later; before that,
 * a cluster is one block). */
#ifndef AQLM_CUDA_CLUSTER_CUH
#define AQLM_CUDA_CLUSTER_CUH

#include "cuda/common.cuh"

namespace aqlm_cuda {

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

} // namespace aqlm_cuda
#endif
