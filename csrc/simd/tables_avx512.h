/* Bodies of make_tables and table_sums in AVX-512 VBMI: a table of 256 int16 is two byte planes in 8 registers, looked
 * up 64 codes at a time by vpermi2b. Codes are transposed as they come, 64 outputs by 64 codes (measured: 0.033 ns a
 * code beside 0.034 for the lookup), so the layout on disk stays the only one. */

/* Magic numbers put the integer in the low bits of the sum; 32768 makes both planes unsigned. */
static void make_tables(uint8_t *tables, const float *x, const float *ct, int64_t K, int64_t g, int64_t first,
                        int64_t n) {
    const __m512 magic = _mm512_set1_ps(0x1.8p23f + 32768.0f);
    uint8_t index[64];
    for (int i = 0; i < 32; i++) {
        index[i] = (uint8_t)(4 * i);
        index[32 + i] = (uint8_t)(4 * i + 1);
    }
    const __m512i planes = _mm512_loadu_si512(index);
    for (int64_t k = 0; k < K; k++)
        for (int64_t e = 0; e < 256; e += 32) {
            const float *c = ct + k * g * 256 + e;
            __m512 c0[8], c1[8];
            for (int d = 0; d < 8; d++) {
                c0[d] = d < g ? _mm512_loadu_ps(c + d * 256) : _mm512_setzero_ps();
                c1[d] = d < g ? _mm512_loadu_ps(c + d * 256 + 16) : _mm512_setzero_ps();
            }
            for (int64_t t = (k - first % K + K) % K; t < n; t += K) {
                const float *group = x + (first + t) / K * g;
                __m512 a0 = _mm512_setzero_ps(), a1 = a0;
                if (g == 8) {
#pragma GCC unroll 8
                    for (int d = 0; d < 8; d++) {
                        const __m512 xd = _mm512_set1_ps(group[d]);
                        a0 = _mm512_fmadd_ps(xd, c0[d], a0);
                        a1 = _mm512_fmadd_ps(xd, c1[d], a1);
                    }
                } else
                    for (int64_t d = 0; d < g; d++) {
                        const __m512 xd = _mm512_set1_ps(group[d]);
                        a0 = _mm512_fmadd_ps(xd, _mm512_loadu_ps(c + d * 256), a0);
                        a1 = _mm512_fmadd_ps(xd, _mm512_loadu_ps(c + d * 256 + 16), a1);
                    }
                const __m512i both = _mm512_permutex2var_epi8(_mm512_castps_si512(_mm512_add_ps(a0, magic)), planes,
                                                              _mm512_castps_si512(_mm512_add_ps(a1, magic)));
                uint8_t *to = tables + t * AQLM_TABLE_BYTES + e;
                _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(both));
                _mm256_storeu_si256((__m256i *)(to + 256), _mm512_extracti64x4_epi64(both, 1));
            }
        }
}

/* to[t][lane] = codes[row(lane), t]: even lanes hold rows 0..31, odd lanes 32..63, as flush wants them. */
static inline void transpose_codes(uint8_t *to, const uint8_t *codes, int64_t step, int64_t rows, int64_t n,
                                   int64_t ahead) {
    const __mmask64 have = n < 64 ? (UINT64_C(1) << n) - 1 : ~UINT64_C(0);
    _Alignas(64) uint8_t half[4][16][64];
    for (int q = 0; q < 4; q++) {
        __m512i v[16], w[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int64_t row = 8 * q + i / 2 + 32 * (i & 1);
            const uint8_t *at = codes + (row < rows ? row : rows - 1) * step;
            v[i] = _mm512_maskz_loadu_epi8(have, at);
            _mm_prefetch((const char *)(at + ahead), _MM_HINT_T1);
        }
#pragma GCC unroll 2
        for (int stage = 0; stage < 2; stage++) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                w[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + 8]);
                w[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + 8]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                v[2 * i] = _mm512_unpacklo_epi8(w[i], w[i + 8]);
                v[2 * i + 1] = _mm512_unpackhi_epi8(w[i], w[i + 8]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(half[q][i], v[i]);
    }
    for (int i = 0; i < 16; i++) {
        const __m512i a = _mm512_load_si512(half[0][i]), b = _mm512_load_si512(half[1][i]);
        const __m512i c = _mm512_load_si512(half[2][i]), d = _mm512_load_si512(half[3][i]);
        const __m512i ab0 = _mm512_shuffle_i32x4(a, b, 0x44), ab1 = _mm512_shuffle_i32x4(a, b, 0xee);
        const __m512i cd0 = _mm512_shuffle_i32x4(c, d, 0x44), cd1 = _mm512_shuffle_i32x4(c, d, 0xee);
        _mm512_store_si512(to + 64 * i, _mm512_shuffle_i32x4(ab0, cd0, 0x88));
        _mm512_store_si512(to + 64 * (16 + i), _mm512_shuffle_i32x4(ab0, cd0, 0xdd));
        _mm512_store_si512(to + 64 * (32 + i), _mm512_shuffle_i32x4(ab1, cd1, 0x88));
        _mm512_store_si512(to + 64 * (48 + i), _mm512_shuffle_i32x4(ab1, cd1, 0xdd));
    }
}

/* y += scale * sum for 32 outputs, from the sums of their low and high bytes and the tables' offset. */
static inline void flush_32(float *y, __m512i low, __m512i high, __m512i offset, __m512 scale) {
    for (int h = 0; h < 2; h++) {
        const __m512i lo = _mm512_cvtepu16_epi32(h ? _mm512_extracti64x4_epi64(low, 1) : _mm512_castsi512_si256(low));
        const __m512i hi = _mm512_cvtepu16_epi32(h ? _mm512_extracti64x4_epi64(high, 1) : _mm512_castsi512_si256(high));
        const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(lo, _mm512_slli_epi32(hi, 8)), offset);
        float *to = y + 16 * h;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum), _mm512_loadu_ps(to)));
    }
}

/* `panels` (of 64 outputs) is a constant at every call site: the sums stay in registers. */
static inline void sum_panels(float *y, const uint8_t *codes, const uint8_t *tables, float scale, int64_t n,
                              const int panels) {
    __m512i low[4], low_odd[4], high[4], high_odd[4];
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) low[p] = low_odd[p] = high[p] = high_odd[p] = _mm512_setzero_si512();
    for (int64_t t = 0; t < n; t++, tables += AQLM_TABLE_BYTES) {
        __m512i T[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) T[i] = _mm512_load_si512(tables + 64 * i);
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            const __m512i c = _mm512_load_si512(codes + 4096 * p + 64 * t);
            const __mmask64 upper = _mm512_movepi8_mask(c), lower = _knot_mask64(upper);
            /* A lane outside the mask keeps its code: what the other half of the table then looks up. */
            const __m512i lo =
                _mm512_mask2_permutex2var_epi8(T[2], _mm512_mask2_permutex2var_epi8(T[0], c, lower, T[1]), upper, T[3]);
            const __m512i hi =
                _mm512_mask2_permutex2var_epi8(T[6], _mm512_mask2_permutex2var_epi8(T[4], c, lower, T[5]), upper, T[7]);
            low[p] = _mm512_add_epi16(low[p], lo); /* of pairs: the odd byte's part is taken off at the end */
            low_odd[p] = _mm512_add_epi16(low_odd[p], _mm512_srli_epi16(lo, 8));
            high[p] = _mm512_add_epi16(high[p], hi);
            high_odd[p] = _mm512_add_epi16(high_odd[p], _mm512_srli_epi16(hi, 8));
        }
    }
    const __m512i offset = _mm512_set1_epi32((int)(32768 * n));
    const __m512 s = _mm512_set1_ps(scale);
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) {
        const __m512i low_even = _mm512_sub_epi16(low[p], _mm512_slli_epi16(low_odd[p], 8));
        const __m512i high_even = _mm512_sub_epi16(high[p], _mm512_slli_epi16(high_odd[p], 8));
        flush_32(y + 64 * p, low_even, high_even, offset, s);
        flush_32(y + 64 * p + 32, low_odd[p], high_odd[p], offset, s);
    }
}

static void table_sums(float *y, int64_t ldy, const uint8_t *codes, int64_t step, int64_t ahead, const uint8_t *tables,
                       const float *scales, int64_t rows, int64_t outputs, int64_t n) {
    _Alignas(64) uint8_t transposed[AQLM_TABLE_OUTPUTS / 64 * 4096];
    const int64_t panels = (outputs + 63) / 64;
    for (int64_t p = 0; p < panels; p++)
        transpose_codes(transposed + 4096 * p, codes + 64 * p * step, step, outputs - 64 * p, n, ahead);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *T = tables + r * AQLM_TABLE_BLOCK * AQLM_TABLE_BYTES;
        if (panels == 4) sum_panels(y + r * ldy, transposed, T, scales[r], n, 4);
        else
            for (int64_t p = 0; p < panels; p++)
                sum_panels(y + r * ldy + 64 * p, transposed + 4096 * p, T, scales[r], n, 1);
    }
}
