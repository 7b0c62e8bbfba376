/* quantizer_cuda.cpp: the quantizer's verbs on tensors of a GPU, under the schemas of quantizer_cpu.cpp. Products of
 * 16-bit activations and the Cholesky factorization are torch's; all else is csrc/cuda/quantizer. */
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda.h"
#include "cuda/aqlm_cuda_quantizer.h"
#include "quantizer.h"

namespace aqlm_torch {
namespace {

using torch::stable::clone;
using torch::stable::new_empty;

/* Rows whose product is one sum of fp32, before it is added to that of fp64: tensor cores cut off what they add. */
constexpr int64_t CHUNK = 8192, SPLIT_CHUNK = 2048;

/* A tensor of this GPU. */
void check_place(const Tensor &t, const char *name, int32_t device) {
    check_value(t.is_cuda() && t.get_device_index() == device, name,
                ": got a tensor elsewhere, expected it on cuda:", device, " as the others");
}

Tensor workspace_of(const Tensor &like, size_t bytes) {
    return new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

/* What lies at a tensor's start, once the stream has come to it. */
template <class T> T read(const Tensor &t, cudaStream_t stream) {
    T value;
    check(cudaMemcpyAsync(&value, t.const_data_ptr(), sizeof value, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    return value;
}

/* Whether a CUDA graph is being recorded: nothing can be read then, and what is recorded has run before. */
bool is_recorded(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
}

struct Layer : LayerOf<ready> {
    OnDevice on;
    cudaStream_t stream;

    Layer(const Tensor &weight_in, const Optional &H_in, const Optional &codes_in, const Optional &codebooks_in,
          const Optional &scales_in)
        : LayerOf(weight_in, H_in, codes_in, codebooks_in, scales_in), on(weight.get_device_index()),
          stream(on.stream) {
        const int32_t device = weight.get_device_index();
        for (const auto &[tensor, name] :
             {std::pair{&H, "H"}, {&codes, "codes"}, {&codebooks, "codebooks"}, {&scales, "scales"}})
            if (*tensor) check_place(**tensor, name, device);
        if (codes) check_codes();
    }

    Tensor workspace(size_t bytes) const { return workspace_of(weight, bytes); }

  private:
    void check_codes() const {
        if (is_recorded(stream)) return;
        const Tensor outside = new_empty(weight, {1}, ScalarType::Int);
        check(aqlm_cuda_check_codes(writable<int32_t>(outside), data<uint16_t>(codes), &shape, stream), "codes");
        check_value(read<int32_t>(outside, stream) == 0, "codes: got one outside, expected 0..",
                    (int64_t{1} << shape.nbits_per_codebook) - 1);
    }
};

std::tuple<Tensor, Tensor> residual_kmeans(const Tensor &weight, const Tensor &scales, int64_t num_codebooks,
                                           int64_t nbits_per_codebook, int64_t in_group_size, int64_t init_max_iter,
                                           double tolerance, int64_t seed, const Optional &column_weight) {
    Layer l(weight, std::nullopt, std::nullopt, std::nullopt, scales);
    l.set_format(num_codebooks, nbits_per_codebook, in_group_size, init_max_iter, tolerance);
    Optional columns;
    if (column_weight) {
        columns = Layer::floats("column_weight", *column_weight, {l.shape.in_features});
        check_place(*columns, "column_weight", l.weight.get_device_index());
    }
    const Tensor codes = l.new_codes(), codebooks = l.new_codebooks();
    const Tensor workspace = l.workspace(aqlm_cuda_kmeans_workspace(&l.shape));
    const cudaError_t error = aqlm_cuda_residual_kmeans(
        writable<uint16_t>(codes), writable(codebooks), data(l.weight), data(l.scales), data(columns), &l.shape,
        init_max_iter, tolerance, static_cast<uint64_t>(seed), workspace.mutable_data_ptr(), l.stream);
    if (error == cudaErrorInvalidValue) check_status(AQLM_BAD_ARGUMENT, "residual_kmeans");
    check(error, "residual_kmeans");
    return {codes, codebooks};
}

/* Activations [n, in] as their products are taken. */
Tensor activations_of(const Tensor &x) {
    const ScalarType type = x.scalar_type();
    check_value(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, "x: got dtype ",
                name_of(type), ", expected float32, float16 or bfloat16");
    check_fits(x, "x", {-1, -1});
    return ready(x);
}

/* What x^T y is added to, in place. */
double *sums_of(const Tensor &sum, const Tensor &x, const Tensor &y) {
    check_value(sum.scalar_type() == ScalarType::Double, "sum: got dtype ", name_of(sum.scalar_type()),
                ", expected float64");
    check_fits(sum, "sum", {x.size(1), y.size(1)});
    check_value(sum.is_contiguous(), "sum: got a strided tensor, expected one to write into");
    check_place(sum, "sum", x.get_device_index());
    return writable<double>(sum);
}

Tensor some_rows(const Tensor &x, int64_t start, int64_t count) {
    return torch::stable::narrow(const_cast<Tensor &>(x), 0, start, std::min(count, x.size(0) - start));
}

/* x^T y, fp32. */
Tensor product_of(const Tensor &x, const Tensor &y) {
    const Tensor turned = torch::stable::transpose(x, 0, 1);
    return x.scalar_type() == ScalarType::Float ? call("aten::mm", "", turned, y)[0]
                                                : call("aten::mm", "dtype", turned, y, ScalarType::Float)[0];
}

void accumulate_hessian(const Tensor &sum, const Tensor &x_in) {
    const Tensor x = activations_of(x_in);
    double *sums = sums_of(sum, x, x);
    const OnDevice on(x.get_device_index());
    const int64_t in = x.size(1);
    const bool split = x.scalar_type() == ScalarType::Float && in % 4 == 0;
    Tensor product = split ? new_empty(x, {in, in}) : x;
    const int64_t chunk = split ? SPLIT_CHUNK : CHUNK;
    for (int64_t done = 0; done < x.size(0); done += chunk) {
        const Tensor rows = some_rows(x, done, chunk);
        if (split) check(aqlm_cuda_square(writable(product), data(rows), rows.size(0), in, on.stream), "square");
        else product = product_of(rows, rows);
        check(aqlm_cuda_add_square(sums, data(product), in, on.stream), "accumulate_hessian");
    }
}

void accumulate_product(const Tensor &sum, const Tensor &x_in, const Tensor &y_in) {
    const Tensor x = activations_of(x_in);
    check_value(y_in.scalar_type() == x.scalar_type(), "y: got dtype ", name_of(y_in.scalar_type()), ", expected ",
                name_of(x.scalar_type()), " as x");
    check_fits(y_in, "y", {x.size(0), -1});
    const Tensor y = ready(y_in);
    double *sums = sums_of(sum, x, y);
    check_place(y, "y", x.get_device_index());
    const OnDevice on(x.get_device_index());
    for (int64_t done = 0; done < x.size(0); done += CHUNK) {
        const Tensor product = product_of(some_rows(x, done, CHUNK), some_rows(y, done, CHUNK));
        check(aqlm_cuda_add_product(sums, data(product), sum.numel(), on.stream), "accumulate_product");
    }
}

/* W C and the factor's systems are torch's, in fp32 and fp64. */
Tensor correct_weight(const Tensor &weight_in, const Tensor &cross_in, const Tensor &H_in, double alpha,
                      double relative_damp) {
    check_not_negative(relative_damp, "relative_damp");
    const Tensor weight = Layer::floats("weight", weight_in, {-1, -1});
    const int64_t out = weight.size(0), in = weight.size(1);
    const Tensor cross = Layer::floats("cross", cross_in, {in, in}), H = Layer::floats("H", H_in, {in, in});
    check_place(cross, "cross", weight.get_device_index());
    check_place(H, "H", weight.get_device_index());
    const OnDevice on(weight.get_device_index());
    Optional damped = new_empty(H, {in, in}, ScalarType::Double);
    check(aqlm_cuda_damp_hessian(writable<double>(*damped), data(H), relative_damp, in, on.stream), "correct_weight");
    const auto [lower, info] = call<2>("aten::linalg_cholesky_ex", "", *damped, false, false);
    damped.reset(); /* it has the size of two H */
    if (read<int32_t>(info, on.stream) != 0) check_status(AQLM_NOT_POSITIVE, "correct_weight");
    const Tensor product = call("aten::mm", "", weight, cross)[0];
    const Tensor turned = new_empty(weight, {in, out}, ScalarType::Double);
    check(aqlm_cuda_turn(writable<double>(turned), data(product), out, in, on.stream), "correct_weight");
    const Tensor solved = call("aten::cholesky_solve", "", turned, lower, false)[0];
    const Tensor corrected = new_empty(weight, {out, in});
    check(aqlm_cuda_add_turned(writable(corrected), data(weight), data<double>(solved), solved.stride(0),
                               solved.stride(1), alpha, out, in, on.stream),
          "correct_weight");
    return corrected;
}

std::tuple<Tensor, Tensor, Tensor> factor_hessian(const Tensor &H_in, int64_t in_group_size, double relative_damp) {
    check_not_negative(relative_damp, "relative_damp");
    const Tensor H = Layer::floats("H", H_in, {-1, -1});
    const int64_t in = H.size(1), g = in_group_size;
    check_value(H.size(0) == in, "H: got shape ", shape_of(H), ", expected a square matrix");
    check_shape({1, in, 1, 1, g, 1});
    const OnDevice on(H.get_device_index());
    const Tensor order = new_empty(H, {in / g}, ScalarType::Int), feedback = new_empty(H, {in, in});
    const Tensor metric = new_empty(H, {in / g, g, g}), mean = new_empty(H, {1}, ScalarType::Double);
    const Tensor workspace = workspace_of(H, aqlm_cuda_order_groups_workspace(in, g));
    check(aqlm_cuda_order_groups(writable<int32_t>(order), writable<double>(mean), data(H), in, g,
                                 workspace.mutable_data_ptr(), on.stream),
          "factor_hessian");
    const double value = read<double>(mean, on.stream);
    if (!(value > 0.0) || std::isinf(value)) check_status(AQLM_NOT_POSITIVE, "factor_hessian");
    Optional permuted = new_empty(H, {in, in}, ScalarType::Double);
    check(aqlm_cuda_permute_hessian(writable<double>(*permuted), data(H), data<int32_t>(order), data<double>(mean),
                                    relative_damp, in, g, on.stream),
          "factor_hessian");
    const auto [lower, info] = call<2>("aten::linalg_cholesky_ex", "", *permuted, false, false);
    permuted.reset(); /* it has the size of two H */
    if (read<int32_t>(info, on.stream) != 0) check_status(AQLM_NOT_POSITIVE, "factor_hessian");
    check(aqlm_cuda_factor_blocks(writable(feedback), writable(metric), data<double>(lower), lower.stride(0),
                                  lower.stride(1), in, g, on.stream),
          "factor_hessian");
    return {order, feedback, metric};
}

void check_search(cudaError_t error, const aqlm_shape &shape, const char *what) {
    check_value(error != cudaErrorInvalidConfiguration, what, ": got ", shape.num_codebooks, "x",
                shape.nbits_per_codebook, "g", shape.in_group_size,
                ", expected a format that this GPU has shared memory for");
    check(error, what);
}

Tensor search_sweep(const Tensor &codes, const Tensor &weight, const Tensor &H, const Tensor &codebooks,
                    const Tensor &scales, int64_t beam_size, int64_t seed, bool pairs) {
    const Layer l(weight, H, codes, codebooks, scales);
    const aqlm_search search = l.search(beam_size, pairs, seed);
    const Tensor found = clone(*l.codes), workspace = l.workspace(aqlm_cuda_search_workspace(&search));
    check_search(
        aqlm_cuda_search_sweep(writable<uint16_t>(found), &search, data(l.H), workspace.mutable_data_ptr(), l.stream),
        l.shape, "search_sweep");
    return found;
}

Tensor search_ldl(const Tensor &weight, const Tensor &order_in, const Tensor &feedback_in, const Tensor &metric_in,
                  const Tensor &codebooks, const Tensor &scales, int64_t beam_size, bool pairs) {
    const Layer l(weight, std::nullopt, std::nullopt, codebooks, scales);
    const int64_t in = l.shape.in_features, g = l.shape.in_group_size, groups = in / g;
    const Tensor order = tensor_of<ready>(order_in, "order", ScalarType::Int, {groups});
    const Tensor feedback = Layer::floats("feedback", feedback_in, {in, in});
    const Tensor metric = Layer::floats("metric", metric_in, {groups, g, g});
    for (const auto &[tensor, name] : {std::pair{&order, "order"}, {&feedback, "feedback"}, {&metric, "metric"}})
        check_place(*tensor, name, l.weight.get_device_index());
    const aqlm_search search = l.search(beam_size, pairs, 0);
    const Tensor found = l.new_codes(), workspace = l.workspace(aqlm_cuda_search_workspace(&search));
    check_search(aqlm_cuda_search_ldl(writable<uint16_t>(found), &search, data<int32_t>(order), data(feedback),
                                      data(metric), workspace.mutable_data_ptr(), l.stream),
                 l.shape, "search_ldl");
    return found;
}

Tensor update_codebooks(const Tensor &codebooks, const Tensor &weight, const Tensor &H, const Tensor &codes,
                        const Tensor &scales, int64_t cg_steps) {
    check_value(cg_steps >= 0, "cg_steps: got ", cg_steps, ", expected at least 0");
    const Layer l(weight, H, codes, codebooks, scales);
    const Tensor updated = clone(*l.codebooks), workspace = l.workspace(aqlm_cuda_update_workspace(&l.shape));
    check(aqlm_cuda_update_codebooks(writable(updated), data(l.weight), data(l.H), data<uint16_t>(l.codes),
                                     data(l.scales), &l.shape, cg_steps, workspace.mutable_data_ptr(), l.stream),
          "update_codebooks");
    return updated;
}

Tensor update_scales(const Tensor &scales, const Tensor &weight, const Tensor &H, const Tensor &codes,
                     const Tensor &codebooks) {
    const Layer l(weight, H, codes, codebooks, scales);
    const Tensor updated = clone(*l.scales), workspace = l.workspace(aqlm_cuda_update_workspace(&l.shape));
    check(aqlm_cuda_update_scales(writable(updated), data(l.weight), data(l.H), data<uint16_t>(l.codes),
                                  data(l.codebooks), &l.shape, workspace.mutable_data_ptr(), l.stream),
          "update_scales");
    return updated;
}

std::tuple<Tensor, Tensor, Tensor> update_adam(const Tensor &codebooks, const Tensor &scales, const Tensor &moments,
                                               const Tensor &weight, const Tensor &H, const Tensor &codes,
                                               int64_t steps, double learning_rate, int64_t steps_before) {
    check_adam(steps, learning_rate, steps_before);
    const Layer l(weight, H, codes, codebooks, scales);
    const Tensor c = clone(*l.codebooks), s = clone(*l.scales);
    const Tensor m = clone(tensor_of<ready>(moments, "moments", ScalarType::Double, {2, c.numel() + s.numel()}));
    check_place(m, "moments", l.weight.get_device_index());
    const Tensor workspace = l.workspace(aqlm_cuda_update_workspace(&l.shape));
    check(aqlm_cuda_update_adam(writable(c), writable(s), writable<double>(m), data(l.weight), data(l.H),
                                data<uint16_t>(l.codes), &l.shape, steps, learning_rate, steps_before,
                                workspace.mutable_data_ptr(), l.stream),
          "update_adam");
    return {c, s, m};
}

void buffer_step(const Tensor &buffer, const Tensor &gradient, const Optional &first, const Tensor &second,
                 const Optional &scales, double divisor, double learning_rate, double beta1, double beta2,
                 int64_t step) {
    const BufferOf<ready> b(buffer, gradient, first, second, scales, {divisor, learning_rate, beta1, beta2, step});
    const int32_t device = b.buffer.get_device_index();
    check_place(b.gradient, "gradient", device);
    if (first) check_place(*first, "first", device);
    check_place(second, "second", device);
    if (scales) check_place(*scales, "scales", device);
    const OnDevice on(device);
    const aqlm_buffer_moments moments = b.moments();
    check(aqlm_cuda_buffer_step(writable(b.buffer), &moments, b.gradient.const_data_ptr(), b.dtype, b.buffer.numel(),
                                &b.options, on.stream),
          "buffer_step");
}

Tensor quantization_error(const Tensor &weight, const Tensor &H, const Optional &codes, const Optional &codebooks,
                          const Optional &scales) {
    check_state(codes, codebooks, scales);
    const Layer l =
        codes ? Layer(weight, H, codes, codebooks, scales) : Layer(weight, H, std::nullopt, std::nullopt, std::nullopt);
    const Tensor error = new_empty(l.weight, {}, ScalarType::Double);
    const Tensor workspace = l.workspace(aqlm_cuda_update_workspace(&l.shape));
    check(aqlm_cuda_quantization_error(writable<double>(error), data(l.weight), data(l.H), data<uint16_t>(l.codes),
                                       data(l.codebooks), data(l.scales), &l.shape, workspace.mutable_data_ptr(),
                                       l.stream),
          "quantization_error");
    return error;
}

Tensor convert_codes(const Tensor &codes_in, int64_t bits, bool packs) {
    const CodesOf<ready> from(codes_in, bits, packs);
    const OnDevice on(from.codes.get_device_index());
    const Tensor converted = from.converted(packs), where = new_empty(from.codes, {1}, ScalarType::Long);
    const int64_t n = from.codes.numel();
    auto *first = writable<uint64_t>(where);
    check(packs ? aqlm_cuda_pack_codes(converted.mutable_data_ptr(), data<uint16_t>(from.codes), n, bits, first,
                                       on.stream)
                : aqlm_cuda_unpack_codes(writable<uint16_t>(converted), from.codes.const_data_ptr(), n, bits, first,
                                         on.stream),
          packs ? "pack_codes" : "unpack_codes");
    if (is_recorded(on.stream)) return converted;
    const auto outside = read<int64_t>(where, on.stream);
    if (outside >= 0) {
        uint16_t value = 0;
        const int64_t size = packs || bits > 8 ? 2 : 1;
        check(cudaMemcpy(&value, static_cast<const char *>(from.codes.const_data_ptr()) + outside * size, size,
                         cudaMemcpyDeviceToHost),
              "cudaMemcpy");
        from.refuse(packs       ? int64_t{value}
                    : bits <= 8 ? int64_t{static_cast<int8_t>(value)}
                                : int64_t{static_cast<int16_t>(value)},
                    outside, packs);
    }
    return converted;
}

Tensor hadamard(const Tensor &x_in, bool inverse) {
    const Tensor x = Layer::floats("x", x_in, {-1, -1});
    const int64_t rows = x.size(0), n = x.size(1);
    check_value(rows > 0 && n > 0, "x: got shape ", shape_of(x), ", expected values");
    const OnDevice on(x.get_device_index());
    const Tensor y = new_empty(x, {rows, n});
    const Tensor workspace = workspace_of(x, aqlm_cuda_hadamard_workspace(rows, n));
    check(aqlm_cuda_hadamard(writable(y), data(x), rows, n, inverse, workspace.mutable_data_ptr(), on.stream),
          "hadamard");
    return y;
}

Tensor pack_codes(const Tensor &codes, int64_t nbits_per_codebook) {
    return convert_codes(codes, nbits_per_codebook, true);
}

Tensor unpack_codes(const Tensor &codes, int64_t nbits_per_codebook) {
    return convert_codes(codes, nbits_per_codebook, false);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(aqlm_c, CUDA, m) {
    m.impl("residual_kmeans", TORCH_BOX(&residual_kmeans));
    m.impl("accumulate_hessian", TORCH_BOX(&accumulate_hessian));
    m.impl("accumulate_product", TORCH_BOX(&accumulate_product));
    m.impl("correct_weight", TORCH_BOX(&correct_weight));
    m.impl("factor_hessian", TORCH_BOX(&factor_hessian));
    m.impl("search_sweep", TORCH_BOX(&search_sweep));
    m.impl("search_ldl", TORCH_BOX(&search_ldl));
    m.impl("update_codebooks", TORCH_BOX(&update_codebooks));
    m.impl("update_scales", TORCH_BOX(&update_scales));
    m.impl("update_adam", TORCH_BOX(&update_adam));
    m.impl("buffer_step", TORCH_BOX(&buffer_step));
    m.impl("quantization_error", TORCH_BOX(&quantization_error));
    m.impl("hadamard", TORCH_BOX(&hadamard));
    m.impl("pack_codes", TORCH_BOX(&pack_codes));
    m.impl("unpack_codes", TORCH_BOX(&unpack_codes));
}

} // namespace aqlm_torch
