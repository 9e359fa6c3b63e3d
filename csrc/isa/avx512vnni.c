/* avx512vnni.c - AVX-512 with VNNI: 512-bit vpdpbusd, 24 accumulators of 16 outputs (6 rows x 64 columns or 12 x 32).
 *
 * Hot loop           per 64 bytes                ports (Zen 5 / Golden Cove)
 *   vpdpbusd zmm     64 u8 x s8 products         2 / 1 per cycle     the limit
 *   vpsrlw, vpandd   decode 64 codes             left free by VNNI / its own ports: many rows share them, or a panel
 *   broadcast load   4 activations               folded into vpdpbusd's memory operand where it pays
 * Codes 0..2 are the unsigned operand; minus the sum of the activations makes them -1..1, exactly. */
#include "../kernels/kernel.h"
#include "forward_avx512vnni.h"
#include "panels_avx512.h"

#define OB_ISA_NAME avx512vnni
#define OB_FORWARD_ROWS 12
#define OB_INPUT_ROWS 6
#define OB_WEIGHT_ROWS 6
#define OB_FORWARD_PANEL decode_forward_panel
#define OB_PANEL_TOKENS 64

/* ------------------------------------------------------------------ integer tiles */
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

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
    if (rows == 1 && k_steps <= VECTOR_STEPS) {
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

#ifndef OB_WITHOUT_amxint8
#include "amxint8.h"

#undef OB_ISA_NAME
#undef OB_FORWARD_ROWS
#undef OB_INPUT_ROWS
#undef OB_WEIGHT_ROWS
#undef OB_FORWARD_PANEL
#undef OB_PANEL_TOKENS
#undef OB_LEAVE
#undef OB_PRODUCT
#define OB_ISA_NAME amxint8
#define OB_FORWARD_ROWS 16
#define OB_INPUT_ROWS 32
#define OB_WEIGHT_ROWS 64 /* four tiles, then the votes of all: 1.1 x votes after each */
#define OB_FORWARD_PANEL ob_amxint8_decode_forward_panel
#define OB_PANEL_TOKENS 33
#define OB_LEAVE ob_amxint8_leave
#define OB_PRODUCT(name) ob_amxint8_##name
#include "../kernels/table.tmpl.h"
#endif
