/* runtime.h: threads and instruction sets (core/runtime/parallel.c, dispatch.c). No result depends on either. */
#ifndef AQLM_RUNTIME_H
#define AQLM_RUNTIME_H

#include <stdint.h>

#include "aqlm/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*aqlm_range_fn)(int64_t begin, int64_t end, void *ctx);

/* Cuts [begin, end) into pieces of at least `grain` and runs fn on each, perhaps on many threads. */
typedef void (*aqlm_parallel_fn)(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx);

/* NULL restores the built-in runner (threads of its own, aqlm_set_num_threads of them). */
void aqlm_set_parallel(aqlm_parallel_fn runner);
void aqlm_set_num_threads(int n); /* n < 1: as many as the process may use */
int aqlm_get_num_threads(void);

/* poll() is called now and then from the thread that called into the core, while it runs loops; non-zero means stop,
 * and the call returns AQLM_CANCELLED. */
void aqlm_set_poll(int (*poll)(void));

/* Names of ISAs: "scalar", "avx2", "avx512", "neon". Those this CPU runs, slowest first, and a NULL. */
const char *aqlm_get_isa(void);
const char *const *aqlm_available_isas(void);
aqlm_status aqlm_set_isa(const char *name); /* AQLM_BAD_ARGUMENT if this CPU cannot run it */

#ifdef __cplusplus
}
#endif
#endif
