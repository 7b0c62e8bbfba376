/* gemm.c: one packed, single-threaded matrix product on top of the ISA's tile. Callers cut the rows. */
#include "core/runtime/gemm.h"
#include "core/runtime/isa.h"
#include "core/runtime/memory.h"

enum { DEPTH = 256, WIDTH = 512, MOST_TILE = 64 }; /* a packed b block is 512 KB, a packed a panel 12 KB */

int64_t aqlm_gemm_workspace(void) { return DEPTH * (WIDTH + MOST_TILE) + DEPTH * MOST_TILE + MOST_TILE * MOST_TILE; }

/* panels[n / width][k][width] of x(p, j), zero beyond n */
static void pack(float *to, const float *x, int64_t k_step, int64_t n_step, int64_t k, int64_t n, int64_t width) {
    for (int64_t j = 0; j < n; j += width, to += k * width) {
        const int64_t have = aqlm_min(width, n - j);
        if (n_step == 1) {
            for (int64_t p = 0; p < k; p++) {
                memcpy(to + p * width, x + p * k_step + j, (size_t)have * sizeof *to);
                memset(to + p * width + have, 0, (size_t)(width - have) * sizeof *to);
            }
        } else {
            if (have < width) memset(to, 0, (size_t)(k * width) * sizeof *to);
            for (int64_t i = 0; i < have; i++) {
                const float *from = x + (j + i) * n_step;
                for (int64_t p = 0; p < k; p++) to[p * width + i] = from[p * k_step];
            }
        }
    }
}

void aqlm_gemm(float *c, int64_t ldc, aqlm_operand a, aqlm_operand b, int64_t m, int64_t n, int64_t k,
               float *workspace) {
    const aqlm_kernels *isa = aqlm_isa();
    const int64_t rows = isa->tile_rows, cols = isa->tile_cols;
    float *packed_b = workspace, *packed_a = packed_b + DEPTH * (WIDTH + MOST_TILE);
    float *edge = packed_a + DEPTH * MOST_TILE;
    for (int64_t i = 0; i < m; i++) memset(c + i * ldc, 0, (size_t)n * sizeof *c);
    for (int64_t j0 = 0; j0 < n; j0 += WIDTH) {
        const int64_t width = aqlm_min(WIDTH, n - j0);
        for (int64_t p0 = 0; p0 < k; p0 += DEPTH) {
            const int64_t depth = aqlm_min(DEPTH, k - p0);
            pack(packed_b, b.at + p0 * b.row_step + j0 * b.col_step, b.row_step, b.col_step, depth, width, cols);
            for (int64_t i = 0; i < m; i += rows) {
                const int64_t have_rows = aqlm_min(rows, m - i);
                pack(packed_a, a.at + i * a.row_step + p0 * a.col_step, a.col_step, a.row_step, depth, have_rows, rows);
                for (int64_t j = 0; j < width; j += cols) {
                    const int64_t have_cols = aqlm_min(cols, width - j);
                    float *to = c + i * ldc + j0 + j;
                    const float *panel = packed_b + j * depth;
                    if (have_rows == rows && have_cols == cols) {
                        isa->gemm_tile(to, ldc, packed_a, panel, depth);
                        continue;
                    }
                    for (int64_t r = 0; r < have_rows; r++)
                        memcpy(edge + r * cols, to + r * ldc, (size_t)have_cols * sizeof *c);
                    isa->gemm_tile(edge, cols, packed_a, panel, depth);
                    for (int64_t r = 0; r < have_rows; r++)
                        memcpy(to + r * ldc, edge + r * cols, (size_t)have_cols * sizeof *c);
                }
            }
        }
    }
}
