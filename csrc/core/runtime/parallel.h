/* parallel.h: loops over ranges on many threads, and how they stop (parallel.c). */
#ifndef AQLM_CORE_PARALLEL_H
#define AQLM_CORE_PARALLEL_H

#include <stdbool.h>
#include <stdint.h>

#include "aqlm/runtime.h"

void aqlm_parallel(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx);
bool aqlm_cancelled(void); /* polls on the calling thread; once true, true until aqlm_get_status */
int64_t aqlm_even_grain(int64_t n, int64_t least); /* n cut into one piece a thread, none below `least` */

/* A status that many threads may set; the first error stays. */
typedef struct aqlm_shared_status {
    _Atomic int value;
} aqlm_shared_status;
void aqlm_set_status(aqlm_shared_status *s, aqlm_status status);
aqlm_status aqlm_get_status(aqlm_shared_status *s); /* AQLM_CANCELLED included; clears the caller's flag */

#endif
