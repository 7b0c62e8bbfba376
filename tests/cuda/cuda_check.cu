/* cuda_check.cu: the launchers of aqlm_cuda.h against plain sums on the CPU, without torch or Python: small enough for
 * compute-sanitizer. test_cuda.py builds and runs it; by hand:
 *
 *   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/cuda/cuda_check.cu \
 *     $(find csrc/cuda -name "*.cu") \
 *     csrc/core/runtime/rng.c -o cuda_check
 *   for tool in memcheck racecheck initcheck synccheck; do compute-sanitizer --tool $tool ./cuda_check; done
 *
 * With AQLM_C_TILES=1 many rows by tiles. Arguments: the numbers of the shapes to check, all of them without. Prints a
 * line for each; exits with 1 if one is wrong. Every array is an allocation of its own size. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/aqlm_cuda.h"

namespace {

void check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
}

template <class T> struct OnDevice {
    T *data = nullptr;
    size_t count;
    explicit OnDevice(size_t count) : count(count) { check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc"); }
    explicit OnDevice(const std::vector<T> &from) : OnDevice(from.size()) {
        check(cudaMemcpy(data, from.data(), count * sizeof(T), cudaMemcpyHostToDevice), "to the device");
    }
    OnDevice(const OnDevice &) = delete;
    ~OnDevice() { cudaFree(data); }
    std::vector<T> host() const {
        std::vector<T> to(count);
        check(cudaMemcpy(to.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "a kernel");
        return to;
    }
};

template <class T> constexpr aqlm_dtype dtype_of = AQLM_F32;
template <> constexpr aqlm_dtype dtype_of<__half> = AQLM_F16;
template <> constexpr aqlm_dtype dtype_of<__nv_bfloat16> = AQLM_BF16;
template <class T> constexpr double unit = 6e-8; /* of rounding */
template <> constexpr double unit<__half> = 4.9e-4;
template <> constexpr double unit<__nv_bfloat16> = 3.9e-3;

struct Format {
    int64_t out, in, K, B, og, g;
};

/* Each kernel (tables of every g and K; gathers from shared memory and L2, of one format and of any; planes; tiles;
 * plain), sizes around its tiles. */
const Format FORMATS[] = {
    {520, 1056, 2, 8, 1, 8},  {137, 1024, 4, 8, 1, 8},  {77, 512, 8, 8, 1, 8},    {65, 520, 1, 8, 1, 8},
    {64, 1376, 2, 8, 1, 8},   {192, 576, 3, 8, 1, 8},   {33, 256, 7, 7, 1, 8},    {65, 128, 2, 8, 1, 4},
    {41, 512, 1, 8, 1, 16},   {30, 512, 2, 2, 1, 32},   {131, 1088, 1, 16, 1, 8}, {50, 16512, 1, 16, 1, 8},
    {40, 320, 1, 14, 1, 8},   {40, 320, 1, 12, 1, 8},   {51, 768, 2, 12, 1, 8},   {12, 264, 1, 15, 1, 8},
    {28, 512, 3, 10, 1, 16},  {28, 520, 2, 8, 2, 8},    {40, 2816, 8, 8, 1, 8},   {10, 8, 1, 8, 1, 8},
    {2060, 8832, 2, 8, 1, 8}, {16, 17024, 8, 8, 1, 8},  {16, 33920, 8, 8, 1, 8},  {48, 512, 8, 8, 1, 16},
    {48, 256, 8, 6, 1, 4},    {49, 640, 5, 8, 1, 8},    {50, 512, 6, 8, 1, 4},    {35, 1024, 3, 8, 1, 16},
    {36, 2048, 5, 5, 1, 32},  {70, 1024, 3, 8, 1, 8},   {33, 12288, 3, 8, 1, 8},  {130, 1024, 1, 16, 1, 16},
    {190, 512, 4, 8, 1, 16},  {131, 1024, 2, 8, 1, 32}, {129, 640, 1, 8, 1, 4},   {60, 2048, 2, 16, 1, 8},
    {35, 9216, 2, 15, 1, 8},  {41, 768, 1, 12, 1, 4},   {40, 1024, 3, 12, 1, 8},  {50, 1024, 2, 9, 1, 32},
    {20, 144, 1, 16, 1, 16},  {50, 640, 5, 8, 1, 16},   {33, 1024, 7, 8, 1, 32},  {35, 516, 7, 8, 1, 4},
    {48, 520, 1, 12, 4, 8},   {30, 512, 5, 8, 3, 16},   {24, 512, 8, 8, 12, 32},  {41, 8, 3, 16, 1, 4},
};

/* Paths of products of float16, of 8 rows at a time and of those behind. */
const struct {
    Format format;
    int64_t rows;
    aqlm_cuda_path path, last_path;
    bool tiled; /* where tiles are wanted */
} PATHS[] = {
    {{4096, 4096, 2, 8, 1, 8}, 1, AQLM_CUDA_TABLES, AQLM_CUDA_TABLES, false},
    {{4096, 4096, 2, 8, 1, 8}, 3, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, false},
    {{4096, 4096, 2, 8, 1, 8}, 9, AQLM_CUDA_GATHER, AQLM_CUDA_TABLES, true},
    {{4096, 4096, 2, 8, 1, 8}, 24, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, true},
    {{4096, 4096, 2, 8, 1, 8}, 25, AQLM_CUDA_DENSE, AQLM_CUDA_DENSE, true},
    {{4096, 4096, 1, 16, 1, 8}, 1, AQLM_CUDA_SHARDS, AQLM_CUDA_SHARDS, false},
    {{13824, 5120, 2, 16, 1, 8}, 1, AQLM_CUDA_SHARDS, AQLM_CUDA_SHARDS, false},
    {{4096, 4096, 2, 16, 1, 8}, 1, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, false},
    {{1024, 4096, 1, 16, 1, 8}, 1, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, false},
    {{4096, 4096, 1, 16, 1, 16}, 1, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, false},
    {{4096, 4096, 1, 16, 1, 8}, 8, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, false},
    {{13824, 5120, 1, 16, 1, 8}, 8, AQLM_CUDA_SHARDS, AQLM_CUDA_SHARDS, false},
    {{4096, 4096, 1, 16, 1, 16}, 16, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, true},
    {{4096, 4096, 2, 8, 1, 16}, 2, AQLM_CUDA_TABLES, AQLM_CUDA_TABLES, false},
    {{4096, 4096, 1, 16, 1, 8}, 9, AQLM_CUDA_DENSE, AQLM_CUDA_DENSE, true},
    {{4096, 4096, 8, 8, 1, 8}, 4, AQLM_CUDA_TABLES, AQLM_CUDA_TABLES, false},
    {{4096, 4096, 8, 8, 1, 8}, 9, AQLM_CUDA_DENSE, AQLM_CUDA_DENSE, true},
    {{4096, 4096, 2, 8, 2, 8}, 1, AQLM_CUDA_GATHER, AQLM_CUDA_GATHER, false},
};

std::mt19937 random_bits(1);

template <class T> std::vector<T> random_values(size_t count, float size) {
    std::normal_distribution<float> normal(0, size);
    std::vector<T> values(count);
    for (T &v : values) v = T(normal(random_bits));
    return values;
}

/* The largest difference, in units of rounding of the truth's largest number. */
template <class T> double error_of(const std::vector<T> &got, const std::vector<double> &truth) {
    double worst = 0, largest = 1e-30;
    for (size_t i = 0; i < truth.size(); ++i) {
        worst = std::fmax(worst, std::isfinite(float(got[i])) ? std::fabs(double(float(got[i])) - truth[i]) : INFINITY);
        largest = std::fmax(largest, std::fabs(truth[i]));
    }
    return worst / largest / unit<T>;
}

/* Random, and what it stands for. */
template <class T> struct Weight {
    Format f;
    int64_t J = f.in / f.g, O = f.out / f.og, E = int64_t{1} << f.B, width = f.B <= 8 ? 1 : 2;
    std::vector<unsigned char> codes = std::vector<unsigned char>(O * J * f.K * width);
    std::vector<T> books = random_values<T>(f.K * E * f.og * f.g, 1), scales = random_values<T>(O, 1),
                   bias = random_values<T>(f.out, 1);
    OnDevice<unsigned char> codes_there{(std::generate(codes.begin(), codes.end(), std::ref(random_bits)), codes)};
    OnDevice<T> books_there{books}, scales_there{scales}, bias_there{bias};
    std::vector<double> unscaled = std::vector<double>(f.out * f.in), W = unscaled;
    aqlm_weight view = {
        {f.out, f.in, f.K, f.B, f.g, f.og}, codes_there.data, books_there.data, scales_there.data, dtype_of<T>, false};

    explicit Weight(const Format &format) : f(format) {
        for (int64_t r = 0; r < f.out; ++r)
            for (int64_t j = 0; j < J; ++j)
                for (int64_t k = 0; k < f.K; ++k)
                    for (int64_t i = 0; i < f.g; ++i)
                        unscaled[r * f.in + j * f.g + i] +=
                            float(books[((k * E + code_of(r / f.og, j, k)) * f.og + r % f.og) * f.g + i]);
        for (int64_t at = 0; at < f.out * f.in; ++at) W[at] = unscaled[at] * float(scales[at / f.in / f.og]);
    }
    int64_t code_of(int64_t o, int64_t j, int64_t k) const {
        const int64_t at = (o * J + j) * f.K + k;
        return (width == 1 ? codes[at] : codes[2 * at] | codes[2 * at + 1] << 8) & (E - 1);
    }
};

aqlm_cuda_plan plan_of(const aqlm_product *products, int64_t count, aqlm_dtype dtype, int64_t rows) {
    aqlm_cuda_plan plan;
    check(aqlm_cuda_matmul_plan(&plan, products, count, dtype, rows), "aqlm_cuda_matmul_plan");
    return plan;
}

int attribute(cudaDeviceAttr of) {
    int value;
    check(cudaDeviceGetAttribute(&value, of, 0), "cudaDeviceGetAttribute");
    return value;
}

bool has_planes() {
    return attribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) > 200 * 1024;
}

/* On Hopper GPUs, which have all paths. */
bool check_paths() {
    if (attribute(cudaDevAttrComputeCapabilityMajor) != 9 || !has_planes()) return true;
    bool ok = true;
    const bool wants_tiles = std::getenv("AQLM_C_TILES");
    for (auto [f, rows, path, last_path, tiled] : PATHS) {
        if (wants_tiles && tiled) path = last_path = AQLM_CUDA_TILES;
        const aqlm_product product = {nullptr, {{f.out, f.in, f.K, f.B, f.g, f.og}, 0, 0, 0, AQLM_F16, false}, nullptr};
        const aqlm_cuda_plan plan = plan_of(&product, 1, AQLM_F16, rows);
        const bool same = plan.path == path && plan.last_path == last_path;
        std::printf("%s %ldx%ld og%ld, %ld rows: paths %d %d of %d %d\n", same ? "ok" : "WRONG", f.K, f.B, f.og, rows,
                    plan.path, plan.last_path, path, last_path);
        ok &= same;
    }
    return ok;
}

/* Products with x, as planned; or by planes, which are planned for more codes than there are here. */
void multiply(const std::vector<aqlm_product> &products, const void *x, aqlm_dtype dtype, int64_t rows,
              bool by_planes) {
    const auto count = static_cast<int64_t>(products.size());
    aqlm_cuda_plan plan = plan_of(products.data(), count, dtype, rows);
    if (by_planes) plan.path = plan.last_path = AQLM_CUDA_SHARDS, plan.workspace = size_t{64} << 20;
    if (plan.path == AQLM_CUDA_SEPARATE) {
        for (const aqlm_product &product : products) multiply({product}, x, dtype, rows, false);
        return;
    }
    const OnDevice<char> workspace(plan.workspace);
    check(aqlm_cuda_matmul(products.data(), count, x, dtype, rows, &plan, workspace.data, nullptr), "aqlm_cuda_matmul");
}

/* Of products with one x, which has so many rows; the same bits twice. */
template <class T>
double error_of_products(const std::vector<const Weight<T> *> &weights, int64_t rows, bool by_planes = false) {
    const int64_t in = weights[0]->f.in;
    const bool with_bias = rows != 3;
    const OnDevice<T> x_there(random_values<T>(rows * in, 1));
    const auto x = x_there.host();
    std::deque<OnDevice<T>> ys;
    std::vector<aqlm_product> products;
    for (const auto *w : weights)
        products.push_back({ys.emplace_back(rows * w->f.out).data, w->view, with_bias ? w->bias_there.data : nullptr});
    const auto count = static_cast<int64_t>(products.size());
    double worst = 0;
    std::vector<std::vector<T>> first;
    for (int iteration = 0; iteration < 2; ++iteration) {
        multiply(products, x_there.data, dtype_of<T>, rows, by_planes);
        for (int64_t m = 0; m < count; ++m) {
            const auto got = ys[m].host();
            if (iteration == 0) first.push_back(got);
            for (size_t i = 0; i < got.size(); ++i)
                if (float(got[i]) != float(first[m][i])) worst = INFINITY;
        }
    }
    for (int64_t m = 0; m < count; ++m) {
        const Weight<T> &w = *weights[m];
        std::vector<double> truth(rows * w.f.out);
        for (int64_t n = 0; n < rows; ++n)
            for (int64_t o = 0; o < w.f.out; ++o) {
                double &sum = truth[n * w.f.out + o];
                sum = with_bias ? float(w.bias[o]) : 0;
                for (int64_t i = 0; i < in; ++i) sum += float(x[n * in + i]) * w.W[o * in + i];
            }
        worst = std::fmax(worst, error_of(first[m], truth));
    }
    return worst;
}

/* Of rows that each have one of three weights, or none, by two of them. */
template <class T> double error_of_routed(const Format &f, int64_t rows) {
    constexpr int64_t WEIGHTS = 3;
    Format more = f;
    more.out = f.out + 8 * f.og;
    std::deque<Weight<T>> weights;
    std::deque<OnDevice<unsigned char>> codes;
    std::deque<OnDevice<T>> floats;
    std::vector<aqlm_product> products;
    int64_t outs = 0;
    for (const Format &format : {f, more}) {
        std::vector<unsigned char> all_codes;
        std::vector<T> all_books, all_scales;
        for (int64_t e = 0; e < WEIGHTS; ++e) {
            const Weight<T> &w = weights.emplace_back(format);
            all_codes.insert(all_codes.end(), w.codes.begin(), w.codes.end());
            all_books.insert(all_books.end(), w.books.begin(), w.books.end());
            all_scales.insert(all_scales.end(), w.scales.begin(), w.scales.end());
        }
        aqlm_weight view = weights.back().view;
        view.codes = codes.emplace_back(all_codes).data;
        view.codebooks = floats.emplace_back(all_books).data;
        view.scales = floats.emplace_back(all_scales).data;
        products.push_back({nullptr, view, nullptr});
        outs += format.out;
    }
    const OnDevice<T> x_there(random_values<T>(rows / 2 * f.in, 1)), y(rows * outs);
    products[0].y = y.data, products[1].y = y.data + f.out;
    std::vector<int64_t> index(rows);
    for (int64_t &e : index) e = int64_t(random_bits() % (WEIGHTS + 2)) - 1;
    const OnDevice<int64_t> index_there(index);
    const aqlm_cuda_routes routes = {index_there.data, WEIGHTS, 2, outs};
    aqlm_cuda_plan plan;
    check(aqlm_cuda_routed_plan(&plan, products.data(), 2, dtype_of<T>, rows, &routes), "aqlm_cuda_routed_plan");
    const OnDevice<char> workspace(plan.workspace);
    check(
        aqlm_cuda_routed(products.data(), 2, x_there.data, dtype_of<T>, rows, &routes, &plan, workspace.data, nullptr),
        "aqlm_cuda_routed");
    const auto x = x_there.host();
    std::vector<double> truth(rows * outs);
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t o = 0; o < outs && index[n] >= 0 && index[n] < WEIGHTS; ++o) {
            const Weight<T> &w = weights[index[n] + (o < f.out ? 0 : WEIGHTS)];
            const double *row = &w.W[(o < f.out ? o : o - f.out) * f.in];
            for (int64_t i = 0; i < f.in; ++i) truth[n * outs + o] += float(x[n / 2 * f.in + i]) * row[i];
        }
    return error_of(y.host(), truth);
}

template <class T> bool check_format(const Format &f) {
    const Weight<T> weight(f);
    const int64_t J = weight.J, O = weight.O, E = weight.E;
    const auto &[books, scales, W, unscaled] = std::tie(weight.books, weight.scales, weight.W, weight.unscaled);
    const aqlm_weight &w = weight.view;
    const auto code_of = [&](int64_t o, int64_t j, int64_t k) { return weight.code_of(o, j, k); };

    double worst = 0;
    const aqlm_product product = {nullptr, w, nullptr};
    for (int64_t rows : {1, 3, 8, 9, 16, 17, 40, 70, 130, 300})
        if (rows * f.out * f.in < 1 << 28 && plan_of(&product, 1, dtype_of<T>, rows).path != AQLM_CUDA_DENSE)
            worst = std::fmax(worst, error_of_products<T>({&weight}, rows));
    if (has_planes() && sizeof(T) == 2 && f.B > 13 && f.K <= 2 && f.g == 8 && f.og == 1 && f.in % 64 == 0)
        for (int64_t rows : {1, 2, 4, 5, 8}) worst = std::fmax(worst, error_of_products<T>({&weight}, rows, true));
    if (f.og == 1 && f.out * f.in < 1 << 20) { /* grouped, where that is so: fewer outputs, and more */
        Format fewer = f, more = f;
        fewer.out = std::max<int64_t>(16, f.out / 3), more.out = f.out + 50;
        const Weight<T> second(fewer), third(more);
        worst = std::fmax(worst, error_of_products<T>({&weight, &second}, 1));
        worst = std::fmax(worst, error_of_products<T>({&weight, &second, &third}, 1));
        worst = std::fmax(worst, error_of_products<T>({&third, &weight}, 3));
    }

    if (f.out * f.in < 1 << 17)
        for (int64_t rows : {2, 40}) worst = std::fmax(worst, error_of_routed<T>(f, rows));

    const int64_t first_out = f.og, outs = f.out - f.og, first_group = J > 8 ? 8 : 0, groups = J - first_group;
    std::vector<double> part;
    for (int64_t o = first_out; o < f.out; ++o)
        part.insert(part.end(), &W[o * f.in + first_group * f.g], &W[o * f.in] + f.in);
    const OnDevice<T> rows(outs * groups * f.g);
    check(aqlm_cuda_decode_rows(rows.data, dtype_of<T>, &w, first_out, outs, first_group, groups, nullptr),
          "aqlm_cuda_decode_rows");
    worst = std::fmax(worst, error_of(rows.host(), part));

    {
        const auto grad_rows = random_values<T>(f.out * f.in, 1);
        const OnDevice<T> grad_rows_there(grad_rows), grad_scales(O), grad_books(books.size());
        aqlm_cuda_gradient_plan plan;
        check(aqlm_cuda_decode_rows_backward_plan(&plan, &w), "aqlm_cuda_decode_rows_backward_plan");
        const OnDevice<char> workspace(plan.workspace);
        const OnDevice<int32_t> index(plan.pass == 0 ? f.K * (E + 1 + O * J) : 1);
        for (int64_t k = 0; k < f.K && plan.pass == 0; ++k) {
            const OnDevice<int16_t> keys(O * J);
            check(aqlm_cuda_code_keys(keys.data, &w, k, nullptr), "aqlm_cuda_code_keys");
            const auto unsorted = keys.host();
            std::vector<int64_t> order(O * J);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return unsorted[a] < unsorted[b]; });
            auto sorted = unsorted;
            std::sort(sorted.begin(), sorted.end());
            const OnDevice<int16_t> sorted_there(sorted);
            const OnDevice<int64_t> order_there(order);
            check(aqlm_cuda_index_codes(index.data, sorted_there.data, order_there.data, &w, k, nullptr),
                  "aqlm_cuda_index_codes");
            check(cudaDeviceSynchronize(), "aqlm_cuda_index_codes");
        }
        check(aqlm_cuda_decode_rows_backward(grad_books.data, grad_scales.data, grad_rows_there.data, dtype_of<T>, &w,
                                             index.data, &plan, workspace.data, nullptr),
              "aqlm_cuda_decode_rows_backward");
        std::vector<double> truth(O);
        for (int64_t at = 0; at < f.out * f.in; ++at) truth[at / f.in / f.og] += unscaled[at] * float(grad_rows[at]);
        worst = std::fmax(worst, error_of(grad_scales.host(), truth));
        truth.assign(books.size(), 0);
        for (int64_t k = 0; k < f.K; ++k)
            for (int64_t r = 0; r < f.out; ++r)
                for (int64_t j = 0; j < J; ++j)
                    for (int64_t i = 0; i < f.g; ++i)
                        truth[((k * E + code_of(r / f.og, j, k)) * f.og + r % f.og) * f.g + i] +=
                            double(float(scales[r / f.og])) * float(grad_rows[r * f.in + j * f.g + i]);
        worst = std::fmax(worst, error_of(grad_books.host(), truth));
    }

    const double limit = sizeof(T) == 4 ? 32 : 1.5; /* fp32 sums; else one rounding of the result */
    std::printf("%s %ldx%ld g%ld og%ld, %ld x %ld, dtype %d: error %.2f of %.1f\n", worst <= limit ? "ok" : "WRONG",
                f.K, f.B, f.g, f.og, f.out, f.in, dtype_of<T>, worst, limit);
    return worst <= limit;
}

} // namespace

int main(int argc, char **argv) {
    bool ok = check_paths();
    const int count = sizeof FORMATS / sizeof *FORMATS;
    for (int i = 0; i < count; ++i) {
        bool wanted = argc == 1;
        for (int a = 1; a < argc; ++a) wanted |= std::atoi(argv[a]) == i;
        if (!wanted) continue;
        ok &= check_format<__half>(FORMATS[i]);
        ok &= check_format<__nv_bfloat16>(FORMATS[i]);
        ok &= check_format<float>(FORMATS[i]);
    }
    return ok ? 0 : 1;
}
