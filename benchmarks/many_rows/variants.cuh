/* variants.cuh: what the ladder tries. */
#ifndef MANY_ROWS_VARIANTS_CUH
#define MANY_ROWS_VARIANTS_CUH

#include <functional>
#include <string>

#include "simple.cuh"

namespace ladder {

using Run = std::function<cudaError_t(ManyRowsProblem, void *, const aqlm_cuda::Device &, cudaStream_t)>;
/* (rung, name, run, bytes of workspace) */
using Variant = std::function<void(int, const std::string &, const Run &, size_t)>;

template <class T, class B, class L> void pipelined(const Variant &try_it, int out, int in, int n, int sms) {
    const auto number = [](const char *what, int i) { return std::string(" ") + what + std::to_string(i); };
    const std::string name = "n" + std::to_string(L::N) + number("w", L::WARPGROUPS) + number("s", L::STAGES) +
                             number("x", L::STAGE_CHUNKS) + number("a", L::AHEAD) + number("f", L::BUFFERS) +
                             number("hint", L::HINT);
    if (B::BOOKS + L::BYTES > 227 * 1024) return;
    try_it(3, name, aqlm_cuda::launch_many_rows<T, B, L>,
           static_cast<size_t>(aqlm_cuda::ManyRowsCut(out, in, n, L::N, L::OUTS, sms).bytes));
}

/* N, WARPGROUPS, STAGES, STAGE_CHUNKS, AHEAD, BUFFERS, HINT */
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
        TILING(16, 2, 8, 1, 1, 2, 0);
        TILING(16, 2, 4, 4, 2);
        TILING(16, 4, 8);
    } else if (n <= 32) {
        TILING(32, 2, 8);
        TILING(32, 2, 8, 1, 1, 2, 0);
        TILING(32, 4, 8);
    } else if (n <= 64) {
        TILING(64, 2, 8);
        TILING(64, 2, 8, 1, 1, 2, 0);
        TILING(64, 4, 8);
    } else if (n <= 128) {
        TILING(128, 2, 8);
        TILING(128, 2, 8, 1, 1, 2, 0);
        TILING(128, 3, 8);
        TILING(64, 2, 8);
    } else {
        TILING(256, 2, 4);
        TILING(128, 2, 8);
        TILING(192, 2, 6);
    }
#else
    const auto with = [&](auto entries) {
        const auto go = [&](auto tiling) {
            pipelined<T, decltype(entries), decltype(tiling)>(try_it, out, in, n, sms);
        };
        if (n <= 16) TILING(16, 2, 8);
        else if (n <= 64) TILING(64, 2, 6);
        else TILING(256, 2, 3);
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
