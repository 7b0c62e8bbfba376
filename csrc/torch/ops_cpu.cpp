/* ops_cpu.cpp: door 2, torch tensors on the CPU -> aqlm.h, by torch's stable ABI.
 *
 * Fake kernels and gradients are registered in aqlm_c/ops.py (the stable ABI has neither). */
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace aqlm_torch {
namespace {

using torch::stable::contiguous;

/* Contiguous tensors and the core's view of them, which borrows their memory. */
struct Weight {
    Tensor codes, codebooks, scales;
    aqlm_weight view;

    Weight(const Tensor &codes_in, const Tensor &codebooks_in, const Tensor &scales_in)
        : codes(contiguous(codes_in)), codebooks(contiguous(codebooks_in)), scales(contiguous(scales_in)) {
        view.shape = shape_of_weight(codes, codebooks, scales);
        view.dtype = dtype_of(codebooks, "codebooks");
        view.codes = codes.const_data_ptr();
        view.codebooks = codebooks.const_data_ptr();
        view.scales = scales.const_data_ptr();
    }
};

std::unique_ptr<void, decltype(&std::free)> aligned_bytes(size_t bytes) {
    constexpr size_t line = 64;
    void *memory = std::aligned_alloc(line, (bytes / line + 1) * line);
    check(memory != nullptr, "matmul: no memory for ", bytes, " bytes of workspace");
    return {memory, std::free};
}

/* y [..., out] = x [..., in] W^T + bias, of x's dtype; W is never whole in memory. */
Tensor matmul(const Tensor &x_in, const Tensor &codes, const Tensor &codebooks, const Tensor &scales,
              const std::optional<Tensor> &bias_in) {
    const Weight w(codes, codebooks, scales);
    const int64_t in_features = w.view.shape.in_features, out_features = w.view.shape.out_features;
    check(x_in.dim() >= 1 && x_in.size(x_in.dim() - 1) == in_features, "x: got shape ", shape_of(x_in),
          ", expected [..., ", in_features, "]");
    const Tensor x = contiguous(x_in);
    const aqlm_dtype dtype = dtype_of(x, "x");

    std::optional<Tensor> bias;
    if (bias_in) {
        check(bias_in->dim() == 1 && bias_in->size(0) == out_features, "bias: got shape ", shape_of(*bias_in),
              ", expected [", out_features, "]");
        check(bias_in->scalar_type() == x.scalar_type(), "bias: got dtype ",
              torch::headeronly::toString(bias_in->scalar_type()), ", expected that of x, ",
              torch::headeronly::toString(x.scalar_type()));
        bias = contiguous(*bias_in);
    }

    std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
    size.back() = out_features;
    Tensor y = torch::stable::new_empty(x, size);
    const int64_t n_rows = x.numel() / in_features;
    if (n_rows == 0) return y;
    aqlm_set_num_threads(static_cast<int>(torch::stable::get_num_threads())); /* follows torch.set_num_threads */
    const size_t bytes = aqlm_matmul_workspace(&w.view, n_rows);
    const auto workspace = aligned_bytes(bytes);
    check(aqlm_matmul(y.mutable_data_ptr(), x.const_data_ptr(), dtype, &w.view, bias ? bias->const_data_ptr() : nullptr,
                      n_rows, workspace.get(), bytes),
          "matmul");
    return y;
}

/* W [out, in], of the codebooks' dtype. */
Tensor decode_rows(const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    const Weight w(codes, codebooks, scales);
    Tensor rows = torch::stable::new_empty(w.codebooks, {w.view.shape.out_features, w.view.shape.in_features});
    check(aqlm_decode_rows(rows.mutable_data_ptr(), w.view.dtype, &w.view, 0, w.view.shape.out_features),
          "decode_rows");
    return rows;
}

} // namespace

STABLE_TORCH_LIBRARY(aqlm_c, m) {
    m.def("matmul(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias) -> Tensor");
    m.def("decode_rows(Tensor codes, Tensor codebooks, Tensor scales) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aqlm_c, CPU, m) {
    m.impl("matmul", TORCH_BOX(&matmul));
    m.impl("decode_rows", TORCH_BOX(&decode_rows));
}

} // namespace aqlm_torch
