/* ops_cpu.cpp: the torch binding, tensors on the CPU -> aqlm.h, by torch's stable ABI.
 *
 * Fake kernels and gradients are registered in aqlm_c/nn/ops.py (the stable ABI has neither). */
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu.h"
#include "product.h"

namespace aqlm_torch {
namespace {

/* Contiguous tensors and the core's view of them, which borrows their memory. */
struct Weight {
    Tensor codes, codebooks, scales;
    aqlm_weight view;

    Weight(const Tensor &codes_in, const Tensor &codebooks_in, const Tensor &scales_in)
        : codes(codes_in), codebooks(as_contiguous(codebooks_in)), scales(as_contiguous(scales_in)) {
        view.shape = shape_of_weight(codes, codebooks, scales);
        view.packed = is_packed(codes);
        if (!view.packed) codes = as_contiguous(codes);
        view.dtype = dtype_of(codebooks, "codebooks");
        view.codes = codes.const_data_ptr();
        view.codebooks = codebooks.const_data_ptr();
        view.scales = scales.const_data_ptr();
    }
};

using Product = ProductOf<as_contiguous>;
using Gradients = GradientsOf<as_contiguous>;

/* 64-byte aligned. What few rows need is kept for the thread's next call: malloc would cut tensors that stay, such as a
 * cache's, out of freed ones, and be left with as many holes as there are layers. */
struct Workspace {
    using Memory = std::unique_ptr<void, decltype(&std::free)>;
    Memory own{nullptr, std::free};
    void *memory;

    explicit Workspace(size_t bytes) {
        constexpr size_t line = 64, most_kept = size_t{4} << 20;
        thread_local Memory kept{nullptr, std::free};
        thread_local size_t n_kept = 0;
        const size_t n = (bytes / line + 1) * line;
        if (n <= n_kept) {
            memory = kept.get();
            return;
        }
        Memory &place = n <= most_kept ? kept : own;
        place.reset(); /* first, so that they are not in memory together */
        if (n <= most_kept) n_kept = 0;
        place.reset(std::aligned_alloc(line, n));
        memory = place.get();
        check(memory != nullptr, "matmul: no memory for ", bytes, " bytes of workspace");
        if (n <= most_kept) n_kept = n;
    }
};

/* The core's plan: torch's product has the CPU's bf16 instructions. */
template <class Plan> aqlm_plan plan_of(Plan plan, const Product &p, const Weight &w) {
    follow_torch_threads();
    return plan(&w.view, p.dtype, p.n_rows, true);
}

/* y = x W^T + bias, or y = x W if transposed, by aten::linear on tiles of W rounded to bf16. One thread multiplies a
 * tile, and tiles are cut alike for any number of them. Threads make tensors of bare memory: what autograd knows
 * about p.x, it would not know there. */
void torch_product(const Product &p, const Weight &w, const std::optional<Tensor> &bias, bool transposed) {
    constexpr int64_t TILE = 512;
    const aqlm_shape &s = w.view.shape;
    const int64_t depth = transposed ? s.out_features : s.in_features;
    const int64_t width = transposed ? s.in_features : s.out_features;
    const int64_t unit = transposed ? s.in_group_size : 1, units = width / unit;
    const int64_t n_tiles = std::max<int64_t>(2, (width + TILE - 1) / TILE); /* of one, torch would use all threads */
    const auto view = [](const void *data, const std::vector<int64_t> &sizes, const std::vector<int64_t> &steps) {
        return torch::stable::from_blob(const_cast<void *>(data), sizes, steps,
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                        ScalarType::BFloat16);
    };
    const auto *x = static_cast<const uint16_t *>(p.x.const_data_ptr());
    auto *y = static_cast<uint16_t *>(p.y.mutable_data_ptr());
    const auto *added = bias ? static_cast<const uint16_t *>(bias->const_data_ptr()) : nullptr;

    torch::stable::parallel_for(0, n_tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = units * tile / n_tiles * unit, last = units * (tile + 1) / n_tiles * unit;
            const int64_t n = last - first;
            if (n == 0) continue;
            aqlm_weight part = w.view;
            std::vector<char> columns; /* the codes of these inputs alone */
            if (transposed && w.view.packed) {
                part.codes = static_cast<const char *>(w.view.codes) +
                             first / unit * s.num_codebooks * (s.out_features / s.out_group_size);
                part.shape.in_features = n;
            } else if (transposed) {
                const size_t group = s.num_codebooks * (s.nbits_per_codebook <= 8 ? 1 : 2);
                const size_t row = s.in_features / unit * group, used = n / unit * group;
                columns.resize(s.out_features / s.out_group_size * used);
                const char *from = static_cast<const char *>(w.view.codes) + first / unit * group;
                for (size_t to = 0; to < columns.size(); to += used, from += row)
                    std::memcpy(columns.data() + to, from, used);
                part.codes = columns.data();
                part.shape.in_features = n;
            }
            const std::unique_ptr<uint16_t[]> rows(new uint16_t[n * depth]);
            check(aqlm_decode_rows(rows.get(), AQLM_BF16, &part, transposed ? 0 : first,
                                   transposed ? s.out_features : last),
                  "matmul");
            std::optional<Tensor> bias_part;
            if (added) bias_part = view(added + first, {n}, {1});
            using torch::stable::detail::from;
            std::array<StableIValue, 3> stack{
                from(view(x, {p.n_rows, depth}, {depth, 1})),
                from(transposed ? view(rows.get(), {n, depth}, {1, n}) : view(rows.get(), {n, depth}, {depth, 1})),
                from(bias_part)};
            STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
            Tensor to = view(y + first, {p.n_rows, n}, {width, 1});
            torch::stable::copy_(to, torch::stable::detail::to<Tensor>(stack[0]));
        }
    });
}

/* y [..., out] = x [..., in] W^T + bias, of x's dtype; W is never whole in memory. */
Tensor matmul(const Tensor &x, const Tensor &codes, const Tensor &codebooks, const Tensor &scales,
              const std::optional<Tensor> &bias_in) {
    const Weight w(codes, codebooks, scales);
    const int64_t out_features = w.view.shape.out_features;
    const Product p(x, "x", w.view.shape.in_features, out_features);
    std::optional<Tensor> bias;
    if (bias_in) {
        check_bias(*bias_in, x, out_features);
        bias = as_contiguous(*bias_in);
    }
    if (p.n_rows == 0) return p.y;
    const aqlm_plan plan = plan_of(aqlm_matmul_plan, p, w);
    if (plan.path == AQLM_PATH_CALLER) {
        torch_product(p, w, bias, false);
        return p.y;
    }
    const Workspace workspace(plan.workspace);
    check(aqlm_matmul(p.y.mutable_data_ptr(), p.x.const_data_ptr(), p.dtype, &w.view,
                      bias ? bias->const_data_ptr() : nullptr, p.n_rows, &plan, workspace.memory),
          "matmul");
    return p.y;
}

/* matmul with several weights, one after the other: each is on all threads. */
std::vector<Tensor> matmul_grouped(const Tensor &x, const std::vector<Tensor> &codes,
                                   const std::vector<Tensor> &codebooks, const std::vector<Tensor> &scales,
                                   const std::vector<Tensor> &biases) {
    return Grouped{codes, codebooks, scales, biases}.one_by_one(x, matmul);
}

/* y [index.numel(), out of all weights]: a row of x by each weight of its expert; zeros where there is no such expert.
 * Rows of one expert are one product. */
Tensor matmul_experts(const Tensor &x_in, const Tensor &index_in, const std::vector<Tensor> &codes,
                      const std::vector<Tensor> &codebooks, const std::vector<Tensor> &scales) {
    const Tensor x = as_contiguous(x_in);
    const Routed routed(x, index_in, codes, codebooks, scales);
    int64_t outs = 0;
    for (size_t m = 0; m < codes.size(); ++m) outs += codes[m].size(1) * codebooks[m].size(3);
    Tensor y = torch::stable::new_empty(x, {routed.n_rows, outs});
    if (routed.n_rows == 0) return y;
    const auto *index = static_cast<const int64_t *>(routed.index.const_data_ptr());
    const size_t number = dtype_of(x, "x") == AQLM_F32 ? 4 : 2, width = x.size(1) * number;
    std::memset(y.mutable_data_ptr(), 0, routed.n_rows * outs * number);
    for (int64_t e = 0; e < routed.experts; ++e) {
        std::vector<int64_t> rows;
        for (int64_t r = 0; r < routed.n_rows; ++r)
            if (index[r] == e) rows.push_back(r);
        if (rows.empty()) continue;
        const auto n = static_cast<int64_t>(rows.size());
        Tensor given = torch::stable::new_empty(x, {n, x.size(1)});
        for (int64_t i = 0; i < n; ++i)
            std::memcpy(static_cast<char *>(given.mutable_data_ptr()) + i * width,
                        static_cast<const char *>(x.const_data_ptr()) + rows[i] / routed.rows_of_x * width, width);
        size_t first = 0;
        for (size_t m = 0; m < codes.size(); ++m) {
            const Tensor part =
                matmul(given, Routed::of(as_contiguous(codes[m]), e), Routed::of(as_contiguous(codebooks[m]), e),
                       Routed::of(as_contiguous(scales[m]), e), std::nullopt);
            const size_t bytes = part.size(1) * number;
            for (int64_t i = 0; i < n; ++i)
                std::memcpy(static_cast<char *>(y.mutable_data_ptr()) + rows[i] * outs * number + first,
                            static_cast<const char *>(part.const_data_ptr()) + i * bytes, bytes);
            first += bytes;
        }
    }
    return y;
}

/* grad_x [..., in] = grad_y [..., out] W, of grad_y's dtype; W is never whole in memory. */
Tensor matmul_backward(const Tensor &grad_y, const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    const Weight w(codes, codebooks, scales);
    const Product p(grad_y, "grad_y", w.view.shape.out_features, w.view.shape.in_features);
    if (p.n_rows == 0) return p.y;
    const aqlm_plan plan = plan_of(aqlm_matmul_backward_plan, p, w);
    if (plan.path == AQLM_PATH_CALLER) {
        torch_product(p, w, std::nullopt, true);
        return p.y;
    }
    const Workspace workspace(plan.workspace);
    check(aqlm_matmul_backward(p.y.mutable_data_ptr(), p.x.const_data_ptr(), p.dtype, &w.view, p.n_rows, &plan,
                               workspace.memory),
          "matmul_backward");
    return p.y;
}

/* W [out, in] of dtype, without one of the codebooks'. */
Tensor decode_rows(const Tensor &codes, const Tensor &codebooks, const Tensor &scales,
                   const std::optional<ScalarType> &dtype) {
    const Weight w(codes, codebooks, scales);
    Tensor rows = new_rows(w, dtype);
    check(aqlm_decode_rows(rows.mutable_data_ptr(), dtype_of(rows, "dtype"), &w.view, 0, w.view.shape.out_features),
          "decode_rows");
    return rows;
}

/* The gradients to codebooks and scales from that to W. */
std::tuple<Tensor, Tensor> decode_rows_backward(const Tensor &grad_rows, const Tensor &codes, const Tensor &codebooks,
                                                const Tensor &scales, bool need_codebooks, bool need_scales,
                                                const std::optional<Tensor> &) {
    const Weight w(codes, codebooks, scales);
    const Gradients g(grad_rows, w, need_codebooks, need_scales);
    check(aqlm_decode_rows_backward(need_codebooks ? g.codebooks.mutable_data_ptr() : nullptr,
                                    need_scales ? g.scales.mutable_data_ptr() : nullptr, g.rows.const_data_ptr(),
                                    g.dtype, &w.view),
          "decode_rows_backward");
    return g.result();
}

/* What decode_rows_backward can be given while codes stay: on the CPU nothing. */
Tensor index_codes(const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    const Weight w(codes, codebooks, scales);
    return torch::stable::new_empty(w.codes, {0}, ScalarType::Int);
}

} // namespace

STABLE_TORCH_LIBRARY(aqlm_c, m) {
    m.def("matmul(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias) -> Tensor");
    m.def("matmul_grouped(Tensor x, Tensor[] codes, Tensor[] codebooks, Tensor[] scales, Tensor[] biases) -> Tensor[]");
    m.def("matmul_experts(Tensor x, Tensor index, Tensor[] codes, Tensor[] codebooks, Tensor[] scales) -> Tensor");
    m.def("matmul_backward(Tensor grad_y, Tensor codes, Tensor codebooks, Tensor scales) -> Tensor");
    m.def("decode_rows(Tensor codes, Tensor codebooks, Tensor scales, ScalarType? dtype=None) -> Tensor");
    m.def("decode_rows_backward(Tensor grad_rows, Tensor codes, Tensor codebooks, Tensor scales, bool need_codebooks, "
          "bool need_scales, Tensor? index=None) -> (Tensor, Tensor)");
    m.def("index_codes(Tensor codes, Tensor codebooks, Tensor scales) -> Tensor");
    m.def(
        "divergence(Tensor original, Tensor logits, bool need_gradient) -> (Tensor, Tensor)"); /* GPUs alone have it */
}

STABLE_TORCH_LIBRARY_IMPL(aqlm_c, CPU, m) {
    m.impl("matmul", TORCH_BOX(&matmul));
    m.impl("matmul_grouped", TORCH_BOX(&matmul_grouped));
    m.impl("matmul_experts", TORCH_BOX(&matmul_experts));
    m.impl("matmul_backward", TORCH_BOX(&matmul_backward));
    m.impl("decode_rows", TORCH_BOX(&decode_rows));
    m.impl("decode_rows_backward", TORCH_BOX(&decode_rows_backward));
    m.impl("index_codes", TORCH_BOX(&index_codes));
}

} // namespace aqlm_torch
