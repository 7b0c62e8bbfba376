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

namespace aqlm_torch {
namespace {

using torch::stable::new_empty;

template <class... Parts> void check_value(bool ok, const Parts &...parts) {
    check<std::invalid_argument>(ok, parts...);
}

/* Also refuses NaN. */
void check_not_negative(double x, const char *name) {
    check_value(x >= 0.0, name, ": got ", x, ", expected a number >= 0");
}

struct expected_shape {
    std::initializer_list<int64_t> sizes;
};

std::ostream &operator<<(std::ostream &text, const expected_shape &shape) {
    const char *comma = "[";
    for (const int64_t n : shape.sizes) {
        text << comma;
        n < 0 ? text << "any" : text << n;
        comma = ", ";
    }
    return text << "]";
}

/* t, contiguous, if it has exactly this dtype and shape (sizes < 0: any). */
Tensor tensor_of(const Tensor &t, const char *name, ScalarType type, std::initializer_list<int64_t> sizes) {
    check_value(t.scalar_type() == type, name, ": got dtype ", name_of(t.scalar_type()), ", expected ", name_of(type));
    bool fits = t.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t i = 0; fits && i < t.dim(); ++i) fits = sizes.begin()[i] < 0 || t.size(i) == sizes.begin()[i];
    check_value(fits, name, ": got shape ", shape_of(t), ", expected ", expected_shape{sizes});
    return as_contiguous(t);
}

Tensor floats_of(const Tensor &t, const char *name, std::initializer_list<int64_t> sizes) {
    return tensor_of(t, name, ScalarType::Float, sizes);
}

template <class T = float> const T *data(const Tensor &t) { return static_cast<const T *>(t.const_data_ptr()); }
template <class T = float> const T *data(const std::optional<Tensor> &t) { return t ? data<T>(*t) : nullptr; }
template <class T = float> T *writable(const Tensor &t) { return static_cast<T *>(t.mutable_data_ptr()); }

void check_shape(const aqlm_shape &shape) {
    const char *problem = aqlm_check_shape(&shape);
    check_value(!problem, problem ? problem : "", "; got out_features=", shape.out_features,
                ", in_features=", shape.in_features, ", num_codebooks=", shape.num_codebooks,
                ", nbits_per_codebook=", shape.nbits_per_codebook, ", in_group_size=", shape.in_group_size);
}

void check_status(aqlm_status status, const char *what) {
    if (status == AQLM_NO_MEMORY) check(status, what);
    check_value(status == AQLM_OK, what, ": ", aqlm_status_text(status));
}

void check_codes(const Tensor &codes, int64_t bits) {
    const auto *code = data<uint16_t>(codes);
    for (int64_t i = 0, n = codes.numel(); i < n; ++i)
        if (code[i] >> bits)
            check_value(false, "codes: got ", code[i], " at flat index ", i, ", expected 0..",
                        (int64_t{1} << bits) - 1);
}

using Optional = std::optional<Tensor>;

Tensor copy_of(const Optional &t) { return torch::stable::clone(t.value()); }

/* What most verbs take, contiguous and agreeing with each other; none where a verb does not take it. */
struct Layer {
    Tensor weight;
    Optional H, codes, codebooks, scales;
    aqlm_shape shape;

    Layer(const Tensor &weight_in, const Optional &H_in, const Optional &codes_in, const Optional &codebooks_in,
          const Optional &scales_in)
        : weight(floats_of(weight_in, "weight", {-1, -1})) {
        const int64_t out = weight.size(0), in = weight.size(1);
        shape = {out, in, 1, 1, 4, 1};
        if (H_in) H = floats_of(*H_in, "H", {in, in});
        if (codebooks_in) {
            codebooks = floats_of(*codebooks_in, "codebooks", {-1, -1, -1});
            const int64_t entries = codebooks->size(1);
            int64_t bits = 1;
            while (bits < 16 && (int64_t{1} << bits) < entries) ++bits;
            check_value(entries == int64_t{1} << bits, "codebooks: got ", entries,
                        " entries, expected a power of two in 2..65536");
            shape = {out, in, codebooks->size(0), bits, codebooks->size(2), 1};
        }
        if (codebooks_in || codes_in || H_in) check_shape(shape);
        if (codes_in) {
            codes =
                tensor_of(*codes_in, "codes", ScalarType::UInt16, {out, in / shape.in_group_size, shape.num_codebooks});
            check_codes(*codes, shape.nbits_per_codebook);
        }
        if (scales_in) scales = floats_of(*scales_in, "scales", {out});
        follow_torch_threads();
    }

    Tensor new_codes() const {
        return new_empty(weight, {shape.out_features, shape.in_features / shape.in_group_size, shape.num_codebooks},
                         ScalarType::UInt16);
    }

    aqlm_search search(int64_t beam_size, bool pairs, int64_t seed) const {
        check_value(beam_size >= 0 && beam_size <= 64, "beam_size: got ", beam_size,
                    ", expected 0 (exact pairs) or 1..64");
        check_value(!(pairs || beam_size == 0) || (shape.num_codebooks >= 2 && shape.nbits_per_codebook <= 8),
                    pairs ? "pairs: got True" : "beam_size: got 0", " (exact pairs) with ", shape.num_codebooks, "x",
                    shape.nbits_per_codebook, ", expected at least 2 codebooks of at most 8 bits");
        return {data(weight), data(codebooks), data(scales), shape, beam_size, pairs, static_cast<uint64_t>(seed)};
    }
};

std::tuple<Tensor, Tensor> residual_kmeans(const Tensor &weight, const Tensor &scales, int64_t num_codebooks,
                                           int64_t nbits_per_codebook, int64_t in_group_size, int64_t init_max_iter,
                                           double tolerance, int64_t seed, const Optional &column_weight) {
    check_not_negative(tolerance, "tolerance");
    Layer l(weight, std::nullopt, std::nullopt, std::nullopt, scales);
    l.shape.num_codebooks = num_codebooks;
    l.shape.nbits_per_codebook = nbits_per_codebook;
    l.shape.in_group_size = in_group_size;
    check_shape(l.shape);
    Optional columns;
    if (column_weight) columns = floats_of(*column_weight, "column_weight", {l.shape.in_features});
    check_value(init_max_iter >= 1, "init_max_iter: got ", init_max_iter, ", expected at least 1");
    const Tensor codes = l.new_codes();
    const Tensor codebooks =
        new_empty(l.weight, {num_codebooks, int64_t{1} << nbits_per_codebook, in_group_size}, ScalarType::Float);
    check_status(aqlm_residual_kmeans(writable<uint16_t>(codes), writable(codebooks), data(l.weight), data(l.scales),
                                      data(columns), &l.shape, init_max_iter, tolerance, static_cast<uint64_t>(seed)),
                 "residual_kmeans");
    return {codes, codebooks};
}

void accumulate_hessian(const Tensor &sum, const Tensor &x_in) {
    const Tensor x = floats_of(x_in, "x", {-1, -1});
    tensor_of(sum, "sum", ScalarType::Double, {x.size(1), x.size(1)});
    check_value(sum.is_contiguous() && is_aligned(sum), "sum: got a strided tensor, expected one to write into");
    follow_torch_threads();
    check_status(aqlm_accumulate_hessian(writable<double>(sum), data(x), x.size(0), x.size(1)), "accumulate_hessian");
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
    const Tensor order = tensor_of(order_in, "order", ScalarType::Int, {groups});
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
    check_value(steps >= 0, "steps: got ", steps, ", expected a number >= 0");
    check_not_negative(learning_rate, "learning_rate");
    check_value(steps_before >= 0, "steps_before: got ", steps_before, ", expected a number >= 0");
    const Layer l(weight, H, codes, codebooks, scales);
    const Tensor c = copy_of(l.codebooks), s = copy_of(l.scales);
    const Tensor m = copy_of(tensor_of(moments, "moments", ScalarType::Double, {2, c.numel() + s.numel()}));
    check_status(aqlm_update_adam(writable(c), writable(s), writable<double>(m), data(l.weight), data(l.H),
                                  data<uint16_t>(l.codes), &l.shape, steps, learning_rate, steps_before),
                 "update_adam");
    return {c, s, m};
}

Tensor quantization_error(const Tensor &weight, const Tensor &H, const Optional &codes, const Optional &codebooks,
                          const Optional &scales) {
    check_value(!codes || codebooks, "codebooks: got None, expected a tensor beside codes");
    check_value(!codes || scales, "scales: got None, expected a tensor beside codes");
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
    const Tensor eigenvalues = tensor_of(eigenvalues_in, "eigenvalues", ScalarType::Double, {-1});
    check_value(eigenvalues.numel() > 0, "eigenvalues: got none, expected at least one");
    const Tensor error = new_empty(eigenvalues, {});
    check_status(aqlm_gaussian_reference(writable<double>(error), data<double>(eigenvalues), eigenvalues.numel(), rate),
                 "gaussian_reference");
    return error;
}

/* Working codes to the disk layout or back, by `convert`, which says where it met a code outside first..last. */
template <class Convert>
Tensor convert_codes(const Tensor &codes_in, int64_t bits, bool packs, const Convert &convert) {
    check_value(bits >= 1 && bits <= 16, "nbits_per_codebook: got ", bits, ", expected 1..16");
    const ScalarType stored = bits <= 8 ? ScalarType::Char : ScalarType::Short;
    const Tensor codes = tensor_of(codes_in, "codes", packs ? ScalarType::UInt16 : stored, {-1, -1, -1});
    const aqlm_shape shape = {codes.size(0), codes.size(1) * 4, codes.size(2), bits, 4, 1}; /* of any g and og */
    check_shape(shape);
    const Tensor converted =
        new_empty(codes, {codes.size(0), codes.size(1), codes.size(2)}, packs ? stored : ScalarType::UInt16);
    int64_t where = -1;
    const aqlm_status status = convert(converted.mutable_data_ptr(), codes.const_data_ptr(), &shape, &where);
    if (where >= 0) {
        const int64_t value = packs       ? int64_t{data<uint16_t>(codes)[where]}
                              : bits <= 8 ? int64_t{data<int8_t>(codes)[where]}
                                          : int64_t{data<int16_t>(codes)[where]};
        const int64_t entries = int64_t{1} << bits, first = packs ? 0 : -entries / 2;
        check_value(false, "codes: got ", value, " at flat index ", where, ", expected ", first, "..",
                    first + entries - 1, " for nbits_per_codebook=", bits);
    }
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
    m.def("quantization_error(Tensor weight, Tensor H, Tensor? codes=None, Tensor? codebooks=None, "
          "Tensor? scales=None) -> Tensor");
    m.def("gaussian_reference(Tensor eigenvalues, float rate) -> Tensor");
    m.def("pack_codes(Tensor codes, int nbits_per_codebook) -> Tensor");
    m.def("unpack_codes(Tensor codes, int nbits_per_codebook) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(aqlm_c, CPU, m) {
    m.impl("residual_kmeans", TORCH_BOX(&answering<&residual_kmeans>::call));
    m.impl("accumulate_hessian", TORCH_BOX(&answering<&accumulate_hessian>::call));
    m.impl("factor_hessian", TORCH_BOX(&answering<&factor_hessian>::call));
    m.impl("search_sweep", TORCH_BOX(&answering<&search_sweep>::call));
    m.impl("search_ldl", TORCH_BOX(&answering<&search_ldl>::call));
    m.impl("update_codebooks", TORCH_BOX(&answering<&update_codebooks>::call));
    m.impl("update_scales", TORCH_BOX(&answering<&update_scales>::call));
    m.impl("update_adam", TORCH_BOX(&answering<&update_adam>::call));
    m.impl("quantization_error", TORCH_BOX(&answering<&quantization_error>::call));
    m.impl("gaussian_reference", TORCH_BOX(&answering<&gaussian_reference>::call));
    m.impl("pack_codes", TORCH_BOX(&answering<&pack_codes>::call));
    m.impl("unpack_codes", TORCH_BOX(&answering<&unpack_codes>::call));
}

} // namespace aqlm_torch
