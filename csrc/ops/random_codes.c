/* random_codes.c - starting codes of a layer that nothing has trained yet. */
#include "../base/rng.h"
#include "../formats/tile16.h"
#include "../onebit.h"

#include <string.h>

/* packed tile16 (N,K): -1, 0, +1 with equal shares, stream INIT at row n, column k */
void
ob_random_codes(size_t n, size_t k, uint64_t seed, uint8_t *packed)
{
    const size_t strips = OB_CEIL_DIV(n, 64), steps = OB_CEIL_DIV(k, 16);
    const uint64_t key = ob_rng_key(seed, 0, 0, 0, OB_STREAM_INIT);
    memset(packed, 0x55, strips * steps * 256); /* code 1 = zero, the padding included */
    for (size_t row = 0; row < n; row++) {
        const ob_rng_row rng = ob_rng_at_row(key, row);
        for (size_t column = 0; column < k; column++) {
            const uint64_t draw = ob_rng_draw(rng, (uint32_t)column);
            const unsigned code = (unsigned)(draw * 3 >> 32); /* 0, 1 or 2 */
            const unsigned shift = ob_tile16_shift(column);
            uint8_t *byte = &packed[ob_tile16_byte(steps, row, column)];
            *byte = (uint8_t)((*byte & ~(3u << shift)) | code << shift);
        }
    }
}
