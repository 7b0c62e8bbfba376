/* gradient.c: from the gradient to W those to its codebooks and scales, codes held (autograd, block fine-tuning).
 * Entries are summed in fp32 over fixed chunks of outputs, then over chunks in double: threads change no bit. */
#include "core/product/stored.h"
#include "core/runtime/convert.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

enum { LEAST_CHUNKS = 2, MOST_CHUNKS = 32 };

typedef struct gradient_job {
    const aqlm_weight *w;
    const void *grad_rows; /* [out, in] of row_dtype */
    aqlm_dtype row_dtype;
    void *grad_codebooks;        /* of w->dtype, or NULL */
    float *grad_scales;          /* [O], or NULL */
    const float *scales;         /* in f32, for grad_codebooks */
    float *rows;                 /* [n_chunks, 2, in] */
    uint8_t *scratch;            /* [n_chunks, aqlm_codes_scratch] */
    float *partial;              /* [n_chunks, K, E, og, g] */
    int64_t n_chunks, n_entries; /* n_entries = K * E * og * g floats */
} gradient_job;

/* Many chunks feed many threads, but each has a table to clear and to add: keep that below half the work. */
static int64_t count_chunks(const aqlm_shape *s, int64_t n_entries) {
    const int64_t worth = s->out_features * s->in_features / 2 * s->num_codebooks / n_entries;
    return aqlm_max(LEAST_CHUNKS, aqlm_min(worth, MOST_CHUNKS));
}

/* The i-th stored code; `wide`: int16, else int8. */
static inline uint32_t stored_code(const void *codes, int64_t i, const aqlm_shape *s, bool wide) {
    return (wide ? ((const uint16_t *)codes)[i] : ((const uint8_t *)codes)[i]) & ((1u << s->nbits_per_codebook) - 1);
}

/* sums[k, code] += scale * grad for every group of one row. */
static inline void add_row(float *restrict sums /* [K, E, og, g] */, const float *restrict grad /* [in] */,
                           const void *codes, float scale, const aqlm_shape *s, int64_t inner, bool wide, int64_t g) {
    const int64_t K = s->num_codebooks, groups = s->in_features / g, entry_size = s->out_group_size * g;
    const int64_t stride = entry_size << s->nbits_per_codebook;
    for (int64_t j = 0; j < groups; j++) {
        float scaled[32];
        for (int64_t d = 0; d < g; d++) scaled[d] = scale * grad[j * g + d];
        for (int64_t k = 0; k < K; k++) {
            float *entry = sums + inner * g + k * stride + stored_code(codes, j * K + k, s, wide) * entry_size;
            float sum[32];
            for (int64_t d = 0; d < g; d++) sum[d] = entry[d] + scaled[d];
            memcpy(entry, sum, (size_t)g * sizeof *sum); /* all loads before all stores: so it vectorises */
        }
    }
}

/* Calls body(..., wide, g) with constants in their place: one inline body for every (code width, g). */
#define WITH_FORMAT(s, body, ...)                                                                                      \
    switch ((s)->in_group_size * 2 + ((s)->nbits_per_codebook > 8)) {                                                  \
    case 8: body(__VA_ARGS__, false, 4); break;                                                                        \
    case 9: body(__VA_ARGS__, true, 4); break;                                                                         \
    case 16: body(__VA_ARGS__, false, 8); break;                                                                       \
    case 17: body(__VA_ARGS__, true, 8); break;                                                                        \
    case 32: body(__VA_ARGS__, false, 16); break;                                                                      \
    case 33: body(__VA_ARGS__, true, 16); break;                                                                       \
    case 64: body(__VA_ARGS__, false, 32); break;                                                                      \
    case 65: body(__VA_ARGS__, true, 32); break;                                                                       \
    default: break;                                                                                                    \
    }

static void gradient_chunks(int64_t begin, int64_t end, void *ctx) {
    const gradient_job *job = ctx;
    const aqlm_weight *w = job->w;
    const aqlm_shape *s = &w->shape;
    const int64_t in = s->in_features, og = s->out_group_size, O = s->out_features / og;
    const int64_t groups = in / s->in_group_size;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        float *sums = job->grad_codebooks ? job->partial + chunk * job->n_entries : NULL;
        float *converted = job->rows + chunk * 2 * in, *decoded = converted + in;
        if (job->grad_codebooks) memset(sums, 0, (size_t)job->n_entries * sizeof *sums);
        const int64_t last = O * (chunk + 1) / job->n_chunks;
        int64_t first = 0, ready = 0, step = 0; /* codes are those of outputs first..ready */
        const void *codes = NULL;
        for (int64_t o = O * chunk / job->n_chunks; o < last && !aqlm_cancelled(); o++) {
            if (o >= ready) {
                first = o;
                ready = aqlm_min(o + AQLM_ROWS, last);
                codes = aqlm_codes_of(w, first, ready, 0, groups, job->scratch + chunk * aqlm_codes_scratch(w, groups),
                                      &step);
            }
            float product = 0.0f;
            for (int64_t inner = 0; inner < og; inner++) {
                const void *from =
                    (const char *)job->grad_rows + (size_t)((o * og + inner) * in) * aqlm_dtype_size(job->row_dtype);
                const float *grad = job->row_dtype == AQLM_F32 ? from : converted;
                if (job->row_dtype != AQLM_F32) aqlm_to_f32(converted, from, job->row_dtype, in);
                const void *own = (const char *)codes + (o - first) * step;
                if (job->grad_codebooks) WITH_FORMAT(s, add_row, sums, grad, own, job->scales[o], s, inner)
                if (!job->grad_scales) continue;
                const aqlm_entries entries = aqlm_entries_of(w, inner, groups);
                aqlm_isa()->decode_row(decoded, &entries, own, 1.0f);
                product += aqlm_isa()->dot(grad, decoded, in);
            }
            if (job->grad_scales) job->grad_scales[o] = product;
        }
    }
}

/* Floats begin..end of the chunks' tables, summed into the first one and from there to the caller. */
static void add_chunks(int64_t begin, int64_t end, void *ctx) {
    const gradient_job *job = ctx;
    for (int64_t i = begin; i < end; i++) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < job->n_chunks; chunk++) sum += job->partial[chunk * job->n_entries + i];
        job->partial[i] = (float)sum;
    }
    char *to = (char *)job->grad_codebooks + (size_t)begin * aqlm_dtype_size(job->w->dtype);
    aqlm_from_f32(to, job->w->dtype, job->partial + begin, end - begin);
}

aqlm_status aqlm_decode_rows_backward(void *grad_codebooks, void *grad_scales, const void *grad_rows,
                                      aqlm_dtype row_dtype, const aqlm_weight *w) {
    const aqlm_shape *s = &w->shape;
    if (aqlm_check_weight(w)) return AQLM_BAD_ARGUMENT;
    const int64_t n = (s->num_codebooks << s->nbits_per_codebook) * s->out_group_size * s->in_group_size;
    const int64_t O = s->out_features / s->out_group_size, n_chunks = count_chunks(s, n);
    const int64_t n_rows = n_chunks * 2 * s->in_features;
    const int64_t floats = 2 * O + n_rows + (grad_codebooks ? n_chunks * n : 0);
    const int64_t scratch = n_chunks * aqlm_codes_scratch(w, s->in_features / s->in_group_size);
    float *memory = aqlm_alloc(floats * (int64_t)sizeof *memory + scratch, 1);
    if (!memory) return AQLM_NO_MEMORY;
    float *scales = memory, *scale_sums = scales + O, *rows = scale_sums + O;
    if (grad_codebooks) aqlm_to_f32(scales, w->scales, w->dtype, O);
    gradient_job job = {.w = w,
                        .grad_rows = grad_rows,
                        .row_dtype = row_dtype,
                        .grad_codebooks = grad_codebooks,
                        .grad_scales = grad_scales ? scale_sums : NULL,
                        .scales = scales,
                        .rows = rows,
                        .scratch = (uint8_t *)(memory + floats),
                        .partial = rows + n_rows,
                        .n_chunks = n_chunks,
                        .n_entries = n};
    aqlm_parallel(0, n_chunks, 1, gradient_chunks, &job);
    if (grad_codebooks) aqlm_parallel(0, n, 1024, add_chunks, &job);
    aqlm_shared_status shared = {AQLM_OK};
    const aqlm_status status = aqlm_get_status(&shared);
    if (grad_scales && status == AQLM_OK) aqlm_from_f32(grad_scales, w->dtype, scale_sums, O);
    free(memory);
    return status;
}
