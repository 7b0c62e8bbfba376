/* shape.c: what a valid layer is, in one place, and what each status says. */
#include "aqlm/shape.h"
#include "aqlm/status.h"

#include <stddef.h>

const char *aqlm_status_text(aqlm_status status) {
    switch (status) {
    case AQLM_OK: return "ok";
    case AQLM_BAD_ARGUMENT: return "an argument is outside its documented range";
    case AQLM_NO_MEMORY: return "out of memory";
    case AQLM_NOT_POSITIVE: return "H is not positive definite after damping, or holds NaN or Inf";
    case AQLM_CANCELLED: return "cancelled";
    }
    return "unknown status";
}

const char *aqlm_check_shape(const aqlm_shape *s) {
    if (s->num_codebooks < 1 || s->num_codebooks > 8) return "num_codebooks must be in 1..8";
    if (s->nbits_per_codebook < 1 || s->nbits_per_codebook > 16) return "nbits_per_codebook must be in 1..16";
    if (s->in_group_size != 4 && s->in_group_size != 8 && s->in_group_size != 16 && s->in_group_size != 32)
        return "in_group_size must be 4, 8, 16 or 32";
    if (s->out_group_size < 1) return "out_group_size must be at least 1";
    const int64_t most = INT64_C(1) << 31;
    if (s->out_features < 1 || s->out_features > most) return "out_features must be in 1..2^31";
    if (s->in_features < 1 || s->in_features > most) return "in_features must be in 1..2^31";
    if (s->in_features % s->in_group_size) return "in_features must be a multiple of in_group_size";
    if (s->out_features % s->out_group_size) return "out_features must be a multiple of out_group_size";
    return NULL;
}
