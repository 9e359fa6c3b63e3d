/* dot_avx512vnni.h - the int8 product of the files for AVX-512 VNNI: 16 outputs times 4 inputs. */
#ifndef OB_DOT_AVX512VNNI_H
#define OB_DOT_AVX512VNNI_H

#include <immintrin.h>
#include <string.h>

#include "../base/config.h"

/* acc + u8 . s8 by fours.  Why asm and not the intrinsic: gcc 12 keeps 18 of 24 accumulators on the stack when vpdpbusd
 * goes through _mm512_dpbusd_epi32 (half the speed); a tied operand keeps them in registers. */
OB_INLINE __m512i
dot4(__m512i acc, __m512i u8, __m512i s8)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
    return acc;
}

OB_INLINE __m512i
broadcast4(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}

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

/* Sums of codes that were masked where they stand: sum[p] is 4^p times what it counts, so the shifts are exact. */
OB_INLINE __m512i
masked_sums(const __m512i sum[4])
{
    __m512i low = _mm512_add_epi32(sum[0], _mm512_srai_epi32(sum[1], 2));
    __m512i high = _mm512_add_epi32(_mm512_srai_epi32(sum[2], 4), _mm512_srai_epi32(sum[3], 6));
    return _mm512_add_epi32(low, high);
}

#endif
