/* ladder.cu: kernels for many rows of x beside each other, from the plain one to the one that aqlm_c runs, each checked
 * before it is timed. 2x8g8 in fp16 by default; no Python, no torch; cuBLAS is loaded where it is found.
 *
 *   nvcc -std=c++17 -O3 -Icsrc -gencode=arch=compute_90a,code=sm_90a benchmarks/many_rows/ladder.cu -ldl -o ladder
 *   ./ladder [--shapes 4096x4096,...] [--rows 16,64] [--rungs 0,1,2,3] [--formats 2x8g8,...] [--only TEXT]
 *     [--json FILE] [--phases] [--bf16] [--hot] [--rates]
 *
 * Times: a CUDA graph of calls with weights in rotation that exceed L2 twice; the median of its replays. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "cuda/product/many_rows.cuh"
#include "rates.cuh"
#include "simple.cuh"
#include "variants.cuh"

namespace ladder {

void check(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    std::printf("%s: %s\n", what, cudaGetErrorString(error));
    std::fflush(stdout);
    std::exit(1);
}

template <class P> P *allocate(size_t bytes) {
    void *p;
    check(cudaMalloc(&p, bytes), "cudaMalloc");
    return static_cast<P *>(p);
}

__device__ uint32_t mixed(uint64_t i, uint32_t seed) {
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1342543de82ef95ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull, z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>((z ^ z >> 31) >> 16);
}
__global__ void random_words(uint32_t *to, size_t count, uint32_t seed) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x)
        to[i] = mixed(i, seed);
}
/* Sums of four uniform numbers, of mean `mean` and standard deviation `deviation`. */
template <class T> __global__ void random_numbers(T *to, size_t count, float mean, float deviation, uint32_t seed) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        float sum = -2;
        for (int k = 0; k < 4; ++k) sum += mixed(i * 4 + k, seed) * 2.3283064e-10f;
        to[i] = static_cast<T>(mean + sum * 1.7320508f * deviation);
    }
}

/* Of any format, by definition. */
struct Formula {
    const unsigned char *codes;
    const void *codebooks, *scales;
    int in, K, code, g, entries;
};
template <class T> __device__ double weight_of(const Formula &f, int o, int i) {
    double sum = 0;
    for (int k = 0; k < f.K; ++k) {
        const size_t at = (size_t(o) * (f.in / f.g) + i / f.g) * f.K + k;
        const int code = f.code == 1 ? f.codes[at] : reinterpret_cast<const uint16_t *>(f.codes)[at];
        sum += static_cast<double>(
            static_cast<float>(static_cast<const T *>(f.codebooks)[(size_t(k) * f.entries + code) * f.g + i % f.g]));
    }
    return sum * static_cast<double>(static_cast<float>(static_cast<const T *>(f.scales)[o]));
}
template <class T> __global__ void decode_kernel(T *w, Formula f, int out) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < size_t(out) * f.in;
         i += size_t(gridDim.x) * blockDim.x)
        w[i] =
            static_cast<T>(static_cast<float>(weight_of<T>(f, static_cast<int>(i / f.in), static_cast<int>(i % f.in))));
}
/* truth[n, s] of `some` outputs: a warp each. */
template <class T>
__global__ void truth_kernel(double *truth, Formula f, const T *x, const int *some, int count, int n_rows) {
    const int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (at >= count * n_rows) return;
    const int s = at / n_rows, n = at % n_rows;
    double sum = 0;
    for (int i = lane; i < f.in; i += 32)
        sum += weight_of<T>(f, some[s], i) * static_cast<double>(static_cast<float>(x[size_t(n) * f.in + i]));
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane == 0) truth[size_t(n) * count + s] = sum;
}
/* errors[0] += (y - truth)^2, errors[1] += truth^2. */
template <class T>
__global__ void error_kernel(double *errors, const T *y, const double *truth, const int *some, int count, int n_rows,
                             int out) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count * n_rows; i += gridDim.x * blockDim.x) {
        const double t = truth[i];
        const double d = static_cast<double>(static_cast<float>(y[size_t(i / count) * out + some[i % count]])) - t;
        atomicAdd(errors, d * d), atomicAdd(errors + 1, t * t);
    }
}
/* The same between two results, of all numbers; errors[2] counts different bits. */
template <class T> __global__ void difference_kernel(double *errors, const T *y, const T *other, size_t count) {
    for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        const double a = static_cast<float>(y[i]), b = static_cast<float>(other[i]);
        const bool differ = reinterpret_cast<const uint16_t *>(y)[i] != reinterpret_cast<const uint16_t *>(other)[i];
        atomicAdd(errors, (a - b) * (a - b)), atomicAdd(errors + 1, b * b);
        if (differ) atomicAdd(errors + 2, 1.0);
    }
}

/* y[n, out] = x[n, in] W[out, in]^T by cuBLAS, from whose header nothing is needed but these. */
class Cublas {
  public:
    Cublas() {
        for (const char *name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"})
            if ((library_ = dlopen(name, RTLD_NOW))) break;
        if (!library_) return;
        int (*create)(void **);
        load(create, "cublasCreate_v2"), load(set_stream_, "cublasSetStream_v2"), load(gemm_, "cublasGemmEx");
        load(set_workspace_, "cublasSetWorkspace_v2");
        if (create(&handle_)) library_ = nullptr;
        else workspace_ = allocate<char>(WORKSPACE);
    }
    bool found() const { return library_; }
    void product(void *y, const void *x, const void *w, int out, int in, int n, bool half, cudaStream_t stream,
                 int y_width = 0) {
        const float one = 1, zero = 0;
        const int type = half ? 2 : 14; /* CUDA_R_16F, CUDA_R_16BF; 68: CUBLAS_COMPUTE_32F */
        set_stream_(handle_, stream), set_workspace_(handle_, workspace_, WORKSPACE);
        if (gemm_(handle_, 1, 0, out, n, in, &one, w, type, in, x, type, in, &zero, y, type, y_width ? y_width : out,
                  68, -1))
            std::printf("cublasGemmEx failed\n");
    }

  private:
    static constexpr size_t WORKSPACE = 32 << 20;
    template <class F> void load(F &f, const char *name) { f = reinterpret_cast<F>(dlsym(library_, name)); }
    void *library_ = nullptr, *handle_ = nullptr, *workspace_ = nullptr;
    int (*set_stream_)(void *, cudaStream_t);
    int (*set_workspace_)(void *, void *, size_t);
    int (*gemm_)(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int,
                 const void *, void *, int, int, int, int);
};

/* Milliseconds of one of `calls` calls, whose graph is replayed; the median. */
float time_of(const std::function<void(int, cudaStream_t)> &call, int calls, cudaStream_t stream) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    call(0, stream);
    check(cudaStreamSynchronize(stream), "first call");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < calls; ++i) call(i, stream);
    check(cudaStreamEndCapture(stream, &graph), "end of capture");
    check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    cudaEvent_t begin, end;
    cudaEventCreate(&begin), cudaEventCreate(&end);
    std::vector<float> times;
    for (int i = 0; i < 8; ++i) {
        cudaEventRecord(begin, stream);
        check(cudaGraphLaunch(exec, stream), "replay");
        cudaEventRecord(end, stream);
        check(cudaEventSynchronize(end), "replay");
        float ms;
        cudaEventElapsedTime(&ms, begin, end);
        if (i > 1) times.push_back(ms / calls);
    }
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaEventDestroy(begin), cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

struct Options {
    std::vector<std::pair<int, int>> shapes;
    std::vector<int> rows = {16, 32, 64, 128, 256}, rungs = {3};
    std::vector<std::string> formats = {"2x8g8"};
    std::string only, json;
    bool phases = false, bf16 = false, hot = false, rates = false;
};

std::vector<std::string> split(const std::string &text) {
    std::vector<std::string> parts;
    for (size_t at = 0; at <= text.size();) {
        const size_t comma = std::min(text.find(',', at), text.size());
        parts.push_back(text.substr(at, comma - at)), at = comma + 1;
    }
    return parts;
}

Options parse(int argc, char **argv) {
    Options o;
    std::string shapes = "4096x4096,11008x4096,8192x8192,28672x8192,1024x4096";
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
        if (name == "--phases" || name == "--bf16" || name == "--hot" || name == "--rates") {
            (name == "--phases" ? o.phases : name == "--bf16" ? o.bf16 : name == "--hot" ? o.hot : o.rates) = true;
            continue;
        }
        ++i;
        if (name == "--shapes") shapes = value;
        else if (name == "--rows") {
            o.rows.clear();
            for (const auto &n : split(value)) o.rows.push_back(std::atoi(n.c_str()));
        } else if (name == "--rungs") {
            o.rungs.clear();
            for (const auto &n : split(value)) o.rungs.push_back(std::atoi(n.c_str()));
        } else if (name == "--formats") o.formats = split(value);
        else if (name == "--only") o.only = value;
        else if (name == "--json") o.json = value;
        else
            std::printf("%s: expected --shapes, --rows, --rungs, --formats, --only, --json, --phases, --hot, --rates "
                        "or --bf16\n",
                        name.c_str()),
                std::exit(2);
    }
    for (const auto &s : split(shapes))
        o.shapes.push_back({std::atoi(s.c_str()), std::atoi(s.c_str() + s.find('x') + 1)});
    return o;
}

struct Tester {
    Options options;
    Cublas cublas;
    aqlm_cuda::Device device;
    cudaStream_t stream;
    std::FILE *json = nullptr;
    bool first_row = true;
    int failures = 0;
    long long *clocks;
    double *errors;
    char *workspace;
    size_t workspace_bytes = size_t(640) << 20;

    explicit Tester(const Options &o) : options(o) {
        check(aqlm_cuda::current_device(device), "device");
        check(cudaStreamCreate(&stream), "stream");
        clocks = allocate<long long>(4096 * 64), errors = allocate<double>(64);
        workspace = allocate<char>(workspace_bytes);
        if (!o.json.empty() && (json = std::fopen(o.json.c_str(), "w"))) std::fprintf(json, "[\n");
        if (!cublas.found()) std::printf("no cuBLAS: no ratios\n");
    }
    ~Tester() {
        if (json) std::fprintf(json, "\n]\n"), std::fclose(json);
    }

    template <class F> std::vector<double> sums(const F &launch) {
        check(cudaMemsetAsync(errors, 0, 64, stream), "memset");
        launch();
        check(cudaGetLastError(), "launch");
        std::vector<double> host(8);
        check(cudaMemcpyAsync(host.data(), errors, 64, cudaMemcpyDeviceToHost, stream), "copy");
        check(cudaStreamSynchronize(stream), "errors");
        return host;
    }

    template <class T> void shape(int out, int in, int K, int code, int g) {
        using aqlm_cuda::ManyRowsProblem;
        const int entries = code == 1 ? 256 : 65536, most = *std::max_element(options.rows.begin(), options.rows.end());
        const size_t code_bytes = size_t(out) * (in / g) * K * code, dense_bytes = size_t(out) * in * 2;
        const size_t cold = 2 * 52e6;
        const int copies = static_cast<int>(cold / code_bytes) + 2,
                  dense_copies = static_cast<int>(cold / dense_bytes) + 2;
        std::vector<unsigned char *> codes;
        std::vector<T *> dense;
        for (int i = 0; i < copies; ++i) {
            codes.push_back(allocate<unsigned char>(code_bytes));
            random_words<<<512, 256, 0, stream>>>(reinterpret_cast<uint32_t *>(codes[i]), code_bytes / 4, 7 + i);
        }
        T *books = allocate<T>(size_t(K) * entries * g * 2), *scales = allocate<T>(out * 2),
          *x = allocate<T>(size_t(most) * in * 2);
        T *y = allocate<T>(size_t(most) * out * 2), *y2 = allocate<T>(size_t(most) * out * 2),
          *yd = allocate<T>(size_t(most) * out * 2);
        random_numbers<T><<<512, 256, 0, stream>>>(books, size_t(K) * entries * g, 0, 1, 1);
        random_numbers<T><<<512, 256, 0, stream>>>(scales, out, 0.02f, 0.004f, 2);
        random_numbers<T><<<512, 256, 0, stream>>>(x, size_t(most) * in, 0, 1, 3);
        const Formula formula = {codes[0], books, scales, in, K, code, g, entries};
        for (int i = 0; i < dense_copies; ++i) {
            dense.push_back(allocate<T>(dense_bytes));
            if (i == 0) decode_kernel<T><<<2048, 256, 0, stream>>>(dense[0], formula, out);
            else check(cudaMemcpyAsync(dense[i], dense[0], dense_bytes, cudaMemcpyDeviceToDevice, stream), "copy");
        }
        std::vector<int> some;
        const int count = std::min(out, 96);
        for (int i = 0; i < count; ++i)
            some.push_back(i < 8 ? i : i < 16 ? out - 1 - (i - 8) : int((i * 2654435761u) % out));
        int *some_device = allocate<int>(count * 4);
        check(cudaMemcpyAsync(some_device, some.data(), count * 4, cudaMemcpyHostToDevice, stream), "copy");
        double *truth = allocate<double>(size_t(count) * most * 8);

        for (const int n : options.rows) {
            truth_kernel<T><<<(count * n + 7) / 8, 256, 0, stream>>>(truth, formula, x, some_device, count, n);
            const auto error = [&](const T *of) {
                const auto s = sums(
                    [&] { error_kernel<T><<<64, 256, 0, stream>>>(errors, of, truth, some_device, count, n, out); });
                return std::sqrt(s[0] / s[1]);
            };
            double dense_error = 0;
            float dense_ms = 0;
            const bool half = std::is_same_v<T, __half>;
            if (cublas.found()) {
                cublas.product(yd, x, dense[0], out, in, n, half, stream);
                dense_error = error(yd);
                dense_ms = time_of(
                    [&](int i, cudaStream_t s) { cublas.product(yd, x, dense[i % dense_copies], out, in, n, half, s); },
                    std::max(dense_copies, 8), stream);
                cublas.product(yd, x, dense[0], out, in, n, half, stream);
            }
            std::printf("%6dx%-6d %dx%dg%d %4d rows  cuBLAS %8.2f us, error %.2e\n", out, in, K, code * 8, g, n,
                        dense_ms * 1e3, dense_error);
            const auto variant = [&](int rung, const std::string &name, const Run &run, size_t needs) {
                if (std::find(options.rungs.begin(), options.rungs.end(), rung) == options.rungs.end()) return;
                if (!options.only.empty() && name.find(options.only) == std::string::npos) return;
                if (needs > workspace_bytes) return;
                ManyRowsProblem p = {};
                p.y = y, p.x = x, p.codes = codes[0], p.codebooks = books, p.scales = scales;
                p.out = out, p.in = in, p.n_rows = n, p.entries = entries;
                check(cudaMemsetAsync(y, 0xff, size_t(n) * out * 2, stream), "poison");
                check(cudaMemsetAsync(workspace, 0xff, needs, stream), "poison");
                check(run(p, workspace, device, stream), name.c_str());
                check(cudaStreamSynchronize(stream), name.c_str());
                const double wrong = error(y);
                p.y = y2;
                check(cudaMemsetAsync(y2, 0xff, size_t(n) * out * 2, stream), "poison");
                check(run(p, workspace, device, stream), name.c_str());
                const auto again =
                    sums([&] { difference_kernel<T><<<256, 256, 0, stream>>>(errors, y, y2, size_t(n) * out); });
                double far = 0;
                if (cublas.found()) {
                    const auto all =
                        sums([&] { difference_kernel<T><<<256, 256, 0, stream>>>(errors, y, yd, size_t(n) * out); });
                    far = std::sqrt(all[0] / all[1]);
                }
                const double limit = dense_error > 0 ? 2 * dense_error : half ? 1e-3 : 8e-3;
                const bool right = wrong <= limit && far <= 2 * limit && again[2] == 0;
                failures += !right;
                p.y = y;
                const float ms = !right && !options.phases ? 0.f
                                                           : time_of(
                                                                 [&](int i, cudaStream_t s) {
                                                                     ManyRowsProblem q = p;
                                                                     q.codes = codes[options.hot ? 0 : i % copies];
                                                                     check(run(q, workspace, device, s), name.c_str());
                                                                 },
                                                                 rung == 0 ? 2 : std::max(copies, 8), stream);
                std::printf("    %d %-26s %8.2f us  x %5.2f  error %.2e %s", rung, name.c_str(), ms * 1e3,
                            ms > 0 ? dense_ms / ms : 0, wrong, right ? "" : "WRONG");
                if (!right) std::printf(" (all %.2e, %g bits differ)", far, again[2]);
                if (options.phases) phases(p, run);
                std::printf("\n");
                std::fflush(stdout);
                if (json)
                    std::fprintf(json,
                                 "%s{\"shape\": \"%dx%d\", \"scheme\": \"%dx%dg%d\", \"rows\": %d, \"rung\": %d, "
                                 "\"variant\": \"%s\", "
                                 "\"us\": %.3f, \"cublas us\": %.3f, \"ratio\": %.4f, \"error\": %.3e, \"cublas "
                                 "error\": %.3e, \"right\": %s}",
                                 first_row ? "" : ",\n", out, in, K, code * 8, g, n, rung, name.c_str(), ms * 1e3,
                                 dense_ms * 1e3, ms > 0 ? dense_ms / ms : 0, wrong, dense_error,
                                 right ? "true" : "false");
                first_row = false;
            };
            for_each_variant<T>(out, in, n, K, code, g, device.sms, variant);
            if (K == 2 && code == 1 && g == 8 && cublas.found())
                for (const int slice : std::set<int>{std::min(1024, out), std::min(4096, out), out})
                    variant(4, "dense slices of " + std::to_string(slice), slices<T>(slice), size_t(slice) * in * 2);
        }
        for (auto *c : codes) cudaFree(c);
        for (auto *d : dense) cudaFree(d);
        for (void *p : {(void *)books, (void *)scales, (void *)x, (void *)y, (void *)y2, (void *)yd,
                        (void *)some_device, (void *)truth})
            cudaFree(p);
    }

    /* W slice by slice, for cuBLAS. */
    template <class T> Run slices(int slice) {
        return [=](const aqlm_cuda::ManyRowsProblem &p, void *space, const aqlm_cuda::Device &, cudaStream_t stream) {
            constexpr auto decode = decode_some_kernel<T>;
            if (const auto e = cudaFuncSetAttribute(decode, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536))
                return e;
            T *const w = static_cast<T *>(space);
            for (int first = 0; first < p.out; first += slice) {
                const int outs = std::min(slice, p.out - first);
                decode<<<264, 512, 65536, stream>>>(p, w, first, outs);
                cublas.product(static_cast<T *>(p.y) + first, p.x, w, outs, p.in, p.n_rows, std::is_same_v<T, __half>,
                               stream, p.out);
            }
            return cudaGetLastError();
        };
    }

    /* Mean cycles of the phases of a block. */
    void phases(aqlm_cuda::ManyRowsProblem p, const Run &run) {
        constexpr int BLOCKS = 2 * 144;
        check(cudaMemset(clocks, 0, BLOCKS * 64), "clocks");
        p.clocks = clocks;
        check(run(p, workspace, device, stream), "phases");
        std::vector<long long> host(BLOCKS * 8);
        check(cudaStreamSynchronize(stream), "phases");
        check(cudaMemcpy(host.data(), clocks, BLOCKS * 64, cudaMemcpyDeviceToHost), "phases");
        const char *names[] = {"fill", "loop", "parts", "finish"};
        int blocks = 0;
        double mean[4] = {};
        for (int b = 0; b < BLOCKS; ++b) {
            const long long *c = host.data() + b * 8;
            if (!c[0]) continue;
            ++blocks;
            for (int i = 0; i < 4; ++i) mean[i] += double(c[i + 1] - c[i]);
        }
        std::printf(" cycles:");
        for (int i = 0; i < 4; ++i) std::printf(" %s %.0f", names[i], mean[i] / std::max(blocks, 1));
    }
};

} // namespace ladder

int main(int argc, char **argv) {
    const auto options = ladder::parse(argc, argv);
    if (options.rates) return ladder::print_rates(), 0;
    ladder::Tester tester(options);
    for (const auto &format : options.formats)
        for (const auto &[out, in] : options.shapes) {
            int K = 0, B = 0, g = 0;
            if (std::sscanf(format.c_str(), "%dx%dg%d", &K, &B, &g) != 3)
                return std::printf("%s: expected KxBgG\n", format.c_str()), 2;
#ifdef BF16
            if (options.bf16) tester.shape<__nv_bfloat16>(out, in, K, B > 8 ? 2 : 1, g);
            else
#endif
                tester.shape<__half>(out, in, K, B > 8 ? 2 : 1, g);
        }
    std::printf("%d wrong\n", tester.failures);
    return tester.failures > 0;
}
