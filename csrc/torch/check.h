/* check.h: what the ops ask of their tensors. Every failure is one line: argument, value, what was expected. */
#ifndef AQLM_TORCH_CHECK_H
#define AQLM_TORCH_CHECK_H

#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "aqlm.h"

/* Headers of torch 2.11 lack it; later ones define it as this for the ABI of 2.11. */
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace aqlm_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/* RuntimeError in Python, or ValueError if Error is std::invalid_argument. STD_TORCH_CHECK would put the C++ file and
 * line in front of a message meant for the caller. */
template <class Error = std::runtime_error, class... Parts> inline void check(bool ok, const Parts &...parts) {
    if (ok) return;
    std::ostringstream text;
    (text << ... << parts);
    throw Error(text.str());
}

inline void check(aqlm_status status, const char *what) {
    check(status == AQLM_OK, what, ": ", aqlm_status_text(status));
}

/* Printed only where a check fails: text costs microseconds. */
struct shape_of {
    const Tensor &t;
    explicit shape_of(const Tensor &tensor) : t(tensor) {}
};

inline std::ostream &operator<<(std::ostream &text, const shape_of &shape) {
    for (int64_t i = 0; i < shape.t.dim(); ++i) text << (i ? ", " : "[") << shape.t.size(i);
    return text << (shape.t.dim() ? "]" : "[]");
}

/* As Python writes it. */
inline const char *name_of(ScalarType type) {
    switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(type);
    }
}

template <class Error = std::runtime_error> inline aqlm_dtype dtype_of(const Tensor &t, const char *name) {
    switch (t.scalar_type()) {
    case ScalarType::Float: return AQLM_F32;
    case ScalarType::Half: return AQLM_F16;
    case ScalarType::BFloat16: return AQLM_BF16;
    default: break;
    }
    check<Error>(false, name, ": got dtype ", name_of(t.scalar_type()), ", expected float32, float16 or bfloat16");
    return AQLM_F32;
}

/* The shape a stored weight has, once its three tensors are known to agree with each other. */
inline aqlm_shape shape_of_weight(const Tensor &codes, const Tensor &codebooks, const Tensor &scales) {
    check(codes.dim() == 3, "codes: got shape ", shape_of(codes), ", expected [out / og, in / g, num_codebooks]");
    check(codebooks.dim() == 4, "codebooks: got shape ", shape_of(codebooks),
          ", expected [num_codebooks, 2^nbits_per_codebook, og, g]");
    const int64_t entries = codebooks.size(1);
    int64_t nbits = 0;
    while (nbits < 17 && (int64_t{1} << nbits) < entries) ++nbits;
    check(entries == int64_t{1} << nbits, "codebooks: got ", entries, " entries, expected a power of two");
    check(codebooks.size(0) == codes.size(2), "codebooks: got ", codebooks.size(0), " codebooks, expected ",
          codes.size(2), " as in codes");
    check(scales.numel() == codes.size(0) && (scales.dim() == 1 || scales.dim() == 4), "scales: got shape ",
          shape_of(scales), ", expected [", codes.size(0), ", 1, 1, 1]");
    const ScalarType stored = nbits <= 8 ? ScalarType::Char : ScalarType::Short;
    check(codes.scalar_type() == stored, "codes: got dtype ", name_of(codes.scalar_type()), ", expected ",
          name_of(stored), " for ", nbits, " bits per codebook");
    check(scales.scalar_type() == codebooks.scalar_type(), "scales: got dtype ", name_of(scales.scalar_type()),
          ", expected that of codebooks, ", name_of(codebooks.scalar_type()));
    const aqlm_shape shape = {codes.size(0) * codebooks.size(2),
                              codes.size(1) * codebooks.size(3),
                              codes.size(2),
                              nbits,
                              codebooks.size(3),
                              codebooks.size(2)};
    const char *problem = aqlm_check_shape(&shape);
    check(problem == nullptr, "codes and codebooks: got shapes ", shape_of(codes), " and ", shape_of(codebooks),
          ", expected a valid layer: ", problem ? problem : "");
    return shape;
}

/* Whether codes [O, J, K] lie in memory as [J, K, O] (QuantizedLinear.pack). */
inline bool is_packed(const Tensor &codes) {
    const int64_t O = codes.size(0), K = codes.size(2);
    return codes.scalar_type() == ScalarType::Char && O > 1 && codes.stride(0) == 1 && codes.stride(2) == O &&
           codes.stride(1) == K * O;
}

} // namespace aqlm_torch
#endif
