/* panels_neon.h - what the NEON files share besides the vocabulary.
 *
 * A strip is eight column groups of 8, one tile wide each, and panels keep the groups apart: a tile walks one from its
 * first byte to its last.  Both sides are signed, so no panel is offset. */
#ifndef OB_PANELS_NEON_H
#define OB_PANELS_NEON_H

#include "../kernels/kernel.h"
#include "vocabulary_neon.h"

#define OB_GROUP 8 /* columns of a group: two registers of 4 x 4 bytes */

/* Codes 0..2 of the p-th four contraction entries of a step: from the 2-bit plane, or from a panel of whole bytes. */
OB_INLINE int8x16_t
packed_codes(const uint8_t *at, int p)
{
    return vreinterpretq_s8_u8(vandq_u8(vld1q_u8(at) >> (uint8_t)(2 * p), vdupq_n_u8(3)));
}

OB_INLINE int8x16_t
panel_bytes(const uint8_t *at, int p)
{
    return vreinterpretq_s8_u8(vld1q_u8(at + 4 * OB_GROUP * p));
}

/* tile16 -> (8, N/4, 8, 4) codes 0..2: group, output / 4, column, output % 4.  A register of 4 outputs x 4 kk becomes
 * four columns of each plane. */
static void
decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip, uint8_t *panel)
{
    const uint8x16_t turn = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    size_t group_bytes = OB_CEIL_DIV(n, (size_t)16) * 16 * OB_GROUP;
    for (size_t n0 = 0; n0 < n; n0 += 16) {
        const uint8_t *q = packed + ob_tile16_byte(k_steps, n0, 64 * strip);
        for (size_t i = 0; i < 4; i++) {
            int exists = 4 * strip + i < k_steps; /* else columns beyond K: code 1, zero */
            uint8_t *out = panel + 2 * i * group_bytes + n0 * OB_GROUP;
            for (size_t g = 0; g < 4; g++, out += 4 * OB_GROUP) {
                uint8x16_t w = vdupq_n_u8(0x55);
                if (exists) {
                    w = vqtbl1q_u8(vld1q_u8(q + 256 * i + 16 * g), turn);
                }
                for (size_t p = 0; p < 4; p++) {
                    uint8x16_t codes = vandq_u8(w >> (uint8_t)(2 * p), vdupq_n_u8(3));
                    vst1q_u8(out + p / 2 * group_bytes + 16 * (p % 2), codes);
                }
            }
        }
    }
}

/* xq (M, ldx) -> (8, M/4, 8, 4) int8: fours of tokens; tokens and columns that do not exist are 0 */
static void
pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    const int8_t *x = xq + OB_STRIP * strip;
    size_t columns = OB_MIN(ldx - OB_STRIP * strip, (size_t)OB_STRIP);
    size_t group_bytes = OB_CEIL_DIV(m, (size_t)4) * 4 * OB_GROUP;
    memset(panel, 0, OB_STRIP / OB_GROUP * group_bytes);
    for (size_t j = 0; j < columns; j += OB_GROUP) {
        int8_t *out = (int8_t *)panel + j / OB_GROUP * group_bytes;
        for (size_t t = 0; t < m; t += 4, out += 4 * OB_GROUP) {
            int8x8x4_t four = {{vdup_n_s8(0), vdup_n_s8(0), vdup_n_s8(0), vdup_n_s8(0)}};
            for (size_t i = 0; i < OB_MIN(m - t, (size_t)4); i++) {
                four.val[i] = vld1_s8(x + (t + i) * ldx + j);
            }
            vst4_s8(out, four); /* interleaves */
        }
    }
}

/* A call for each of the eight column groups, and a copy per tile height so that the sums are registers. */
/* clang-format off */
#define BY_ROWS(most, call)                     \
    for (size_t v = 0; v < 8; v++)              \
        switch (rows) {                         \
        case 1: call(1); break;                 \
        case 2: call(2); break;                 \
        case 3: call(3); break;                 \
        case 4: call(4); break;                 \
        case 5: call(OB_MIN(5, most)); break;                 \
        case 6: call(OB_MIN(6, most)); break;   \
        case 7: call(OB_MIN(7, most)); break;   \
        default: call(most); break;             \
        }
/* clang-format on */
#define GROUP_ACC ((int32_t (*)[OB_STRIP])(acc[0] + OB_GROUP * v))

#endif
