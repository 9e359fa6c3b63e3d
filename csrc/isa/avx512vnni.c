/* avx512vnni.c - AVX-512 with VNNI: 512-bit vpdpbusd, 24 accumulators of 16 outputs (6 rows x 64 columns or 12 x 32).
 *
 * Hot loop           per 64 bytes                ports (Zen 5 / Golden Cove)
 *   vpdpbusd zmm     64 u8 x s8 products         2 / 1 per cycle     the limit
 *   vpsrlw, vpandd   decode 64 codes             left free by VNNI / its own ports: many rows share them, or a panel
 *   broadcast load   4 activations               folded into vpdpbusd's memory operand where it pays
 * Codes 0..2 are the unsigned operand; minus the sum of the activations makes them -1..1, exactly. */
#include "../kernels/kernel.h"
#include "dot_avx512vnni.h"
#include "panels_avx512.h"
#include "vocabulary_avx512.h"

#define OB_ISA_NAME avx512vnni
#define OB_FORWARD_ROWS 12
#define OB_INPUT_ROWS 6
#define OB_WEIGHT_ROWS 6
#define OB_FORWARD_PANEL decode_forward_panel

/* ------------------------------------------------------------------ integer tiles */
OB_INLINE void
clear_sums(size_t rows, size_t width, __m512i sum[][4])
{
#pragma GCC unroll 12
    for (size_t r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (size_t v = 0; v < width; v++) {
            sum[r][v] = _mm512_setzero_si512();
        }
}

OB_INLINE void
finish_tile(size_t rows, size_t width, __m512i sum[][4], const int32_t *offset, int32_t factor,
            size_t column, ob_acc *acc)
{
#pragma GCC unroll 12
    for (size_t r = 0; r < rows; r++) {
        __m512i bias = _mm512_set1_epi32((int32_t)((uint32_t)offset[r] * (uint32_t)factor));
#pragma GCC unroll 4
        for (size_t v = 0; v < width; v++) {
            vi_store(acc[r] + column + 16 * v, _mm512_sub_epi32(sum[r][v], bias));
        }
    }
}

/* rows x 64 outputs, width registers at a time, codes decoded on the fly: up to 6 rows take all four, more rows share what
 * they decode and take two and two */
OB_INLINE void
forward_tile(size_t rows, size_t width, size_t k_steps, const uint8_t *q, const int8_t *x,
             size_t ldx, const int32_t *offset, ob_acc *acc)
{
    const __m512i three = _mm512_set1_epi8(3);
    /* Of two passes each asks for half of the strip's bytes, in order, half a strip ahead: DRAM's time is the products'. */
    const char *ahead = (const char *)q + (width == 4 ? 4096 : 128 * k_steps + 4096);
    for (size_t column = 0; column < OB_STRIP; column += 16 * width) {
        const uint8_t *at = q + 4 * column;
        const int8_t *from = x;
        __m512i sum[12][4];
        clear_sums(rows, width, sum);
        for (size_t i = 0; i < k_steps; i++, at += 256, from += 16) {
            const int8_t *upper = from + 6 * ldx;
            __asm__("" : "+r"(upper)); /* 12 offsets from one base would not fit the registers */
            __m512i held[2];
#pragma GCC unroll 4
            for (size_t v = 0; v < width; v++, ahead += 64) {
                if (width == 4) {
                    _mm_prefetch(ahead, _MM_HINT_T0);
                }
                else {
                    _mm_prefetch(ahead, _MM_HINT_T1);
                    held[v] = _mm512_loadu_si512(at + 64 * v);
                    __asm__("" : "+v"(held[v])); /* one load, not four: 1.1 a cycle start */
                }
            }
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                __m512i w[4];
#pragma GCC unroll 4
                for (size_t v = 0; v < width; v++) {
                    __m512i codes = width == 4 ? _mm512_loadu_si512(at + 64 * v) : held[v];
                    w[v] = _mm512_and_si512(_mm512_srli_epi16(codes, (uint8_t)(2 * p)), three);
                }
#pragma GCC unroll 12
                for (size_t r = 0; r < rows; r++) {
                    __m512i b =
                        broadcast4((r < 6 ? from + r * ldx : upper + (r - 6) * ldx) + 4 * p);
#pragma GCC unroll 4
                    for (size_t v = 0; v < width; v++) {
                        sum[r][v] = dot4(sum[r][v], w[v], b);
                    }
                }
            }
        }
        finish_tile(rows, width, sum, offset, 1, column, acc);
    }
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

/* One group of four of a panel: 64 columns, a broadcast a row. */
OB_INLINE void
panel_group(size_t rows, const uint8_t *panel, const int8_t *s8, size_t ld, __m512i sum[][4])
{
    __m512i w[4];
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; v++) {
        w[v] = _mm512_loadu_si512(panel + 64 * v);
        __asm__("" : "+v"(w[v])); /* one load, not one a row */
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

/* rows x 64 columns over a u8 panel of groups of four: acc = panel . s8 - factor * offset.  Four groups a turn: where two
 * threads share a core, each has half of its instructions a cycle, and counting cost a tenth of this loop's. */
OB_INLINE void
panel_tile(size_t rows, size_t groups, const uint8_t *panel, const int8_t *s8, size_t ld,
           const int32_t *offset, int32_t factor, ob_acc *acc)
{
    const char *next = (const char *)s8 + rows * ld; /* tile's rows, asked for evenly */
    __m512i sum[6][4];
    clear_sums(rows, 4, sum);
    size_t i = 0;
    for (; i + 4 <= groups; i += 4, panel += 1024, s8 += 16, next += 16 * rows) {
        _mm_prefetch(next, _MM_HINT_T0);
        _mm_prefetch(next + 8 * rows, _MM_HINT_T0);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++) {
            panel_group(rows, panel + 256 * j, s8 + 4 * j, ld, sum);
        }
    }
    for (; i < groups; i++, panel += 256, s8 += 4) {
        panel_group(rows, panel, s8, ld, sum);
    }
    finish_tile(rows, 4, sum, offset, factor, 0, acc);
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
#define BY_MORE_ROWS(call)                                                                                             \
    switch (rows) {                                                                                                    \
    case 7: call(7); break;                                                                                            \
    case 8: call(8); break;                                                                                            \
    case 9: call(9); break;                                                                                            \
    case 10: call(10); break;                                                                                          \
    case 11: call(11); break;                                                                                          \
    default: call(12); break;                                                                                          \
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
#define TILE(r) forward_tile(r, r <= 6 ? 4 : 2, k_steps, q, x, ldx, sum, acc)
    if (rows <= 6) {
        BY_ROWS(TILE)
    }
    else {
        BY_MORE_ROWS(TILE)
    }
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

#include "../kernels/all.tmpl.h"
