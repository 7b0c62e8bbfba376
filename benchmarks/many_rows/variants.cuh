/* variants.cuh: what the ladder tries. */
#ifndef MANY_ROWS_VARIANTS_CUH
#define MANY_ROWS_VARIANTS_CUH

#include <functional>
#include <string>

#include "cuda/product/paths.cuh"
#include "simple.cuh"

namespace ladder {

using Run = std::function<cudaError_t(ManyRowsProblem, void *, const aqlm_cuda::Device &, cudaStream_t)>;
/* (rung, name, run, bytes of workspace) */
using Variant = std::function<void(int, const std::string &, const Run &, size_t)>;

template <class T, class B, class L> void pipelined(const Variant &try_it, int out, int in, int n, int sms) {
    const auto number = [](const char *what, int i) { return std::string(" ") + what + std::to_string(i); };
    const std::string name = "n" + std::to_string(L::N) + number("w", L::WARPGROUPS) + number("s", L::STAGES) +
                             number("x", L::STAGE_CHUNKS) + number("a", L::AHEAD) + number("f", L::BUFFERS) +
                             (L::BLOCKS > 1 ? number("b", L::BLOCKS) : "") +
                             (L::CLUSTER ? number("c", L::CLUSTER) : "") + (L::DIRECT ? " d" : "") +
                             (L::SUMS > 1 ? number("sums", L::SUMS) : "") + (L::HINT ? number("hint", L::HINT) : "") +
                             (L::MMA ? number("mma", L::MMA) : "") +
                             (B::COPIES * B::PIECE < 128 ? number("copies", B::COPIES) : "");
    if (L::CLUSTER > (in + 255) / 256) return;
    if (B::BOOKS + L::BYTES > 227 * 1024) return;
    try_it(L::DIRECT ? 4 : 3, name, aqlm_cuda::launch_many_rows<T, B, L>,
           L::DIRECT ? 0
                     : static_cast<size_t>(aqlm_cuda::ManyRowsCut(out, in, n, L::N, L::OUTS, sms * L::BLOCKS).bytes));
}

/* Up to 16 rows by gather.cu. */
template <class T> Run gathers(int out, int in, int K, int B, int g) {
    return [=](const ManyRowsProblem &p, void *, const aqlm_cuda::Device &device, cudaStream_t stream) {
        const aqlm_dtype dtype = std::is_same_v<T, __half> ? AQLM_F16 : AQLM_BF16;
        const aqlm_product product = {
            p.y, {{out, in, K, B, g, 1}, p.codes, p.codebooks, p.scales, dtype, false}, p.bias};
        return aqlm_cuda::run_gather({&product, 1, p.x, dtype, p.n_rows, {}, nullptr, device, stream});
    };
}

/* N, WARPGROUPS, STAGES, STAGE_CHUNKS, AHEAD, BUFFERS, BLOCKS, CLUSTER, DIRECT */
#define TILING(...) go(aqlm_cuda::ManyRowsTiling<__VA_ARGS__>())

template <class T>
void for_each_variant(int out, int in, int n, int K, int code, int g, int sms, const Variant &try_it) {
    using namespace aqlm_cuda;
#ifndef FORMATS
    if (K == 2 && code == 1 && g == 8) {
        for (int rung = 0; rung < 3; ++rung)
            try_it(
                rung,
                rung == 0   ? "naive"
                : rung == 1 ? "shared memory"
                            : "fragments",
                [rung](const ManyRowsProblem &p, void *, const Device &, cudaStream_t s) {
                    return run_simple(rung, p, s);
                },
                0);
        if (n <= 16) try_it(6, "gathers", gathers<T>(out, in, K, 8, g), 0);
        const auto go = [&](auto tiling) {
            pipelined<T, Entries<T, 2, 1, 8>, decltype(tiling)>(try_it, out, in, n, sms);
        };
        if (n <= 16) {
            TILING(16, 2, 8, 1, 1);
            TILING(16, 2, 8, 1, 1, 2, 1, 0, false, 2);
            TILING(16, 2, 8, 1, 1, 2, 1, 0, false, 4);
            TILING(16, 2, 8, 1, 1, 2, 1, 0, false, 1, 256);
            TILING(16, 2, 8, 1, 1, 2, 1, 0, false, 1, 1);
            TILING(16, 2, 8, 1, 1, 2, 1, 0, false, 1, 0, 2);
            TILING(16, 2, 8, 1, 1, 2, 1, 0, false, 1, 0, 1);
            TILING(16, 2, 4, 4, 1, 2, 1, 4, true, 1, 0, 1);
            TILING(16, 3, 8, 1, 1);
            TILING(16, 2, 8, 1, 2, 2, 1, 4);
            TILING(16, 2, 4, 4, 2, 2, 1, 4, true);
            TILING(16, 2, 4, 4, 1, 2, 1, 8, true, 4);
            TILING(16, 1, 4, 4, 1, 2, 2, 4, true);
        } else if (n <= 32) {
            TILING(32, 2, 8, 1, 1);
            TILING(32, 2, 8, 1, 1, 2, 1, 0, false, 2);
            TILING(32, 2, 8, 1, 1, 2, 1, 0, false, 1, 256);
            TILING(32, 2, 8, 1, 1, 2, 1, 0, false, 1, 1);
            TILING(32, 2, 8, 1, 1, 2, 1, 0, false, 1, 0, 2);
            TILING(32, 3, 8, 1, 1, 2, 1, 0, false, 1, 0, 1);
            TILING(32, 2, 4, 4, 1, 2, 1, 4, true, 1, 0, 1);
            TILING(32, 3, 8, 1, 1);
            TILING(32, 4, 8, 1, 1);
            TILING(32, 2, 4, 4, 1, 2, 1, 4, true);
        } else if (n <= 64) {
            TILING(64, 2, 8, 1, 1);
            TILING(64, 2, 8, 1, 1, 2, 1, 0, false, 2);
            TILING(64, 2, 8, 1, 1, 2, 1, 0, false, 1, 256);
            TILING(64, 2, 8, 1, 1, 2, 1, 0, false, 1, 1);
            TILING(64, 2, 8, 1, 1, 2, 1, 0, false, 1, 0, 1);
            TILING(64, 3, 8, 1, 1);
            TILING(64, 4, 8, 1, 1);
            TILING(64, 2, 3, 4, 1, 2, 1, 4, true);
        } else if (n <= 128) {
            TILING(128, 2, 8, 1, 1);
            TILING(128, 2, 8, 1, 1, 2, 1, 0, false, 1, 1);
            TILING(128, 3, 8, 1, 1);
            TILING(128, 2, 5, 1, 1, 2, 1, 4);
            TILING(64, 2, 8, 1, 1);
        } else {
            TILING(256, 2, 4, 1, 1);
            TILING(256, 2, 4, 1, 1, 2, 1, 0, false, 1, 256);
            TILING(128, 2, 8, 1, 1);
            TILING(192, 2, 6, 1, 1);
        }
    }
#else
    if (n <= 16 && g == 8 && K <= 2) try_it(6, "gathers", gathers<T>(out, in, K, 8 * code, g), 0);
    const auto with = [&](auto entries) {
        const auto go = [&](auto tiling) {
            pipelined<T, decltype(entries), decltype(tiling)>(try_it, out, in, n, sms);
        };
        if constexpr (decltype(entries)::CODE == 2) {
            if (n <= 16) {
                TILING(16, 2, 8, 1, 1, 4);
                TILING(16, 3, 8, 1, 1, 4);
                TILING(16, 2, 8, 1, 1, 2);
            } else if (n <= 64) {
                TILING(64, 2, 6, 1, 1, 4);
                TILING(64, 2, 6, 1, 1, 2);
            } else TILING(256, 2, 4, 1, 1, 2);
        } else if (n <= 16) TILING(16, 2, 8, 1, 1);
        else if (n <= 64) TILING(64, 2, 6, 1, 1);
        else TILING(256, 2, 3, 1, 1);
    };
    if (code == 1 && g == 8 && K == 1) with(Entries<T, 1, 1, 8>());
    if (code == 1 && g == 8 && K == 3) with(Entries<T, 3, 1, 8>());
    if (code == 1 && g == 8 && K == 4) with(Entries<T, 4, 1, 8>());
    if (code == 1 && g == 4 && K == 1) with(Entries<T, 1, 1, 4>());
    if (code == 1 && g == 16 && K == 2) with(Entries<T, 2, 1, 16>());
    if (code == 1 && g == 32 && K == 1) with(Entries<T, 1, 1, 32>());
    if (code == 2 && g == 8 && K == 1) with(Entries<T, 1, 2, 8>());
    if (code == 2 && g == 16 && K == 1) with(Entries<T, 1, 2, 16>());
#endif
}

} // namespace ladder
#endif
