/* rows4.h - the packing of transformers' BitNet checkpoints: uint8 (N/4, K), bits 2i, 2i+1 of byte (r, k) = code of
 * W[i * N/4 + r, k]: four blocks of rows share a byte.
 *
 * Needs N % 4 == 0: transformers pads the codes of missing rows with 0, which reads as -1. */
#ifndef OB_ROWS4_H
#define OB_ROWS4_H

#include "format.h"

static ob_status
rows4_measure(size_t n, size_t k, ob_extent *e)
{
    return n % 4 ? OB_INVALID : ob_extent_of_quads(n, k, 4, 1, e);
}

static void
rows4_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
           uint8_t *codes)
{
    size_t block = e->rows / 4;
    unsigned shift = (unsigned)(row / block * 2);
    const uint8_t *at = bytes + row % block * e->columns + first;
    for (size_t i = 0; i < count; i++) {
        codes[i] = (at[i] >> shift) & 3;
    }
}

static void
rows4_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
            const uint8_t *codes)
{
    size_t block = e->rows / 4;
    unsigned shift = (unsigned)(row / block * 2);
    uint8_t *at = bytes + row % block * e->columns + first;
    uint8_t keep = shift ? 0xFF : 0; /* the first block to be written clears what was there */
    for (size_t i = 0; i < count; i++) {
        at[i] = (uint8_t)((at[i] & keep) | codes[i] << shift);
    }
}

static const ob_format ob_format__rows4 __attribute__((unused)) = {
    "rows4",
    rows4_measure,
    rows4_read,
    rows4_write,
};

#endif
