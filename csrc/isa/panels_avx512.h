/* panels_avx512.h - the panels of the 512-bit files: groups of four along the contraction, 64 columns, bytes.
 * Unsigned, for vpdpbusd: codes 0..2 and x + 128; with OB_SIGNED_PANELS 1, defined before this, -1..1 and x. */
#ifndef OB_PANELS_AVX512_H
#define OB_PANELS_AVX512_H

#include <immintrin.h>

#include "../kernels/kernel.h"

#ifndef OB_SIGNED_PANELS
#define OB_SIGNED_PANELS 0
#endif

OB_INLINE __m512i
panel_codes(__m512i packed, int p)
{
    __m512i codes =
        _mm512_and_si512(_mm512_srli_epi16(packed, (uint8_t)(2 * p)), _mm512_set1_epi8(3));
    return OB_SIGNED_PANELS ? _mm512_sub_epi8(codes, _mm512_set1_epi8(1)) : codes;
}

/* One strip of tile16 -> (K/4, 64, 4) */
static void
decode_forward_panel(size_t k_steps, const uint8_t *q, uint8_t *panel)
{
    for (size_t i = 0; i < k_steps; i++, q += 256, panel += 1024) {
        for (size_t v = 0; v < 4; v++) {
            __m512i w = _mm512_loadu_si512(q + 64 * v);
            _mm_prefetch((const char *)q + 4096 + 64 * v, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                _mm512_storeu_si512(panel + 256 * p + 64 * v, panel_codes(w, p));
            }
        }
    }
}

/* tile16 -> (N/4, 64, 4): byte j of a group is output 4g + j. One in-lane 4 x 4 byte transpose, then lanes of 4 planes. */
static void
decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip, uint8_t *panel)
{
    const __m512i turn =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    size_t steps = OB_MIN(k_steps - 4 * strip, (size_t)4);
    for (size_t n0 = 0; n0 < n; n0 += 16) {
        const uint8_t *q = packed + ob_tile16_byte(k_steps, n0, 64 * strip);
        for (size_t i = 0; i < steps; i++) {
            uint8_t *out = panel + n0 * 64 + 64 * i;
            __m512i w = _mm512_shuffle_epi8(_mm512_loadu_si512(q + 256 * i), turn), plane[4];
            for (int p = 0; p < 4; p++) {
                plane[p] = panel_codes(w, p);
            }
            __m512i ab0 = _mm512_shuffle_i32x4(plane[0], plane[1], 0x44),
                    ab1 = _mm512_shuffle_i32x4(plane[0], plane[1], 0xEE);
            __m512i cd0 = _mm512_shuffle_i32x4(plane[2], plane[3], 0x44),
                    cd1 = _mm512_shuffle_i32x4(plane[2], plane[3], 0xEE);
            _mm512_storeu_si512(out, _mm512_shuffle_i32x4(ab0, cd0, 0x88));
            _mm512_storeu_si512(out + 256, _mm512_shuffle_i32x4(ab0, cd0, 0xDD));
            _mm512_storeu_si512(out + 512, _mm512_shuffle_i32x4(ab1, cd1, 0x88));
            _mm512_storeu_si512(out + 768, _mm512_shuffle_i32x4(ab1, cd1, 0xDD));
        }
        for (size_t i = steps; i < 4; i++) { /* columns beyond K */
            for (size_t g = 0; g < 4; g++) {
                _mm512_storeu_si512(panel + n0 * 64 + 64 * i + 256 * g,
                                    _mm512_set1_epi8(OB_SIGNED_PANELS ? 0 : 1));
            }
        }
    }
}

/* xq (M, ldx) -> (M/4, 64, 4) of x + 128 or x; tokens and columns that do not exist are zero */
static void
pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    const __m512i flip = _mm512_set1_epi8(OB_SIGNED_PANELS ? 0 : (char)0x80);
    size_t columns = OB_MIN(ldx - 64 * strip, (size_t)64);
    __mmask64 mask = columns == 64 ? ~(__mmask64)0 : (((__mmask64)1 << columns) - 1);
    for (size_t t = 0; t < m; t += 4, panel += 256) {
        __m512i r[4];
        for (size_t i = 0; i < 4; i++) {
            _mm_prefetch((const char *)xq + (t + i + 32) * ldx + 64 * strip, _MM_HINT_T0);
            r[i] = t + i < m ? _mm512_maskz_loadu_epi8(mask, xq + (t + i) * ldx + 64 * strip)
                             : _mm512_setzero_si512();
        }
        __m512i a0 = _mm512_unpacklo_epi8(r[0], r[1]), a1 = _mm512_unpackhi_epi8(r[0], r[1]);
        __m512i b0 = _mm512_unpacklo_epi8(r[2], r[3]), b1 = _mm512_unpackhi_epi8(r[2], r[3]);
        __m512i c0 = _mm512_unpacklo_epi16(a0, b0), c1 = _mm512_unpackhi_epi16(a0, b0);
        __m512i c2 = _mm512_unpacklo_epi16(a1, b1), c3 = _mm512_unpackhi_epi16(a1, b1);
        __m512i d0 = _mm512_shuffle_i32x4(c0, c1, 0x44), d1 = _mm512_shuffle_i32x4(c0, c1, 0xEE);
        __m512i e0 = _mm512_shuffle_i32x4(c2, c3, 0x44), e1 = _mm512_shuffle_i32x4(c2, c3, 0xEE);
        _mm512_storeu_si512(panel, _mm512_xor_si512(flip, _mm512_shuffle_i32x4(d0, e0, 0x88)));
        _mm512_storeu_si512(panel + 64, _mm512_xor_si512(flip, _mm512_shuffle_i32x4(d0, e0, 0xDD)));
        _mm512_storeu_si512(panel + 128,
                            _mm512_xor_si512(flip, _mm512_shuffle_i32x4(d1, e1, 0x88)));
        _mm512_storeu_si512(panel + 192,
                            _mm512_xor_si512(flip, _mm512_shuffle_i32x4(d1, e1, 0xDD)));
    }
}

#endif
