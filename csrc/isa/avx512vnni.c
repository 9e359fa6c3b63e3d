/* avx512vnni.c - AVX-512 with VNNI: 512-bit vpdpbusd, 24 accumulators of 16 outputs (6 rows x 64 columns).
 *
 * Hot loop           per 64 bytes                ports (Zen 5 / Golden Cove)
 *   vpdpbusd zmm     64 u8 x s8 products         2 / 1 per cycle     the limit
 *   vpsrlw, vpandd   decode 64 codes             left free by VNNI / its own ports: many tokens share a panel
 *   broadcast load   4 activations               folded into vpdpbusd's memory operand where it pays
 * Codes 0..2 are the unsigned operand; minus the sum of the activations makes them -1..1, exactly. */
#include "../kernels/kernel.h"
#include "dot_avx512vnni.h"
#include "vocabulary_avx512.h"

#define OB_ISA_NAME avx512vnni
#define OB_FORWARD_ROWS 6
#define OB_INPUT_ROWS 6
#define OB_WEIGHT_ROWS 6
#define OB_FORWARD_PANEL decode_forward_panel

/* ------------------------------------------------------------------ integer tiles */
OB_INLINE void
finish_tile(size_t rows, __m512i sum[][4], const int32_t *offset, int32_t factor, ob_acc *acc)
{
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++) {
        __m512i bias = _mm512_set1_epi32((int32_t)((uint32_t)offset[r] * (uint32_t)factor));
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++) {
            vi_store(acc[r] + 16 * v, _mm512_sub_epi32(sum[r][v], bias));
        }
    }
}

/* rows x 64 outputs, codes decoded on the fly */
OB_INLINE void
forward_tile(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
             const int32_t *offset, ob_acc *acc)
{
    const __m512i three = _mm512_set1_epi8(3);
    __m512i sum[6][4];
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++) {
            sum[r][v] = _mm512_setzero_si512();
        }
    for (size_t i = 0; i < k_steps; i++, q += 256, x += 16) {
        for (size_t line = 0; line < 4; line++) {
            _mm_prefetch((const char *)q + 2048 + 64 * line, _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            __m512i w[4];
#pragma GCC unroll 4
            for (size_t v = 0; v < 4; v++) {
                w[v] = _mm512_and_si512(
                    _mm512_srli_epi16(_mm512_loadu_si512(q + 64 * v), (uint8_t)(2 * p)), three);
            }
#pragma GCC unroll 6
            for (size_t r = 0; r < rows; r++) {
                __m512i b = broadcast4(x + r * ldx + 4 * p);
#pragma GCC unroll 4
                for (size_t v = 0; v < 4; v++) {
                    sum[r][v] = dot4(sum[r][v], w[v], b);
                }
            }
        }
    }
    finish_tile(rows, sum, offset, 1, acc);
}

/* One token: no shifts. Masked codes are 4^p times the code; one accumulator per p, divided exactly at the end. */
static void
forward_vector(size_t k_steps, const uint8_t *q, const int8_t *x, const int32_t *offset,
               ob_acc *acc)
{
    const __m512i mask[4] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                             _mm512_set1_epi8((char)192)};
    __m512i sum[4][4];
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++)
#pragma GCC unroll 4
        for (size_t p = 0; p < 4; p++) {
            sum[v][p] = _mm512_setzero_si512();
        }
    for (size_t i = 0; i < k_steps; i++, q += 256, x += 16) {
        for (size_t line = 0; line < 4; line++) {
            _mm_prefetch((const char *)q + 4096 + 64 * line, _MM_HINT_T0);
        }
        __m512i b[4] = {broadcast4(x), broadcast4(x + 4), broadcast4(x + 8), broadcast4(x + 12)};
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++) {
            __m512i w = _mm512_loadu_si512(q + 64 * v);
            __asm__("" : "+v"(w)); /* one load, not four */
#pragma GCC unroll 4
            for (size_t p = 0; p < 4; p++) {
                sum[v][p] = dot4(sum[v][p], _mm512_and_si512(w, mask[p]), b[p]);
            }
        }
    }
    for (size_t v = 0; v < 4; v++) {
        __m512i low = _mm512_add_epi32(sum[v][0], _mm512_srai_epi32(sum[v][1], 2));
        __m512i high =
            _mm512_add_epi32(_mm512_srai_epi32(sum[v][2], 4), _mm512_srai_epi32(sum[v][3], 6));
        vi_store(acc[0] + 16 * v,
                 _mm512_sub_epi32(_mm512_add_epi32(low, high), _mm512_set1_epi32(*offset)));
    }
}

/* rows x 64 columns over a u8 panel of groups of four: acc = panel . s8 - factor * offset */
OB_INLINE void
panel_tile(size_t rows, size_t groups, const uint8_t *panel, const int8_t *s8, size_t ld,
           const int32_t *offset, int32_t factor, ob_acc *acc)
{
    const char *next = (const char *)s8 + rows * ld; /* tile's rows, asked for evenly */
    __m512i sum[6][4];
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++) {
            sum[r][v] = _mm512_setzero_si512();
        }
    for (size_t i = 0; i < groups; i++, panel += 256, s8 += 4, next += 4 * rows) {
        __m512i w[4];
        _mm_prefetch(next, _MM_HINT_T0);
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; v++) {
            w[v] = _mm512_loadu_si512(panel + 64 * v);
        }
#pragma GCC unroll 6
        for (size_t r = 0; r < rows; r++) {
            __m512i b = broadcast4(s8 + r * ld);
#pragma GCC unroll 4
            for (size_t v = 0; v < 4; v++) {
                sum[r][v] = dot4(sum[r][v], w[v], b);
            }
        }
    }
    finish_tile(rows, sum, offset, factor, acc);
}

/* A copy per tile height, so that the accumulators are registers. */
/* clang-format off */
#define BY_ROWS(call)                                                                                                  \
    switch (rows) {                                                                                                    \
    case 1: call(1); break;                                                                                            \
    case 2: call(2); break;                                                                                            \
    case 3: call(3); break;                                                                                            \
    case 4: call(4); break;                                                                                            \
    case 5: call(5); break;                                                                                            \
    default: call(6); break;                                                                                           \
    }
/* clang-format on */

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
    if (rows == 1 && k_steps <= 16384) { /* 64 * 3 * 127 * K/4 fits int32 */
        forward_vector(k_steps, q, x, sum, acc);
        return;
    }
#define TILE(r) forward_tile(r, k_steps, q, x, ldx, sum, acc)
    BY_ROWS(TILE)
#undef TILE
}

static void
dot_panel(size_t rows, size_t groups, const uint8_t *panel, const int8_t *s8, size_t ld,
          const int32_t *sum, int32_t factor, ob_acc *acc)
{
#define TILE(r) panel_tile(r, groups, panel, s8, ld, sum, factor, acc)
    BY_ROWS(TILE)
#undef TILE
}

static void
dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q, size_t ldq,
          const int32_t *sum, ob_acc *acc)
{
    dot_panel(rows, n_padded / 4, panel, q, ldq, sum, 1, acc);
}

static void
dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h, size_t ldh,
           const int32_t *sum, ob_acc *acc)
{
    dot_panel(rows, m_padded / 4, panel, h, ldh, sum, 128, acc); /* the panel holds x + 128 */
}

/* ------------------------------------------------------------------ panels */

/* One strip of tile16 -> (K/4, 64, 4) */
static void
decode_forward_panel(size_t k_steps, const uint8_t *q, uint8_t *panel)
{
    const __m512i three = _mm512_set1_epi8(3);
    for (size_t i = 0; i < k_steps; i++, q += 256, panel += 1024) {
        for (size_t v = 0; v < 4; v++) {
            __m512i w = _mm512_loadu_si512(q + 64 * v);
            _mm_prefetch((const char *)q + 4096 + 64 * v, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                _mm512_storeu_si512(
                    panel + 256 * p + 64 * v,
                    _mm512_and_si512(_mm512_srli_epi16(w, (uint8_t)(2 * p)), three));
            }
        }
    }
}

/* tile16 -> (N/4, 64, 4): byte j of a group is output 4g + j. One in-lane 4 x 4 byte transpose, then lanes of 4 planes. */
static void
decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip, uint8_t *panel)
{
    const __m512i three = _mm512_set1_epi8(3);
    const __m512i turn =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    size_t steps = OB_MIN(k_steps - 4 * strip, (size_t)4);
    for (size_t n0 = 0; n0 < n; n0 += 16) {
        const uint8_t *q = packed + ob_tile16_byte(k_steps, n0, 64 * strip);
        for (size_t i = 0; i < steps; i++) {
            uint8_t *out = panel + n0 * 64 + 64 * i;
            __m512i w = _mm512_shuffle_epi8(_mm512_loadu_si512(q + 256 * i), turn), plane[4];
            for (int p = 0; p < 4; p++) {
                plane[p] = _mm512_and_si512(_mm512_srli_epi16(w, (uint8_t)(2 * p)), three);
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
                _mm512_storeu_si512(panel + n0 * 64 + 64 * i + 256 * g, _mm512_set1_epi8(1));
            }
        }
    }
}

/* xq (M, ldx) -> (M/4, 64, 4) of x + 128; tokens and columns that do not exist are 128 */
static void
pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    const __m512i flip = _mm512_set1_epi8((char)0x80);
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

#include "../kernels/all.tmpl.h"
