/* ops_cpu.cpp: door 2, torch tensors on the CPU -> aqlm.h, by torch's stable ABI.
 *
 * Fake kernels and gradients are registered in aqlm_c/ops.py (the stable ABI has neither). */
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
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

/* The rows of x, [..., from], and as many new ones, y [..., to], of x's dtype. */
struct Product {
    Tensor x, y;
    aqlm_dtype dtype;
    int64_t n_rows;

    Product(const Tensor &x_in, const char *name, int64_t from, int64_t to) : x(x_in), y(x_in) {
        check(x_in.dim() >= 1 && x_in.size(x_in.dim() - 1) == from, name, ": got shape ", shape_of(x_in),
              ", expected [..., ", from, "]");
        dtype = dtype_of(x_in, name);
        x = contiguous(x_in);
        std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
        size.back() = to;
        y = torch::stable::new_empty(x, size);
        n_rows = x.numel() / from;
    }
};

/* 64-byte aligned, of size_of(w, n_rows) bytes. */
struct Workspace {
    size_t bytes;
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, std::free};

    Workspace(size_t (*size_of)(const aqlm_weight *, int64_t), const Weight &w, int64_t n_rows) {
        constexpr size_t line = 64;
        aqlm_set_num_threads(static_cast<int>(torch::stable::get_num_threads())); /* follows torch.set_num_threads */
        bytes = size_of(&w.view, n_rows);
        memory.reset(std::aligned_alloc(line, (bytes / line + 1) * line));
        check(memory != nullptr, "matmul: no memory for ", bytes, " bytes of workspace");
    }
};

/* y [..., out] = x [..., in] W^T + bias, of x's dtype; W is never whole in memory. */
Tensor matmul(const Tensor &x, const Tensor &codes, const Tensor &codebooks, const Tensor &scales,
              const std::optional<Tensor> &bias_in) {
    const Weight w(codes, codebooks, scales);
    const int64_t out_features = w.view.shape.out_features;
    Product p(x, "x", w.view.shape.in_features, out_features);
    std::optional<Tensor> bias;
    if (bias_in) {
        check(bias_in->dim() == 1 && bias_in->size(0) == out_features, "bias: got shape ", shape_of(*bias_in),
              ", expected [", out_features, "]");
        check(bias_in->scalar_type() == x.scalar_type(), "bias: got dtype ",
              torch::headeronly::toString(bias_in->scalar_type()), ", expected that of x, ",
              torch::headeronly::toString(x.scalar_type()));
        bias = contiguous(*bias_in);
    }
    if (p.n_rows == 0) return p.y;
    const Workspace space(aqlm_matmul_workspace, w, p.n_rows);
    check(aqlm_matmul(p.y.mutable_data_ptr(), p.x.const_data_ptr(), p.dtype, &w.view,
                      bias ? bias->const_data_ptr() : nullptr, p.n_rows, space.memory.get(), space.bytes),
          "matmul");
    return p.y;
}

/* grad_x [..., in] = grad_y [..., out] W, of grad_y's dtype; W is never whole in memory. */
Tensor matmul_backward(const Tensor &grad_y, const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    const Weight w(codes, codebooks, scales);
    Product p(grad_y, "grad_y", w.view.shape.out_features, w.view.shape.in_features);
    if (p.n_rows == 0) return p.y;
    const Workspace space(aqlm_matmul_backward_workspace, w, p.n_rows);
    check(aqlm_matmul_backward(p.y.mutable_data_ptr(), p.x.const_data_ptr(), p.dtype, &w.view, p.n_rows,
                               space.memory.get(), space.bytes),
          "matmul_backward");
    return p.y;
}

/* W [out, in], of the codebooks' dtype. */
Tensor decode_rows(const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    const Weight w(codes, codebooks, scales);
    Tensor rows = torch::stable::new_empty(w.codebooks, {w.view.shape.out_features, w.view.shape.in_features});
    check(aqlm_decode_rows(rows.mutable_data_ptr(), w.view.dtype, &w.view, 0, w.view.shape.out_features),
          "decode_rows");
    return rows;
}

/* The gradients to codebooks and scales, of their shapes and dtype, from that to W; [0] where not needed. */
std::tuple<Tensor, Tensor> decode_rows_backward(const Tensor &grad_rows_in, const Tensor &codes,
                                                const Tensor &codebooks, const Tensor &scales, bool need_codebooks,
                                                bool need_scales) {
    const Weight w(codes, codebooks, scales);
    const int64_t in_features = w.view.shape.in_features, out_features = w.view.shape.out_features;
    check(grad_rows_in.dim() == 2 && grad_rows_in.size(0) == out_features && grad_rows_in.size(1) == in_features,
          "grad_rows: got shape ", shape_of(grad_rows_in), ", expected [", out_features, ", ", in_features, "]");
    const Tensor grad_rows = contiguous(grad_rows_in);
    const aqlm_dtype dtype = dtype_of(grad_rows, "grad_rows");
    const auto gradient_of = [](const Tensor &t, bool needed) {
        return needed ? torch::stable::new_empty(t, t.sizes()) : torch::stable::new_empty(t, {0});
    };
    Tensor grad_codebooks = gradient_of(w.codebooks, need_codebooks), grad_scales = gradient_of(w.scales, need_scales);
    check(aqlm_decode_rows_backward(need_codebooks ? grad_codebooks.mutable_data_ptr() : nullptr,
                                    need_scales ? grad_scales.mutable_data_ptr() : nullptr, grad_rows.const_data_ptr(),
                                    dtype, &w.view),
          "decode_rows_backward");
    return {grad_codebooks, grad_scales};
}

} // namespace

STABLE_TORCH_LIBRARY(aqlm_c, m) {
    m.def("matmul(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias) -> Tensor");
    m.def("matmul_backward(Tensor grad_y, Tensor codes, Tensor codebooks, Tensor scales) -> Tensor");
    m.def("decode_rows(Tensor codes, Tensor codebooks, Tensor scales) -> Tensor");
    m.def("decode_rows_backward(Tensor grad_rows, Tensor codes, Tensor codebooks, Tensor scales, bool need_codebooks, "
          "bool need_scales) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(aqlm_c, CPU, m) {
    m.impl("matmul", TORCH_BOX(&matmul));
    m.impl("matmul_backward", TORCH_BOX(&matmul_backward));
    m.impl("decode_rows", TORCH_BOX(&decode_rows));
    m.impl("decode_rows_backward", TORCH_BOX(&decode_rows_backward));
}

} // namespace aqlm_torch
