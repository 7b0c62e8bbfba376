/* The words of kernels.h about tables of products, in AVX2. A plane of a table is 16 parts of 16 bytes, looked up by
 * vpshufb, which gives 0 where the top bit of an index is set. With x = code % 128, only parts 0 .. x / 16 of a half of
 * the plane are not 0 for the index x - 16 i; from the second on each is stored as its xor with the part before, so
 * that the xor of all that was found is the entry. */
static inline void transpose_16(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t from_step) {
    __m128i v[16], w[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = _mm_loadu_si128((const __m128i *)(from + i * from_step));
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; stage++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            w[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
            w[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
        }
        memcpy(v, w, sizeof v);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm_storeu_si128((__m128i *)(to + i * to_step), v[i]);
}

static inline void finish_plane(uint8_t *plane) {
    __m128i *part = (__m128i *)plane;
#pragma GCC unroll 16
    for (int i = 15; i > 0; i--)
        if (i != 8) _mm_storeu_si128(part + i, _mm_xor_si128(_mm_loadu_si128(part + i), _mm_loadu_si128(part + i - 1)));
}

static inline void add_products(int32_t *sums, const int16_t *x, const int16_t *c) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    const __m256i both = _mm256_set1_epi32(pair);
    for (int e = 0; e < 256; e += 8) {
        __m256i *sum = (__m256i *)(sums + e);
        const __m256i products = _mm256_madd_epi16(both, _mm256_loadu_si256((const __m256i *)(c + 2 * e)));
        _mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), products));
    }
}

static inline __m256i part_of(const uint8_t *plane, int i) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(plane + 16 * i)));
}

static inline void sum_planes(uint16_t (*sums)[AQLM_PANEL], const aqlm_codes_block *block, const uint8_t *tables,
                              int64_t table_step, const int planes) {
    const __m256i low_bits = _mm256_set1_epi8(127), next = _mm256_set1_epi8(16), zero = _mm256_setzero_si256();
    const uint8_t *codes = block->codes, *ahead = block->ahead.at;
    __m256i all[2][2] = {{zero, zero}, {zero, zero}}, odd[2][2] = {{zero, zero}, {zero, zero}}; /* vector, plane */
    for (int64_t t = 0; t < block->n; t++, codes += block->step, ahead += block->ahead.step, tables += table_step) {
        _mm_prefetch((const char *)ahead, _MM_HINT_T1); /* tables fill the first level */
        __m256i x[2], lower[2][2] = {{zero, zero}, {zero, zero}}, upper[2][2] = {{zero, zero}, {zero, zero}};
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            x[v] = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(codes + 32 * v)), low_bits);
#pragma GCC unroll 1 /* unrolled, the xors would be reordered to need more registers than there are */
        for (int i = 0; i < 8; i++) {
#pragma GCC unroll 2
            for (int p = 0; p < planes; p++) {
                const __m256i a = part_of(tables + p * AQLM_PLANE, i), b = part_of(tables + p * AQLM_PLANE, i + 8);
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++) {
                    lower[v][p] = _mm256_xor_si256(lower[v][p], _mm256_shuffle_epi8(a, x[v]));
                    upper[v][p] = _mm256_xor_si256(upper[v][p], _mm256_shuffle_epi8(b, x[v]));
                }
            }
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) x[v] = _mm256_sub_epi8(x[v], next);
        }
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const __m256i c = _mm256_loadu_si256((const __m256i *)(codes + 32 * v));
#pragma GCC unroll 2
            for (int p = 0; p < planes; p++) {
                const __m256i found = _mm256_blendv_epi8(lower[v][p], upper[v][p], c);
                all[v][p] = _mm256_add_epi16(all[v][p], found); /* of pairs: the odd byte's part goes at the end */
                odd[v][p] = _mm256_add_epi16(odd[v][p], _mm256_srli_epi16(found, 8));
            }
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < planes; p++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const __m256i o = odd[v][p], even = _mm256_sub_epi16(all[v][p], _mm256_slli_epi16(o, 8));
            const __m256i low = _mm256_unpacklo_epi16(even, o), high = _mm256_unpackhi_epi16(even, o);
            __m256i *to = (__m256i *)(sums[p] + 32 * v);
            _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
            _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
        }
}
