/* memory.h: sizes and where they are allocated (memory.c). */
#ifndef AQLM_CORE_MEMORY_H
#define AQLM_CORE_MEMORY_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline int64_t aqlm_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t aqlm_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t aqlm_round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* 64-byte aligned; NULL if the size overflows or memory is out. Free with free(). */
void *aqlm_alloc(int64_t count, size_t size);

#endif
