/* trits5.h - five codes a byte, 1.6 bits per weight: strips of 64 outputs, steps of 20 inputs, for reading weights from DRAM.
 *
 *   uint8 (ceil(N/64), ceil(K/20), 4, 16, 4)    byte (strip, step, v, o, kk) = codes c_0 .. c_4 of W[64 strip + 16 v + o,
 *                                                                                             20 step + 4 j + kk]
 *   byte = 64 c_4 + r            r = c_0 + 3 c_1 + 9 c_2 + 27 c_3 < 64
 *          192 + 17 c_4 + r - 64 otherwise                               243 .. 255: reserved
 *
 * Why not plain base 3: below 192 the low 6 bits look up four codes in one register of 64 bytes, and c_4 is in place as two
 * bits; the 51 bytes beyond need the same look-up in another.  Lines of 16 outputs x 4 inputs as in tile16.h. */
#ifndef OB_TRITS5_H
#define OB_TRITS5_H

#include "format.h"

#define OB_TRITS5_STEP 20
#define OB_TRITS5_FAR 192u   /* the first byte of an r of 64 .. 80 */
#define OB_TRITS5_FAR_R 17u  /* their number */
#define OB_TRITS5_BYTES 243u /* bytes with a meaning: 3 ** 5 */

OB_INLINE size_t
ob_trits5_steps(size_t k)
{
    return OB_CEIL_DIV(k, OB_TRITS5_STEP);
}

/* The byte that holds W[n, k]; steps = ceil(K/20). */
OB_INLINE size_t
ob_trits5_byte(size_t steps, size_t n, size_t k)
{
    return (n / 64 * steps + k / OB_TRITS5_STEP) * 256 + n % 64 * 4 + k % 4;
}

/* Byte -> r and c_4 */
OB_INLINE uint8_t
ob_trits5_split(uint8_t byte, uint8_t *last)
{
    uint8_t low = byte & 63, far = byte >= OB_TRITS5_FAR;
    uint8_t part = (uint8_t)((low >= OB_TRITS5_FAR_R) + (low >= 2 * OB_TRITS5_FAR_R));
    *last = far ? part : byte >> 6;
    return far ? (uint8_t)(64 + low - OB_TRITS5_FAR_R * part) : low;
}

static ob_status
trits5_measure(size_t n, size_t k, ob_extent *e)
{
    size_t codes;
    int fits = ob_round_up(n, 64, &e->rows) && ob_round_up(k, OB_TRITS5_STEP, &e->columns) &&
               ob_mul(e->rows, e->columns, &codes) && codes <= PTRDIFF_MAX;
    e->bytes = fits ? codes / 5 : 0;
    return fits ? OB_OK : OB_OVERFLOW;
}

static void
trits5_read(const uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
            uint8_t *codes)
{
    const uint8_t *at = bytes + ob_trits5_byte(e->columns / OB_TRITS5_STEP, row, first);
    for (size_t i = 0; i < count; i += OB_TRITS5_STEP, at += 256) {
        for (size_t kk = 0; kk < 4; kk++) {
            uint8_t r = ob_trits5_split(at[kk], &codes[i + 16 + kk]);
            for (size_t j = 0; j < 4; j++, r /= 3) {
                codes[i + 4 * j + kk] = r % 3;
            }
            if (at[kk] >= OB_TRITS5_BYTES) {
                codes[i + kk] = 3;
            }
        }
    }
}

static void
trits5_write(uint8_t *bytes, const ob_extent *e, size_t row, size_t first, size_t count,
             const uint8_t *codes)
{
    uint8_t *at = bytes + ob_trits5_byte(e->columns / OB_TRITS5_STEP, row, first);
    for (size_t i = 0; i < count; i += OB_TRITS5_STEP, at += 256) {
        for (size_t kk = 0; kk < 4; kk++) {
            const uint8_t *c = codes + i + kk;
            unsigned r = c[0] + 3u * c[4] + 9u * c[8] + 27u * c[12];
            unsigned near = 64u * c[16] + r,
                     far = OB_TRITS5_FAR + OB_TRITS5_FAR_R * c[16] + (r - 64);
            at[kk] = (uint8_t)(r < 64 ? near : far);
        }
    }
}

static const ob_format ob_format__trits5 __attribute__((unused)) = {
    "trits5",
    trits5_measure,
    trits5_read,
    trits5_write,
};

#endif
