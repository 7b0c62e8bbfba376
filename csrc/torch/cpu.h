/* cpu.h: what the ops of tensors on the CPU share. */
#ifndef AQLM_TORCH_CPU_H
#define AQLM_TORCH_CPU_H

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace aqlm_torch {

/* torch's own goes through the dispatcher even if there is nothing to do. */
inline Tensor as_contiguous(const Tensor &t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

/* The core cuts its loops for as many threads as torch.set_num_threads says. */
inline void follow_torch_threads() { aqlm_set_num_threads(static_cast<int>(torch::stable::get_num_threads())); }

/* Whether this thread is inside an op that Ctrl-C stops. Products are short, and run inside what would not expect it.
 */
inline thread_local bool answers_signals = false;

} // namespace aqlm_torch
#endif
