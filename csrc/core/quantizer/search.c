/* search.c: the codes of all groups under H (AQLM section 3.2), by coordinate sweeps or by one pass of
 * sequential error feedback (docs/method.md). Both are the same walk over groups: within one output, group j has
 * the metric S_j and a linear term that the groups already fixed contribute, tr(D H D^T) being quadratic.
 *
 *   sweep: S_j = H_jj,         target' = w_j S_j + sum over i != j of D_i H_ij
 *   LDL:   S_j = R_jj R_jj^T,  target' = (w_j + sum over i < j of D_i F_ij) S_j
 *
 * and the cost of the sum of entries q (scale divided out) is q S q - 2 target' q. Outputs are independent, so
 * threads take rows; groups are taken in `order`, in blocks: what D contributes to a block is one matrix
 * product, what changes inside the block is added by small rank-g updates (lazy batched updates, as GPTQ). */
#include "aqlm/quantizer.h"
#include "core/quantizer/small.h"
#include "core/quantizer/working.h"
#include "core/runtime/gemm.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"
#include "core/runtime/rng.h"

#include <assert.h>
#include <float.h>
#include <math.h>

enum { BLOCK_COLS = 128, CHUNK_ROWS = 512, MOST_BEAM = 64, MOST_K = 8 };

typedef struct search {
    const aqlm_search *s;
    uint16_t *codes;
    const int32_t *order; /* [J] */
    const float *couple;  /* [in, in] in order space: H for a sweep, the feedback F for LDL */
    const float *metric;  /* [J, g, g] in order space */
    const int32_t *books; /* [J, K] order of the codebooks in a group's beam search, in order space; sweeps only */
    bool ldl;
    aqlm_shared_status status;
} search;

/* ---- one group: its codebooks seen through the metric S_j ---------------------------------- */

typedef struct pair_table {
    int64_t first, second; /* codebooks; the one with the larger radius is `first`, it is scanned outside */
    aqlm_pair pair;
    float *m;
} pair_table;

typedef struct view {
    const aqlm_search *s;
    int64_t g, K, E, padded;
    const float *metric;
    double factor[32 * 32]; /* Cholesky factor of the metric, for |t|^2 */
    bool bounded;           /* there is one; else no pair is pruned */
    float *ct, *norm;       /* [K, g, padded] twice the entries, [K, padded] their squares in S (Inf beyond E) */
    float *cs;              /* [K, E, g] entries times S */
    float radius[MOST_K];
    pair_table table; /* one pair at a time; m is [padded, padded] */
} view;

static int64_t view_floats(const aqlm_search *s, int64_t padded, bool pairs) {
    const int64_t g = s->shape.in_group_size, K = s->shape.num_codebooks;
    return K * padded * (2 * g + 1) + (pairs ? padded * padded : 0);
}

static void view_place(view *v, const aqlm_search *s, float *memory) {
    v->s = s;
    v->g = s->shape.in_group_size;
    v->K = s->shape.num_codebooks;
    v->E = INT64_C(1) << s->shape.nbits_per_codebook;
    v->padded = aqlm_round_up(v->E, AQLM_LANES);
    v->ct = memory;
    v->norm = v->ct + v->K * v->g * v->padded;
    v->cs = v->norm + v->K * v->padded;
    v->table.m = v->cs + v->K * v->padded * v->g;
}

static aqlm_status view_metric(view *v, const float *metric) {
    const int64_t g = v->g, n = v->padded;
    v->metric = metric;
    double s[32 * 32], trace = 0.0, sum = 0.0;
    for (int64_t r = 0; r < g; r++) {
        for (int64_t c = 0; c < g; c++) sum += s[r * g + c] = metric[r * g + c];
        trace += s[r * g + r];
    }
    if (!isfinite(sum)) return AQLM_NOT_POSITIVE;
    /* Only a bound hangs on this factor, so a metric that rounding left indefinite just goes without. */
    for (int64_t d = 0; d < g; d++) s[d * g + d] += 1e-6 * trace / (double)g + 1e-30;
    v->bounded = aqlm_cholesky_small(v->factor, s, g);
    for (int64_t k = 0; k < v->K; k++) {
        float most = 0.0f;
        for (int64_t e = 0; e < n; e++) {
            float *ct = v->ct + k * g * n + e;
            if (e >= v->E) {
                for (int64_t d = 0; d < g; d++) ct[d * n] = 0.0f;
                v->norm[k * n + e] = INFINITY;
                continue;
            }
            const float *entry = v->s->codebooks + (k * v->E + e) * g;
            float *cs = v->cs + (k * v->E + e) * g, square = 0.0f;
            memset(cs, 0, (size_t)g * sizeof *cs);
            for (int64_t p = 0; p < g; p++)
                for (int64_t d = 0; d < g; d++) cs[d] += entry[p] * metric[p * g + d];
            for (int64_t d = 0; d < g; d++) {
                ct[d * n] = 2.0f * entry[d];
                square += cs[d] * entry[d];
            }
            v->norm[k * n + e] = square;
            most = square > most ? square : most;
        }
        v->radius[k] = sqrtf(most);
    }
    return AQLM_OK;
}

static void view_pair(view *v, int64_t i, int64_t j) {
    const int64_t g = v->g, n = v->padded;
    assert(i >= 0 && i < MOST_K && j >= 0 && j < MOST_K);
    const bool swap = v->radius[j] > v->radius[i];
    pair_table *t = &v->table;
    t->first = swap ? j : i;
    t->second = swap ? i : j;
    memset(t->m, 0, (size_t)(n * n) * sizeof *t->m);
    /* m[a, b] = 2 c_a S c_b: rank_update sums over the group in order on every ISA */
    aqlm_isa()->rank_update(t->m, n, v->cs + t->first * v->E * g, g, v->ct + t->second * g * n, n, v->E, g, n);
    t->pair = (aqlm_pair){t->m, n, v->radius[t->second], 0.0f, 0.0f};
}

static float cost_of(const view *v, const float *q, const float *target) {
    float square = 0.0f, cross = 0.0f;
    for (int64_t d = 0; d < v->g; d++) {
        float sum = 0.0f;
        for (int64_t p = 0; p < v->g; p++) sum += q[p] * v->metric[p * v->g + d];
        square += sum * q[d];
        cross += target[d] * q[d];
    }
    return square - 2.0f * cross;
}

/* target' - q S: what is left for the codebooks not in q */
static void remaining(const view *v, float *left, const float *target, const float *q) {
    memcpy(left, target, (size_t)v->g * sizeof *left);
    for (int64_t p = 0; p < v->g; p++)
        for (int64_t d = 0; d < v->g; d++) left[d] -= q[p] * v->metric[p * v->g + d];
}

static const float *entry_of(const view *v, int64_t k, int64_t code) {
    return v->s->codebooks + (k * v->E + code) * v->g;
}

static void sum_without(const view *v, float *q, const uint16_t *codes, uint32_t left_out) {
    memset(q, 0, (size_t)v->g * sizeof *q);
    for (int64_t k = 0; k < v->K; k++)
        if (!(left_out >> k & 1)) {
            const float *entry = entry_of(v, k, codes[k]);
            for (int64_t d = 0; d < v->g; d++) q[d] += entry[d];
        }
}

/* ---- beam search ------------------------------------------------------------------------------ */

typedef struct hypothesis {
    float cost;
    uint16_t codes[MOST_K];
    float sum[32];
} hypothesis;

typedef struct beam {
    hypothesis *now, *next; /* [beam_size] each */
    int64_t size, most;
    float *score; /* [2, padded] */
} beam;

/* Keeps the `most` cheapest of all (hypothesis, entry of codebook k); ties to the earlier hypothesis, then
 * entry. The codes at k must already be taken out of each sum. */
static void expand(const view *v, beam *b, int64_t k, const float *target) {
    const int64_t g = v->g, n = v->padded;
    const aqlm_kernels *isa = aqlm_isa();
    int64_t kept = 0;
    for (int64_t h = 0; h < b->size; h++) {
        const hypothesis *from = b->now + h;
        float left[32];
        remaining(v, left, target, from->sum);
        if (b->most == 1) {
            int32_t best;
            float low;
            isa->nearest(&best, &low, v->norm + k * n, v->ct + k * g * n, left, 1, g, n);
            b->next[0] = *from;
            b->next[0].cost = from->cost + low;
            b->next[0].codes[k] = (uint16_t)best;
            kept = 1;
            break;
        }
        isa->scores(b->score, v->norm + k * n, v->ct + k * g * n, left, g, n);
        for (int64_t e = 0; e < v->E; e++) {
            const float cost = from->cost + b->score[e];
            if (kept == b->most && !(cost < b->next[kept - 1].cost)) continue;
            int64_t at = kept < b->most ? kept++ : kept - 1;
            for (; at > 0 && cost < b->next[at - 1].cost; at--) b->next[at] = b->next[at - 1];
            b->next[at] = *from;
            b->next[at].cost = cost;
            b->next[at].codes[k] = (uint16_t)e;
        }
    }
    for (int64_t h = 0; h < kept; h++) {
        const float *entry = entry_of(v, k, b->next[h].codes[k]);
        for (int64_t d = 0; d < g; d++) b->next[h].sum[d] += entry[d];
    }
    hypothesis *t = b->now;
    b->now = b->next;
    b->next = t;
    b->size = kept;
}

/* Takes code k out of every hypothesis; those that then coincide are one. */
static void release(const view *v, beam *b, int64_t k, const float *target) {
    int64_t kept = 0;
    for (int64_t h = 0; h < b->size; h++) {
        hypothesis *x = b->now + h;
        bool seen = false;
        for (int64_t i = 0; i < kept && !seen; i++) {
            seen = true;
            for (int64_t c = 0; c < v->K; c++) seen = seen && (c == k || b->now[i].codes[c] == x->codes[c]);
        }
        if (seen) continue;
        sum_without(v, x->sum, x->codes, 1u << k);
        x->cost = cost_of(v, x->sum, target);
        b->now[kept++] = *x;
    }
    b->size = kept;
}

/* `books` [K]: the order of the codebooks; NULL, from scratch: 0..K-1, twice. */
static void search_beam(const view *v, beam *b, uint16_t *codes, const float *target, const int32_t *books) {
    const int64_t K = v->K;
    const bool from_scratch = !books;
    b->size = 1;
    memset(b->now, 0, sizeof *b->now);
    float before = INFINITY;
    if (from_scratch)
        for (int64_t k = 0; k < K; k++) expand(v, b, k, target);
    else {
        memcpy(b->now->codes, codes, (size_t)K * sizeof *codes);
        sum_without(v, b->now->sum, codes, 0);
        before = cost_of(v, b->now->sum, target);
    }
    if (!from_scratch || K > 1)
        for (int64_t k = 0; k < K; k++) {
            release(v, b, books ? books[k] : k, target);
            expand(v, b, books ? books[k] : k, target);
        }
    float q[32];
    sum_without(v, q, b->now->codes, 0);
    if (cost_of(v, q, target) < before) memcpy(codes, b->now->codes, (size_t)K * sizeof *codes);
}

/* ---- exact pairs, after a beam over the other codebooks --------------------------------------- */

/* The search prunes and stays exact (pair_min in simd.h): with t the target and |.| the norm of the metric, a first
 * entry a can only win if |t - a| is at most the second codebook's radius plus the best distance so far (triangle
 * inequality), plus a margin for rounding. */

/* The best codes of the two codebooks in v->table after those in `from`, and the cost of all: exactly, if that is below
 * `least`. have_guess: `codes` holds a first guess of the two. */
static float end_by_pair(const view *v, uint16_t *codes, const hypothesis *from, const float *target, float least,
                         bool have_guess, float *scratch /* [2, padded] */) {
    const pair_table *t = &v->table;
    const int64_t g = v->g, n = v->padded;
    const aqlm_kernels *isa = aqlm_isa();
    float left[32], *u = scratch, *w = scratch + n;
    double wide[32];
    remaining(v, left, target, from->sum);
    isa->scores(u, v->norm + t->first * n, v->ct + t->first * g * n, left, g, n);
    isa->scores(w, v->norm + t->second * n, v->ct + t->second * g * n, left, g, n);
    for (int64_t d = 0; d < g; d++) wide[d] = left[d];
    const float square = v->bounded ? (float)aqlm_forward_square(v->factor, wide, g) : 0.0f;
    int32_t first = codes[t->first], second = codes[t->second];
    if (!have_guess) {
        float low;
        isa->nearest(&first, &low, v->norm + t->first * n, v->ct + t->first * g * n, left, 1, g, n);
        second = 0;
    }
    aqlm_pair pair = t->pair;
    const float reach = v->radius[t->first] + v->radius[t->second];
    pair.slack = v->bounded ? 1e-4f * (square + reach * reach) : INFINITY;
    pair.worth = least - from->cost;
    const float cost = from->cost + isa->pair_min(&first, &second, u, w, square, &pair);
    codes[t->first] = (uint16_t)first;
    codes[t->second] = (uint16_t)second;
    return cost;
}

/* All rows of one group: a beam over all codebooks but the last two, and after each of its states their best pair.
 * targets [rows, g]; codes of row r at codes + r * stride; a sweep keeps them where nothing better is found. */
static void search_pairs(view *v, beam *b, uint16_t *codes, int64_t stride, const float *targets, int64_t rows,
                         bool from_scratch) {
    const int64_t K = v->K, g = v->g;
    view_pair(v, K - 2, K - 1);
    for (int64_t r = 0; r < rows; r++, codes += stride, targets += g) {
        uint16_t trial[MOST_K], best[MOST_K] = {0};
        float q[32], before = INFINITY;
        memcpy(trial, codes, (size_t)K * sizeof *codes);
        if (!from_scratch && K > 2) { /* of two codebooks nothing is better than their best pair */
            sum_without(v, q, codes, 0);
            before = cost_of(v, q, targets);
        }
        float least = before;
        b->size = 1;
        memset(b->now, 0, sizeof *b->now);
        for (int64_t k = 0; k < K - 2; k++) expand(v, b, k, targets);
        for (int64_t h = 0; h < b->size; h++) {
            const float cost = end_by_pair(v, trial, b->now + h, targets, least, !from_scratch || h > 0, b->score);
            if (h > 0 && !(cost < least)) continue;
            least = cost < least ? cost : least;
            memcpy(trial, b->now[h].codes, (size_t)(K - 2) * sizeof *trial);
            memcpy(best, trial, (size_t)K * sizeof *best);
        }
        sum_without(v, q, best, 0);
        if (K == 2 || cost_of(v, q, targets) < before) memcpy(codes, best, (size_t)K * sizeof *codes);
    }
}

/* ---- the walk ------------------------------------------------------------------------------------- */

typedef struct walk {
    float *D;       /* [rows, in] W - Wq in order space */
    float *T;       /* [rows, ldt] contribution of D to the block's linear terms */
    float *targets; /* [rows, g] target' / scale */
    float *change;  /* [rows, g] what is sent on to the later groups of the block */
    float *gemm, *scores;
    int64_t ldt;
} walk;

static void walk_chunk(search *x, view *v, beam *b, walk *k, int64_t r0, int64_t rows) {
    const aqlm_search *s = x->s;
    const aqlm_shape *shape = &s->shape;
    const int64_t in = shape->in_features, g = v->g, K = v->K, J = in / g, per_block = BLOCK_COLS / g;
    const int64_t stride = J * K;
    uint16_t *codes = x->codes + r0 * stride;
    float q[32];
    for (int64_t r = 0; r < rows && !x->ldl; r++)
        for (int64_t i = 0; i < J; i++) {
            const int64_t j = x->order[i];
            sum_without(v, q, codes + r * stride + j * K, 0);
            const float *w = s->weight + (r0 + r) * in + j * g;
            for (int64_t d = 0; d < g; d++) k->D[r * in + i * g + d] = w[d] - s->scales[r0 + r] * q[d];
        }
    for (int64_t b0 = 0; b0 < J; b0 += per_block) {
        const int64_t b1 = aqlm_min(b0 + per_block, J), cols = (b1 - b0) * g;
        const int64_t depth = x->ldl ? b0 * g : in;
        aqlm_gemm(k->T, k->ldt, (aqlm_operand){k->D, in, 1}, (aqlm_operand){x->couple + b0 * g, in, 1}, rows, cols,
                  depth, k->gemm);
        for (int64_t i = b0; i < b1; i++) {
            if (aqlm_cancelled()) return;
            const int64_t j = x->order[i];
            const float *metric = x->metric + i * g * g;
            aqlm_status status = view_metric(v, metric);
            if (status) {
                aqlm_set_status(&x->status, status);
                return;
            }
            for (int64_t r = 0; r < rows; r++) {
                const float scale = s->scales[r0 + r], inverse = fabsf(scale) >= FLT_MIN ? 1.0f / scale : 0.0f;
                const float *w = s->weight + (r0 + r) * in + j * g, *D = k->D + r * in + i * g;
                const float *T = k->T + r * k->ldt + (i - b0) * g;
                float *target = k->targets + r * g, base[32];
                /* LDL: (w + T) S. Sweep: T + (w - D) S, because T counts D_j itself. */
                for (int64_t d = 0; d < g; d++) base[d] = x->ldl ? w[d] + T[d] : w[d] - D[d];
                for (int64_t d = 0; d < g; d++) target[d] = x->ldl ? 0.0f : T[d];
                for (int64_t p = 0; p < g; p++)
                    for (int64_t d = 0; d < g; d++) target[d] += base[p] * metric[p * g + d];
                for (int64_t d = 0; d < g; d++) target[d] *= inverse;
            }
            if (s->pairs) search_pairs(v, b, codes + j * K, stride, k->targets, rows, x->ldl);
            else
                for (int64_t r = 0; r < rows; r++)
                    search_beam(v, b, codes + r * stride + j * K, k->targets + r * g, x->ldl ? NULL : x->books + i * K);
            for (int64_t r = 0; r < rows; r++) {
                const float *w = s->weight + (r0 + r) * in + j * g;
                float *D = k->D + r * in + i * g;
                sum_without(v, q, codes + r * stride + j * K, 0);
                for (int64_t d = 0; d < g; d++) {
                    const float now = w[d] - s->scales[r0 + r] * q[d];
                    k->change[r * g + d] = x->ldl ? now : now - D[d];
                    D[d] = now;
                }
            }
            const int64_t later = (i + 1 - b0) * g;
            if (later < cols)
                aqlm_isa()->rank_update(k->T + later, k->ldt, k->change, g, x->couple + i * g * in + b0 * g + later, in,
                                        rows, g, cols - later);
        }
    }
}

static void walk_rows(int64_t begin, int64_t end, void *ctx) {
    search *x = ctx;
    const aqlm_shape *shape = &x->s->shape;
    const int64_t in = shape->in_features, g = shape->in_group_size, most = x->s->beam_size;
    const int64_t chunk = aqlm_min(CHUNK_ROWS, end - begin),
                  padded = aqlm_round_up(INT64_C(1) << shape->nbits_per_codebook, AQLM_LANES);
    view v;
    walk k = {.ldt = BLOCK_COLS + AQLM_LANES};
    const int64_t sizes[] = {view_floats(x->s, padded, x->s->pairs),
                             chunk * in,
                             chunk * k.ldt + AQLM_LANES,
                             chunk * g,
                             chunk * g,
                             aqlm_gemm_workspace(),
                             2 * padded};
    int64_t total = 0;
    for (int i = 0; i < 7; i++) total += aqlm_round_up(sizes[i], AQLM_LANES);
    float *memory = aqlm_alloc(total, sizeof *memory), *at[7];
    hypothesis *hypotheses = aqlm_alloc(2 * most, sizeof *hypotheses);
    if (memory && hypotheses) {
        float *p = memory;
        for (int i = 0; i < 7; p += aqlm_round_up(sizes[i], AQLM_LANES), i++) at[i] = p;
        view_place(&v, x->s, at[0]);
        k.D = at[1];
        k.T = at[2];
        memset(k.T, 0, (size_t)sizes[2] * sizeof *k.T);
        k.targets = at[3];
        k.change = at[4];
        k.gemm = at[5];
        k.scores = at[6];
        beam b = {hypotheses, hypotheses + most, 0, most, k.scores};
        for (int64_t r = begin; r < end && !aqlm_cancelled(); r += chunk)
            walk_chunk(x, &v, &b, &k, r, aqlm_min(chunk, end - r));
    } else aqlm_set_status(&x->status, AQLM_NO_MEMORY);
    free(memory);
    free(hypotheses);
}

/* Puts the defaults in and checks. */
static aqlm_status resolve(aqlm_search *s) {
    if (s->beam_size == 0) {
        s->pairs = true;
        s->beam_size = AQLM_PAIR_BEAM;
    }
    if (s->beam_size < 1 || s->beam_size > MOST_BEAM) return AQLM_BAD_ARGUMENT;
    if (s->pairs && (s->shape.num_codebooks < 2 || s->shape.nbits_per_codebook > 8)) return AQLM_BAD_ARGUMENT;
    return aqlm_check_quantizer_shape(&s->shape);
}

static aqlm_status walk_all(search *x) {
    const int64_t out = x->s->shape.out_features;
    aqlm_parallel(0, out, aqlm_even_grain(out, 16), walk_rows, x);
    return aqlm_get_status(&x->status);
}

aqlm_status aqlm_search_ldl(uint16_t *codes, const aqlm_search *s, const int32_t *order, const float *feedback,
                            const float *metric) {
    aqlm_search given = *s;
    aqlm_status status = resolve(&given);
    if (status) return status;
    s = &given;
    const int64_t n = s->shape.out_features * (s->shape.in_features / s->shape.in_group_size) * s->shape.num_codebooks;
    memset(codes, 0, (size_t)n * sizeof *codes);
    search x = {s, codes, order, feedback, metric, NULL, true, {AQLM_OK}};
    return walk_all(&x);
}

typedef struct permute_job {
    float *to, *metric;
    const float *from;
    const int32_t *order;
    int64_t in, g;
} permute_job;

static void permute_groups(int64_t begin, int64_t end, void *ctx) {
    const permute_job *p = ctx;
    const int64_t g = p->g, J = p->in / g;
    for (int64_t i = begin; i < end; i++)
        for (int64_t d = 0; d < g; d++) {
            const float *row = p->from + (p->order[i] * g + d) * p->in;
            float *to = p->to + (i * g + d) * p->in;
            for (int64_t j = 0; j < J; j++) memcpy(to + j * g, row + p->order[j] * g, (size_t)g * sizeof *to);
            memcpy(p->metric + (i * g + d) * g, to + i * g, (size_t)g * sizeof *to);
        }
}

aqlm_status aqlm_search_sweep(uint16_t *codes, const aqlm_search *s, const float *H) {
    aqlm_search given = *s;
    aqlm_status status = resolve(&given);
    s = &given;
    if (!status) status = aqlm_check_working_codes(codes, &s->shape);
    if (status) return status;
    const int64_t in = s->shape.in_features, g = s->shape.in_group_size, J = in / g, K = s->shape.num_codebooks;
    int32_t *order = aqlm_alloc(J * (1 + K), sizeof *order), *books = order + J;
    float *memory = aqlm_alloc(in * in + in * g + AQLM_LANES, sizeof *memory);
    if (order && memory) {
        aqlm_sweep_order(order, J, K, s->seed);
        permute_job p = {memory, memory + in * in, H, order, in, g};
        aqlm_parallel(0, J, 8, permute_groups, &p);
        search x = {s, codes, order, p.to, p.metric, books, false, {AQLM_OK}};
        status = walk_all(&x);
    } else status = AQLM_NO_MEMORY;
    free(order);
    free(memory);
    return status;
}
