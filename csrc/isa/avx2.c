/* avx2.c - AVX2 without VNNI: vpmaddubsw on codes, |x| and sign transfer where both sides are signed.
 *
 * Hot loop              per 32 bytes                          ports (Zen 3 / Skylake)
 *   vpmaddubsw          32 u8 x s8 products, pairs in int16   2 / 2 per cycle
 *   vpaddw              four groups: 4 * 2 * 2 * 127 = 2032   fits int16
 *   vpmaddwd by 1       int16 pairs to int32                  once per four groups
 * dW has no code operand: |x| (0..127) as the unsigned side, h with the sign of x as the signed side; a pair is at most
 * 2 * 127 * 127 = 32258 and fits int16.
 *
 * 16 lanes are two registers; a tile is 4 rows x 16 columns, repeated over the strip's four column groups. */
#include <immintrin.h>
#include <string.h>

#include "../kernels/kernel.h"

#define OB_ISA_NAME avx2
#define OB_FORWARD_ROWS 4
#define OB_INPUT_ROWS 4
#define OB_WEIGHT_ROWS 4

/* ------------------------------------------------------------------ vocabulary */
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

OB_INLINE vf vf_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OB_INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
OB_INLINE vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OB_INLINE vf vf_add(vf a, vf b) { return F2(_mm256_add_ps, a, b); }
OB_INLINE vf vf_mul(vf a, vf b) { return F2(_mm256_mul_ps, a, b); }
OB_INLINE vf vf_min(vf a, vf b) { return F2(_mm256_min_ps, a, b); }
OB_INLINE vf vf_max(vf a, vf b) { return F2(_mm256_max_ps, a, b); }
OB_INLINE vf
vf_rint(vf a)
{
    return (vf){_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
OB_INLINE vf vf_floor(vf a) { return F1(_mm256_floor_ps, a); }
OB_INLINE vf
vf_zero_nan(vf a)
{
    return (vf){_mm256_and_ps(a.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_ORD_Q)),
                _mm256_and_ps(a.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_ORD_Q))};
}
OB_INLINE vf vf_bits(vi a) { return (vf){_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
OB_INLINE vi vf_to_bits(vf a) { return (vi){_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

OB_INLINE float
vf_sum(vf a)
{
    __m256 eight = _mm256_add_ps(a.lo, a.hi);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#define LOAD256(p) _mm256_loadu_si256((const void *)(p))
#define LOAD128(p) _mm_loadu_si128((const void *)(p))
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
OB_INLINE vi
vi_iota(void)
{
    return (vi){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
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
    return (vi){_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes))};
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
    _mm_storeu_si128((void *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

OB_INLINE void
vi_store_u16(uint16_t *p, vi a)
{
    _mm256_storeu_si256((void *)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xD8));
}

OB_INLINE uint64_t
v_mask_beyond64(const int8_t *p)
{
    uint64_t mask[2];
    for (size_t half = 0; half < 2; half++) {
        __m256i e = LOAD256(p + 32 * half), high = _mm256_set1_epi8(64), low = _mm256_set1_epi8(-64);
        __m256i beyond = _mm256_or_si256(_mm256_cmpgt_epi8(e, high), _mm256_cmpgt_epi8(low, e));
        mask[half] = (uint32_t)_mm256_movemask_epi8(beyond);
    }
    return mask[0] | mask[1] << 32;
}

OB_INLINE void
v_transpose16(const int8_t *in, size_t ld, int8_t *out)
{
    __m128i r[16], t[16];
    for (size_t i = 0; i < 16; i++)
        r[i] = LOAD128(in + i * ld);
    for (unsigned round = 0; round < 4; round++) {
        for (size_t i = 0; i < 8; i++) {
            t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
            t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
        }
        memcpy(r, t, sizeof r);
    }
    for (size_t i = 0; i < 16; i++)
        _mm_storeu_si128((void *)(out + 16 * i), r[i]);
}

/* ------------------------------------------------------------------ integer tiles */
OB_INLINE __m256i
broadcast4(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

/* Codes 0..2 of 4-input group p of a step: from the 2-bit plane, or from a panel of whole bytes. */
OB_INLINE __m256i
packed_codes(const uint8_t *at, int p)
{
    return _mm256_and_si256(_mm256_srli_epi16(LOAD256(at), 2 * p), _mm256_set1_epi8(3));
}

OB_INLINE __m256i
panel_codes(const uint8_t *at, int p)
{
    return LOAD256(at + 256 * p);
}

/* One column group: rows x 16 columns, 16 contraction steps at a time, codes at base + step_bytes * i. */
OB_INLINE void
code_tile(size_t rows, size_t steps, const uint8_t *base, size_t step_bytes, __m256i (*codes)(const uint8_t *, int),
          const int8_t *s8, size_t ld, const int32_t *offset, int32_t (*acc)[OB_STRIP])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[4][2];
    for (size_t r = 0; r < rows; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (size_t i = 0; i < steps; i++)
        for (size_t half = 0; half < 2; half++) {
            const uint8_t *at = base + step_bytes * i + 32 * half;
            const __m256i w0 = codes(at, 0), w1 = codes(at, 1), w2 = codes(at, 2), w3 = codes(at, 3);
            for (size_t r = 0; r < rows; r++) {
                const int8_t *x = s8 + r * ld + 16 * i;
                __m256i t01 = _mm256_add_epi16(_mm256_maddubs_epi16(w0, broadcast4(x)),
                                               _mm256_maddubs_epi16(w1, broadcast4(x + 4)));
                __m256i t23 = _mm256_add_epi16(_mm256_maddubs_epi16(w2, broadcast4(x + 8)),
                                               _mm256_maddubs_epi16(w3, broadcast4(x + 12)));
                sum[r][half] = _mm256_add_epi32(sum[r][half], _mm256_madd_epi16(_mm256_add_epi16(t01, t23), ones));
            }
        }
    for (size_t r = 0; r < rows; r++)
        vi_store(acc[r], vi_sub((vi){sum[r][0], sum[r][1]}, vi_set1(offset[r])));
}

OB_INLINE void
weight_tile(size_t rows, size_t groups, const uint8_t *panel, const int8_t *h, size_t ld, int32_t (*acc)[OB_STRIP])
{
    const __m256i ones = _mm256_set1_epi16(1);
    vi sum[4];
    for (size_t r = 0; r < rows; r++)
        sum[r] = vi_set1(0);
    for (size_t i = 0; i < groups; i++, panel += 256) {
        __m256i x0 = LOAD256(panel), x1 = LOAD256(panel + 32), a0 = _mm256_abs_epi8(x0), a1 = _mm256_abs_epi8(x1);
        for (size_t r = 0; r < rows; r++) {
            __m256i b = broadcast4(h + r * ld + 4 * i);
            __m256i t0 = _mm256_maddubs_epi16(a0, _mm256_sign_epi8(b, x0));
            __m256i t1 = _mm256_maddubs_epi16(a1, _mm256_sign_epi8(b, x1));
            sum[r].lo = _mm256_add_epi32(sum[r].lo, _mm256_madd_epi16(t0, ones));
            sum[r].hi = _mm256_add_epi32(sum[r].hi, _mm256_madd_epi16(t1, ones));
        }
    }
    for (size_t r = 0; r < rows; r++)
        vi_store(acc[r], sum[r]);
}

/* Four column groups of 16, and a copy per tile height so that the sums are registers. */
#define BY_ROWS(call)                                                                                                  \
    for (size_t v = 0; v < 4; v++)                                                                                     \
        switch (rows) {                                                                                                \
        case 1: call(1); break;                                                                                        \
        case 2: call(2); break;                                                                                        \
        case 3: call(3); break;                                                                                        \
        default: call(4); break;                                                                                       \
        }
#define GROUP_ACC ((int32_t(*)[OB_STRIP])(acc[0] + 16 * v))

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx, const int32_t *sum, ob_acc *acc)
{
#define TILE(r) code_tile(r, k_steps, q + 64 * v, 256, packed_codes, x, ldx, sum, GROUP_ACC)
    BY_ROWS(TILE)
#undef TILE
}

static void
dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q, size_t ldq, const int32_t *sum, ob_acc *acc)
{
#define TILE(r) code_tile(r, n_padded / 16, panel + 64 * v, 1024, panel_codes, q, ldq, sum, GROUP_ACC)
    BY_ROWS(TILE)
#undef TILE
}

static void
dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h, size_t ldh, const int32_t *sum, ob_acc *acc)
{
    (void)sum; /* both sides are signed */
#define TILE(r) weight_tile(r, m_padded / 4, panel + 64 * v, h, ldh, GROUP_ACC)
    BY_ROWS(TILE)
#undef TILE
}

/* ------------------------------------------------------------------ panels */

/* tile16 -> (N/4, 64, 4) codes 0..2; 16 bytes (4 outputs x 4 kk, four planes) become 64 contiguous ones */
static void
decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip, uint8_t *panel)
{
    const __m128i three = _mm_set1_epi8(3), turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (size_t n0 = 0; n0 < n; n0 += 16) {
        const uint8_t *q = packed + (((n0 / 64) * k_steps + 4 * strip) * 4 + (n0 % 64) / 16) * 64;
        for (size_t i = 0; i < 4; i++)
            for (size_t g = 0; g < 4; g++) {
                uint8_t *out = panel + n0 * 64 + 256 * g + 64 * i;
                int exists = 4 * strip + i < k_steps; /* else a column beyond K: code 1, zero */
                __m128i w = exists ? _mm_shuffle_epi8(LOAD128(q + 256 * i + 16 * g), turn) : _mm_set1_epi8(0x55);
                for (int p = 0; p < 4; p++)
                    _mm_storeu_si128((void *)(out + 16 * p), _mm_and_si128(_mm_srli_epi16(w, 2 * p), three));
            }
    }
}

/* xq (M, ldx) -> (M/4, 64, 4) int8; tokens and columns that do not exist are 0 */
static void
pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    size_t columns = OB_MIN(ldx - 64 * strip, (size_t)64);
    memset(panel, 0, OB_CEIL_DIV(m, 4) * 256);
    for (size_t t = 0; t < m; t += 4, panel += 256)
        for (size_t j = 0; j < columns; j += 16) {
            __m128i r[4];
            for (size_t i = 0; i < 4; i++)
                r[i] = t + i < m ? LOAD128(xq + (t + i) * ldx + 64 * strip + j) : _mm_setzero_si128();
            __m128i a0 = _mm_unpacklo_epi8(r[0], r[1]), a1 = _mm_unpackhi_epi8(r[0], r[1]);
            __m128i b0 = _mm_unpacklo_epi8(r[2], r[3]), b1 = _mm_unpackhi_epi8(r[2], r[3]);
            __m128i *out = (void *)(panel + 4 * j);
            _mm_storeu_si128(out, _mm_unpacklo_epi16(a0, b0));
            _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(a0, b0));
            _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(a1, b1));
            _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(a1, b1));
        }
}

#include "../kernels/all.tmpl.h"
