/* tq2_0.h - ggml's type 35: uint8 (N, K/256, 66), blocks of 256 codes.  Byte 32 h + b, bits 2j, 2j+1 = code of element
 * 128 h + 32 j + b; then fp16 d (see gguf.h). */
#ifndef OB_TQ2_0_H
#define OB_TQ2_0_H

#include "gguf.h"

#define OB_TQ2_BYTES 66

static ob_status
tq2_0_measure(size_t n, size_t k, ob_extent *e)
{
    return gguf_measure(n, k, OB_TQ_BLOCK, OB_TQ2_BYTES, e);
}

static void
tq2_0_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
           uint8_t *codes)
{
    const uint8_t *at = bytes + (row * e->columns + first) / OB_TQ_BLOCK * OB_TQ2_BYTES;
    for (; count; count -= OB_TQ_BLOCK, at += OB_TQ2_BYTES) {
        for (const uint8_t *half = at; half < at + 64; half += 32) {
            for (unsigned j = 0; j < 4; j++, codes += 32) {
                for (unsigned b = 0; b < 32; b++) {
                    codes[b] = (half[b] >> 2 * j) & 3;
                }
            }
        }
    }
}

static void
tq2_0_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
            const uint8_t *codes)
{
    uint8_t *at = bytes + (row * e->columns + first) / OB_TQ_BLOCK * OB_TQ2_BYTES;
    for (; count; count -= OB_TQ_BLOCK, at += OB_TQ2_BYTES) {
        for (uint8_t *half = at; half < at + 64; half += 32, codes += 128) {
            for (unsigned b = 0; b < 32; b++) {
                half[b] = (uint8_t)(codes[b] | codes[32 + b] << 2 | codes[64 + b] << 4 |
                                    codes[96 + b] << 6);
            }
        }
        gguf_write_one(at + 64);
    }
}

static const ob_format ob_format__tq2_0 __attribute__((unused)) = {
    "tq2_0",
    tq2_0_measure,
    tq2_0_read,
    tq2_0_write,
};

#endif
