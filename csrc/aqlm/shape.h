/* shape.h: the sizes of a quantized layer and the dtypes of its tensors. */
#ifndef AQLM_SHAPE_H
#define AQLM_SHAPE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum aqlm_dtype { AQLM_F32 = 0, AQLM_F16 = 1, AQLM_BF16 = 2 } aqlm_dtype;

typedef struct aqlm_shape {
    int64_t out_features, in_features;
    int64_t num_codebooks;      /* K, 1..8 */
    int64_t nbits_per_codebook; /* B, 1..16 */
    int64_t in_group_size;      /* g, 4, 8, 16 or 32; divides in_features */
    int64_t out_group_size;     /* og, >= 1; divides out_features */
} aqlm_shape;

/* NULL if the shape is valid, else one line that names the field and what was expected. */
const char *aqlm_check_shape(const aqlm_shape *shape);

#ifdef __cplusplus
}
#endif
#endif
