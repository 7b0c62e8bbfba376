/* memory.c: what the core allocates. */
#include "core/runtime/memory.h"

void *aqlm_alloc(int64_t count, size_t size) {
    if (count < 0 || (uint64_t)count > (SIZE_MAX - 64) / (size ? size : 1)) return NULL;
    size_t bytes = ((size_t)count * size + 63) / 64 * 64;
    return aligned_alloc(64, bytes ? bytes : 64);
}
