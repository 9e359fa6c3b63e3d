/* seq2.h - 2-bit codes in order: uint8 (N, ceil(K/4)), bits 2j, 2j+1 of byte i = code of W[n, 4i + j].
 *
 * Nothing to learn before one can read it: for other tools, and for looking at. */
#ifndef OB_SEQ2_H
#define OB_SEQ2_H

#include "format.h"

static ob_status
seq2_measure(size_t n, size_t k, ob_extent *e)
{
    return ob_extent_of_quads(n, k, 1, 4, e);
}

static void
seq2_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
          uint8_t *codes)
{
    const uint8_t *at = bytes + (row * e->columns + first) / 4;
    for (size_t i = 0; i < count / 4; i++) {
        for (unsigned j = 0; j < 4; j++) {
            codes[4 * i + j] = (at[i] >> 2 * j) & 3;
        }
    }
}

static void
seq2_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
           const uint8_t *codes)
{
    uint8_t *at = bytes + (row * e->columns + first) / 4;
    for (size_t i = 0; i < count / 4; i++) {
        const uint8_t *c = codes + 4 * i;
        at[i] = (uint8_t)(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
    }
}

static const ob_format ob_format__seq2 __attribute__((unused)) = {
    "seq2",
    seq2_measure,
    seq2_read,
    seq2_write,
};

#endif
