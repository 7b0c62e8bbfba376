/* The words of kernels.h about tables of products, in NEON: a plane of a table is 4 parts of 4 registers, looked up by
 * tbx, which leaves a lane as it is where the index is 64 or more. */
static inline void transpose_16(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t from_step) {
    uint8x16_t v[16], w[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = vld1q_u8(from + i * from_step);
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; stage++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            w[2 * i] = vzip1q_u8(v[i], v[i + 8]);
            w[2 * i + 1] = vzip2q_u8(v[i], v[i + 8]);
        }
        memcpy(v, w, sizeof v);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) vst1q_u8(to + i * to_step, v[i]);
}

static inline void finish_plane(uint8_t *plane) { (void)plane; }

static inline void add_products(int32_t *sums, const int16_t *x, const int16_t *c) {
    for (int e = 0; e < 256; e++) sums[e] += x[0] * c[2 * e] + x[1] * c[2 * e + 1];
}

static inline void sum_planes(uint16_t (*sums)[AQLM_PANEL], const aqlm_codes_block *block, const uint8_t *tables,
                              int64_t table_step, const int planes) {
    const uint8x16_t next = vdupq_n_u8(64);
    for (int p = 0; p < planes; p++) { /* one at a time: its part of a table and the sums fill the registers */
        const uint8_t *codes = block->codes, *plane = tables + p * AQLM_PLANE;
        const uint8_t *ahead = block->ahead.at;
        uint16x8_t sum[8];
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) sum[v] = vdupq_n_u16(0);
        for (int64_t t = 0; t < block->n; t++, codes += block->step, plane += table_step) {
            if (p == 0) __builtin_prefetch(ahead + t * block->ahead.step, 0, 2); /* tables fill the first level */
            uint8x16_t x[4], found[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                x[v] = vld1q_u8(codes + 16 * v);
                found[v] = vdupq_n_u8(0);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const uint8x16x4_t part = vld1q_u8_x4(plane + 64 * i);
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) {
                    found[v] = vqtbx4q_u8(found[v], part, x[v]);
                    x[v] = vsubq_u8(x[v], next);
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                sum[2 * v] = vaddw_u8(sum[2 * v], vget_low_u8(found[v]));
                sum[2 * v + 1] = vaddw_high_u8(sum[2 * v + 1], found[v]);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) vst1q_u16(sums[p] + 8 * v, sum[v]);
    }
}
