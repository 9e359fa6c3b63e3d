/* vocabulary_avx2.h - the vocabulary of kernels/all.tmpl.h on AVX2: 16 lanes are two registers. */
#ifndef OB_VOCABULARY_AVX2_H
#define OB_VOCABULARY_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "../base/config.h"

typedef struct {
    __m256 lo, hi;
} vf;
typedef struct {
    __m256i lo, hi;
} vi;

#define F1(f, a) ((vf){f((a).lo), f((a).hi)})
#define F2(f, a, b) ((vf){f((a).lo, (b).lo), f((a).hi, (b).hi)})
#define I2(f, a, b) ((vi){f((a).lo, (b).lo), f((a).hi, (b).hi)})
#define I2N(f, a, n) ((vi){f((a).lo, n), f((a).hi, n)})

/* clang-format off */
OB_INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OB_INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
OB_INLINE vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OB_INLINE vf vf_add(vf a, vf b) { return F2(_mm256_add_ps, a, b); }
OB_INLINE vf vf_mul(vf a, vf b) { return F2(_mm256_mul_ps, a, b); }
OB_INLINE vf vf_min(vf a, vf b) { return F2(_mm256_min_ps, a, b); }
OB_INLINE vf vf_max(vf a, vf b) { return F2(_mm256_max_ps, a, b); }
/* clang-format on */
OB_INLINE vf
vf_clip(vf a, vf limit)
{
    return vf_max(vf_min(a, limit), F2(_mm256_xor_ps, limit, vf_set1(-0.0f)));
}
OB_INLINE __m256
one_nan8(__m256 a)
{
    __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
    return _mm256_blendv_ps(a, nan, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
OB_INLINE vf
vf_one_nan(vf a)
{
    return (vf){one_nan8(a.lo), one_nan8(a.hi)};
}
/* clang-format off */
OB_INLINE vf vf_bits(vi a) { return (vf){_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
OB_INLINE vi vf_to_bits(vf a) { return (vi){_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

/* clang-format on */
OB_INLINE float
vf_sum(vf a)
{
    __m256 eight = _mm256_add_ps(a.lo, a.hi);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

OB_INLINE void
vf_sum_pair(vf a, vf b, float *sum_a, float *sum_b)
{
    __m256 x = _mm256_add_ps(a.lo, a.hi), y = _mm256_add_ps(b.lo, b.hi);
    __m256 four =
        _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
    __m256 two = _mm256_add_ps(four, _mm256_permute_ps(four, 0x4E));
    __m256 one = _mm256_add_ps(two, _mm256_permute_ps(two, 0xB1));
    _mm_store_ss(sum_a, _mm256_castps256_ps128(one));
    _mm_store_ss(sum_b, _mm256_extractf128_ps(one, 1));
}

#define LOAD256(p) _mm256_loadu_si256((const void *)(p))
#define LOAD128(p) _mm_loadu_si128((const void *)(p))
/* clang-format off */
OB_INLINE vi vi_load(const int32_t *p) { return (vi){LOAD256(p), LOAD256(p + 8)}; }
OB_INLINE void vi_store(int32_t *p, vi v) { _mm256_storeu_si256((void *)p, v.lo), _mm256_storeu_si256((void *)(p + 8), v.hi); }
OB_INLINE vi vi_set1(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OB_INLINE vi vi_add(vi a, vi b) { return I2(_mm256_add_epi32, a, b); }
OB_INLINE vi vi_sub(vi a, vi b) { return I2(_mm256_sub_epi32, a, b); }
OB_INLINE vi vi_mul(vi a, vi b) { return I2(_mm256_mullo_epi32, a, b); }
OB_INLINE vi vi_and(vi a, vi b) { return I2(_mm256_and_si256, a, b); }
OB_INLINE vi vi_andnot(vi mask, vi a) { return I2(_mm256_andnot_si256, mask, a); }
OB_INLINE vi vi_or(vi a, vi b) { return I2(_mm256_or_si256, a, b); }
OB_INLINE vi vi_xor(vi a, vi b) { return I2(_mm256_xor_si256, a, b); }
OB_INLINE vi vi_srl(vi a, int n) { return I2N(_mm256_srli_epi32, a, n); }
OB_INLINE vi vi_sra(vi a, int n) { return I2N(_mm256_srai_epi32, a, n); }
OB_INLINE vi vi_sll(vi a, int n) { return I2N(_mm256_slli_epi32, a, n); }
OB_INLINE vi vi_srlv(vi a, vi n) { return I2(_mm256_srlv_epi32, a, n); }
OB_INLINE vi vi_max(vi a, vi b) { return I2(_mm256_max_epi32, a, b); }
OB_INLINE vf vi_to_f32(vi a) { return (vf){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
OB_INLINE vi vi_from_f32(vf a) { return (vi){_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
OB_INLINE vi vi_rint(vf a) { return (vi){_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
OB_INLINE vi vi_floor(vf a) { return vi_from_f32(F1(_mm256_floor_ps, a)); }
OB_INLINE vf vf_add_uniform(vf v, vi r) { return vf_add(v, vf_mul(vi_to_f32(vi_srl(r, 8)), vf_set1(0x1p-24f))); }
/* clang-format on */
OB_INLINE vi
vi_iota(void)
{
    return (vi){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

OB_INLINE int32_t
vi_hmax(vi a)
{
    __m256i eight = _mm256_max_epi32(a.lo, a.hi);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

OB_INLINE int32_t
vi_sum(vi a)
{
    __m256i eight = _mm256_add_epi32(a.lo, a.hi);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}

OB_INLINE int64_t
vi_sum64(vi a, vi b)
{
    const __m256i part[4] = {a.lo, a.hi, b.lo, b.hi};
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < 4; i++) {
        sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(part[i])));
        sum = _mm256_add_epi64(sum, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(part[i], 1)));
    }
    __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

OB_INLINE vi
vi_load_i8(const int8_t *p)
{
    __m128i bytes = LOAD128(p);
    return (vi){_mm256_cvtepi8_epi32(bytes),
                _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
}

OB_INLINE vi
vi_load_u16(const uint16_t *p)
{
    return (vi){_mm256_cvtepu16_epi32(LOAD128(p)), _mm256_cvtepu16_epi32(LOAD128(p + 8))};
}

OB_INLINE void
vi_store_i8(int8_t *p, vi a)
{
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8);
    _mm_storeu_si128((void *)p, _mm_packs_epi16(_mm256_castsi256_si128(words),
                                                _mm256_extracti128_si256(words, 1)));
}

OB_INLINE void
vi_store_u16(uint16_t *p, vi a)
{
    _mm256_storeu_si256((void *)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xD8));
}

OB_INLINE void
v_add64(int8_t *e, const vi *d)
{
    const __m256i least = _mm256_set1_epi8(-127);
    for (size_t half = 0; half < 2; half++, e += 32, d += 2) {
        __m256i low = _mm256_packs_epi32(d[0].lo, d[0].hi),
                high = _mm256_packs_epi32(d[1].lo, d[1].hi);
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        bytes = _mm256_adds_epi8(LOAD256(e), _mm256_max_epi8(bytes, least));
        _mm256_storeu_si256((void *)e, _mm256_max_epi8(bytes, least));
    }
}

OB_INLINE vi
vi_unset(vi x, vi mask)
{
    return I2(_mm256_cmpeq_epi32, vi_and(x, mask), vi_set1(0));
}

OB_INLINE vi
vi_add_where(vi sum, vi a, vi x, vi mask)
{
    return vi_add(sum, vi_andnot(vi_unset(x, mask), a));
}

OB_INLINE vi
vi_sub_unless(vi sum, vi a, vi x, vi mask)
{
    return vi_sub(sum, vi_and(vi_unset(x, mask), a));
}

OB_INLINE uint64_t
v_mask_beyond64(const int8_t *p)
{
    uint64_t mask[2];
    for (size_t half = 0; half < 2; half++) {
        __m256i e = LOAD256(p + 32 * half), high = _mm256_set1_epi8(64),
                low = _mm256_set1_epi8(-64);
        __m256i beyond = _mm256_or_si256(_mm256_cmpgt_epi8(e, high), _mm256_cmpgt_epi8(low, e));
        mask[half] = (uint32_t)_mm256_movemask_epi8(beyond);
    }
    return mask[0] | mask[1] << 32;
}

OB_INLINE void
v_transpose16(const int8_t *in, size_t ld, int8_t *out)
{
    __m128i r[16], t[16];
    for (size_t i = 0; i < 16; i++) {
        r[i] = LOAD128(in + i * ld);
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
