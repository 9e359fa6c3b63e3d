/* forward_avx512vnni.h - forward tiles of AVX-512 with VNNI, codes decoded on the fly; for the files that have it. */
#ifndef OB_FORWARD_AVX512VNNI_H
#define OB_FORWARD_AVX512VNNI_H

#include "../kernels/kernel.h"
#include "dot_avx512vnni.h"
#include "vocabulary_avx512.h"

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

enum { VECTOR_STEPS = 16384 }; /* of forward_vector: 64 * 3 * 127 * K/4 fits int32 */

/* One token: no shifts. Masked codes are 4^p times the code; one accumulator per p, divided exactly at the end. */
static void
forward_vector(size_t k_steps, const uint8_t *q, const int8_t *x, const int32_t *offset,
               ob_acc *acc)
{
    const __m512i mask[4] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                             _mm512_set1_epi8((char)192)};
    __m512i sum[4][4];
    clear_sums(4, 4, sum);
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
        vi_store(acc[0] + 16 * v,
                 _mm512_sub_epi32(masked_sums(sum[v]), _mm512_set1_epi32(*offset)));
    }
}

#endif
