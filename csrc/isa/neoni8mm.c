/* neoni8mm.c - NEON with 8-bit matrix multiplies (+i8mm: Neoverse V1/N2, Apple M2, Cortex-A510/X2 and later): smmla.
 *
 * Hot loop     for 32 products
 *   smmla      1 instruction: 2 rows x 2 columns x 8 entries
 *   zip        8 entries of two columns side by side: 4 for 16 smmla
 *   ldr, ld1   8 entries of two rows side by side: a register for 4 smmla
 * A tile is 8 rows x 8 columns: 16 sums of 2 x 2, 4 registers of activations, 4 of codes. */
#include "panels_neon.h"

#define OB_ISA_NAME neoni8mm
#define OB_FORWARD_ROWS 8
#define OB_INPUT_ROWS 8
#define OB_WEIGHT_ROWS 8

/* ------------------------------------------------------------------ integer tiles: rows x 8 columns */
typedef int32x4_t pair_sums[4][4]; /* pair of rows, pair of columns: (2, 2) */

OB_INLINE int8x16_t
zip_low(int8x16_t a, int8x16_t b)
{
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

OB_INLINE int8x16_t
zip_high(int8x16_t a, int8x16_t b)
{
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

/* `count` (8 or 4, then zeros) entries of a row */
OB_INLINE int8x8_t
load_entries(const int8_t *x, size_t count)
{
    uint32_t four;
    memcpy(&four, x, sizeof four);
    return count == 8 ? vld1_s8(x) : vcreate_s8(four);
}

/* sum += two groups of four entries: a and b of columns 0..3 and 4..7, and count entries of every row; the pair of a last
 * odd row is that row twice */
OB_INLINE void
add_groups(size_t rows, int8x16x2_t a, int8x16x2_t b, const int8_t *s8, size_t count, size_t ld,
           pair_sums sum)
{
    const int8x16_t w[4] = {zip_low(a.val[0], b.val[0]), zip_high(a.val[0], b.val[0]),
                            zip_low(a.val[1], b.val[1]), zip_high(a.val[1], b.val[1])};
#pragma GCC unroll 4
    for (size_t r = 0; r < rows; r += 2) {
        const int8_t *x = s8 + r * ld, *next = r + 1 < rows ? x + ld : x;
        int8x16_t pair = vcombine_s8(load_entries(x, count), load_entries(next, count));
#pragma GCC unroll 4
        for (size_t c = 0; c < 4; c++) {
            sum[r / 2][c] = vmmlaq_s32(sum[r / 2][c], pair, w[c]);
        }
    }
}

/* acc = side . s8 - offset over groups of four; offset NULL: 0 */
OB_INLINE void
matrix_tile(size_t rows, size_t groups, const uint8_t *at, size_t step_bytes,
            int8x16_t (*side)(const uint8_t *, int), const int8_t *s8, size_t ld,
            const int32_t *offset, int32_t (*acc)[OB_STRIP])
{
    pair_sums sum;
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = vdupq_n_s32(0);
    }
    for (size_t i = 0; i < groups / 4; i++, at += step_bytes, s8 += 16) {
#pragma GCC unroll 2
        for (int p = 0; p < 4; p += 2) {
            const int8x16x2_t a = {{side(at, p), side(at + 16, p)}};
            const int8x16x2_t b = {{side(at, p + 1), side(at + 16, p + 1)}};
            add_groups(rows, a, b, s8 + 4 * p, 8, ld, sum);
        }
    }
    for (size_t i = 0; i < groups % 4; i++, at += 4 * OB_GROUP, s8 += 4) { /* of tokens only */
        const int8x16x2_t a = {{side(at, 0), side(at + 16, 0)}};
        const int8x16x2_t nothing = {{vdupq_n_s8(0), vdupq_n_s8(0)}};
        add_groups(rows, a, nothing, s8, 4, ld, sum);
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; r++) {
        const int32x4_t bias = vdupq_n_s32(offset ? offset[r] : 0);
#pragma GCC unroll 2
        for (size_t c = 0; c < 4; c += 2) {
            int32x4_t even = sum[r / 2][c], odd = sum[r / 2][c + 1];
            int32x4_t four = r % 2 ? vcombine_s32(vget_high_s32(even), vget_high_s32(odd))
                                   : vcombine_s32(vget_low_s32(even), vget_low_s32(odd));
            vst1q_s32(acc[r] + 2 * c, vsubq_s32(four, bias));
        }
    }
}

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
#define TILE(r) matrix_tile(r, 4 * k_steps, q + 32 * v, 256, packed_codes, x, ldx, sum, GROUP_ACC)
    BY_ROWS(8, TILE)
#undef TILE
}

static void
dot_panel(size_t rows, size_t count, const uint8_t *panel, const int8_t *s8, size_t ld,
          const int32_t *sum, ob_acc *acc)
{
    const uint8_t *at = panel;
    size_t groups = count / 4, bytes = count * OB_GROUP;
#define TILE(r) matrix_tile(r, groups, at + v * bytes, 128, panel_bytes, s8, ld, sum, GROUP_ACC)
    BY_ROWS(8, TILE)
#undef TILE
}

static void
dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q, size_t ldq,
          const int32_t *sum, ob_acc *acc)
{
    dot_panel(rows, n_padded, panel, q, ldq, sum, acc);
}

static void
dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h, size_t ldh,
           const int32_t *sum, ob_acc *acc)
{
    (void)sum;
    dot_panel(rows, m_padded, panel, h, ldh, NULL, acc);
}

#include "../kernels/all.tmpl.h"
