/* kernels_avx512bf16.c: bf16.h in AVX512-BF16. */
#include "bf16.h"

#include <immintrin.h>
#include <stdbool.h>

enum { LINE = 64 }; /* bytes of a cache line */

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Two entries of eight values. */
ALWAYS_INLINE __m512 load_two(const char *a, const char *b, const int dtype) {
    if (dtype == 0)
        return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps((const float *)(const void *)a)),
                                  _mm256_loadu_ps((const float *)(const void *)b), 1);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a)),
                                                 _mm_loadu_si128((const __m128i *)b), 1);
    return dtype == 1 ? _mm512_cvtph_ps(both) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(both), 16));
}

/* Lane l of z[i] holds the pairs of inputs of output 4 l + i. */
ALWAYS_INLINE void store_group(uint16_t *panel, const __m512i *z) {
    const __m512i ab0 = _mm512_unpacklo_epi32(z[0], z[1]), ab1 = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i cd0 = _mm512_unpacklo_epi32(z[2], z[3]), cd1 = _mm512_unpackhi_epi32(z[2], z[3]);
    _mm512_storeu_si512(panel, _mm512_unpacklo_epi64(ab0, cd0));
    _mm512_storeu_si512(panel + 32, _mm512_unpackhi_epi64(ab0, cd0));
    _mm512_storeu_si512(panel + 64, _mm512_unpacklo_epi64(ab1, cd1));
    _mm512_storeu_si512(panel + 96, _mm512_unpackhi_epi64(ab1, cd1));
}

/* Where the codes of the panel's outputs start. */
ALWAYS_INLINE void find_outputs(const uint8_t **at, const aqlm_strided_codes *codes, int64_t outputs) {
    for (int64_t o = 0; o < AQLM_BF16_PANEL; o++)
        at[o] = codes->at + (o < outputs ? o : outputs - 1) * codes->output_step;
}

/* One group at a time, its codes one by one; `together`: those of all 16 outputs lie together. */
ALWAYS_INLINE void decode(uint16_t *panel, const aqlm_entries *from, const aqlm_strided_codes *codes, int64_t outputs,
                          const int dtype, const int K, const bool wide, const bool together) {
    const int64_t size = dtype == 0 ? 32 : 16, book_bytes = size << from->nbits;
    const uint32_t mask = (1u << from->nbits) - 1;
    const uint8_t *at[AQLM_BF16_PANEL];
    find_outputs(at, codes, outputs);
    int64_t offset = 0;
    for (int64_t j = 0; j < from->groups; j++, panel += 4 * 2 * AQLM_BF16_PANEL) {
        __m512 sum[8]; /* of outputs (i, 4 + i) and (8 + i, 12 + i) */
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sum[i] = _mm512_setzero_ps();
        const char *book = from->codebooks;
        for (int k = 0; k < K; k++, offset += codes->code_step, book += book_bytes) {
            if (together) _mm_prefetch((const char *)(codes->at + offset + codes->ahead), _MM_HINT_T1);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const int o = i / 2 + i % 2 * 8;
                const uint8_t *one = (together ? codes->at + o : at[o]) + offset;
                const uint8_t *other = (together ? codes->at + o + 4 : at[o + 4]) + offset;
                uint16_t a = *one, b = *other;
                if (wide) {
                    memcpy(&a, one, 2);
                    memcpy(&b, other, 2);
                }
                const __m512 two = load_two(book + (a & mask) * size, book + (b & mask) * size, dtype);
                sum[i] = k == 0 ? two : _mm512_add_ps(sum[i], two);
            }
        }
        __m512i z[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) z[i] = (__m512i)_mm512_cvtne2ps_pbh(sum[2 * i + 1], sum[2 * i]);
        store_group(panel, z);
    }
}

/* K = 1 and codes of 2 bytes next to each other: four groups at a time. Returns how many are done. */
ALWAYS_INLINE int64_t decode_fours(uint16_t *panel, const aqlm_entries *from, const aqlm_strided_codes *codes,
                                   int64_t outputs, const int dtype) {
    const int64_t size = dtype == 0 ? 32 : 16;
    const uint64_t mask = ((UINT64_C(1) << from->nbits) - 1) * UINT64_C(0x0001000100010001);
    const char *book = from->codebooks;
    const uint8_t *at[AQLM_BF16_PANEL];
    find_outputs(at, codes, outputs);
    int64_t j = 0;
    for (; j + 4 <= from->groups; j += 4, panel += 4 * 4 * 2 * AQLM_BF16_PANEL) {
        __m512i z[4][4];
        for (int o = 0; o < AQLM_BF16_PANEL && j % (LINE / 2) == 0; o++)
            _mm_prefetch((const char *)(at[o] + 2 * j + codes->ahead), _MM_HINT_T1);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            uint64_t four[4];
#pragma GCC unroll 4
            for (int l = 0; l < 4; l++) {
                memcpy(four + l, at[4 * l + i] + 2 * j, 8);
                four[l] &= mask;
            }
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) {
                const char *entry[4];
#pragma GCC unroll 4
                for (int l = 0; l < 4; l++) entry[l] = book + (four[l] >> 16 * n & 0xffff) * size;
                z[n][i] = (__m512i)_mm512_cvtne2ps_pbh(load_two(entry[2], entry[3], dtype),
                                                       load_two(entry[0], entry[1], dtype));
            }
        }
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) store_group(panel + n * 4 * 2 * AQLM_BF16_PANEL, z[n]);
    }
    return j;
}

ALWAYS_INLINE void decode_dtype(uint16_t *panel, const aqlm_entries *from, const aqlm_strided_codes *codes,
                                int64_t outputs, const int dtype) {
    const bool wide = from->nbits > 8, together = codes->output_step == 1 && outputs == AQLM_BF16_PANEL;
    const int K = (int)from->num_codebooks;
    if (wide && K == 1 && codes->code_step == 2) {
        const int64_t done = decode_fours(panel, from, codes, outputs, dtype);
        aqlm_entries rest = *from;
        aqlm_strided_codes rest_codes = *codes;
        rest.groups -= done;
        rest_codes.at += done * 2;
        decode(panel + done * 4 * 2 * AQLM_BF16_PANEL, &rest, &rest_codes, outputs, dtype, 1, true, false);
    } else if (wide) decode(panel, from, codes, outputs, dtype, K, true, false);
    else if (together && K == 1) decode(panel, from, codes, outputs, dtype, 1, false, true);
    else if (together && K == 2) decode(panel, from, codes, outputs, dtype, 2, false, true);
    else if (together) decode(panel, from, codes, outputs, dtype, K, false, true);
    else decode(panel, from, codes, outputs, dtype, K, false, false);
}

static void decode_panel(uint16_t *panel, const aqlm_entries *from, const aqlm_strided_codes *codes, int64_t outputs) {
    switch (from->dtype) {
    case 0: decode_dtype(panel, from, codes, outputs, 0); break;
    case 1: decode_dtype(panel, from, codes, outputs, 1); break;
    default: decode_dtype(panel, from, codes, outputs, 2);
    }
}

ALWAYS_INLINE void tile(float *c, int64_t ldc, const uint16_t *x, const uint16_t *panels, int64_t panel_step,
                        int64_t pairs, const int rows, int more) {
    __m512 acc[AQLM_BF16_ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < AQLM_BF16_ROWS; r++)
        for (int i = 0; i < 2; i++)
            acc[r][i] = more && r < rows ? _mm512_loadu_ps(c + r * ldc + 16 * i) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++, panels += 32, x += 2 * rows) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panels);
        const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panels + panel_step);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + 2 * r, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w0, both);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], w1, both);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 2; i++) _mm512_storeu_ps(c + r * ldc + 16 * i, acc[r][i]);
}

#define ROWS(R)                                                                                                        \
    case R: tile(c, ldc, x, panels, panel_step, pairs, R, more); break;

static void multiply(float *c, int64_t ldc, const uint16_t *x, const uint16_t *panels, int64_t panel_step,
                     int64_t pairs, int64_t rows, int more) {
    switch (rows) {
        ROWS(1)
        ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) default : break;
    }
}

const aqlm_bf16_kernels aqlm_kernels_avx512bf16 = {.decode_panel = decode_panel, .multiply = multiply};
