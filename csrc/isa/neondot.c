/* neondot.c - NEON with dot products (Armv8.2 +dotprod: Cortex-A55/A76, Neoverse, Apple): sdot by element.
 *
 * Hot loop           for 16 products
 *   sdot by element  1 instruction; four activations are one element of a register that holds 16: no broadcasts
 *   ushr, and        decode 16 codes: 12 of them for 64 sdot at 8 rows
 * A tile is 8 rows x 8 columns: 16 sums, 8 registers of activations, two of codes, the mask; the higher a tile, the less
 * decoding, so 8 x 8 and not 6 x 16 (whose sums and activations leave two registers). */
#include "panels_neon.h"

#define OB_ISA_NAME neondot
#define OB_FORWARD_ROWS 8
#define OB_INPUT_ROWS 8
#define OB_WEIGHT_ROWS 8

/* ------------------------------------------------------------------ integer tiles: rows x 8 columns */

/* sum += side . x, the p-th four of the 16 contraction entries in each row's register */
#define ADD_PLANE(p)                                              \
    do {                                                          \
        const int8x16_t w0 = side(at, p), w1 = side(at + 16, p);  \
        _Pragma("GCC unroll 8") for (size_t r = 0; r < rows; r++) \
        {                                                         \
            sum[r][0] = vdotq_laneq_s32(sum[r][0], w0, x[r], p);  \
            sum[r][1] = vdotq_laneq_s32(sum[r][1], w1, x[r], p);  \
        }                                                         \
    } while (0)

/* acc = side . s8 - offset over groups of four; offset NULL: 0 */
OB_INLINE void
dot_tile(size_t rows, size_t groups, const uint8_t *at, size_t step_bytes,
         int8x16_t (*side)(const uint8_t *, int), const int8_t *s8, size_t ld,
         const int32_t *offset, int32_t (*acc)[OB_STRIP])
{
    int32x4_t sum[8][2];
    int8x16_t x[8];
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; r++) {
        sum[r][0] = sum[r][1] = vdupq_n_s32(offset ? -offset[r] : 0);
    }
    for (size_t i = 0; i < groups / 4; i++, at += step_bytes, s8 += 16) {
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) {
            x[r] = vld1q_s8(s8 + r * ld);
        }
        ADD_PLANE(0);
        ADD_PLANE(1);
        ADD_PLANE(2);
        ADD_PLANE(3);
    }
    for (size_t i = 0; i < groups % 4; i++, at += 4 * OB_GROUP, s8 += 4) { /* of tokens only */
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, s8 + r * ld, sizeof four);
            x[r] = vreinterpretq_s8_s32(vdupq_n_s32(four));
        }
        ADD_PLANE(0);
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; r++) {
        vst1q_s32(acc[r], sum[r][0]);
        vst1q_s32(acc[r] + 4, sum[r][1]);
    }
}

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
#define TILE(r) dot_tile(r, 4 * k_steps, q + 32 * v, 256, packed_codes, x, ldx, sum, GROUP_ACC)
    BY_ROWS(8, TILE)
#undef TILE
}

static void
dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q, size_t ldq,
          const int32_t *sum, ob_acc *acc)
{
    const uint8_t *at = panel;
    size_t groups = n_padded / 4, bytes = n_padded * OB_GROUP;
#define TILE(r) dot_tile(r, groups, at + v * bytes, 128, panel_bytes, q, ldq, sum, GROUP_ACC)
    BY_ROWS(8, TILE)
#undef TILE
}

static void
dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h, size_t ldh,
           const int32_t *sum, ob_acc *acc)
{
    const uint8_t *at = panel;
    size_t groups = m_padded / 4, bytes = m_padded * OB_GROUP;
    (void)sum;
#define TILE(r) dot_tile(r, groups, at + v * bytes, 128, panel_bytes, h, ldh, NULL, GROUP_ACC)
    BY_ROWS(8, TILE)
#undef TILE
}

#include "../kernels/all.tmpl.h"
