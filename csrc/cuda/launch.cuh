/* launch.cuh: what launchers share: what a device can do, and launches that overlap. */
#ifndef AQLM_CUDA_LAUNCH_CUH
#define AQLM_CUDA_LAUNCH_CUH

#include <algorithm>
#include <atomic>

#include "cuda/common.cuh"

namespace aqlm_cuda {

/* What the launchers need to know of a device, asked once. */
struct Device {
    int index, sms, shared_memory;
    bool clusters, wgmma;
};

inline constexpr int MAX_DEVICES = 64;

inline cudaError_t current_device(Device &device) {
    static std::atomic<uint64_t> known[MAX_DEVICES];
    if (const cudaError_t error = cudaGetDevice(&device.index)) return error;
    if (device.index >= MAX_DEVICES) return cudaErrorInvalidDevice;
    uint64_t packed = known[device.index].load(std::memory_order_relaxed);
    if (packed == 0) {
        int sms, memory, major;
        if (const cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device.index))
            return error;
        if (const cudaError_t error =
                cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index))
            return error;
        if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index))
            return error;
        packed = uint64_t(sms) << 32 | uint64_t(major >= 9) << 31 | uint64_t(major == 9) << 30 | uint64_t(memory);
        known[device.index].store(packed, std::memory_order_relaxed);
    }
    device.sms = int(packed >> 32);
    device.clusters = packed >> 31 & 1;
    device.wgmma = packed >> 30 & 1;
    device.shared_memory = int(packed & 0x3fffffff);
    return cudaSuccess;
}

/* Lets `kernel` use all of the device's shared memory, and clusters of 16 blocks; tells the driver once for a device.
 */
template <auto kernel> cudaError_t allow_shared_memory(const Device &device) {
    static std::atomic<uint64_t> done;
    const uint64_t bit = uint64_t(1) << device.index;
    if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_memory);
    if (error == cudaSuccess && device.clusters)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
    return error;
}

constexpr int MAX_CLUSTER = 16;

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
