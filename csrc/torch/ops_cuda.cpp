/* ops_cuda.cpp: the CUDA binding, torch tensors on a GPU -> aqlm_cuda.h, by torch's stable ABI. A library of its own,
 * since torch without CUDA lacks what it links to. Schemas: ops_cpu.cpp; fake kernels and gradients: aqlm_c/nn/ops.py.
 */
#include <Python.h>

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda.h"
#include "cuda/aqlm_cuda.h"
#include "product.h"

namespace aqlm_torch {
namespace {

using torch::stable::narrow;

/* Tensors of one GPU, which is the current device while this lives, and the kernels' view of them. */
struct Weight {
    Tensor codes, codebooks, scales;
    aqlm_weight view = {};
    std::optional<OnDevice> on;
    cudaStream_t stream;

    Weight(const Tensor &first, const char *name, const Tensor &codes_in, const Tensor &codebooks_in,
           const Tensor &scales_in)
        : codes(ready(codes_in)), codebooks(ready(codebooks_in)), scales(ready(scales_in)) {
        view.shape = shape_of_weight(codes, codebooks, scales);
        view.dtype = dtype_of(codebooks, "codebooks");
        view.codes = codes.const_data_ptr();
        view.codebooks = codebooks.const_data_ptr();
        view.scales = scales.const_data_ptr();
        const int32_t device = codes.get_device_index();
        for (const auto &[tensor, what] : {std::pair{&first, name}, {&codebooks, "codebooks"}, {&scales, "scales"}})
            aqlm_torch::check(tensor->is_cuda() && tensor->get_device_index() == device, what,
                              ": got a tensor elsewhere, expected it on cuda:", device, " as codes");
        on.emplace(device);
        stream = on->stream;
    }

    /* W[first_out : first_out + outs, first_group * g : (first_group + groups) * g], of rows' dtype. */
    void decode_to(Tensor &rows, const char *name, int64_t first_out, int64_t outs, int64_t first_group,
                   int64_t groups) const {
        check(aqlm_cuda_decode_rows(rows.mutable_data_ptr(), dtype_of(rows, name), &view, first_out, outs, first_group,
                                    groups, stream),
              "decode_rows");
    }
    Tensor decode(const Tensor &like, int64_t first_out, int64_t outs, int64_t first_group, int64_t groups) const {
        Tensor rows = torch::stable::new_empty(like, {outs, groups * view.shape.in_group_size});
        decode_to(rows, "x", first_out, outs, first_group, groups);
        return rows;
    }
};

using Product = ProductOf<ready>;
using Gradients = GradientsOf<ready>;

std::optional<Tensor> ready_bias(const std::optional<Tensor> &bias, const Tensor &x, int64_t out_features) {
    if (!bias) return std::nullopt;
    check_bias(*bias, x, out_features);
    aqlm_torch::check(bias->is_cuda() && bias->get_device_index() == x.get_device_index(),
                      "bias: got a tensor elsewhere, expected it on cuda:", x.get_device_index(), " as x");
    return ready(*bias);
}

aqlm_cuda_plan plan_of(const Product &p, const aqlm_product *products, int64_t count) {
    aqlm_cuda_plan plan;
    check(aqlm_cuda_matmul_plan(&plan, products, count, p.dtype, p.n_rows), "matmul");
    return plan;
}

/* Products with p.x, by our kernels. */
void run(const Product &p, const aqlm_product *products, int64_t count, const aqlm_cuda_plan &plan,
         cudaStream_t stream) {
    std::optional<Tensor> workspace;
    if (plan.workspace > 0)
        workspace = torch::stable::new_empty(p.x, {static_cast<int64_t>(plan.workspace)}, ScalarType::Byte);
    check(aqlm_cuda_matmul(products, count, p.x.const_data_ptr(), p.dtype, p.n_rows, &plan,
                           workspace ? workspace->mutable_data_ptr() : nullptr, stream),
          "matmul");
}

/* Those of few rows, together if that is the plan. */
void run(const Product &p, const aqlm_product *products, int64_t count, cudaStream_t stream) {
    const aqlm_cuda_plan plan = plan_of(p, products, count);
    if (plan.path != AQLM_CUDA_SEPARATE) return run(p, products, count, plan, stream);
    for (int64_t m = 0; m < count; ++m) run(p, products + m, 1, stream);
}

aqlm_product product_of(Product &p, const Weight &w, const std::optional<Tensor> &bias) {
    return {p.y.mutable_data_ptr(), w.view, bias ? bias->const_data_ptr() : nullptr};
}

/* y [..., out] = x [..., in] W^T + bias, of x's dtype. Dense: W is decoded slice by slice for torch's product. */
Tensor matmul(const Tensor &x, const Tensor &codes, const Tensor &codebooks, const Tensor &scales,
              const std::optional<Tensor> &bias_in) {
    const Weight w(x, "x", codes, codebooks, scales);
    const aqlm_shape &s = w.view.shape;
    Product p(x, "x", s.in_features, s.out_features);
    std::optional<Tensor> bias = ready_bias(bias_in, x, s.out_features);
    if (p.n_rows == 0) return p.y;
    const aqlm_product product = product_of(p, w, bias);
    const aqlm_cuda_plan plan = plan_of(p, &product, 1);
    if (plan.path != AQLM_CUDA_DENSE) {
        run(p, &product, 1, plan, w.stream);
        return p.y;
    }
    const int64_t groups = s.in_features / s.in_group_size, slice = plan.slice_size;
    if (slice == s.out_features) return call("aten::linear", "", p.x, w.decode(p.x, 0, slice, 0, groups), bias)[0];
    const Tensor x_rows = p.x_rows();
    Tensor y_rows = p.y_rows();
    for (int64_t o = 0; o < s.out_features; o += slice) {
        const int64_t n = std::min(slice, s.out_features - o);
        std::optional<Tensor> part;
        if (bias) part = narrow(*bias, 0, o, n);
        call("aten::linear", "out", x_rows, w.decode(p.x, o, n, 0, groups), part, narrow(y_rows, 1, o, n));
    }
    return p.y;
}

/* matmul with several weights, with one row in one launch where aqlm_cuda_matmul has it. */
std::vector<Tensor> matmul_grouped(const Tensor &x, std::vector<Tensor> codes, std::vector<Tensor> codebooks,
                                   std::vector<Tensor> scales, std::vector<Tensor> biases) {
    const Grouped grouped = {codes, codebooks, scales, biases};
    if (x.dim() == 0 || x.numel() != x.size(x.dim() - 1)) return grouped.one_by_one(x, matmul);
    std::deque<Weight> weights; /* which do not move */
    std::vector<Product> made;
    std::vector<std::optional<Tensor>> added;
    std::vector<aqlm_product> products;
    std::vector<Tensor> ys;
    for (size_t m = 0, n = grouped.size(); m < n; ++m) {
        const Weight &w = weights.emplace_back(x, "x", codes[m], codebooks[m], scales[m]);
        Product &p = made.emplace_back(x, "x", w.view.shape.in_features, w.view.shape.out_features);
        products.push_back(
            product_of(p, w, added.emplace_back(ready_bias(grouped.bias(m), x, w.view.shape.out_features))));
        ys.push_back(p.y);
    }
    run(made[0], products.data(), static_cast<int64_t>(products.size()), weights[0].stream);
    return ys;
}

/* As on the CPU; nothing waits for index, and what is launched does not depend on it. */
Tensor matmul_experts(const Tensor &x_in, const Tensor &index_in, std::vector<Tensor> codes,
                      std::vector<Tensor> codebooks, std::vector<Tensor> scales) {
    const Routed routed(x_in, index_in, codes, codebooks, scales);
    aqlm_torch::check(routed.index.is_cuda() && routed.index.get_device_index() == x_in.get_device_index(),
                      "index: got a tensor elsewhere, expected it on cuda:", x_in.get_device_index(), " as x");
    std::deque<Weight> weights; /* which do not move */
    std::vector<aqlm_product> products;
    int64_t outs = 0;
    for (size_t m = 0; m < codes.size(); ++m) {
        for (Tensor *t : {&codes[m], &codebooks[m], &scales[m]}) *t = ready(*t);
        const Weight &w = weights.emplace_back(x_in, "x", Routed::of(codes[m], 0), Routed::of(codebooks[m], 0),
                                               Routed::of(scales[m], 0));
        products.push_back({nullptr, w.view, nullptr});
        outs += w.view.shape.out_features;
    }
    const Tensor x = ready(x_in);
    const aqlm_dtype dtype = dtype_of(x, "x");
    Tensor y = torch::stable::new_empty(x, {routed.n_rows, outs});
    if (routed.n_rows == 0) return y;
    auto *to = static_cast<char *>(y.mutable_data_ptr());
    for (aqlm_product &product : products) {
        product.y = to;
        to += product.w.shape.out_features * (dtype == AQLM_F32 ? 4 : 2);
    }
    const aqlm_cuda_routes routes = {static_cast<const int64_t *>(routed.index.const_data_ptr()), routed.experts,
                                     routed.rows_of_x, outs};
    const auto count = static_cast<int64_t>(products.size());
    aqlm_cuda_plan plan;
    check(aqlm_cuda_routed_plan(&plan, products.data(), count, dtype, routed.n_rows, &routes), "matmul_experts");
    Tensor workspace = torch::stable::new_empty(x, {static_cast<int64_t>(plan.workspace)}, ScalarType::Byte);
    check(aqlm_cuda_routed(products.data(), count, x.const_data_ptr(), dtype, routed.n_rows, &routes, &plan,
                           plan.workspace > 0 ? workspace.mutable_data_ptr() : nullptr, weights[0].stream),
          "matmul_experts");
    return y;
}

/* grad_x [..., in] = grad_y [..., out] W, of grad_y's dtype; W is decoded slice by slice of its columns. */
Tensor matmul_backward(const Tensor &grad_y, const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    const Weight w(grad_y, "grad_y", codes, codebooks, scales);
    const aqlm_shape &s = w.view.shape;
    Product p(grad_y, "grad_y", s.out_features, s.in_features);
    const int64_t groups = s.in_features / s.in_group_size;
    if (p.n_rows == 0) return p.y;
    aqlm_cuda_plan plan;
    check(aqlm_cuda_matmul_backward_plan(&plan, &w.view), "matmul_backward");
    const int64_t slice = plan.slice_size;
    if (slice == groups) return torch::stable::matmul(p.x, w.decode(p.x, 0, s.out_features, 0, groups));
    const Tensor x_rows = p.x_rows();
    Tensor y_rows = p.y_rows();
    for (int64_t j = 0; j < groups; j += slice) {
        const int64_t n = std::min(slice, groups - j);
        call("aten::mm", "out", x_rows, w.decode(p.x, 0, s.out_features, j, n),
             narrow(y_rows, 1, j * s.in_group_size, n * s.in_group_size));
    }
    return p.y;
}

/* W [out, in] of dtype, without one of the codebooks'. */
Tensor decode_rows(const Tensor &codes, const Tensor &codebooks, const Tensor &scales,
                   const std::optional<ScalarType> &dtype) {
    const Weight w(codes, "codes", codes, codebooks, scales);
    Tensor rows = new_rows(w, dtype);
    w.decode_to(rows, "dtype", 0, w.view.shape.out_features, 0, w.view.shape.in_features / w.view.shape.in_group_size);
    return rows;
}

aqlm_cuda_gradient_plan gradient_plan_of(const Weight &w) {
    aqlm_cuda_gradient_plan plan;
    check(aqlm_cuda_decode_rows_backward_plan(&plan, &w.view), "decode_rows_backward");
    return plan;
}

/* The groups of each code, [K, E + 1 + O * J]. */
Tensor index_of(const Weight &w) {
    const int64_t K = w.view.shape.num_codebooks, count = w.codes.size(0) * w.codes.size(1);
    Tensor index = torch::stable::new_empty(w.codes, {K, w.codebooks.size(1) + 1 + count}, ScalarType::Int);
    Tensor keys = torch::stable::new_empty(w.codes, {count}, ScalarType::Short);
    for (int64_t k = 0; k < K; ++k) {
        check(aqlm_cuda_code_keys(static_cast<int16_t *>(keys.mutable_data_ptr()), &w.view, k, w.stream),
              "index_codes");
        const auto [sorted, order] =
            call<2>("aten::sort", "stable", keys, std::optional<bool>(true), int64_t{0}, false);
        check(aqlm_cuda_index_codes(static_cast<int32_t *>(index.mutable_data_ptr()),
                                    static_cast<const int16_t *>(sorted.const_data_ptr()),
                                    static_cast<const int64_t *>(order.const_data_ptr()), &w.view, k, w.stream),
              "index_codes");
    }
    return index;
}

/* What decode_rows_backward can be given while codes stay: [0] where it needs nothing. */
Tensor index_codes(const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    const Weight w(codes, "codes", codes, codebooks, scales);
    if (gradient_plan_of(w).pass > 0) return torch::stable::new_empty(w.codes, {0}, ScalarType::Int);
    return index_of(w);
}

Tensor ready_index(const Tensor &index, const Weight &w) {
    const int64_t K = w.view.shape.num_codebooks;
    const int64_t size = w.codebooks.size(1) + 1 + w.codes.size(0) * w.codes.size(1);
    aqlm_torch::check(index.is_cuda() && index.get_device_index() == w.codes.get_device_index(),
                      "index: got a tensor elsewhere, expected it on cuda:", w.codes.get_device_index(), " as codes");
    aqlm_torch::check(index.scalar_type() == ScalarType::Int, "index: got dtype ", name_of(index.scalar_type()),
                      ", expected int32");
    aqlm_torch::check(index.dim() == 2 && index.size(0) == K && index.size(1) == size, "index: got shape ",
                      shape_of(index), ", expected [", K, ", ", size, "] as of index_codes");
    return ready(index);
}

/* The gradients to codebooks and scales from that to W. */
std::tuple<Tensor, Tensor> decode_rows_backward(const Tensor &grad_rows, const Tensor &codes, const Tensor &codebooks,
                                                const Tensor &scales, bool need_codebooks, bool need_scales,
                                                const std::optional<Tensor> &index_in) {
    const Weight w(grad_rows, "grad_rows", codes, codebooks, scales);
    const Gradients g(grad_rows, w, need_codebooks, need_scales);
    const aqlm_cuda_gradient_plan plan = gradient_plan_of(w);
    std::optional<Tensor> index;
    if (plan.pass == 0 && need_codebooks) index = index_in ? ready_index(*index_in, w) : index_of(w);
    Tensor workspace = torch::stable::new_empty(w.codes, {static_cast<int64_t>(plan.workspace)}, ScalarType::Byte);
    check(aqlm_cuda_decode_rows_backward(need_codebooks ? g.codebooks.mutable_data_ptr() : nullptr,
                                         need_scales ? g.scales.mutable_data_ptr() : nullptr, g.rows.const_data_ptr(),
                                         g.dtype, &w.view,
                                         index ? static_cast<const int32_t *>(index->const_data_ptr()) : nullptr, &plan,
                                         workspace.mutable_data_ptr(), w.stream),
          "decode_rows_backward");
    return g.result();
}

/* KL of the rows of logits, float32, and its gradient to them, [0] where it is not needed. */
std::tuple<Tensor, Tensor> divergence(const Tensor &original_in, const Tensor &logits_in, bool need_gradient) {
    const Tensor original = ready(original_in), logits = ready(logits_in);
    aqlm_torch::check(logits.dim() == 2, "logits: got shape ", shape_of(logits), ", expected [n, words]");
    const int32_t device = logits.get_device_index();
    aqlm_torch::check(original.is_cuda() && original.get_device_index() == device,
                      "original: got a tensor elsewhere, expected it on cuda:", device, " as logits");
    aqlm_torch::check(original.dim() == 2 && original.size(0) == logits.size(0) && original.size(1) == logits.size(1),
                      "original: got shape ", shape_of(original), ", expected ", shape_of(logits), " as logits");
    aqlm_torch::check(original.scalar_type() == logits.scalar_type(), "original: got dtype ",
                      name_of(original.scalar_type()), ", expected ", name_of(logits.scalar_type()), " as logits");
    const OnDevice on(device);
    const aqlm_dtype dtype = dtype_of(logits, "logits");
    Tensor kl = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float);
    Tensor gradient = torch::stable::new_empty(logits, {need_gradient ? logits.size(0) : 0, logits.size(1)});
    check(aqlm_cuda_divergence(static_cast<float *>(kl.mutable_data_ptr()),
                               need_gradient ? gradient.mutable_data_ptr() : nullptr, original.const_data_ptr(),
                               logits.const_data_ptr(), dtype, logits.size(0), logits.size(1), on.stream),
          "divergence");
    return {kl, gradient};
}

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", "aqlm_c's CUDA binding.", 0, nullptr, nullptr, nullptr, nullptr, nullptr};

} // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_c, CUDA, m) {
    m.impl("matmul", TORCH_BOX(&matmul));
    m.impl("matmul_grouped", TORCH_BOX(&matmul_grouped));
    m.impl("matmul_experts", TORCH_BOX(&matmul_experts));
    m.impl("matmul_backward", TORCH_BOX(&matmul_backward));
    m.impl("decode_rows", TORCH_BOX(&decode_rows));
    m.impl("decode_rows_backward", TORCH_BOX(&decode_rows_backward));
    m.impl("index_codes", TORCH_BOX(&index_codes));
    m.impl("divergence", TORCH_BOX(&divergence));
}

} // namespace aqlm_torch

PyMODINIT_FUNC PyInit__cuda() { return PyModuleDef_Init(&aqlm_torch::module); }
