/* tile16.h - the kernels' own packing: strips of 64 outputs, steps of 16 inputs, 2 bits per weight.
 *
 *   uint8 (ceil(N/64), ceil(K/16), 4, 16, 4)    byte (strip, step, v, o, kk), bit pair p = code of W[64 strip + 16 v + o,
 *                                                                                            16 step + 4 p + kk]
 *   one tile: 16 outputs o (64-byte line), 4 bytes each
 *       byte kk:   | p=3: k = 12+kk | p=2: k = 8+kk | p=1: k = 4+kk | p=0: k = kk |
 *
 * Why pairs 4 apart: one shift and one AND of a whole line give 16 outputs x 4 consecutive inputs, what one VNNI
 * instruction multiplies. */
#ifndef OB_TILE16_H
#define OB_TILE16_H

#include "format.h"

#include <string.h>

#define OB_TILE16_STRIP 64
#define OB_TILE16_STEP 16

/* The byte that holds W[n, k] and the position of its bit pair; k_steps = ceil(K/16). */
OB_INLINE size_t
ob_tile16_byte(size_t k_steps, size_t n, size_t k)
{
    return (n / 64 * k_steps + k / 16) * 256 + n % 64 * 4 + k % 4;
}

OB_INLINE unsigned
ob_tile16_shift(size_t k)
{
    return (unsigned)(k % 16 / 4 * 2);
}

static ob_status
tile16_measure(size_t n, size_t k, ob_extent *e)
{
    return ob_extent_of_quads(n, k, OB_TILE16_STRIP, OB_TILE16_STEP, e);
}

static void
tile16_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
            uint8_t *codes)
{
    const uint8_t *at = bytes + ob_tile16_byte(e->columns / 16, row, first);
    for (size_t i = 0; i < count; i += 16, at += 256) {
        uint32_t word;
        memcpy(&word, at, 4);
        for (unsigned p = 0; p < 4; p++) {
            uint32_t four = (word >> 2 * p) & 0x03030303;
            memcpy(codes + i + 4 * p, &four, 4);
        }
    }
}

static void
tile16_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
             const uint8_t *codes)
{
    uint8_t *at = bytes + ob_tile16_byte(e->columns / 16, row, first);
    for (size_t i = 0; i < count; i += 16, at += 256) {
        uint32_t word = 0, four;
        for (unsigned p = 0; p < 4; p++) {
            memcpy(&four, codes + i + 4 * p, 4);
            word |= four << 2 * p;
        }
        memcpy(at, &word, 4);
    }
}

static const ob_format ob_format__tile16 __attribute__((unused)) = {
    "tile16",
    tile16_measure,
    tile16_read,
    tile16_write,
};

#endif
