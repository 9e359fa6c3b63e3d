/* gguf.h - what the ternary block types of GGUF files share: tq2_0 and tq1_0 (ggml), i2_s (bitnet.cpp).
 *
 * The packings are the codes.  A scale d inside a block is written as 1, so that the bytes are a whole tensor of T, and
 * never read: who makes a file of W = s T sets it.
 *
 * Why rows of whole blocks only: ggml has no padding; K not a multiple of the block is not representable. */
#ifndef OB_GGUF_H
#define OB_GGUF_H

#include "format.h"

#define OB_TQ_BLOCK 256

OB_INLINE ob_status
gguf_measure(size_t n, size_t k, size_t block, size_t block_bytes, ob_extent *e)
{
    size_t blocks;
    *e = (ob_extent){.rows = n, .columns = k};
    if (k % block) {
        return OB_INVALID;
    }
    int fits = ob_mul(n, k / block, &blocks) && ob_mul(blocks, block_bytes, &e->bytes);
    return fits && e->bytes <= PTRDIFF_MAX / 4 ? OB_OK : OB_OVERFLOW;
}

OB_INLINE void
gguf_write_one(uint8_t *d) /* fp16 1.0, little endian */
{
    d[0] = 0x00;
    d[1] = 0x3C;
}

#endif
