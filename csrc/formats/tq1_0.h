/* tq1_0.h - ggml's type 34: uint8 (N, K/256, 54), blocks of 256 codes in base 3, five a byte, the first most significant.
 *
 *   byte b < 32: elements b + 32 j     32 + b < 48: 160 + b + 16 j     48 + b < 52: 240 + b + 4 j, four; then fp16 d
 *
 * A number v < 243 is stored as ceil(256 v / 243), so that its digits come out by multiplying.  A byte that is no such
 * image (13 of 256; of the last four, all but 81) reads as the reserved code: what is read can be written back to the
 * bit. */
#ifndef OB_TQ1_0_H
#define OB_TQ1_0_H

#include "gguf.h"

#define OB_TQ1_BYTES 54

static ob_status
tq1_0_measure(size_t n, size_t k, ob_extent *e)
{
    return gguf_measure(n, k, OB_TQ_BLOCK, OB_TQ1_BYTES, e);
}

/* `width` bytes of `digits` codes each (5, or 4 and a last digit 0); digit j of byte b is code width * j + b. */
OB_INLINE void
tq1_0_read_part(const uint8_t *at, unsigned width, unsigned digits, uint8_t *codes)
{
    for (unsigned b = 0; b < width; b++) {
        unsigned v =
            at[b] * 243u >> 8; /* the only candidate: ceil(256 v / 243) grows by more than 1 */
        unsigned image = (v * 256 + 242) / 243;
        int clean = image == at[b] && (digits == 5 || v % 3 == 0);
        unsigned rest = at[b];
        for (unsigned j = 0; j < digits; j++) {
            codes[width * j + b] = clean ? (uint8_t)(rest * 3 >> 8) : 3;
            rest = rest * 3 & 0xFF;
        }
    }
}

OB_INLINE void
tq1_0_write_part(uint8_t *at, unsigned width, unsigned digits, const uint8_t *codes)
{
    for (unsigned b = 0; b < width; b++) {
        unsigned v = 0;
        for (unsigned j = 0; j < 5; j++) {
            v = v * 3 + (j < digits ? codes[width * j + b] : 0);
        }
        at[b] = (uint8_t)((v * 256 + 242) / 243);
    }
}

static void
tq1_0_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
           uint8_t *codes)
{
    const uint8_t *at = bytes + (row * e->columns + first) / OB_TQ_BLOCK * OB_TQ1_BYTES;
    for (; count; count -= OB_TQ_BLOCK, at += OB_TQ1_BYTES, codes += OB_TQ_BLOCK) {
        tq1_0_read_part(at, 32, 5, codes);
        tq1_0_read_part(at + 32, 16, 5, codes + 160);
        tq1_0_read_part(at + 48, 4, 4, codes + 240);
    }
}

static void
tq1_0_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
            const uint8_t *codes)
{
    uint8_t *at = bytes + (row * e->columns + first) / OB_TQ_BLOCK * OB_TQ1_BYTES;
    for (; count; count -= OB_TQ_BLOCK, at += OB_TQ1_BYTES, codes += OB_TQ_BLOCK) {
        tq1_0_write_part(at, 32, 5, codes);
        tq1_0_write_part(at + 32, 16, 5, codes + 160);
        tq1_0_write_part(at + 48, 4, 4, codes + 240);
        gguf_write_one(at + 52);
    }
}

static const ob_format ob_format__tq1_0 __attribute__((unused)) = {
    "tq1_0",
    tq1_0_measure,
    tq1_0_read,
    tq1_0_write,
};

#endif
