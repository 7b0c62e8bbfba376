/* cpu.h: what the ops of tensors on the CPU share. */
#ifndef AQLM_TORCH_CPU_H
#define AQLM_TORCH_CPU_H

#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace aqlm_torch {

/* Files of others and views of bytes give tensors at odd addresses. */
inline bool is_aligned(const Tensor &t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % t.element_size() == 0;
}

/* As the core reads it; torch's own goes through the dispatcher even if there is nothing to do. */
inline Tensor as_contiguous(const Tensor &t) {
    if (!t.is_contiguous()) return torch::stable::contiguous(t);
    return is_aligned(t) ? t : torch::stable::clone(t);
}

/* The core cuts its loops for as many threads as torch.set_num_threads says. */
inline void follow_torch_threads() { aqlm_set_num_threads(static_cast<int>(torch::stable::get_num_threads())); }

/* Whether this thread is inside an op that Ctrl-C stops. Products are short, and run inside what would not expect it.
 */
inline thread_local bool answers_signals = false;

} // namespace aqlm_torch
#endif
