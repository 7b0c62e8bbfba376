/* variants.cuh: what the ladder tries. */
#ifndef MANY_ROWS_VARIANTS_CUH
#define MANY_ROWS_VARIANTS_CUH

#include <functional>
#include <string>

#include "cuda/product/many_rows_launch.cuh"
#include "simple.cuh"

namespace ladder {

using Run = std::function<cudaError_t(ManyRowsProblem, void *, const aqlm_cuda::Device &, cudaStream_t)>;
/* (rung, name, run, bytes of workspace) */
using Variant = std::function<void(int, const std::string &, const Run &, size_t)>;

template <class T, class B, class L> void pipelined(const Variant &try_it, int out, int in, int n, int sms) {
    const auto number = [](const char *what, int i) { return std::string(" ") + what + std::to_string(i); };
    const std::string name = "n" + std::to_string(L::N) + number("w", L::WARPGROUPS) + number("s", L::STAGES) +
                             number("a", L::AHEAD) + (L::ALIGNED ? " aligned" : "") + (L::EAGER ? " eager" : "") +
                             (L::SOONER ? " sooner" : "") + number("at", L::AT_ONCE);
    if (B::BOOKS + L::BYTES + aqlm_cuda::CodeStream<B, L>::BYTES > 227 * 1024) return;
    ManyRowsProblem p = {};
    p.out = out, p.in = in, p.n_rows = n;
    try_it(3, name, aqlm_cuda::launch_many_rows<T, B, L>,
           static_cast<size_t>(aqlm_cuda::ManyRowsCut(p, L::N, L::OUTS, L::ALIGNED, sms).bytes));
}

/* N, WARPGROUPS, STAGES, AHEAD, ALIGNED, EAGER, SOONER, AT_ONCE */
#define TILING(...) go(aqlm_cuda::ManyRowsTiling<__VA_ARGS__>())

/* 2x8g8: rungs and tilings; what aqlm_c runs is the first of rung 3. With FORMATS defined instead other formats. */
template <class T>
void for_each_variant(int out, int in, int n, int K, int code, int g, int sms, const Variant &try_it) {
    using namespace aqlm_cuda;
#ifndef FORMATS
    if (K != 2 || code != 1 || g != 8) return;
    if constexpr (std::is_same_v<T, __half>)
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
    const auto go = [&](auto tiling) { pipelined<T, Entries<T, 2, 1, 8>, decltype(tiling)>(try_it, out, in, n, sms); };
    if (n <= 16) {
        TILING(16, 2, 8);
        TILING(16, 2, 8, 0, false, false, true);
        TILING(16, 2, 8, 0, false, true);
        TILING(16, 2, 8, 0, true, false, true);
        TILING(16, 2, 8, 0, false, false, true, 8);
    }
    if (n > 16 && n <= 32) {
        TILING(16, 2, 8);
        TILING(32, 2, 8);
        TILING(32, 2, 8, 0, false, false, true);
        TILING(32, 2, 8, 0, false, true);
        TILING(32, 2, 8, 0, true, false, true);
        TILING(32, 4, 8, 0, false, false, true);
    }
    if (n > 32 && n <= 256) {
        TILING(32, 2, 8);
        TILING(64, 2, 8);
        TILING(64, 2, 8, 0, false, false, true);
        TILING(64, 2, 8, 0, false, true);
        TILING(64, 2, 8, 0, true, false, true);
        TILING(64, 2, 8, 0, false, false, true, 8);
        TILING(64, 4, 8, 0, false, false, true);
    }
    if (n > 64) {
        TILING(128, 2, 8, 4);
        TILING(128, 2, 8, 4, true, false);
        TILING(128, 2, 8, 0, true, false, true);
        TILING(128, 2, 8, 0, false, false, true, 8);
    }
    if (n > 128) {
        TILING(256, 2, 4, 4);
        TILING(256, 2, 4, 0, true, false, true);
        TILING(256, 2, 4, 0, false, false, true, 8);
    }
#else
    const auto with = [&](auto entries) {
        using B = decltype(entries);
        const auto go = [&](auto tiling) {
            using L = decltype(tiling);
            pipelined<T, B, L>(try_it, out, in, n, sms);
        };
        if (n <= 16) go(typename TilingOf<B, 16>::type());
        else if (n <= 64) go(typename TilingOf<B, 64>::type());
        else if (n <= 128) go(typename TilingOf<B, 128>::type());
        else go(typename TilingOf<B, 256>::type());
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
