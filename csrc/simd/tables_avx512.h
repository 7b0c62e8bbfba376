/* Bodies of transpose, make_tables and table_sums in AVX-512 VBMI: a plane of a table is 4 registers, looked up 64
 * codes at a time by vpermi2b. */

/* The bytes numbered `byte` and byte + 1 of 16 + 16 numbers, in two halves. */
static inline __m512i bytes_of(int byte) {
    uint8_t index[64];
    for (int i = 0; i < 32; i++) {
        index[i] = (uint8_t)(4 * i + byte);
        index[32 + i] = (uint8_t)(4 * i + byte + 1);
    }
    return _mm512_loadu_si512(index);
}

static inline void store_two_planes(uint8_t *to, __m512i a, __m512i bytes, __m512i b) {
    const __m512i both = _mm512_permutex2var_epi8(a, bytes, b);
    _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i *)(to + AQLM_PLANE), _mm512_extracti64x4_epi64(both, 1));
}

static void make_tables(uint8_t *tables, const float *x, const float *ct, int64_t K, int64_t g, int64_t first,
                        int64_t n, aqlm_ahead ahead) {
    const __m512 magic = _mm512_set1_ps(AQLM_ROUND);
    const __m512i planes01 = bytes_of(0), planes23 = bytes_of(2);
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
                _mm_prefetch((const char *)(ahead.at + t * ahead.step + 2 * e), _MM_HINT_T1);
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
                const __m512i v0 = _mm512_castps_si512(_mm512_add_ps(a0, magic));
                const __m512i v1 = _mm512_castps_si512(_mm512_add_ps(a1, magic));
                uint8_t *to = tables + t * 3 * AQLM_PLANE + e;
                store_two_planes(to, v0, planes01, v1);
                _mm256_storeu_si256((__m256i *)(to + 2 * AQLM_PLANE),
                                    _mm512_castsi512_si256(_mm512_permutex2var_epi8(v0, planes23, v1)));
            }
        }
}

static inline __m512i load_pair(const int16_t *pair) {
    int32_t both;
    memcpy(&both, pair, sizeof both);
    return _mm512_set1_epi32(both);
}

static void make_short_tables(uint8_t *tables, const int16_t *x, const int16_t *ct, int64_t K, int64_t g, int64_t first,
                              int64_t n, aqlm_ahead ahead) {
    const __m512i start = _mm512_set1_epi32(AQLM_SHORT_START), planes = bytes_of(2);
    for (int64_t k = 0; k < K; k++)
        for (int64_t e = 0; e < 256; e += 32) {
            const int16_t *c = ct + (k * g / 2 * 256 + e) * 2;
            __m512i c0[4], c1[4];
            for (int p = 0; p < 4; p++) {
                c0[p] = 2 * p < g ? _mm512_loadu_si512(c + p * 512) : _mm512_setzero_si512();
                c1[p] = 2 * p < g ? _mm512_loadu_si512(c + p * 512 + 32) : _mm512_setzero_si512();
            }
            for (int64_t t = (k - first % K + K) % K; t < n; t += K) {
                const int16_t *group = x + (first + t) / K * g;
                _mm_prefetch((const char *)(ahead.at + t * ahead.step + 2 * e), _MM_HINT_T1);
                __m512i a0 = start, a1 = start;
                if (g == 8) {
#pragma GCC unroll 4
                    for (int p = 0; p < 4; p++) {
                        const __m512i both = load_pair(group + 2 * p);
                        a0 = _mm512_dpwssd_epi32(a0, c0[p], both);
                        a1 = _mm512_dpwssd_epi32(a1, c1[p], both);
                    }
                } else
                    for (int64_t p = 0; p < g / 2; p++) {
                        const __m512i both = load_pair(group + 2 * p);
                        a0 = _mm512_dpwssd_epi32(a0, _mm512_loadu_si512(c + p * 512), both);
                        a1 = _mm512_dpwssd_epi32(a1, _mm512_loadu_si512(c + p * 512 + 32), both);
                    }
                store_two_planes(tables + t * 2 * AQLM_PLANE + e, _mm512_add_epi32(a0, a0), planes,
                                 _mm512_add_epi32(a1, a1));
            }
        }
}

static void transpose(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t from_step, int64_t rows,
                      int64_t columns) {
    const __mmask64 have = columns < 64 ? (UINT64_C(1) << columns) - 1 : ~UINT64_C(0);
    const __mmask64 wanted = rows < 64 ? (UINT64_C(1) << rows) - 1 : ~UINT64_C(0);
    _Alignas(64) uint8_t part[4][16][64];
    for (int q = 0; q < 4; q++) {
        __m512i v[16], w[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const int64_t row = 16 * q + i;
            v[i] = _mm512_maskz_loadu_epi8(have, from + (row < rows ? row : rows - 1) * from_step);
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
        for (int i = 0; i < 16; i++) _mm512_store_si512(part[q][i], v[i]);
    }
    for (int i = 0; i < 16; i++) { /* part[q][i], lane l: rows 16 q.. of column 16 l + i */
        const __m512i a = _mm512_load_si512(part[0][i]), b = _mm512_load_si512(part[1][i]);
        const __m512i c = _mm512_load_si512(part[2][i]), d = _mm512_load_si512(part[3][i]);
        const __m512i ab0 = _mm512_shuffle_i32x4(a, b, 0x44), ab1 = _mm512_shuffle_i32x4(a, b, 0xee);
        const __m512i cd0 = _mm512_shuffle_i32x4(c, d, 0x44), cd1 = _mm512_shuffle_i32x4(c, d, 0xee);
        const __m512i column[4] = {_mm512_shuffle_i32x4(ab0, cd0, 0x88), _mm512_shuffle_i32x4(ab0, cd0, 0xdd),
                                   _mm512_shuffle_i32x4(ab1, cd1, 0x88), _mm512_shuffle_i32x4(ab1, cd1, 0xdd)};
        for (int l = 0; l < 4; l++)
            if (16 * l + i < columns) _mm512_mask_storeu_epi8(to + (16 * l + i) * to_step, wanted, column[l]);
    }
}

/* y += scale * (sum - offset) for 64 outputs, from the sums of each plane's bytes: those of even and of odd outputs. */
static inline void flush(float *y, const __m512i *even, const __m512i *odd, int32_t offset, float scale,
                         const int planes) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i sum[2];
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; parity++) {
            sum[parity] = _mm512_set1_epi32(-offset);
#pragma GCC unroll 3
            for (int p = 0; p < planes; p++) {
                const __m512i s = parity ? odd[p] : even[p];
                const __m256i part = half ? _mm512_extracti64x4_epi64(s, 1) : _mm512_castsi512_si256(s);
                sum[parity] = _mm512_add_epi32(sum[parity], _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 8 * p));
            }
        }
        for (int i = 0; i < 2; i++) {
            const __m512i natural = _mm512_permutex2var_epi32(sum[0], i ? second : first, sum[1]);
            float *to = y + 32 * half + 16 * i;
            _mm512_storeu_ps(to,
                             _mm512_fmadd_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(natural), _mm512_loadu_ps(to)));
        }
    }
}

/* Panels are of 64 outputs; `panels` and `planes` are constants at every call site: the sums stay in registers. */
static inline void sum_panels(float *y, const aqlm_codes_block *block, int64_t from, const uint8_t *tables, float scale,
                              const int panels, const int planes) {
    const uint8_t *codes = block->codes + from;
    const int64_t left = block->outputs - from - 64 * (panels - 1);
    const __mmask64 have = left < 64 ? (UINT64_C(1) << left) - 1 : ~UINT64_C(0); /* of the last panel */
    const uint8_t *next = block->ahead.at + from;
    __m512i all[4][3], odd[4][3];
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++)
#pragma GCC unroll 3
        for (int p = 0; p < planes; p++) all[i][p] = odd[i][p] = _mm512_setzero_si512();
    for (int64_t t = 0; t < block->n; t++, codes += block->step, next += block->ahead.step) {
        __m512i T[3][4];
#pragma GCC unroll 3
        for (int p = 0; p < planes; p++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, tables += 64) T[p][i] = _mm512_load_si512(tables);
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            const uint8_t *at = codes + 64 * i;
            const __m512i c = i == panels - 1 ? _mm512_maskz_loadu_epi8(have, at) : _mm512_loadu_si512(at);
            _mm_prefetch((const char *)(next + 64 * i), _MM_HINT_T1); /* tables fill the first level */
            const __mmask64 upper = _mm512_movepi8_mask(c), lower = _knot_mask64(upper);
#pragma GCC unroll 3
            for (int p = 0; p < planes; p++) {
                /* A lane outside the mask keeps its code: what the other half of the table then looks up. */
                const __m512i low = _mm512_mask2_permutex2var_epi8(T[p][0], c, lower, T[p][1]);
                const __m512i found = _mm512_mask2_permutex2var_epi8(T[p][2], low, upper, T[p][3]);
                all[i][p] = _mm512_add_epi16(all[i][p], found); /* of pairs: the odd byte's part goes at the end */
                odd[i][p] = _mm512_add_epi16(odd[i][p], _mm512_srli_epi16(found, 8));
            }
        }
    }
    const int32_t offset = aqlm_table_offset(planes) * (int32_t)block->n;
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        /* Copies: an array whose address is taken does not stay in registers. */
        __m512i even_sums[3] = {_mm512_setzero_si512()}, odd_sums[3] = {_mm512_setzero_si512()};
#pragma GCC unroll 3
        for (int p = 0; p < planes; p++) {
            even_sums[p] = _mm512_sub_epi16(all[i][p], _mm512_slli_epi16(odd[i][p], 8));
            odd_sums[p] = odd[i][p];
        }
        flush(y + 64 * i, even_sums, odd_sums, offset, scale, planes);
    }
}

static void table_sums(float *y, int64_t ldy, const aqlm_codes_block *block, const uint8_t *tables, const float *scales,
                       int64_t rows, int planes) {
    for (int64_t r = 0; r < rows; r++, y += ldy, tables += AQLM_TABLE_BLOCK * planes * AQLM_PLANE) {
        int64_t o = 0;
        if (planes == 2) {
            for (; o + 192 < block->outputs; o += 256) sum_panels(y + o, block, o, tables, scales[r], 4, 2);
            for (; o < block->outputs; o += 64) sum_panels(y + o, block, o, tables, scales[r], 1, 2);
        } else {
            for (; o + 64 < block->outputs; o += 128) sum_panels(y + o, block, o, tables, scales[r], 2, 3);
            if (o < block->outputs) sum_panels(y + o, block, o, tables, scales[r], 1, 3);
        }
    }
}
