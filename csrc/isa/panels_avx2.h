/* panels_avx2.h - what the 256-bit files share besides the vocabulary.
 *
 * A strip is four column groups of 16, one tile wide each, and panels keep the groups apart: a tile walks one from its
 * first byte to its last. */
#ifndef OB_PANELS_AVX2_H
#define OB_PANELS_AVX2_H

#include "../kernels/kernel.h"
#include "vocabulary_avx2.h"

#define OB_GROUP 16 /* columns of a group: two registers of 8 x 4 bytes */

OB_INLINE __m256i
broadcast4(const void *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

/* tile16 -> (4, N/4, 16, 4) codes 0..2: group, output / 4, column, output % 4.  16 bytes (4 outputs x 4 kk, four planes) become 64 contiguous ones */
static void
decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip, uint8_t *panel)
{
    const __m128i three = _mm_set1_epi8(3);
    const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    size_t group_bytes = OB_CEIL_DIV(n, (size_t)16) * 16 * OB_GROUP;
    for (size_t n0 = 0; n0 < n; n0 += 16) {
        const uint8_t *q = packed + ob_tile16_byte(k_steps, n0, 64 * strip);
        for (size_t i = 0; i < 4; i++) {
            int exists = 4 * strip + i < k_steps; /* else columns beyond K: code 1, zero */
            __m128i *out = (void *)(panel + i * group_bytes + n0 * OB_GROUP);
            for (size_t g = 0; g < 4; g++, out += 4) {
                __m128i w = _mm_set1_epi8(0x55);
                if (exists) {
                    w = _mm_shuffle_epi8(LOAD128(q + 256 * i + 16 * g), turn);
                }
                for (int p = 0; p < 4; p++) {
                    _mm_storeu_si128(out + p, _mm_and_si128(_mm_srli_epi16(w, 2 * p), three));
                }
            }
        }
    }
}

/* A call for each of the four column groups, and a copy per tile height so that the sums are registers. */
/* clang-format off */
#define BY_ROWS(most, call)             \
    for (size_t v = 0; v < 4; v++)      \
        switch (rows) {                 \
        case 1: call(1); break;         \
        case 2: call(2); break;         \
        case 3: call(3); break;         \
        case 4: call(4); break;         \
        case 5: call(5); break;         \
        default: call(most); break;     \
        }
/* clang-format on */
#define GROUP_ACC ((int32_t (*)[OB_STRIP])(acc[0] + OB_GROUP * v))

#endif
