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
                             number("c", L::CLUSTER) + number("a", L::AHEAD) + (L::EARLY ? " early" : "") +
                             (L::EAGER ? " eager" : "") +
                             (L::STAGE_CHUNKS > 1 ? number("x", L::STAGE_CHUNKS) + number("b", L::BATCH) : "");
    if (B::BOOKS + L::BYTES + aqlm_cuda::CodeStream<B, L>::BYTES > 227 * 1024) return;
    try_it(3, name, aqlm_cuda::launch_many_rows<T, B, L>,
           static_cast<size_t>(aqlm_cuda::ManyRowsCut(out, in, n, L::N, L::OUTS, L::CLUSTER, sms / L::CLUSTER).bytes));
}

/* One launch for all. */
template <class T, class B, class L> void split(const Variant &try_it) {
    if (B::BOOKS + L::BYTES + aqlm_cuda::CodeStream<B, L>::BYTES > 227 * 1024) return;
    try_it(
        3, "n" + std::to_string(L::N) + " w" + std::to_string(L::WARPGROUPS) + " split" + (L::EARLY ? " early" : ""),
        [](const ManyRowsProblem &p, void *, const aqlm_cuda::Device &device, cudaStream_t stream) {
            return aqlm_cuda::launch_split<T, B, L>(p, device, stream);
        },
        0);
}
#define SPLIT(...) split<T, Entries<T, 2, 1, 8>, SplitTiling<__VA_ARGS__>>(try_it)

/* N, WARPGROUPS, STAGES, CLUSTER, AHEAD, EARLY */
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
        SPLIT(16, 2, 8);
        SPLIT(16, 2, 8, 4, true);
        SPLIT(16, 3, 8);
        TILING(16, 2, 8);
        TILING(16, 2, 8, 1, 4, false, true);
    }
    if (n > 16 && n <= 32) {
        SPLIT(32, 2, 8);
        SPLIT(32, 2, 8, 4, true);
        SPLIT(32, 3, 8);
        TILING(32, 2, 8);
        TILING(32, 2, 4, 1, 3, false, true);
    }
    if (n > 32 && n <= 256) {
        SPLIT(64, 2, 8);
        SPLIT(64, 2, 8, 4, true);
        SPLIT(64, 3, 6, 3);
    }
    if (n > 32 && n <= 64) {
        TILING(64, 2, 8, 1, 4, false, true);
        TILING(64, 2, 8, 2, 4, false, true);
        TILING(64, 4, 6, 1, 2, false, true);
    }
    if (n > 64) {
        SPLIT(128, 2, 3, 4);
        SPLIT(128, 2, 3, 4, true);
        TILING(128, 2, 6, 1, 4, false, true);
        TILING(128, 2, 6, 2);
        TILING(128, 2, 6, 2, 4, false, true);
        TILING(128, 2, 6, 2, 4, true, true);
        TILING(128, 3, 5, 2, 2, false, true);
    }
    if (n > 128) {
        TILING(256, 2, 4, 1, 3, false, true);
        TILING(256, 2, 4, 2, 3, false, true);
        TILING(192, 2, 4, 2, 3, false, true);
    }
#else
    const auto with = [&](auto entries) {
        using B = decltype(entries);
        const auto go = [&](auto tiling) {
            using L = decltype(tiling);
            if constexpr (L::SPLITS) split<T, B, L>(try_it);
            else pipelined<T, B, L>(try_it, out, in, n, sms);
        };
        if (n <= 16) go(typename TilingOf<B, 16>::type());
        else if (n <= 64) go(typename TilingOf<B, 64>::type());
        else if (n <= 128) go(typename TilingOf<B, 128>::type());
        else go(typename TilingOf<B, 256>::type());
        if (n <= 16) TILING(16, 2, 4, 1, 2, false, true);
        else if (n <= 64) TILING(64, 2, 3, 1, 2, false, true);
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
