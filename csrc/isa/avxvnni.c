/* avxvnni.c - AVX-VNNI: vpdpbusd on 256 bits, for processors that have it without AVX-512.
 *
 * Hot loop           per 32 bytes                ports (Zen 4, EVEX form / Golden Cove)
 *   vpdpbusd ymm     32 u8 x s8 products         2 / 2 per cycle     the limit
 *   vpsrlw, vpand    decode 32 codes             2, 4 / 1, 3         four of each per 12 vpdpbusd
 *   vpbroadcastd     4 activations               a load only
 * A tile is 6 rows x 16 columns: 12 sums, two registers of codes, the mask, one broadcast are all 16 registers, and
 * the EVEX build of it runs at 0.98 of the processor's vpdpbusd rate on Zen 4; 5 rows 0.94, 4 rows 0.90.
 *
 * Why asm and not the intrinsic: see avx512vnni.c.  The braces ask the assembler for VEX, as it would take EVEX; a build
 * with -mavx512vnni -mavx512vl in place of -mavxvnni gives the same file in EVEX, which is how the tests run it on a
 * processor that has only that. */
#include "panels_avx2.h"

#define OB_ISA_NAME avxvnni
#define OB_FORWARD_ROWS 6
#define OB_INPUT_ROWS 6
#define OB_WEIGHT_ROWS 6

#ifdef __AVXVNNI__
#define ENCODING "%{vex%} "
#else
#define ENCODING ""
#endif

/* ------------------------------------------------------------------ integer tiles: rows x 16 columns */
OB_INLINE __m256i
dot4(__m256i sum, __m256i u8, __m256i s8)
{
    __asm__ volatile(ENCODING "vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u8), "x"(s8));
    return sum;
}

#define THREES 0x0303030303030303u

/* The unsigned side of the p-th four contraction entries of a step: codes of the 2-bit plane, or bytes of a panel. */
OB_INLINE __m256i
packed_codes(const uint8_t *at, int p)
{
    static const OB_ALIGNED(32) uint64_t three[4] = {THREES, THREES, THREES, THREES};
    __asm__ volatile("" : "+r"(at)); /* loads the bytes again for each p: no register is left */
    __m256i w = _mm256_srli_epi16(LOAD256(at), 2 * p);
    __asm__("vpand %1, %0, %0" : "+x"(w) : "m"(three)); /* nor for the mask */
    return w;
}

OB_INLINE __m256i
panel_bytes(const uint8_t *at, int p)
{
    return LOAD256(at + 64 * p);
}

/* acc = u8 . s8 - factor * offset; a step is `planes` groups of four */
OB_INLINE void
dot_tile(size_t rows, size_t steps, int planes, const uint8_t *at, size_t step_bytes,
         __m256i (*unsigned_side)(const uint8_t *, int), const int8_t *s8, size_t ld,
         const int32_t *offset, int32_t factor, int32_t (*acc)[OB_STRIP])
{
    __m256i sum[6][2];
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++) {
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    }
    for (size_t i = 0; i < steps; i++, at += step_bytes, s8 += 4 * planes) {
#pragma GCC unroll 4
        for (int p = 0; p < planes; p++) {
            const __m256i w0 = unsigned_side(at, p), w1 = unsigned_side(at + 32, p);
#pragma GCC unroll 6
            for (size_t r = 0; r < rows; r++) {
                __m256i b = broadcast4(s8 + r * ld + 4 * p);
                sum[r][0] = dot4(sum[r][0], w0, b);
                sum[r][1] = dot4(sum[r][1], w1, b);
            }
        }
    }
#pragma GCC unroll 6
    for (size_t r = 0; r < rows; r++) {
        vi bias = vi_set1((int32_t)((uint32_t)offset[r] * (uint32_t)factor));
        vi_store(acc[r], vi_sub((vi){sum[r][0], sum[r][1]}, bias));
    }
}

/* One token: no shifts. Masked codes are 4^p times the code; one sum per p, divided exactly at the end. */
static void
forward_vector(size_t k_steps, const uint8_t *q, const int8_t *x, int32_t offset, int32_t *acc)
{
    const __m256i mask[4] = {_mm256_set1_epi8(3), _mm256_set1_epi8(12), _mm256_set1_epi8(48),
                             _mm256_set1_epi8((char)192)};
    vi sum[4], total = vi_set1(-offset);
#pragma GCC unroll 4
    for (size_t p = 0; p < 4; p++) {
        sum[p] = vi_set1(0);
    }
    for (size_t i = 0; i < k_steps; i++, q += 256, x += 16) {
        _mm_prefetch((const char *)q + 4096, _MM_HINT_T0);
        __m256i w0 = LOAD256(q), w1 = LOAD256(q + 32);
        __asm__("" : "+x"(w0), "+x"(w1)); /* one load, not four */
#pragma GCC unroll 4
        for (size_t p = 0; p < 4; p++) {
            __m256i b = broadcast4(x + 4 * p);
            sum[p].lo = dot4(sum[p].lo, _mm256_and_si256(w0, mask[p]), b);
            sum[p].hi = dot4(sum[p].hi, _mm256_and_si256(w1, mask[p]), b);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        total = vi_add(total, vi_sra(sum[p], 2 * p));
    }
    vi_store(acc, total);
}

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
    if (rows == 1 && k_steps <= 16384) { /* 64 * 3 * 127 * K/4 fits int32 */
        for (size_t v = 0; v < 4; v++) {
            forward_vector(k_steps, q + 64 * v, x, *sum, acc[0] + OB_GROUP * v);
        }
        return;
    }
#define TILE(r) dot_tile(r, k_steps, 4, q + 64 * v, 256, packed_codes, x, ldx, sum, 1, GROUP_ACC)
    BY_ROWS(6, TILE)
#undef TILE
}

static void
dot_panel(size_t rows, size_t groups, const uint8_t *panel, const int8_t *s8, size_t ld,
          const int32_t *sum, int32_t factor, ob_acc *acc)
{
    const uint8_t *at = panel;
    size_t bytes = groups * 64;
#define TILE(r) \
    dot_tile(r, groups, 1, at + v * bytes, 64, panel_bytes, s8, ld, sum, factor, GROUP_ACC)
    BY_ROWS(6, TILE)
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

/* xq (M, ldx) -> (4, M/4, 16, 4) of x + 128; tokens and columns that do not exist are 128 */
static void
pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    const __m128i flip = _mm_set1_epi8((char)0x80);
    const int8_t *x = xq + OB_STRIP * strip;
    size_t columns = OB_MIN(ldx - OB_STRIP * strip, (size_t)OB_STRIP);
    size_t group_bytes = OB_CEIL_DIV(m, (size_t)4) * 4 * OB_GROUP;
    memset(panel, 0x80, OB_STRIP / OB_GROUP * group_bytes);
    for (size_t j = 0; j < columns; j += OB_GROUP) {
        __m128i *out = (void *)(panel + j / OB_GROUP * group_bytes);
        for (size_t t = 0; t < m; t += 4, out += 4) {
            __m128i r[4] = {flip, flip, flip, flip};
            for (size_t i = 0; i < OB_MIN(m - t, (size_t)4); i++) {
                r[i] = _mm_xor_si128(LOAD128(x + (t + i) * ldx + j), flip);
            }
            __m128i a0 = _mm_unpacklo_epi8(r[0], r[1]), a1 = _mm_unpackhi_epi8(r[0], r[1]);
            __m128i b0 = _mm_unpacklo_epi8(r[2], r[3]), b1 = _mm_unpackhi_epi8(r[2], r[3]);
            _mm_storeu_si128(out, _mm_unpacklo_epi16(a0, b0));
            _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(a0, b0));
            _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(a1, b1));
            _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(a1, b1));
        }
    }
}

#include "../kernels/all.tmpl.h"
