/* stored.h: how the product reads a stored weight: codes of either layout, entries of og rows (decode.c). */
#ifndef AQLM_CORE_STORED_H
#define AQLM_CORE_STORED_H

#include "aqlm/product.h"
#include "core/runtime/convert.h"
#include "simd/simd.h"

/* Whether something is wrong with it. */
static inline bool aqlm_check_weight(const aqlm_weight *w) {
    return aqlm_check_shape(&w->shape) || (w->packed && w->shape.nbits_per_codebook > 8);
}

/* The codes of groups (o, j), first <= o < last (at most AQLM_ROWS of them) and begin <= j < end: those of one o lie
 * together, those of the next `step` bytes further. scratch: aqlm_codes_scratch(w, end - begin) bytes. */
enum { AQLM_ROWS = 64 };
int64_t aqlm_codes_scratch(const aqlm_weight *w, int64_t groups);
const void *aqlm_codes_of(const aqlm_weight *w, int64_t first, int64_t last, int64_t begin, int64_t end,
                          uint8_t *scratch, int64_t *step);

/* How a row reads its codes [groups, K]: the one numbered `inner` in its group of og outputs. */
static inline aqlm_entries aqlm_entries_of(const aqlm_weight *w, int64_t inner, int64_t groups) {
    const aqlm_shape *s = &w->shape;
    const int64_t g = s->in_group_size;
    const char *codebooks = (const char *)w->codebooks + (size_t)(inner * g) * aqlm_dtype_size(w->dtype);
    return (aqlm_entries){codebooks, w->dtype,         s->out_group_size * g, g,
                          groups,    s->num_codebooks, s->nbits_per_codebook};
}

#endif
