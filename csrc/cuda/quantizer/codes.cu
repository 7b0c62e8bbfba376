/* codes.cu: working codes <-> the disk layout (core/product/pack.c), with the first code that is outside of it. */
#include "cuda/aqlm_cuda_quantizer.h"
#include "cuda/common.cuh"

namespace aqlm_cuda {
namespace {

constexpr int THREADS = 256;

/* Ascending places are kept by an integer minimum, so its order does not matter. */
template <class Stored, bool packs>
__global__ void convert_kernel(void *to, const void *from, int64_t n, int32_t entries, unsigned long long *where) {
    const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= n) return;
    const int32_t code =
        packs ? int32_t{static_cast<const uint16_t *>(from)[at]} : int32_t{static_cast<const Stored *>(from)[at]};
    const int32_t first = packs ? 0 : -entries / 2;
    if (code < first || code >= first + entries) atomicMin(where, static_cast<unsigned long long>(at));
    else if (packs) static_cast<Stored *>(to)[at] = static_cast<Stored>(code - (code >= entries / 2 ? entries : 0));
    else static_cast<uint16_t *>(to)[at] = static_cast<uint16_t>(code & (entries - 1));
}

template <bool packs>
cudaError_t convert(void *to, const void *from, int64_t n, int64_t bits, uint64_t *where, cudaStream_t stream) {
    if (const cudaError_t error = cudaMemsetAsync(where, 0xff, sizeof *where, stream)) return error;
    const auto blocks = static_cast<unsigned>(divide_up(n, THREADS));
    auto *first = reinterpret_cast<unsigned long long *>(where);
    if (n == 0) return cudaSuccess;
    if (bits <= 8) convert_kernel<int8_t, packs><<<blocks, THREADS, 0, stream>>>(to, from, n, 1 << bits, first);
    else convert_kernel<int16_t, packs><<<blocks, THREADS, 0, stream>>>(to, from, n, 1 << bits, first);
    return cudaGetLastError();
}

} // namespace
} // namespace aqlm_cuda

extern "C" cudaError_t aqlm_cuda_pack_codes(void *stored, const uint16_t *codes, int64_t n, int64_t bits,
                                            uint64_t *where, cudaStream_t stream) {
    return aqlm_cuda::convert<true>(stored, codes, n, bits, where, stream);
}

extern "C" cudaError_t aqlm_cuda_unpack_codes(uint16_t *codes, const void *stored, int64_t n, int64_t bits,
                                              uint64_t *where, cudaStream_t stream) {
    return aqlm_cuda::convert<false>(codes, stored, n, bits, where, stream);
}
