/* core.h: what the files of core/ share with each other and with nobody else. */
#ifndef AQLM_CORE_H
#define AQLM_CORE_H

#include "../aqlm.h"
#include "../simd/simd.h"

#include <stdlib.h>
#include <string.h>

static inline int64_t aqlm_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t aqlm_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t aqlm_round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/* dispatch.c */
const aqlm_kernels *aqlm_isa(void);

/* parallel.c */
void aqlm_parallel(int64_t begin, int64_t end, int64_t grain, aqlm_range_fn fn, void *ctx);
bool aqlm_cancelled(void); /* polls on the calling thread; once true, true until aqlm_get_status */
int64_t aqlm_even_grain(int64_t n, int64_t least); /* n cut into one piece a thread, none below `least` */

/* A status that many threads may set; the first error stays. */
typedef struct aqlm_shared_status {
    _Atomic int value;
} aqlm_shared_status;
void aqlm_set_status(aqlm_shared_status *s, aqlm_status status);
aqlm_status aqlm_get_status(aqlm_shared_status *s); /* AQLM_CANCELLED included; clears the caller's flag */

/* 64-byte aligned; NULL if the size overflows or memory is out. Free with free(). */
void *aqlm_alloc(int64_t count, size_t size);

/* gemm.c: c[m, n] = a b, every sum over k in order. a(i, p) = a[i * row_step + p * col_step]. One thread. */
int64_t aqlm_gemm_workspace(void); /* in floats */
typedef struct aqlm_operand {
    const float *at;
    int64_t row_step, col_step;
} aqlm_operand;
void aqlm_gemm(float *c, int64_t ldc, aqlm_operand a, aqlm_operand b, int64_t m, int64_t n, int64_t k,
               float *workspace);

/* convert.c */
void aqlm_to_f32(float *to, const void *from, aqlm_dtype dtype, int64_t n);
void aqlm_from_f32(void *to, aqlm_dtype dtype, const float *from, int64_t n);
size_t aqlm_dtype_size(aqlm_dtype dtype);

/* decode.c: q[rows, in] of working codes, rows begin..end, without scales; og = 1 */
void aqlm_decode_working(float *q, const uint16_t *codes, const float *codebooks, const aqlm_shape *shape,
                         int64_t begin, int64_t end);
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

/* gather.c: aqlm_matmul for few rows by the entries themselves */
bool aqlm_gather_fits(const aqlm_weight *w, int64_t n_rows);
size_t aqlm_gather_workspace(const aqlm_weight *w, int64_t n_rows);
aqlm_status aqlm_gather_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size);

/* tables.c: aqlm_matmul for few rows by tables of partial products, where that is allowed and pays */
bool aqlm_tables_fit(const aqlm_shape *shape, int64_t n_rows);
size_t aqlm_tables_workspace(const aqlm_weight *w, int64_t n_rows); /* 0 where they do not fit */
aqlm_status aqlm_tables_matmul(void *y, const void *x, aqlm_dtype dtype, const aqlm_weight *w, const void *bias,
                               int64_t n_rows, void *workspace, size_t workspace_size);

/* The i-th stored code; `wide`: int16, else int8. */
static inline uint32_t aqlm_stored_code(const void *codes, int64_t i, const aqlm_shape *s, bool wide) {
    return (wide ? ((const uint16_t *)codes)[i] : ((const uint8_t *)codes)[i]) & ((1u << s->nbits_per_codebook) - 1);
}

/* Calls body(..., wide, g) with constants in their place: one inline body for every (code width, g). */
#define AQLM_WITH_FORMAT(s, body, ...)                                                                                 \
    switch ((s)->in_group_size * 2 + ((s)->nbits_per_codebook > 8)) {                                                  \
    case 8: body(__VA_ARGS__, false, 4); break;                                                                        \
    case 9: body(__VA_ARGS__, true, 4); break;                                                                         \
    case 16: body(__VA_ARGS__, false, 8); break;                                                                       \
    case 17: body(__VA_ARGS__, true, 8); break;                                                                        \
    case 32: body(__VA_ARGS__, false, 16); break;                                                                      \
    case 33: body(__VA_ARGS__, true, 16); break;                                                                       \
    case 64: body(__VA_ARGS__, false, 32); break;                                                                      \
    case 65: body(__VA_ARGS__, true, 32); break;                                                                       \
    }

/* rng.c: splitmix64 seeded, xoshiro256** */
typedef struct aqlm_rng {
    uint64_t s[4];
} aqlm_rng;
aqlm_rng aqlm_rng_seed(uint64_t seed);
uint64_t aqlm_rng_next(aqlm_rng *rng);
int64_t aqlm_rng_below(aqlm_rng *rng, int64_t n); /* uniform in 0..n-1, no modulo bias */

/* small.c: dense g x g algebra, g <= 32 */
bool aqlm_cholesky_small(double *l, const double *a, int64_t g); /* a = l l^T, l lower; false if not positive */
void aqlm_solve_small(double *x, const double *l, const double *b, int64_t g);
double aqlm_forward_square(const double *l, const double *b, int64_t g); /* b^T (l l^T)^-1 b */

aqlm_status aqlm_check_quantizer_shape(const aqlm_shape *shape); /* a valid shape with og = 1 */
aqlm_status aqlm_check_working_codes(const uint16_t *codes, const aqlm_shape *shape);

#endif
