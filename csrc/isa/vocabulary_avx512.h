/* vocabulary_avx512.h - the vocabulary of kernels/all.tmpl.h on AVX-512 (F, BW, VL, DQ): 16 lanes are one register. */
#ifndef OB_VOCABULARY_AVX512_H
#define OB_VOCABULARY_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "../base/config.h"

typedef __m512 vf;
typedef __m512i vi;

/* clang-format off: one line a name */
OB_INLINE vf
vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
OB_INLINE void
vf_store(float *p, vf v)
{
    _mm512_storeu_ps(p, v);
}
OB_INLINE vf
vf_set1(float x)
{
    return _mm512_set1_ps(x);
}
OB_INLINE vf
vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
OB_INLINE vf
vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
OB_INLINE vf
vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
OB_INLINE vf
vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
OB_INLINE vf
vf_clip(vf a, vf limit)
{
    return _mm512_range_ps(a, limit, 2); /* the smaller magnitude, with the sign of a */
}
OB_INLINE vf
vf_one_nan(vf a)
{
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(a, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
}
OB_INLINE vf
vf_add_uniform(vf v, vi r)
{
    /* the product is exact: one rounding, as of the other sets' two operations */
    return _mm512_fmadd_ps(_mm512_cvtepu32_ps(r), vf_set1(0x1p-32f), v);
}
OB_INLINE vf
vf_bits(vi a)
{
    return _mm512_castsi512_ps(a);
}
OB_INLINE vi
vf_to_bits(vf a)
{
    return _mm512_castps_si512(a);
}
/* clang-format on */

OB_INLINE float
vf_sum(vf a)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

OB_INLINE void
vf_sum_pair(vf a, vf b, float *sum_a, float *sum_b)
{
    __m512 eight =
        _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    __m512 four = _mm512_add_ps(eight, _mm512_shuffle_f32x4(eight, eight, 0xB1));
    __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4E));
    __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xB1));
    _mm_store_ss(sum_a, _mm512_castps512_ps128(one));
    _mm_store_ss(sum_b, _mm512_extractf32x4_ps(one, 2));
}

/* clang-format off */
OB_INLINE vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
OB_INLINE void vi_store(int32_t *p, vi v) { _mm512_storeu_si512(p, v); }
OB_INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
OB_INLINE vi vi_iota(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
OB_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
OB_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
OB_INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
OB_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
OB_INLINE vi vi_andnot(vi mask, vi a) { return _mm512_andnot_si512(mask, a); }
OB_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
OB_INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
OB_INLINE vi vi_srl(vi a, unsigned n) { return _mm512_srli_epi32(a, n); }
OB_INLINE vi vi_sra(vi a, unsigned n) { return _mm512_srai_epi32(a, n); }
OB_INLINE vi vi_sll(vi a, unsigned n) { return _mm512_slli_epi32(a, n); }
OB_INLINE vi vi_srlv(vi a, vi n) { return _mm512_srlv_epi32(a, n); }
OB_INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
OB_INLINE int32_t vi_hmax(vi a) { return _mm512_reduce_max_epi32(a); }
OB_INLINE int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }
OB_INLINE vf vi_to_f32(vi a) { return _mm512_cvtepi32_ps(a); }
OB_INLINE vi vi_from_f32(vf a) { return _mm512_cvttps_epi32(a); }
OB_INLINE vi vi_rint(vf a) { return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
OB_INLINE vi vi_floor(vf a) { return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
OB_INLINE vi vi_add_where(vi sum, vi a, vi x, vi mask) { return _mm512_mask_add_epi32(sum, _mm512_test_epi32_mask(x, mask), sum, a); }
OB_INLINE vi vi_sub_unless(vi sum, vi a, vi x, vi mask) { return _mm512_mask_sub_epi32(sum, _mm512_testn_epi32_mask(x, mask), sum, a); }
OB_INLINE vi vi_load_i8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
OB_INLINE void vi_store_i8(int8_t *p, vi a) { _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(a)); }
OB_INLINE vi vi_load_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }
OB_INLINE void vi_store_u16(uint16_t *p, vi a) { _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(a)); }
/* clang-format on */

OB_INLINE int64_t
vi_sum64(vi a, vi b)
{
    __m512i even = _mm512_add_epi64(_mm512_srai_epi64(_mm512_slli_epi64(a, 32), 32),
                                    _mm512_srai_epi64(_mm512_slli_epi64(b, 32), 32));
    __m512i odd = _mm512_add_epi64(_mm512_srai_epi64(a, 32), _mm512_srai_epi64(b, 32));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(even, odd));
}

/* Packs work inside 128-bit lanes: one permutation of dwords at the end puts the bytes in order. */
OB_INLINE void
v_add64(int8_t *e, const vi *d)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i least = _mm512_set1_epi8(-127);
    __m512i bytes =
        _mm512_packs_epi16(_mm512_packs_epi32(d[0], d[1]), _mm512_packs_epi32(d[2], d[3]));
    bytes = _mm512_max_epi8(_mm512_permutexvar_epi32(order, bytes), least);
    bytes = _mm512_adds_epi8(_mm512_loadu_si512(e), bytes);
    _mm512_storeu_si512(e, _mm512_max_epi8(bytes, least));
}

OB_INLINE uint64_t
v_mask_beyond64(const int8_t *p)
{
    __m512i e = _mm512_loadu_si512(p);
    return _mm512_cmpgt_epi8_mask(e, _mm512_set1_epi8(64)) |
           _mm512_cmplt_epi8_mask(e, _mm512_set1_epi8(-64));
}

/* 16 x 16 bytes, rows of `in` at stride ld, to contiguous rows of `out` */
OB_INLINE void
v_transpose16(const int8_t *in, size_t ld, int8_t *out)
{
    __m128i r[16], t[16];
    for (size_t i = 0; i < 16; i++) {
        r[i] = _mm_loadu_si128((const void *)(in + i * ld));
    }
    for (unsigned round = 0; round < 4; round++) {
        for (size_t i = 0; i < 8; i++) {
            t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
            t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
        }
        memcpy(r, t, sizeof r);
    }
    for (size_t i = 0; i < 16; i++) {
        _mm_storeu_si128((void *)(out + 16 * i), r[i]);
    }
}

#endif
