/* The words of kernels.h about tables of products, in plain C. */
static inline void transpose_16(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t from_step) {
    for (int64_t r = 0; r < 16; r++)
        for (int64_t c = 0; c < 16; c++) to[c * to_step + r] = from[r * from_step + c];
}

static inline void finish_plane(uint8_t *plane) { (void)plane; }

static inline void add_products(int32_t *sums, const int16_t *x, const int16_t *c) {
    for (int e = 0; e < 256; e++) sums[e] += x[0] * c[2 * e] + x[1] * c[2 * e + 1];
}

static inline void sum_planes(uint16_t (*sums)[AQLM_PANEL], const aqlm_codes_block *block, const uint8_t *tables,
                              int64_t table_step, const int planes) {
    const uint8_t *codes = block->codes;
    memset(sums, 0, (size_t)planes * sizeof *sums);
    for (int64_t t = 0; t < block->n; t++, codes += block->step, tables += table_step)
        for (int64_t o = 0; o < AQLM_PANEL; o++)
            for (int p = 0; p < planes; p++) sums[p][o] += tables[p * AQLM_PLANE + codes[o]];
}
