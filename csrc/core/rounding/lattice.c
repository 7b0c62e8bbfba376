/* lattice.c: the codebooks of QuIP# (arXiv 2402.04396, section 4.2) and rounding to them with error feedback. */
#include "aqlm/rounding.h"
#include "core/rounding/feedback.h"
#include "core/runtime/memory.h"
#include "core/runtime/parallel.h"

#include <math.h>

enum { PATTERNS = 256, SHORT = 256, DIM = 8 };

/* By the number of 3/2 in a pattern, without and with a 5/2: magnitudes in place of 1/2, 3/2 and 5/2. */
static const float FITTED[2][6][3] = {
    {{0.39313f, 0.0f, 0.0f},
     {0.40341f, 1.22568f, 0.0f},
     {0.42822f, 1.29102f, 0.0f},
     {0.42953f, 1.32063f, 0.0f},
     {0.47468f, 1.51049f, 0.0f},
     {0.52218f, 1.51399f, 0.0f}},
    {{0.47992f, 0.0f, 2.20425f}, {0.55154f, 1.60365f, 2.51458f}},
};
static const float FITTED_SHIFT = 0.23180f;

/* patterns[DIM][PATTERNS]: magnitudes in halves of odd numbers, all 227 of squared norm up to 10 and 29 of the 56 of
 * norm 12 that hold five 3/2; half their squared norms, and whether their sum is odd. */
typedef struct e8p {
    float patterns[DIM][PATTERNS], half_norm[PATTERNS];
    uint8_t odd[PATTERNS];
    float shift;
} e8p;

static bool belongs(const int *doubled, int *twelve) {
    int norm = 0, fives = 0;
    for (int i = 0; i < DIM; i++) {
        norm += doubled[i] * doubled[i];
        fives += doubled[i] == 5;
    }
    if (norm <= 40) return true;
    return norm == 48 && !fives && (*twelve)++ < 29;
}

static void make_e8p(e8p *table, bool fitted) {
    table->shift = fitted ? FITTED_SHIFT : 0.25f;
    int found = 0, twelve = 0;
    for (int number = 0; number < 6561 && found < PATTERNS; number++) { /* 3^8 */
        int doubled[DIM], rest = number, sum = 0, threes = 0, fives = 0;
        for (int i = DIM - 1; i >= 0; i--, rest /= 3) doubled[i] = 1 + 2 * (rest % 3);
        if (!belongs(doubled, &twelve)) continue;
        for (int i = 0; i < DIM; i++) {
            sum += doubled[i];
            threes += doubled[i] == 3;
            fives += doubled[i] == 5;
        }
        float norm = 0.0f;
        for (int i = 0; i < DIM; i++) {
            const float size = fitted ? FITTED[fives][threes][doubled[i] / 2] : 0.5f * (float)doubled[i];
            table->patterns[i][found] = size;
            norm += size * size;
        }
        table->half_norm[found] = 0.5f * norm;
        table->odd[found++] = (uint8_t)(sum / 2 & 1);
    }
}

static void decode(const e8p *table, float *vector, uint16_t code) {
    const int pattern = code >> 8;
    const float shift = code & 0x80 ? table->shift : -table->shift;
    int negative = table->odd[pattern];
    for (int i = 0; i < DIM; i++) {
        const int minus = i < DIM - 1 ? code >> i & 1 : negative & 1;
        negative += minus;
        vector[i] = (minus ? -table->patterns[i][pattern] : table->patterns[i][pattern]) + shift;
    }
}

void aqlm_e8p_decode(float *vectors, const uint16_t *codes, int64_t n, bool fitted) {
    e8p table;
    make_e8p(&table, fitted);
    for (int64_t i = 0; i < n; i++) decode(&table, vectors + i * DIM, codes[i]);
}

/* The cost is half the squared distance. With signs as x has them a pattern costs norm / 2 - |y| . pattern; where the
 * sum would be odd, the sign that costs least is turned. */
static uint16_t nearest(const e8p *table, const float *x) {
    float least = INFINITY;
    uint16_t code = 0;
    for (int shift = 0; shift < 2; shift++) {
        float size[DIM], dot[PATTERNS] = {0}, turn[PATTERNS], square = 0.0f;
        int minus = 0, negative = 0;
        for (int i = 0; i < DIM; i++) {
            const float y = x[i] - (shift ? table->shift : -table->shift);
            size[i] = fabsf(y);
            square += y * y;
            minus |= (y < 0.0f) << i;
            negative += y < 0.0f;
        }
        for (int p = 0; p < PATTERNS; p++) turn[p] = INFINITY;
        for (int i = 0; i < DIM; i++)
            for (int p = 0; p < PATTERNS; p++) {
                const float part = size[i] * table->patterns[i][p];
                dot[p] += part;
                turn[p] = part < turn[p] ? part : turn[p];
            }
        for (int p = 0; p < PATTERNS; p++) {
            const bool turns = (negative + table->odd[p]) & 1;
            const float cost = 0.5f * square + table->half_norm[p] - dot[p] + (turns ? 2.0f * turn[p] : 0.0f);
            if (!(cost < least)) continue;
            least = cost;
            int signs = minus;
            if (turns) {
                int at = 0;
                for (int i = 1; i < DIM; i++)
                    if (size[i] * table->patterns[i][p] < size[at] * table->patterns[at][p]) at = i;
                signs ^= 1 << at;
            }
            code = (uint16_t)(p << 8 | shift << 7 | (signs & 0x7f));
        }
    }
    return code;
}

typedef struct nearest_job {
    const e8p *table;
    uint16_t *codes;
    const float *x;
} nearest_job;

static void nearest_range(int64_t begin, int64_t end, void *ctx) {
    const nearest_job *job = ctx;
    for (int64_t i = begin; i < end; i++) job->codes[i] = nearest(job->table, job->x + i * DIM);
}

aqlm_status aqlm_e8p_nearest(uint16_t *codes, const float *x, int64_t n, bool fitted) {
    if (n < 0) return AQLM_BAD_ARGUMENT;
    e8p table;
    make_e8p(&table, fitted);
    nearest_job job = {&table, codes, x};
    aqlm_parallel(0, n, 64, nearest_range, &job);
    aqlm_shared_status status = {AQLM_OK};
    return aqlm_get_status(&status);
}

void aqlm_e8_short(float *vectors) {
    memset(vectors, 0, SHORT * DIM * sizeof *vectors);
    float *to = vectors + DIM; /* after 0 */
    for (int i = 0; i < DIM; i++)
        for (int j = i + 1; j < DIM; j++)
            for (int signs = 0; signs < 4; signs++, to += DIM) {
                to[i] = signs & 1 ? -1.0f : 1.0f;
                to[j] = signs & 2 ? -1.0f : 1.0f;
            }
    for (int signs = 0; signs < 128; signs++, to += DIM) {
        int negative = 0;
        for (int i = 0; i < DIM; i++) {
            const int minus = i < DIM - 1 ? signs >> i & 1 : negative & 1;
            negative += minus;
            to[i] = minus ? -0.5f : 0.5f;
        }
    }
    for (int i = 0; i < 15; i++, to += DIM) to[i / 2] = i % 2 ? -2.0f : 2.0f;
}

typedef struct lattice {
    const aqlm_lattice *l;
    const e8p *table, *plain;
    const float *shorts; /* [SHORT, DIM] */
    float *decoded;
    uint16_t *codes;
} lattice;

static uint16_t nearest_short(const float *vectors, const float *x) {
    float least = INFINITY;
    int code = 0;
    for (int v = 0; v < SHORT; v++) {
        const float *at = vectors + (int64_t)v * DIM;
        float cost = 0.0f;
        for (int i = 0; i < DIM; i++) cost += (x[i] - at[i]) * (x[i] - at[i]);
        if (cost < least) {
            least = cost;
            code = v;
        }
    }
    return (uint16_t)code;
}

static void round_group(void *ctx, int64_t row, int64_t first, const float *targets, int64_t left, float *values) {
    (void)left;
    const lattice *all = ctx;
    const aqlm_lattice *l = all->l;
    const int64_t group = l->order[first / DIM], stages = l->second ? 2 : 1;
    uint16_t *codes = all->codes + (row * (l->in_features / DIM) + group) * stages;
    float x[DIM], vector[DIM];
    for (int i = 0; i < DIM; i++) x[i] = targets[i] / l->scale;
    codes[0] = nearest(all->table, x);
    decode(all->table, vector, codes[0]);
    for (int i = 0; i < DIM; i++) values[i] = l->scale * vector[i];
    if (l->second) {
        for (int i = 0; i < DIM; i++) x[i] = (x[i] - vector[i]) / l->residual_scale;
        if (l->second == 2) decode(all->plain, vector, codes[1] = nearest(all->plain, x));
        else memcpy(vector, all->shorts + (codes[1] = nearest_short(all->shorts, x)) * DIM, sizeof vector);
        for (int i = 0; i < DIM; i++) values[i] += l->scale * l->residual_scale * vector[i];
    }
    memcpy(all->decoded + row * l->in_features + group * DIM, values, DIM * sizeof *values);
}

aqlm_status aqlm_round_lattice(float *decoded, uint16_t *codes, const aqlm_lattice *l) {
    if (l->out_features < 1 || l->in_features < 1 || l->in_features % DIM || l->second < 0 || l->second > 2 ||
        !(l->scale > 0.0f) || isinf(l->scale) || (l->second && !(l->residual_scale > 0.0f)))
        return AQLM_BAD_ARGUMENT;
    e8p table, plain;
    float shorts[SHORT * DIM];
    make_e8p(&table, l->fitted);
    make_e8p(&plain, false);
    aqlm_e8_short(shorts);
    lattice all = {l, &table, &plain, shorts, decoded, codes};
    const aqlm_walk walk = {l->weight, l->order, l->feedback, l->out_features, l->in_features, DIM, round_group, &all};
    return aqlm_walk_columns(&walk);
}
