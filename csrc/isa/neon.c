/* neon.c - the NEON of every AArch64 processor: widening multiplies into int16, pairwise sums into int32.
 *
 * Hot loops                              for 16 products
 *   smlal, smlal2   codes 0..2 x int8    2 instructions; 128 products of at most 254 fit int16, then one saddlp widens
 *   smull, smlal    int8 x int8 (dW)     2; two products of 127 * 127 fit int16
 *   sadalp          int16 pairs          1, dW only
 * A tile is rows x 8 columns in four 128-bit sums a row.  Why not sdot: neondot.c. */
#include "panels_neon.h"

#define OB_ISA_NAME neon
#define OB_FORWARD_ROWS 6 /* 24 sums, two codes, one broadcast, the mask: 28 of 32 registers */
#define OB_INPUT_ROWS 6
#define OB_WEIGHT_ROWS 5 /* 20 sums, four of x, two broadcasts, products */

#define STEPS_INT16 32 /* k-steps of 4 products whose sum fits int16: 128 * 254 = 32512 */

/* ------------------------------------------------------------------ integer tiles: rows x 8 columns */
OB_INLINE int8x16_t
broadcast4(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

OB_INLINE void
code_tile(size_t rows, size_t steps, const uint8_t *at, size_t step_bytes,
          int8x16_t (*codes)(const uint8_t *, int), const int8_t *s8, size_t ld,
          const int32_t *offset, int32_t (*acc)[OB_STRIP])
{
    for (size_t r = 0; r < rows; r++) {
        vst1q_s32(acc[r], vdupq_n_s32(-offset[r]));
        vst1q_s32(acc[r] + 4, vdupq_n_s32(-offset[r]));
    }
    for (size_t done = 0; done < steps; done += STEPS_INT16) {
        int16x8_t sum[6][4];
#pragma GCC unroll 6
        for (size_t r = 0; r < rows; r++) {
            sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = vdupq_n_s16(0);
        }
        for (size_t left = OB_MIN(steps - done, (size_t)STEPS_INT16); left; left--) {
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                const int8x16_t w0 = codes(at, p), w1 = codes(at + 16, p);
#pragma GCC unroll 6
                for (size_t r = 0; r < rows; r++) {
                    int8x16_t b = broadcast4(s8 + r * ld + 4 * p);
                    sum[r][0] = vmlal_s8(sum[r][0], vget_low_s8(w0), vget_low_s8(b));
                    sum[r][1] = vmlal_high_s8(sum[r][1], w0, b);
                    sum[r][2] = vmlal_s8(sum[r][2], vget_low_s8(w1), vget_low_s8(b));
                    sum[r][3] = vmlal_high_s8(sum[r][3], w1, b);
                }
            }
            at += step_bytes, s8 += 16;
        }
#pragma GCC unroll 6
        for (size_t r = 0; r < rows; r++) {
            int32x4_t low = vpaddq_s32(vpaddlq_s16(sum[r][0]), vpaddlq_s16(sum[r][1]));
            int32x4_t high = vpaddq_s32(vpaddlq_s16(sum[r][2]), vpaddlq_s16(sum[r][3]));
            vst1q_s32(acc[r], vaddq_s32(vld1q_s32(acc[r]), low));
            vst1q_s32(acc[r] + 4, vaddq_s32(vld1q_s32(acc[r] + 4), high));
        }
    }
}

/* sum += x0 . h0 + x1 . h1, two groups of four tokens */
OB_INLINE void
two_groups(size_t rows, const int8_t *x0, const int8_t *x1, const int8_t *h0, const int8_t *h1,
           size_t ld, int32x4_t (*sum)[4])
{
    const int8x16_t a0 = vld1q_s8(x0), a1 = vld1q_s8(x1);
    const int8x16_t c0 = vld1q_s8(x0 + 16), c1 = vld1q_s8(x1 + 16);
#pragma GCC unroll 5
    for (size_t r = 0; r < rows; r++) {
        int8x16_t b0 = broadcast4(h0 + r * ld), b1 = broadcast4(h1 + r * ld);
        int8x8_t low0 = vget_low_s8(b0), low1 = vget_low_s8(b1);
        int16x8_t t0 = vmlal_s8(vmull_s8(vget_low_s8(a0), low0), vget_low_s8(a1), low1);
        int16x8_t t1 = vmlal_high_s8(vmull_high_s8(a0, b0), a1, b1);
        int16x8_t t2 = vmlal_s8(vmull_s8(vget_low_s8(c0), low0), vget_low_s8(c1), low1);
        int16x8_t t3 = vmlal_high_s8(vmull_high_s8(c0, b0), c1, b1);
        sum[r][0] = vpadalq_s16(sum[r][0], t0);
        sum[r][1] = vpadalq_s16(sum[r][1], t1);
        sum[r][2] = vpadalq_s16(sum[r][2], t2);
        sum[r][3] = vpadalq_s16(sum[r][3], t3);
    }
}

OB_INLINE void
weight_tile(size_t rows, size_t groups, const uint8_t *panel, const int8_t *h, size_t ld,
            int32_t (*acc)[OB_STRIP])
{
    static const int8_t nothing[4 * OB_GROUP];
    const int8_t *x = (const int8_t *)panel;
    int32x4_t sum[5][4];
#pragma GCC unroll 5
    for (size_t r = 0; r < rows; r++) {
        sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = vdupq_n_s32(0);
    }
    for (size_t i = 0; i < groups / 2; i++, x += 8 * OB_GROUP, h += 8) {
        two_groups(rows, x, x + 4 * OB_GROUP, h, h + 4, ld, sum);
    }
    if (groups % 2) {
        two_groups(rows, x, nothing, h, h, ld, sum);
    }
#pragma GCC unroll 5
    for (size_t r = 0; r < rows; r++) {
        vst1q_s32(acc[r], vpaddq_s32(sum[r][0], sum[r][1]));
        vst1q_s32(acc[r] + 4, vpaddq_s32(sum[r][2], sum[r][3]));
    }
}

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
#define TILE(r) code_tile(r, k_steps, q + 32 * v, 256, packed_codes, x, ldx, sum, GROUP_ACC)
    BY_ROWS(6, TILE)
#undef TILE
}

static void
dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q, size_t ldq,
          const int32_t *sum, ob_acc *acc)
{
    const uint8_t *at = panel;
    size_t steps = n_padded / 16, bytes = n_padded * OB_GROUP;
#define TILE(r) code_tile(r, steps, at + v * bytes, 128, panel_bytes, q, ldq, sum, GROUP_ACC)
    BY_ROWS(6, TILE)
#undef TILE
}

static void
dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h, size_t ldh,
           const int32_t *sum, ob_acc *acc)
{
    (void)sum;
#define TILE(r) weight_tile(r, m_padded / 4, panel + v * m_padded * OB_GROUP, h, ldh, GROUP_ACC)
    BY_ROWS(5, TILE)
#undef TILE
}

#include "../kernels/all.tmpl.h"
