/* arena.cuh: a workspace cut into arrays of 256-byte alignment; counted first, where there is none. */
#ifndef AQLM_CUDA_ARENA_CUH
#define AQLM_CUDA_ARENA_CUH

#include <cstddef>
#include <cstdint>

namespace aqlm_cuda {

struct Arena {
    char *base; /* NULL: only `used` is wanted */
    size_t used = 0;

    explicit Arena(void *memory) : base(static_cast<char *>(memory)) {}

    template <class T> T *take(int64_t count) {
        char *at = base ? base + used : nullptr;
        used += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
        return reinterpret_cast<T *>(at);
    }
};

} // namespace aqlm_cuda
#endif
