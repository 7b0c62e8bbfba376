/* product.h: what the ops of both devices do before and after the product itself. `Dense` makes of a tensor what the
 * kernels of a device read: itself where possible. */
#ifndef AQLM_TORCH_PRODUCT_H
#define AQLM_TORCH_PRODUCT_H

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace aqlm_torch {

/* The rows of x, [..., from], and as many new ones, y [..., to], of x's dtype. */
template <Tensor (*Dense)(const Tensor &)> struct ProductOf {
    Tensor x, y;
    aqlm_dtype dtype;
    int64_t n_rows;

    ProductOf(const Tensor &x_in, const char *name, int64_t from, int64_t to) : x(x_in), y(x_in) {
        aqlm_torch::check(x_in.dim() >= 1 && x_in.size(x_in.dim() - 1) == from, name, ": got shape ", shape_of(x_in),
                          ", expected [..., ", from, "]");
        dtype = dtype_of(x_in, name);
        x = Dense(x_in);
        std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
        size.back() = to;
        y = torch::stable::new_empty(x, size);
        n_rows = x.numel() / from;
    }

    Tensor x_rows() const { return torch::stable::view(x, {n_rows, x.size(x.dim() - 1)}); }
    Tensor y_rows() const { return torch::stable::view(y, {n_rows, y.size(y.dim() - 1)}); }
};

inline void check_bias(const Tensor &bias, const Tensor &x, int64_t out_features) {
    check(bias.dim() == 1 && bias.size(0) == out_features, "bias: got shape ", shape_of(bias), ", expected [",
          out_features, "]");
    check(bias.scalar_type() == x.scalar_type(), "bias: got dtype ", name_of(bias.scalar_type()),
          ", expected that of x, ", name_of(x.scalar_type()));
}

/* An empty W [out, in] of dtype, without one of the codebooks'. */
template <class Weight> Tensor new_rows(const Weight &w, const std::optional<ScalarType> &dtype) {
    const aqlm_shape &s = w.view.shape;
    return torch::stable::new_empty(w.codebooks, {s.out_features, s.in_features},
                                    dtype.value_or(w.codebooks.scalar_type()));
}

/* Of decode_rows_backward: grad_rows [out, in], and what it returns, of the shapes and dtype of codebooks and scales,
 * [0] where not needed. */
template <Tensor (*Dense)(const Tensor &)> struct GradientsOf {
    Tensor rows, codebooks, scales;
    aqlm_dtype dtype; /* of rows */
    bool need_codebooks, need_scales;

    template <class Weight>
    GradientsOf(const Tensor &grad_rows, const Weight &w, bool with_codebooks, bool with_scales)
        : rows(grad_rows), codebooks(grad_rows), scales(grad_rows), need_codebooks(with_codebooks),
          need_scales(with_scales) {
        const aqlm_shape &s = w.view.shape;
        aqlm_torch::check(
            grad_rows.dim() == 2 && grad_rows.size(0) == s.out_features && grad_rows.size(1) == s.in_features,
            "grad_rows: got shape ", shape_of(grad_rows), ", expected [", s.out_features, ", ", s.in_features, "]");
        rows = Dense(grad_rows);
        dtype = dtype_of(rows, "grad_rows");
        codebooks = gradient_of(w.codebooks, need_codebooks);
        scales = gradient_of(w.scales, need_scales);
    }

    std::tuple<Tensor, Tensor> result() const { return {codebooks, scales}; }

  private:
    static Tensor gradient_of(const Tensor &t, bool needed) {
        return needed ? torch::stable::new_empty(t, t.sizes()) : torch::stable::new_empty(t, {0});
    }
};

/* The weights of matmul_grouped, a list for each of their tensors; no biases at all, or one each. */
struct Grouped {
    const std::vector<Tensor> &codes, &codebooks, &scales, &biases;

    size_t size() const {
        const size_t n = codes.size();
        check(n > 0, "codes: got an empty list, expected a tensor for each weight");
        for (const auto &[list, name] : {std::pair{&codebooks, "codebooks"}, {&scales, "scales"}, {&biases, "biases"}})
            check(list->size() == n || (list == &biases && list->empty()), name, ": got ", list->size(),
                  " tensors, expected ", n, " as in codes");
        return n;
    }
    std::optional<Tensor> bias(size_t m) const {
        return biases.empty() ? std::nullopt : std::optional<Tensor>(biases[m]);
    }
    /* matmul(x, codes, codebooks, scales, bias) with one after the other. */
    template <class Matmul> std::vector<Tensor> one_by_one(const Tensor &x, const Matmul &matmul) const {
        std::vector<Tensor> ys;
        for (size_t m = 0, n = size(); m < n; ++m) ys.push_back(matmul(x, codes[m], codebooks[m], scales[m], bias(m)));
        return ys;
    }
};

/* What matmul_experts is given: weights of E experts each, [E, ...] of what one weight has; which expert each row of y
 * has, a row of x for every rows_of_x of them. */
struct Routed {
    Tensor index;
    int64_t experts, n_rows, rows_of_x;

    Routed(const Tensor &x, const Tensor &index_in, const std::vector<Tensor> &codes,
           const std::vector<Tensor> &codebooks, const std::vector<Tensor> &scales)
        : index(torch::stable::contiguous(index_in)) {
        const size_t n = codes.size();
        check(n > 0 && codebooks.size() == n && scales.size() == n, "codes, codebooks, scales: got ", n, ", ",
              codebooks.size(), " and ", scales.size(), " tensors, expected as many of each");
        check(codes[0].dim() == 4 && codes[0].size(0) > 0, "codes: got shape ", shape_of(codes[0]),
              ", expected [experts, out / og, in / g, num_codebooks]");
        experts = codes[0].size(0);
        for (size_t m = 0; m < n; ++m)
            for (const Tensor *t : {&codes[m], &codebooks[m], &scales[m]})
                check(t->dim() > 0 && t->size(0) == experts, "codes, codebooks, scales: got shape ", shape_of(*t),
                      ", expected ", experts, " experts");
        check(index.scalar_type() == ScalarType::Long, "index: got dtype ", name_of(index.scalar_type()),
              ", expected int64");
        check(codebooks[0].dim() == 5, "codebooks: got shape ", shape_of(codebooks[0]),
              ", expected [experts, num_codebooks, 2^nbits_per_codebook, og, g]");
        const int64_t in_features = codes[0].size(2) * codebooks[0].size(4);
        check(x.dim() == 2 && x.size(1) == in_features, "x: got shape ", shape_of(x), ", expected [rows, ", in_features,
              "]");
        n_rows = index.numel();
        check(n_rows == 0 || (x.size(0) > 0 && n_rows % x.size(0) == 0), "index: got ", n_rows,
              " rows, expected a multiple of those of x, ", x.size(0));
        rows_of_x = n_rows == 0 ? 1 : n_rows / x.size(0);
    }

    /* t of expert e, from a dense stack. */
    static Tensor of(const Tensor &t, int64_t e) {
        const std::vector<int64_t> size(t.sizes().begin() + 1, t.sizes().end());
        return torch::stable::view(torch::stable::narrow(const_cast<Tensor &>(t), 0, e, 1), size);
    }
};

} // namespace aqlm_torch
#endif
