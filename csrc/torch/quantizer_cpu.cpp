/* quantizer_cpu.cpp: the torch binding's quantizer: aqlm/quantizer.h on tensors of the CPU. Arguments, results and bits
 * are those of `_core` (aqlm_c/_core.pyi); working codes are torch.uint16, scalars 0-dim float64. What is wrong with a
 * tensor or a number raises ValueError, and so does Ctrl-C, with KeyboardInterrupt as the cause (core/verbs.py). */
#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu.h"
#include "quantizer.h"

namespace aqlm_torch {
namespace {

using torch::stable::new_empty;

Tensor floats_of(const Tensor &t, const char *name, std::initializer_list<int64_t> sizes) {
    return tensor_of<as_contiguous>(t, name, ScalarType::Float, sizes);
}

Tensor copy_of(const Optional &t) { return torch::stable::clone(t.value()); }

struct Layer : LayerOf<as_contiguous> {
    Layer(const Tensor &weight_in, const Optional &H_in, const Optional &codes_in, const Optional &codebooks_in,
          const Optional &scales_in)
        : LayerOf(weight_in, H_in, codes_in, codebooks_in, scales_in) {
        if (codes) check_codes();
        follow_torch_threads();
    }

  private:
    void check_codes() const {
        const int64_t bits = shape.nbits_per_codebook;
        const auto *code = data<uint16_t>(codes);
        for (int64_t i = 0, n = codes->numel(); i < n; ++i)
            if (code[i] >> bits)
                check_value(false, "codes: got ", code[i], " at flat index ", i, ", expected 0..",
                            (int64_t{1} << bits) - 1);
    }
};

std::tuple<Tensor, Tensor> residual_kmeans(const Tensor &weight, const Tensor &scales, int64_t num_codebooks,
                                           int64_t nbits_per_codebook, int64_t in_group_size, int64_t init_max_iter,
                                           double tolerance, int64_t seed, const Optional &column_weight) {
    Layer l(weight, std::nullopt, std::nullopt, std::nullopt, scales);
    l.set_format(num_codebooks, nbits_per_codebook, in_group_size, init_max_iter, tolerance);
    Optional columns;
    if (column_weight) columns = floats_of(*column_weight, "column_weight", {l.shape.in_features});
    const Tensor codes = l.new_codes(), codebooks = l.new_codebooks();
    check_status(aqlm_residual_kmeans(writable<uint16_t>(codes), writable(codebooks), data(l.weight), data(l.scales),
                                      data(columns), &l.shape, init_max_iter, tolerance, static_cast<uint64_t>(seed)),
                 "residual_kmeans");
    return {codes, codebooks};
}

/* What sums are added to, in place. */
double *sums_of(const Tensor &sum, int64_t rows, int64_t columns) {
    tensor_of<as_contiguous>(sum, "sum", ScalarType::Double, {rows, columns});
    check_value(sum.is_contiguous() && is_aligned(sum), "sum: got a strided tensor, expected one to write into");
    return writable<double>(sum);
}

void accumulate_hessian(const Tensor &sum, const Tensor &x_in) {
    const Tensor x = floats_of(x_in, "x", {-1, -1});
    double *sums = sums_of(sum, x.size(1), x.size(1));
    follow_torch_threads();
    check_status(aqlm_accumulate_hessian(sums, data(x), x.size(0), x.size(1)), "accumulate_hessian");
}

void accumulate_product(const Tensor &sum, const Tensor &x_in, const Tensor &y_in) {
    const Tensor x = floats_of(x_in, "x", {-1, -1}), y = floats_of(y_in, "y", {x.size(0), -1});
    double *sums = sums_of(sum, x.size(1), y.size(1));
    follow_torch_threads();
    check_status(aqlm_accumulate_product(sums, data(x), data(y), x.size(0), x.size(1), y.size(1)),
                 "accumulate_product");
}

Tensor correct_weight(const Tensor &weight_in, const Tensor &cross_in, const Tensor &H_in, double alpha,
                      double relative_damp) {
    check_not_negative(relative_damp, "relative_damp");
    const Tensor weight = floats_of(weight_in, "weight", {-1, -1});
    const int64_t out = weight.size(0), in = weight.size(1);
    const Tensor cross = floats_of(cross_in, "cross", {in, in}), H = floats_of(H_in, "H", {in, in});
    const Tensor corrected = new_empty(weight, {out, in});
    follow_torch_threads();
    check_status(
        aqlm_correct_weight(writable(corrected), data(weight), data(cross), data(H), out, in, alpha, relative_damp),
        "correct_weight");
    return corrected;
}

std::tuple<Tensor, Tensor, Tensor> factor_hessian(const Tensor &H_in, int64_t in_group_size, double relative_damp) {
    check_not_negative(relative_damp, "relative_damp");
    const Tensor H = floats_of(H_in, "H", {-1, -1});
    const int64_t in = H.size(1), g = in_group_size;
    check_value(H.size(0) == in, "H: got shape ", shape_of(H), ", expected a square matrix");
    check_shape({1, in, 1, 1, g, 1});
    const Tensor order = new_empty(H, {in / g}, ScalarType::Int), feedback = new_empty(H, {in, in});
    const Tensor metric = new_empty(H, {in / g, g, g});
    follow_torch_threads();
    check_status(aqlm_factor_hessian(writable<int32_t>(order), writable(feedback), writable(metric), data(H), in, g,
                                     relative_damp),
                 "factor_hessian");
    return {order, feedback, metric};
}

Tensor search_sweep(const Tensor &codes, const Tensor &weight, const Tensor &H, const Tensor &codebooks,
                    const Tensor &scales, int64_t beam_size, int64_t seed, bool pairs) {
    const Layer l(weight, H, codes, codebooks, scales);
    const aqlm_search search = l.search(beam_size, pairs, seed);
    const Tensor found = copy_of(l.codes);
    check_status(aqlm_search_sweep(writable<uint16_t>(found), &search, data(l.H)), "search_sweep");
    return found;
}

Tensor search_ldl(const Tensor &weight, const Tensor &order_in, const Tensor &feedback_in, const Tensor &metric_in,
                  const Tensor &codebooks, const Tensor &scales, int64_t beam_size, bool pairs) {
    const Layer l(weight, std::nullopt, std::nullopt, codebooks, scales);
    const int64_t in = l.shape.in_features, g = l.shape.in_group_size, groups = in / g;
    const Tensor order = tensor_of<as_contiguous>(order_in, "order", ScalarType::Int, {groups});
    const Tensor feedback = floats_of(feedback_in, "feedback", {in, in});
    const Tensor metric = floats_of(metric_in, "metric", {groups, g, g});
    std::vector<bool> seen(groups);
    for (int64_t i = 0; i < groups; ++i) {
        const int32_t at = data<int32_t>(order)[i];
        check_value(at >= 0 && at < groups && !seen[at], "order: expected a permutation of 0..", groups - 1);
        seen[at] = true;
    }
    const aqlm_search search = l.search(beam_size, pairs, 0);
    const Tensor found = l.new_codes();
    check_status(
        aqlm_search_ldl(writable<uint16_t>(found), &search, data<int32_t>(order), data(feedback), data(metric)),
        "search_ldl");
    return found;
}

Tensor update_codebooks(const Tensor &codebooks, const Tensor &weight, const Tensor &H, const Tensor &codes,
                        const Tensor &scales, int64_t cg_steps) {
    check_value(cg_steps >= 0, "cg_steps: got ", cg_steps, ", expected at least 0");
    const Layer l(weight, H, codes, codebooks, scales);
    const Tensor updated = copy_of(l.codebooks);
    check_status(aqlm_update_codebooks(writable(updated), data(l.weight), data(l.H), data<uint16_t>(l.codes),
                                       data(l.scales), &l.shape, cg_steps),
                 "update_codebooks");
    return updated;
}

Tensor update_scales(const Tensor &scales, const Tensor &weight, const Tensor &H, const Tensor &codes,
                     const Tensor &codebooks) {
    const Layer l(weight, H, codes, codebooks, scales);
    const Tensor updated = copy_of(l.scales);
    check_status(aqlm_update_scales(writable(updated), data(l.weight), data(l.H), data<uint16_t>(l.codes),
                                    data(l.codebooks), &l.shape),
                 "update_scales");
    return updated;
}

std::tuple<Tensor, Tensor, Tensor> update_adam(const Tensor &codebooks, const Tensor &scales, const Tensor &moments,
                                               const Tensor &weight, const Tensor &H, const Tensor &codes,
                                               int64_t steps, double learning_rate, int64_t steps_before) {
    check_adam(steps, learning_rate, steps_before);
    const Layer l(weight, H, codes, codebooks, scales);
    const Tensor c = copy_of(l.codebooks), s = copy_of(l.scales);
    const Tensor m =
        copy_of(tensor_of<as_contiguous>(moments, "moments", ScalarType::Double, {2, c.numel() + s.numel()}));
    check_status(aqlm_update_adam(writable(c), writable(s), writable<double>(m), data(l.weight), data(l.H),
                                  data<uint16_t>(l.codes), &l.shape, steps, learning_rate, steps_before),
                 "update_adam");
    return {c, s, m};
}

void buffer_step(const Tensor &buffer, const Tensor &gradient, const Optional &first, const Tensor &second,
                 const Optional &scales, double divisor, double learning_rate, double beta1, double beta2,
                 int64_t step) {
    const BufferOf<as_contiguous> b(buffer, gradient, first, second, scales,
                                    {divisor, learning_rate, beta1, beta2, step});
    const aqlm_buffer_moments moments = b.moments();
    follow_torch_threads();
    check_status(aqlm_buffer_step(writable(b.buffer), &moments, b.gradient.const_data_ptr(), b.dtype, b.buffer.numel(),
                                  &b.options),
                 "buffer_step");
}

Tensor quantization_error(const Tensor &weight, const Tensor &H, const Optional &codes, const Optional &codebooks,
                          const Optional &scales) {
    check_state(codes, codebooks, scales);
    const Layer l =
        codes ? Layer(weight, H, codes, codebooks, scales) : Layer(weight, H, std::nullopt, std::nullopt, std::nullopt);
    const Tensor error = new_empty(l.weight, {}, ScalarType::Double);
    check_status(aqlm_quantization_error(writable<double>(error), data(l.weight), data(l.H), data<uint16_t>(l.codes),
                                         data(l.codebooks), data(l.scales), &l.shape),
                 "quantization_error");
    return error;
}

Tensor gaussian_reference(const Tensor &eigenvalues_in, double rate) {
    check_not_negative(rate, "rate");
    const Tensor eigenvalues = tensor_of<as_contiguous>(eigenvalues_in, "eigenvalues", ScalarType::Double, {-1});
    check_value(eigenvalues.numel() > 0, "eigenvalues: got none, expected at least one");
    const Tensor error = new_empty(eigenvalues, {});
    check_status(aqlm_gaussian_reference(writable<double>(error), data<double>(eigenvalues), eigenvalues.numel(), rate),
                 "gaussian_reference");
    return error;
}

Tensor hadamard(const Tensor &x_in, bool inverse) {
    const Tensor x = floats_of(x_in, "x", {-1, -1});
    check_value(x.size(0) > 0 && x.size(1) > 0, "x: got shape ", shape_of(x), ", expected values");
    const Tensor y = new_empty(x, {x.size(0), x.size(1)});
    follow_torch_threads();
    check_status(aqlm_hadamard(writable(y), data(x), x.size(0), x.size(1), inverse), "hadamard");
    return y;
}

/* Working codes to the disk layout or back, by `convert`, which says where it met a code outside first..last. */
template <class Convert>
Tensor convert_codes(const Tensor &codes_in, int64_t bits, bool packs, const Convert &convert) {
    const CodesOf<as_contiguous> from(codes_in, bits, packs);
    const Tensor converted = from.converted(packs);
    int64_t where = -1;
    const aqlm_status status = convert(converted.mutable_data_ptr(), from.codes.const_data_ptr(), &from.shape, &where);
    if (where >= 0)
        from.refuse(packs       ? int64_t{data<uint16_t>(from.codes)[where]}
                    : bits <= 8 ? int64_t{data<int8_t>(from.codes)[where]}
                                : int64_t{data<int16_t>(from.codes)[where]},
                    where, packs);
    check_status(status, packs ? "pack_codes" : "unpack_codes");
    return converted;
}

Tensor pack_codes(const Tensor &codes, int64_t nbits_per_codebook) {
    return convert_codes(codes, nbits_per_codebook, true, [](void *to, const void *from, auto... rest) {
        return aqlm_pack_codes(to, static_cast<const uint16_t *>(from), rest...);
    });
}

Tensor unpack_codes(const Tensor &codes, int64_t nbits_per_codebook) {
    return convert_codes(codes, nbits_per_codebook, false, [](void *to, const void *from, auto... rest) {
        return aqlm_unpack_codes(static_cast<uint16_t *>(to), from, rest...);
    });
}

/* The verb, while which Ctrl-C is answered. */
template <auto verb> struct answering;
template <class Result, class... Arguments, Result (*verb)(Arguments...)> struct answering<verb> {
    static Result call(Arguments... arguments) {
        struct Answers {
            Answers() { answers_signals = true; }
            ~Answers() { answers_signals = false; }
        } const answers;
        return verb(arguments...);
    }
};

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(aqlm_c, m) {
    m.def("residual_kmeans(Tensor weight, Tensor scales, int num_codebooks, int nbits_per_codebook, int in_group_size, "
          "int init_max_iter=100, float tolerance=1e-3, int seed=0, Tensor? column_weight=None) -> (Tensor, Tensor)");
    m.def("accumulate_hessian(Tensor(a!) sum, Tensor x) -> ()");
    m.def("accumulate_product(Tensor(a!) sum, Tensor x, Tensor y) -> ()");
    m.def("correct_weight(Tensor weight, Tensor cross, Tensor H, float alpha, float relative_damp) -> Tensor");
    m.def("factor_hessian(Tensor H, int in_group_size, float relative_damp) -> (Tensor, Tensor, Tensor)");
    m.def("search_sweep(Tensor codes, Tensor weight, Tensor H, Tensor codebooks, Tensor scales, int beam_size=0, "
          "int seed=0, bool pairs=False) -> Tensor");
    m.def("search_ldl(Tensor weight, Tensor order, Tensor feedback, Tensor metric, Tensor codebooks, Tensor scales, "
          "int beam_size=0, bool pairs=False) -> Tensor");
    m.def("update_codebooks(Tensor codebooks, Tensor weight, Tensor H, Tensor codes, Tensor scales, int cg_steps) "
          "-> Tensor");
    m.def("update_scales(Tensor scales, Tensor weight, Tensor H, Tensor codes, Tensor codebooks) -> Tensor");
    m.def("update_adam(Tensor codebooks, Tensor scales, Tensor moments, Tensor weight, Tensor H, Tensor codes, "
          "int steps, float learning_rate, int steps_before=0) -> (Tensor, Tensor, Tensor)");
    m.def("buffer_step(Tensor(a!) buffer, Tensor gradient, Tensor(b!)? first, Tensor(c!) second, Tensor(d!)? scales, "
          "float divisor, float learning_rate, float beta1, float beta2, int step) -> ()");
    m.def("quantization_error(Tensor weight, Tensor H, Tensor? codes=None, Tensor? codebooks=None, "
          "Tensor? scales=None) -> Tensor");
    m.def("gaussian_reference(Tensor eigenvalues, float rate) -> Tensor");
    m.def("hadamard(Tensor x, bool inverse=False) -> Tensor");
    m.def("pack_codes(Tensor codes, int nbits_per_codebook) -> Tensor");
    m.def("unpack_codes(Tensor codes, int nbits_per_codebook) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aqlm_c, CPU, m) {
    m.impl("residual_kmeans", TORCH_BOX(&answering<&residual_kmeans>::call));
    m.impl("accumulate_hessian", TORCH_BOX(&answering<&accumulate_hessian>::call));
    m.impl("accumulate_product", TORCH_BOX(&answering<&accumulate_product>::call));
    m.impl("correct_weight", TORCH_BOX(&answering<&correct_weight>::call));
    m.impl("factor_hessian", TORCH_BOX(&answering<&factor_hessian>::call));
    m.impl("search_sweep", TORCH_BOX(&answering<&search_sweep>::call));
    m.impl("search_ldl", TORCH_BOX(&answering<&search_ldl>::call));
    m.impl("update_codebooks", TORCH_BOX(&answering<&update_codebooks>::call));
    m.impl("update_scales", TORCH_BOX(&answering<&update_scales>::call));
    m.impl("update_adam", TORCH_BOX(&answering<&update_adam>::call));
    m.impl("buffer_step", TORCH_BOX(&answering<&buffer_step>::call));
    m.impl("quantization_error", TORCH_BOX(&answering<&quantization_error>::call));
    m.impl("gaussian_reference", TORCH_BOX(&answering<&gaussian_reference>::call));
    m.impl("hadamard", TORCH_BOX(&answering<&hadamard>::call));
    m.impl("pack_codes", TORCH_BOX(&answering<&pack_codes>::call));
    m.impl("unpack_codes", TORCH_BOX(&answering<&unpack_codes>::call));
}

} // namespace aqlm_torch
