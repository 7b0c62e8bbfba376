/* quantizer.h: what the quantizer's verbs ask of their tensors on either device. What is wrong with a tensor or a
 * number raises ValueError. */
#ifndef AQLM_TORCH_QUANTIZER_H
#define AQLM_TORCH_QUANTIZER_H

#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "check.h"

namespace aqlm_torch {

using Optional = std::optional<Tensor>;

template <class... Parts> void check_value(bool ok, const Parts &...parts) {
    check<std::invalid_argument>(ok, parts...);
}

/* Also refuses NaN. */
inline void check_not_negative(double x, const char *name) {
    check_value(x >= 0.0, name, ": got ", x, ", expected a number >= 0");
}

struct expected_shape {
    std::initializer_list<int64_t> sizes;
};

inline std::ostream &operator<<(std::ostream &text, const expected_shape &shape) {
    const char *comma = "[";
    for (const int64_t n : shape.sizes) {
        text << comma;
        n < 0 ? text << "any" : text << n;
        comma = ", ";
    }
    return text << "]";
}

inline void check_fits(const Tensor &t, const char *name, std::initializer_list<int64_t> sizes) {
    bool fits = t.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t i = 0; fits && i < t.dim(); ++i) fits = sizes.begin()[i] < 0 || t.size(i) == sizes.begin()[i];
    check_value(fits, name, ": got shape ", shape_of(t), ", expected ", expected_shape{sizes});
}

/* t, as a device's kernels read it (`Dense`), if it has exactly this dtype and shape (sizes < 0: any). */
template <Tensor (*Dense)(const Tensor &)>
Tensor tensor_of(const Tensor &t, const char *name, ScalarType type, std::initializer_list<int64_t> sizes) {
    check_value(t.scalar_type() == type, name, ": got dtype ", name_of(t.scalar_type()), ", expected ", name_of(type));
    check_fits(t, name, sizes);
    return Dense(t);
}

template <class T = float> const T *data(const Tensor &t) { return static_cast<const T *>(t.const_data_ptr()); }
template <class T = float> const T *data(const std::optional<Tensor> &t) { return t ? data<T>(*t) : nullptr; }
template <class T = float> T *writable(const Tensor &t) { return static_cast<T *>(t.mutable_data_ptr()); }

inline void check_shape(const aqlm_shape &shape) {
    const char *problem = aqlm_check_shape(&shape);
    check_value(!problem, problem ? problem : "", "; got out_features=", shape.out_features,
                ", in_features=", shape.in_features, ", num_codebooks=", shape.num_codebooks,
                ", nbits_per_codebook=", shape.nbits_per_codebook, ", in_group_size=", shape.in_group_size);
}

inline void check_status(aqlm_status status, const char *what) {
    if (status == AQLM_NO_MEMORY) check(status, what);
    check_value(status == AQLM_OK, what, ": ", aqlm_status_text(status));
}

/* What most verbs take, dense and agreeing with each other; none where a verb does not take it. */
template <Tensor (*Dense)(const Tensor &)> struct LayerOf {
    Tensor weight;
    Optional H, codes, codebooks, scales;
    aqlm_shape shape;

    LayerOf(const Tensor &weight_in, const Optional &H_in, const Optional &codes_in, const Optional &codebooks_in,
            const Optional &scales_in)
        : weight(floats("weight", weight_in, {-1, -1})) {
        const int64_t out = weight.size(0), in = weight.size(1);
        shape = {out, in, 1, 1, 4, 1};
        if (H_in) H = floats("H", *H_in, {in, in});
        if (codebooks_in) {
            codebooks = floats("codebooks", *codebooks_in, {-1, -1, -1});
            const int64_t entries = codebooks->size(1);
            int64_t bits = 1;
            while (bits < 16 && (int64_t{1} << bits) < entries) ++bits;
            check_value(entries == int64_t{1} << bits, "codebooks: got ", entries,
                        " entries, expected a power of two in 2..65536");
            shape = {out, in, codebooks->size(0), bits, codebooks->size(2), 1};
        }
        if (codebooks_in || codes_in || H_in) check_shape(shape);
        if (codes_in)
            codes = tensor_of<Dense>(*codes_in, "codes", ScalarType::UInt16,
                                     {out, in / shape.in_group_size, shape.num_codebooks});
        if (scales_in) scales = floats("scales", *scales_in, {out});
    }

    static Tensor floats(const char *name, const Tensor &t, std::initializer_list<int64_t> sizes) {
        return tensor_of<Dense>(t, name, ScalarType::Float, sizes);
    }

    Tensor new_codes() const {
        return torch::stable::new_empty(
            weight, {shape.out_features, shape.in_features / shape.in_group_size, shape.num_codebooks},
            ScalarType::UInt16);
    }

    /* Of residual_kmeans: the format that is asked for. */
    void set_format(int64_t num_codebooks, int64_t nbits_per_codebook, int64_t in_group_size, int64_t init_max_iter,
                    double tolerance) {
        check_not_negative(tolerance, "tolerance");
        shape.num_codebooks = num_codebooks;
        shape.nbits_per_codebook = nbits_per_codebook;
        shape.in_group_size = in_group_size;
        check_shape(shape);
        check_value(init_max_iter >= 1, "init_max_iter: got ", init_max_iter, ", expected at least 1");
    }

    Tensor new_codebooks() const {
        return torch::stable::new_empty(
            weight, {shape.num_codebooks, int64_t{1} << shape.nbits_per_codebook, shape.in_group_size},
            ScalarType::Float);
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

inline void check_adam(int64_t steps, double learning_rate, int64_t steps_before) {
    check_value(steps >= 0, "steps: got ", steps, ", expected a number >= 0");
    check_not_negative(learning_rate, "learning_rate");
    check_value(steps_before >= 0, "steps_before: got ", steps_before, ", expected a number >= 0");
}

/* What buffer_step is given, checked; moments and buffer are written into as they lie. */
template <Tensor (*Dense)(const Tensor &)> struct BufferOf {
    Tensor buffer, gradient, second;
    Optional first, scales;
    aqlm_dtype dtype;
    aqlm_buffer_options options;

    BufferOf(const Tensor &buffer_in, const Tensor &gradient_in, const Optional &first_in, const Tensor &second_in,
             const Optional &scales_in, const aqlm_buffer_options &options_in)
        : buffer(target(buffer_in, "buffer", ScalarType::Float, {-1, -1})), gradient(gradient_in), second(second_in),
          first(first_in), scales(scales_in), dtype(dtype_of<std::invalid_argument>(gradient_in, "gradient")),
          options(options_in) {
        const int64_t out = buffer.size(0), in = buffer.size(1);
        check_fits(gradient_in, "gradient", {out, in});
        gradient = Dense(gradient_in);
        if (first) target(*first, "first", scales ? ScalarType::Char : ScalarType::Float, {out, in});
        target(second, "second", scales ? ScalarType::Byte : ScalarType::Float, {out, in});
        if (scales)
            target(*scales, "scales", ScalarType::Float, {2, (out * in + AQLM_MOMENTS_BLOCK - 1) / AQLM_MOMENTS_BLOCK});
        for (const auto &[value, name] : {std::pair{options.beta1, "beta1"}, {options.beta2, "beta2"}})
            check_value(value >= 0.0 && value < 1.0, name, ": got ", value, ", expected a number in [0, 1)");
        check_value(options.divisor > 0.0, "divisor: got ", options.divisor, ", expected a number > 0");
        check_not_negative(options.learning_rate, "learning_rate");
        check_value(options.step >= 1, "step: got ", options.step, ", expected at least 1");
        check_value(options.beta1 == 0.0 || first, "first: got None, expected a tensor for a beta1 above 0");
    }

    aqlm_buffer_moments moments() const {
        return {first ? first->mutable_data_ptr() : nullptr, second.mutable_data_ptr(),
                scales ? writable(*scales) : nullptr};
    }

  private:
    static Tensor target(const Tensor &t, const char *name, ScalarType type, std::initializer_list<int64_t> sizes) {
        check_value(t.scalar_type() == type, name, ": got dtype ", name_of(t.scalar_type()), ", expected ",
                    name_of(type));
        check_fits(t, name, sizes);
        check_value(t.is_contiguous() && Dense(t).const_data_ptr() == t.const_data_ptr(), name,
                    ": got a strided tensor, expected one to write into");
        return t;
    }
};

inline void check_state(const Optional &codes, const Optional &codebooks, const Optional &scales) {
    check_value(!codes || codebooks, "codebooks: got None, expected a tensor beside codes");
    check_value(!codes || scales, "scales: got None, expected a tensor beside codes");
}

/* Working codes or stored ones, [out, J, K] of any g and og; the shape that stands for them. */
template <Tensor (*Dense)(const Tensor &)> struct CodesOf {
    int64_t bits;
    ScalarType stored;
    Tensor codes;
    aqlm_shape shape;

    CodesOf(const Tensor &codes_in, int64_t bits_in, bool packs)
        : bits(bits_in), stored(bits_in <= 8 ? ScalarType::Char : ScalarType::Short), codes(codes_in) {
        check_value(bits >= 1 && bits <= 16, "nbits_per_codebook: got ", bits, ", expected 1..16");
        codes = tensor_of<Dense>(codes_in, "codes", packs ? ScalarType::UInt16 : stored, {-1, -1, -1});
        shape = {codes.size(0), codes.size(1) * 4, codes.size(2), bits, 4, 1};
        check_shape(shape);
    }

    Tensor converted(bool packs) const {
        return torch::stable::new_empty(codes, {codes.size(0), codes.size(1), codes.size(2)},
                                        packs ? stored : ScalarType::UInt16);
    }

    [[noreturn]] void refuse(int64_t value, int64_t where, bool packs) const {
        const int64_t entries = int64_t{1} << bits, first = packs ? 0 : -entries / 2;
        check_value(false, "codes: got ", value, " at flat index ", where, ", expected ", first, "..",
                    first + entries - 1, " for nbits_per_codebook=", bits);
        throw std::logic_error("unreachable");
    }
};

} // namespace aqlm_torch
#endif
