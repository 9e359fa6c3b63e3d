/* format.h - what a packing must offer; formats.c does the rest (pack, unpack, convert, validate).
 *
 * A code is T + 1: 0, 1, 2 for -1, 0, 1; the 2-bit code 3 is reserved.  A packing stores a grid of `rows` x `columns`
 * codes that covers (N, K); what lies beyond N or K is padding and holds code 1.
 *
 * read and write move `count` codes of one stored row from column `first` on; first is a multiple of OB_FORMAT_CHUNK,
 * count at most that, and all of the row's rest if less.  They check nothing.  Rows i, i + q, i + 2q, i + 3q with
 * q = ceil(rows / 4) are written in this order by one thread, so a packing may keep those four in shared bytes. */
#ifndef OB_FORMAT_H
#define OB_FORMAT_H

#include "../base/check.h"
#include "../base/config.h"
#include "../onebit.h"

#define OB_FORMAT_CHUNK 1280 /* whole blocks of every packing: 256 and 20 divide it */

typedef struct ob_extent {
    size_t rows, columns; /* stored */
    size_t bytes;
} ob_extent;

typedef struct ob_format {
    const char *name;
    /* OB_INVALID: (N, K) has no such packing; OB_OVERFLOW: its size does not fit. */
    ob_status (*measure)(size_t n, size_t k, ob_extent *extent);
    void (*read)(const uint8_t *bytes, const ob_extent *extent, size_t row, size_t first,
                 size_t count, uint8_t *codes);
    void (*write)(uint8_t *bytes, const ob_extent *extent, size_t row, size_t first, size_t count,
                  const uint8_t *codes);
} ob_format;

/* Measure a packing of 4 codes per byte whose rows and columns are padded to multiples. */
OB_INLINE ob_status
ob_extent_of_quads(size_t n, size_t k, size_t row_multiple, size_t column_multiple, ob_extent *e)
{
    size_t codes;
    int fits = ob_round_up(n, row_multiple, &e->rows) &&
               ob_round_up(k, column_multiple, &e->columns) &&
               ob_mul(e->rows, e->columns, &codes) && codes <= PTRDIFF_MAX;
    e->bytes = fits ? codes / 4 : 0;
    return fits ? OB_OK : OB_OVERFLOW;
}

#endif
