/* i2_s.h - bitnet.cpp's type 36: 128 codes in 32 bytes, bits 7,6 = code of element b, 5,4: 32 + b, 3,2: 64 + b, 1,0: 96 + b;
 * N * K/4 bytes.
 *
 * The file appends float32 s and zeros to 32 bytes.  Why this grouping only: builds for ARM wrote 64 codes in 16 bytes
 * under the same type number, which no reader can tell apart. */
#ifndef OB_I2_S_H
#define OB_I2_S_H

#include "gguf.h"

#define OB_I2S_BLOCK 128

static ob_status
i2_s_measure(size_t n, size_t k, ob_extent *e)
{
    return gguf_measure(n, k, OB_I2S_BLOCK, OB_I2S_BLOCK / 4, e);
}

static void
i2_s_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
          uint8_t *codes)
{
    const uint8_t *at = bytes + (row * e->columns + first) / 4;
    for (; count; count -= OB_I2S_BLOCK, at += 32) {
        for (unsigned j = 0; j < 4; j++, codes += 32) {
            for (unsigned b = 0; b < 32; b++) {
                codes[b] = (at[b] >> (6 - 2 * j)) & 3;
            }
        }
    }
}

static void
i2_s_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
           const uint8_t *codes)
{
    uint8_t *at = bytes + (row * e->columns + first) / 4;
    for (; count; count -= OB_I2S_BLOCK, at += 32, codes += OB_I2S_BLOCK) {
        for (unsigned b = 0; b < 32; b++) {
            at[b] =
                (uint8_t)(codes[b] << 6 | codes[32 + b] << 4 | codes[64 + b] << 2 | codes[96 + b]);
        }
    }
}

static const ob_format ob_format__i2_s __attribute__((unused)) = {
    "i2_s",
    i2_s_measure,
    i2_s_read,
    i2_s_write,
};

#endif
