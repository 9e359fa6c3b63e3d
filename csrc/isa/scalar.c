/* scalar.c - plain C: the baseline of every machine, and what a new instruction set is checked against.
 *
 * 16 virtual lanes are arrays, which the compiler may vectorise with what the baseline has; panels are int8 codes. */
#include <string.h>

#include "../kernels/kernel.h"

#define OB_ISA_NAME scalar
#define OB_FORWARD_ROWS 4
#define OB_INPUT_ROWS 4
#define OB_WEIGHT_ROWS 4

/* ------------------------------------------------------------------ vocabulary */
typedef struct {
    float lane[16];
} vf;
typedef struct {
    int32_t lane[16];
} vi;

#define EACH(type, expression)      \
    type out;                       \
    for (size_t i = 0; i < 16; i++) \
        out.lane[i] = (expression); \
    return out
#define U(x) ((uint32_t)(x))

/* clang-format off: one line a name */
OB_INLINE vf
vf_load(const float *p)
{
    EACH(vf, p[i]);
}
OB_INLINE void
vf_store(float *p, vf v)
{
    memcpy(p, v.lane, sizeof v.lane);
}
OB_INLINE vf
vf_set1(float x)
{
    EACH(vf, x);
}
OB_INLINE vf
vf_add(vf a, vf b)
{
    EACH(vf, a.lane[i] + b.lane[i]);
}
OB_INLINE vf
vf_mul(vf a, vf b)
{
    EACH(vf, a.lane[i] * b.lane[i]);
}
OB_INLINE vf
vf_min(vf a, vf b)
{
    EACH(vf, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]);
}
OB_INLINE vf
vf_max(vf a, vf b)
{
    EACH(vf, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
}
/* clang-format on */

OB_INLINE vf
vf_clip(vf a, vf limit)
{
    EACH(vf, a.lane[i] > limit.lane[i]    ? limit.lane[i]
             : a.lane[i] < -limit.lane[i] ? -limit.lane[i]
                                          : a.lane[i]);
}

OB_INLINE vf
vf_one_nan(vf a)
{
    EACH(vf, a.lane[i] != a.lane[i] ? __builtin_nanf("") : a.lane[i]);
}

OB_INLINE vf
vf_bits(vi a)
{
    vf out;
    memcpy(&out, &a, sizeof out);
    return out;
}

OB_INLINE vi
vf_to_bits(vf a)
{
    vi out;
    memcpy(&out, &a, sizeof out);
    return out;
}

OB_INLINE float
vf_sum(vf a)
{
    for (size_t half = 8; half; half /= 2) {
        for (size_t i = 0; i < half; i++) {
            a.lane[i] += a.lane[i + half];
        }
    }
    return a.lane[0];
}

OB_INLINE void
vf_sum_pair(vf a, vf b, float *sum_a, float *sum_b)
{
    *sum_a = vf_sum(a);
    *sum_b = vf_sum(b);
}

/* clang-format off */
OB_INLINE vi vi_load(const int32_t *p) { EACH(vi, p[i]); }
OB_INLINE void vi_store(int32_t *p, vi v) { memcpy(p, v.lane, sizeof v.lane); }
OB_INLINE vi vi_set1(int32_t x) { EACH(vi, x); }
OB_INLINE vi vi_iota(void) { EACH(vi, (int32_t)i); }
OB_INLINE vi vi_add(vi a, vi b) { EACH(vi, (int32_t)(U(a.lane[i]) + U(b.lane[i]))); }
OB_INLINE vi vi_sub(vi a, vi b) { EACH(vi, (int32_t)(U(a.lane[i]) - U(b.lane[i]))); }
OB_INLINE vi vi_mul(vi a, vi b) { EACH(vi, (int32_t)(U(a.lane[i]) * U(b.lane[i]))); }
OB_INLINE vi vi_and(vi a, vi b) { EACH(vi, a.lane[i] & b.lane[i]); }
OB_INLINE vi vi_andnot(vi mask, vi a) { EACH(vi, ~mask.lane[i] & a.lane[i]); }
OB_INLINE vi vi_or(vi a, vi b) { EACH(vi, a.lane[i] | b.lane[i]); }
OB_INLINE vi vi_xor(vi a, vi b) { EACH(vi, a.lane[i] ^ b.lane[i]); }
OB_INLINE vi vi_srl(vi a, unsigned n) { EACH(vi, (int32_t)(U(a.lane[i]) >> n)); }
OB_INLINE vi vi_sra(vi a, unsigned n) { EACH(vi, a.lane[i] >> n); }
OB_INLINE vi vi_sll(vi a, unsigned n) { EACH(vi, (int32_t)(U(a.lane[i]) << n)); }
OB_INLINE vi vi_srlv(vi a, vi n) { EACH(vi, (int32_t)(U(a.lane[i]) >> n.lane[i])); }
OB_INLINE vi vi_max(vi a, vi b) { EACH(vi, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
OB_INLINE vf vi_to_f32(vi a) { EACH(vf, (float)a.lane[i]); }
OB_INLINE vi vi_from_f32(vf a) { EACH(vi, (int32_t)a.lane[i]); }
/* adding 1.5 * 2^23 rounds to a whole number, half to even */
OB_INLINE vi vi_rint(vf a) { EACH(vi, (int32_t)((a.lane[i] + 12582912.0f) - 12582912.0f)); }
OB_INLINE vi vi_floor(vf a) { EACH(vi, (int32_t)a.lane[i] - ((float)(int32_t)a.lane[i] > a.lane[i])); }
OB_INLINE vf vf_add_uniform(vf v, vi r) { EACH(vf, v.lane[i] + (float)(U(r.lane[i]) >> 8) * 0x1p-24f); }
OB_INLINE vi vi_add_where(vi sum, vi a, vi x, vi mask) { EACH(vi, sum.lane[i] + (x.lane[i] & mask.lane[i] ? a.lane[i] : 0)); }
OB_INLINE vi vi_sub_unless(vi sum, vi a, vi x, vi mask) { EACH(vi, sum.lane[i] - (x.lane[i] & mask.lane[i] ? 0 : a.lane[i])); }
OB_INLINE vi vi_load_i8(const int8_t *p) { EACH(vi, p[i]); }
OB_INLINE vi vi_load_u16(const uint16_t *p) { EACH(vi, p[i]); }
/* clang-format on */

OB_INLINE void
vi_store_i8(int8_t *p, vi a)
{
    for (size_t i = 0; i < 16; i++) {
        p[i] = (int8_t)a.lane[i];
    }
}

OB_INLINE void
vi_store_u16(uint16_t *p, vi a)
{
    for (size_t i = 0; i < 16; i++) {
        p[i] = (uint16_t)a.lane[i];
    }
}

OB_INLINE int32_t
vi_hmax(vi a)
{
    int32_t top = a.lane[0];
    for (size_t i = 1; i < 16; i++) {
        top = a.lane[i] > top ? a.lane[i] : top;
    }
    return top;
}

OB_INLINE int32_t
vi_sum(vi a)
{
    uint32_t sum = 0;
    for (size_t i = 0; i < 16; i++) {
        sum += U(a.lane[i]);
    }
    return (int32_t)sum;
}

OB_INLINE int64_t
vi_sum64(vi a, vi b)
{
    int64_t sum = 0;
    for (size_t i = 0; i < 16; i++) {
        sum += (int64_t)a.lane[i] + b.lane[i];
    }
    return sum;
}

OB_INLINE void
v_add64(int8_t *e, const vi *d)
{
    for (size_t i = 0; i < 64; i++) {
        int vote = d[i / 16].lane[i % 16], sum = e[i] + (vote > 127    ? 127
                                                         : vote < -127 ? -127
                                                                       : vote);
        e[i] = (int8_t)(sum > 127 ? 127 : sum < -127 ? -127 : sum);
    }
}

OB_INLINE uint64_t
v_mask_beyond64(const int8_t *p)
{
    uint64_t mask = 0;
    for (size_t i = 0; i < 64; i++) {
        mask |= (uint64_t)(p[i] > 64 || p[i] < -64) << i;
    }
    return mask;
}

OB_INLINE void
v_transpose16(const int8_t *in, size_t ld, int8_t *out)
{
    for (size_t i = 0; i < 16; i++) {
        for (size_t j = 0; j < 16; j++) {
            out[16 * j + i] = in[i * ld + j];
        }
    }
}

/* ------------------------------------------------------------------ integer tiles */

#define BLOCK 32 /* columns whose sums are registers, if the compiler vectorises */

/* acc[r][j] += sum_i s8[r][i] * codes[i][j] over `count` rows of 64 codes -1..1; 256 products of 127 fit int16 */
OB_INLINE void
add_code_rows(size_t rows, size_t count, const int8_t *codes, const int8_t *s8, size_t ld,
              ob_acc *acc)
{
    for (size_t r = 0; r < rows; r++) {
        for (size_t j0 = 0; j0 < OB_STRIP; j0 += BLOCK) {
            int16_t sum[BLOCK] = {0};
            for (size_t i = 0; i < count; i++) {
                int16_t x = s8[r * ld + i];
                for (size_t j = 0; j < BLOCK; j++) {
                    sum[j] = (int16_t)(sum[j] + x * codes[i * OB_STRIP + j0 + j]);
                }
            }
            for (size_t j = 0; j < BLOCK; j++) {
                acc[r][j0 + j] += sum[j];
            }
        }
    }
}

static void
dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
            const int32_t *sum, ob_acc *acc)
{
    (void)sum; /* codes are decoded to -1..1 */
    memset(acc, 0, rows * sizeof *acc);
    for (size_t step = 0; step < k_steps; step++, q += 256) {
        int8_t codes[16][OB_STRIP];
        for (size_t o = 0; o < OB_STRIP; o++) {
            for (size_t k = 0; k < 16; k++) {
                codes[k][o] = (int8_t)(((q[4 * o + k % 4] >> (2 * (k / 4))) & 3) - 1);
            }
        }
        add_code_rows(rows, 16, codes[0], x + 16 * step, ldx, acc);
    }
}

static void
dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q, size_t ldq,
          const int32_t *sum, ob_acc *acc)
{
    (void)sum;
    memset(acc, 0, rows * sizeof *acc);
    for (size_t n = 0; n < n_padded; n += 256) {
        const int8_t *codes = (const int8_t *)panel + n * OB_STRIP;
        add_code_rows(rows, OB_MIN(n_padded - n, (size_t)256), codes, q + n, ldq, acc);
    }
}

static void
dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h, size_t ldh,
           const int32_t *sum, ob_acc *acc)
{
    (void)sum;
    memset(acc, 0, rows * sizeof *acc);
    for (size_t r = 0; r < rows; r++) {
        const int8_t *x = (const int8_t *)panel, *g = h + r * ldh;
        for (size_t m = 0; m < m_padded; m += 4, x += 4 * OB_STRIP, g += 4) {
            const int16_t g0 = g[0], g1 = g[1], g2 = g[2], g3 = g[3];
            for (size_t j = 0; j < OB_STRIP; j++) { /* two products of 127 * 127 fit int16 */
                int16_t low = (int16_t)(g0 * x[j] + g1 * x[OB_STRIP + j]);
                int16_t high = (int16_t)(g2 * x[2 * OB_STRIP + j] + g3 * x[3 * OB_STRIP + j]);
                acc[r][j] += low + high;
            }
        }
    }
}

/* ------------------------------------------------------------------ panels: (rows, 64) int8 */
static void
decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip, uint8_t *panel)
{
    for (size_t i = 0; i < OB_CEIL_DIV(n, 16) * 16; i++) {
        for (size_t j = 0; j < OB_STRIP; j++, panel++) {
            size_t k = OB_STRIP * strip + j;
            unsigned byte = packed[k / 16 < k_steps ? ob_tile16_byte(k_steps, i, k) : 0];
            *panel = k / 16 < k_steps ? (uint8_t)((byte >> ob_tile16_shift(k) & 3u) - 1u) : 0;
        }
    }
}

static void
pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    size_t columns = OB_MIN(ldx - OB_STRIP * strip, (size_t)OB_STRIP);
    memset(panel, 0, OB_CEIL_DIV(m, 4) * 4 * OB_STRIP);
    for (size_t t = 0; t < m; t++) {
        memcpy(panel + t * OB_STRIP, xq + t * ldx + OB_STRIP * strip, columns);
    }
}

#include "../kernels/all.tmpl.h"
