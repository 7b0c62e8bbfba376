/* pack.c: working codes <-> the disk layout (int8 for B <= 8, else int16; code - 2^B from 2^(B-1) on). */
#include "aqlm/product.h"

static int64_t code_count(const aqlm_shape *s) {
    return s->out_features / s->out_group_size * (s->in_features / s->in_group_size) * s->num_codebooks;
}

aqlm_status aqlm_pack_codes(void *stored, const uint16_t *codes, const aqlm_shape *shape, int64_t *where) {
    if (aqlm_check_shape(shape)) return AQLM_BAD_ARGUMENT;
    const int32_t entries = 1 << shape->nbits_per_codebook;
    const int64_t n = code_count(shape);
    for (int64_t i = 0; i < n; i++) {
        if (codes[i] >= entries) {
            *where = i;
            return AQLM_BAD_ARGUMENT;
        }
        const int32_t code = codes[i] - (codes[i] >= entries / 2 ? entries : 0);
        if (shape->nbits_per_codebook <= 8) ((int8_t *)stored)[i] = (int8_t)code;
        else ((int16_t *)stored)[i] = (int16_t)code;
    }
    return AQLM_OK;
}

aqlm_status aqlm_unpack_codes(uint16_t *codes, const void *stored, const aqlm_shape *shape, int64_t *where) {
    if (aqlm_check_shape(shape)) return AQLM_BAD_ARGUMENT;
    const int32_t entries = 1 << shape->nbits_per_codebook;
    const int64_t n = code_count(shape);
    for (int64_t i = 0; i < n; i++) {
        const int32_t code =
            shape->nbits_per_codebook <= 8 ? ((const int8_t *)stored)[i] : ((const int16_t *)stored)[i];
        if (code < -entries / 2 || code >= entries / 2) {
            *where = i;
            return AQLM_BAD_ARGUMENT;
        }
        codes[i] = (uint16_t)(code & (entries - 1));
    }
    return AQLM_OK;
}
