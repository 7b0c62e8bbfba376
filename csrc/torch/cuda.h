/* cuda.h: what the CUDA bindings share: errors, tensors as kernels load them, the current device and stream, ATen. */
#ifndef AQLM_TORCH_CUDA_H
#define AQLM_TORCH_CUDA_H

#include <array>
#include <optional>

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace aqlm_torch {

inline void check(cudaError_t error, const char *what) {
    check(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

/* t, dense and 16-byte aligned, as the kernels load it. */
inline Tensor ready(const Tensor &t) {
    Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
    return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

/* `device` is the current one while this lives. */
struct OnDevice {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    cudaStream_t stream;

    explicit OnDevice(int32_t device) {
        int current;
        check(cudaGetDevice(&current), "cudaGetDevice");
        if (current != device) guard.emplace(device);
        void *handle;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
        stream = static_cast<cudaStream_t>(handle);
    }
};

/* name(arguments...), an ATen operator whose first Results results are tensors. */
template <size_t Results = 1, class... Arguments>
std::array<Tensor, Results> call(const char *name, const char *overload, const Arguments &...arguments) {
    namespace detail = torch::stable::detail;
    std::array<StableIValue, sizeof...(Arguments)> stack{detail::from(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    if constexpr (Results == 1) return {detail::to<Tensor>(stack[0])};
    else return {detail::to<Tensor>(stack[0]), detail::to<Tensor>(stack[1])};
}

} // namespace aqlm_torch
#endif
