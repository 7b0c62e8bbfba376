/* dispatch.c: asks the CPU once, then every call goes through one table of kernels. */
#include "aqlm/runtime.h"
#include "core/runtime/isa.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const aqlm_kernels *_Atomic chosen; /* another thread may choose while products run */
static const char *names[5];
static const aqlm_kernels *tables[4];
static int count;
static const aqlm_bf16_kernels *bf16;

static void add(const aqlm_kernels *table) {
    tables[count] = table;
    names[count++] = table->name;
}

__attribute__((constructor)) static void find_isas(void) {
    add(&aqlm_kernels_scalar);
#ifdef AQLM_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        add(&aqlm_kernels_avx2);
#endif
#ifdef AQLM_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni"))
        add(&aqlm_kernels_avx512);
#endif
#ifdef AQLM_HAVE_AVX512BF16
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16"))
        bf16 = &aqlm_kernels_avx512bf16;
#endif
#ifdef AQLM_HAVE_NEON
    add(&aqlm_kernels_neon); /* every AArch64 CPU has it */
#endif
    chosen = tables[count - 1];
    const char *wish = getenv("AQLM_C_ISA");
    if (wish && *wish) aqlm_set_isa(wish); /* an unknown name leaves the best one; the NumPy binding reports it */
}

const aqlm_kernels *aqlm_isa(void) { return chosen; }
const aqlm_bf16_kernels *aqlm_bf16_isa(void) { return bf16; }
const char *aqlm_get_isa(void) { return aqlm_isa()->name; }
const char *const *aqlm_available_isas(void) { return names; }

aqlm_status aqlm_set_isa(const char *name) {
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0) {
            chosen = tables[i];
            return AQLM_OK;
        }
    return AQLM_BAD_ARGUMENT;
}
