/* avx2.c - AVX2 without VNNI: vpmaddubsw where one side is codes, vpmaddwd on widened bytes where both are signed.
 *
 * Hot loops                                      ports (Zen 4 / Skylake)
 *   vpmaddubsw  32 u8 x s8 products to int16     2 / 2 per cycle
 *   vpaddw      pairs are at most 2 * 2 * 127    4 / 3      64 of them fit int16, then one vpmaddwd by 1 widens
 *   vpmaddwd    16 s16 products to int32         2 / 2      dW: a pair of 127 * 127 leaves no room in int16
 *   vpaddd                                       4 / 3
 * dW alternatives: |x| and sign transfer (vpsignb, vpmaddubsw, vpmaddwd, vpaddd for 32 products) has three of four
 * operations on the multipliers and was 15 % slower on Zen 4; x + 128 saturates vpmaddubsw.
 *
 * Why asm for the sums: gcc turns a chain of additions into a tree, whose leaves then live on the stack (a third
 * slower); a tied operand keeps the order. */
#include "panels_avx2.h"

#define OB_ISA_NAME avx2
#define OB_FORWARD_ROWS 5 /* 10 sums, two codes, mask, broadcast, product: 6 rows spill */
#define OB_INPUT_ROWS 5
#define OB_WEIGHT_ROWS 6

#define STEPS_INT16 16  /* k-steps of 4 vpmaddubsw whose sum fits int16: 64 * 508 = 32512 */
#define WIDE_TOKENS 256 /* tokens widened at a time: 6 rows are 3 KiB */

/* ------------------------------------------------------------------ integer tiles: rows x 16 columns */
OB_INLINE __m256i
add16(__m256i sum, __m256i v)
{
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(v));
    return sum;
}

OB_INLINE __m256i
add32(__m256i sum, __m256i v)
{
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v));
    return sum;
}

/* Codes 0..2 of the p-th four contraction entries of a step: from the 2-bit plane, or from a panel of whole bytes. */
OB_INLINE __m256i
packed_codes(const uint8_t *at, int p)
{
    return _mm256_and_si256(_mm256_srli_epi16(LOAD256(at), 2 * p), _mm256_set1_epi8(3));
}

OB_INLINE __m256i
panel_codes(const uint8_t *at, int p)
{
    return LOAD256(at + 64 * p);
}

OB_INLINE void
code_tile(size_t rows, size_t steps, const uint8_t *at, size_t step_bytes,
          __m256i (*codes)(const uint8_t *, int), const int8_t *s8, size_t ld,
          const int32_t *offset, int32_t (*acc)[OB_STRIP])
{
    const __m256i ones = _mm256_set1_epi16(1);
    for (size_t r = 0; r < rows; r++) {
        vi_store(acc[r], vi_set1(-offset[r]));
    }
    for (size_t done = 0; done < steps; done += STEPS_INT16) {
        __m256i sum[5][2];
#pragma GCC unroll 5
        for (size_t r = 0; r < rows; r++) {
            sum[r][0] = sum[r][1] = _mm256_setzero_si256();
        }
        for (size_t left = OB_MIN(steps - done, (size_t)STEPS_INT16); left; left--) {
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                const __m256i w0 = codes(at, p), w1 = codes(at + 32, p);
#pragma GCC unroll 5
                for (size_t r = 0; r < rows; r++) {
                    __m256i b = broadcast4(s8 + r * ld + 4 * p);
                    sum[r][0] = add16(sum[r][0], _mm256_maddubs_epi16(w0, b));
                    sum[r][1] = add16(sum[r][1], _mm256_maddubs_epi16(w1, b));
                }
            }
            at += step_bytes, s8 += 16;
        }
#pragma GCC unroll 5
        for (size_t r = 0; r < rows; r++) {
            vi wide = {_mm256_madd_epi16(sum[r][0], ones), _mm256_madd_epi16(sum[r][1], ones)};
            vi_store(acc[r], vi_add(vi_load(acc[r]), wide));
        }
    }
}

/* acc += panel . h over pairs of tokens; panel (pairs, 16, 2) int8, h rows of int16 */
OB_INLINE void
weight_tile(size_t rows, size_t pairs, const uint8_t *panel, const int16_t (*h)[WIDE_TOKENS],
            int32_t (*acc)[OB_STRIP])
{
    vi sum[6];
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++) {
        sum[r] = vi_load(acc[r]);
    }
    for (size_t i = 0; i < pairs; i++, panel += 32) {
        __m256i x0 = _mm256_cvtepi8_epi16(LOAD128(panel));
        __m256i x1 = _mm256_cvtepi8_epi16(LOAD128(panel + 16));
#pragma GCC unroll 6
        for (size_t r = 0; r < rows; r++) {
            __m256i b = broadcast4(h[r] + 2 * i);
            sum[r].lo = add32(sum[r].lo, _mm256_madd_epi16(x0, b));
            sum[r].hi = add32(sum[r].hi, _mm256_madd_epi16(x1, b));
        }
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++) {
        vi_store(acc[r], sum[r]);
    }
}

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
#define TILE(r) code_tile(r, k_steps, q + 64 * v, 256, packed_codes, x, ldx, sum, GROUP_ACC)
    BY_ROWS(OB_FORWARD_ROWS, TILE)
#undef TILE
}

static void
dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q, size_t ldq,
          const int32_t *sum, ob_acc *acc)
{
    const uint8_t *at = panel;
    size_t steps = n_padded / 16, bytes = n_padded * OB_GROUP;
#define TILE(r) code_tile(r, steps, at + v * bytes, 256, panel_codes, q, ldq, sum, GROUP_ACC)
    BY_ROWS(OB_INPUT_ROWS, TILE)
#undef TILE
}

static void
dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h, size_t ldh,
           const int32_t *sum, ob_acc *acc)
{
    (void)sum; /* both sides are signed */
    memset(acc, 0, rows * sizeof *acc);
    for (size_t done = 0; done < m_padded; done += WIDE_TOKENS) {
        int16_t wide[6][WIDE_TOKENS];
        size_t count = OB_MIN(m_padded - done, (size_t)WIDE_TOKENS);
        for (size_t r = 0; r < rows; r++) {
            for (size_t i = 0; i < count; i++) {
                wide[r][i] = h[r * ldh + done + i];
            }
        }
        const int16_t (*left)[WIDE_TOKENS] = (const int16_t (*)[WIDE_TOKENS])wide;
        const uint8_t *at = panel + done * OB_GROUP;
#define TILE(r) weight_tile(r, count / 2, at + v * m_padded * OB_GROUP, left, GROUP_ACC)
        BY_ROWS(OB_WEIGHT_ROWS, TILE)
#undef TILE
    }
}

/* xq (M, ldx) -> (4, M/2, 16, 2) int8: pairs of tokens; tokens and columns that do not exist are 0 */
static void
pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    const int8_t *x = xq + OB_STRIP * strip;
    size_t columns = OB_MIN(ldx - OB_STRIP * strip, (size_t)OB_STRIP);
    size_t group_bytes = OB_CEIL_DIV(m, (size_t)4) * 4 * OB_GROUP;
    memset(panel, 0, OB_STRIP / OB_GROUP * group_bytes);
    for (size_t j = 0; j < columns; j += OB_GROUP) {
        __m128i *out = (void *)(panel + j / OB_GROUP * group_bytes);
        for (size_t t = 0; t < m; t += 2, out += 2) {
            __m128i a = LOAD128(x + t * ldx + j), b = _mm_setzero_si128();
            if (t + 1 < m) {
                b = LOAD128(x + (t + 1) * ldx + j);
            }
            _mm_storeu_si128(out, _mm_unpacklo_epi8(a, b));
            _mm_storeu_si128(out + 1, _mm_unpackhi_epi8(a, b));
        }
    }
}

#include "../kernels/all.tmpl.h"
