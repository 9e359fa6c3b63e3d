/* reference.h - what the naive twins share: one element at a time, exactly as csrc/README.md states it.
 *
 * Nothing here is fast, threaded or blocked, and nothing is shared with kernels/ or ops/: an error there must not be
 * repeated here.  Runs in the caller's floating-point environment, which has to be the default one. */
#ifndef OB_REFERENCE_H
#define OB_REFERENCE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../base/config.h"
#include "../base/rng.h"
#include "../onebit.h"

#define OB_REF_INF_BITS 0x7F800000u
#define OB_REF_NAN_BITS 0x7FC00000u /* the canonical quiet NaN: the only one ever written */
#define OB_REF_TINY 0x1p-100f       /* a gradient with a smaller absmax is zero */

OB_INLINE float
ob_ref_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

OB_INLINE uint32_t
ob_ref_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* x[i] of an array of type dt, as float */
OB_INLINE float
ob_ref_load(ob_dtype dt, const void *x, size_t i)
{
    if (dt == OB_F32) {
        return ((const float *)x)[i];
    }
    return ob_ref_float((uint32_t)((const uint16_t *)x)[i] << 16);
}

/* y[i] = v, rounded to nearest even if y is bfloat16 */
OB_INLINE void
ob_ref_store(ob_dtype dt, void *y, size_t i, float v)
{
    uint32_t bits = isnan(v) ? OB_REF_NAN_BITS : ob_ref_bits(v);
    if (dt == OB_F32) {
        ((float *)y)[i] = ob_ref_float(bits);
        return;
    }
    bits += 0x7FFFu + ((bits >> 16) & 1u); /* a NaN stays 0x7FC0 */
    ((uint16_t *)y)[i] = (uint16_t)(bits >> 16);
}

/* Where W[n][k] lives in tile16 (ceil(N/64), ceil(K/16), 4, 16, 4): byte index and shift of its two bits. */
OB_INLINE size_t
ob_ref_code_byte(size_t inputs, size_t n, size_t k)
{
    size_t steps = OB_CEIL_DIV(inputs, 16);
    size_t s = n / 64, v = n % 64 / 16, o = n % 16;
    size_t j = k / 16, kk = k % 4;
    return (((s * steps + j) * 4 + v) * 16 + o) * 4 + kk;
}

OB_INLINE unsigned
ob_ref_code_shift(size_t k)
{
    return 2u * (unsigned)(k % 16 / 4);
}

/* T[n][k] in -1, 0, 1 */
OB_INLINE int
ob_ref_code(const uint8_t *packed, size_t inputs, size_t n, size_t k)
{
    return (packed[ob_ref_code_byte(inputs, n, k)] >> ob_ref_code_shift(k) & 3) - 1;
}

OB_INLINE void
ob_ref_set_code(uint8_t *packed, size_t inputs, size_t n, size_t k, int code)
{
    uint8_t *byte = &packed[ob_ref_code_byte(inputs, n, k)];
    unsigned shift = ob_ref_code_shift(k);
    *byte = (uint8_t)((*byte & ~(3u << shift)) | (unsigned)(code + 1) << shift);
}

/* Field k of a row of signed fields of 2, 4 or 8 bits, in blocks of 64 columns of 8 * bits bytes: field j of a block lies
 * in byte j modulo that, the lowest bits first. */
OB_INLINE uint8_t *
ob_ref_field_byte(uint8_t *row, int bits, size_t k)
{
    return row + k / 64 * 8 * (size_t)bits + k % 64 % (8 * (size_t)bits);
}

OB_INLINE unsigned
ob_ref_field_shift(int bits, size_t k)
{
    return (unsigned)bits * (unsigned)(k % 64 / (8 * (size_t)bits));
}

OB_INLINE int
ob_ref_field(uint8_t *row, int bits, size_t k)
{
    int field = *ob_ref_field_byte(row, bits, k) >> ob_ref_field_shift(bits, k) & ((1 << bits) - 1);
    return field < 1 << (bits - 1) ? field : field - (1 << bits);
}

OB_INLINE void
ob_ref_set_field(uint8_t *row, int bits, size_t k, int value)
{
    uint8_t *byte = ob_ref_field_byte(row, bits, k);
    unsigned shift = ob_ref_field_shift(bits, k), mask = ((1u << bits) - 1) << shift;
    *byte = (uint8_t)((*byte & ~mask) | ((unsigned)value << shift & mask));
}

OB_INLINE float
ob_ref_scale(const ob_weights *w, size_t n)
{
    return w->scale[w->scale_len == 1 ? 0 : n];
}

OB_INLINE int
ob_ref_clamp(int v, int limit)
{
    return v > limit ? limit : v < -limit ? -limit : v;
}

/* SR(v) = clamp(floor(v + r), +-limit), r = first + column * (sqrt 2 - 1) mod 1 in 24 bits; clamped before it becomes an
 * int */
OB_INLINE int
ob_ref_round(float v, uint32_t first, size_t column, float limit)
{
    uint64_t random = (first + column * (uint64_t)6949351) % 16777216;
    float q = floorf(v + (float)random / 16777216.0f);
    return (int)fmaxf(-limit, fminf(limit, q));
}

/* The random rows of one stream of a layer at control's (seed, layer, step); each stripe draws its own. */
OB_INLINE uint64_t
ob_ref_key(const double *control, uint64_t micro, enum ob_stream stream)
{
    uint64_t step = (uint64_t)control[OB_CTL_STEP] + ((uint64_t)control[OB_CTL_STRIPE] << 32);
    return ob_rng_key((uint64_t)control[OB_CTL_SEED], (uint64_t)control[OB_CTL_LAYER], step, micro,
                      stream);
}

/* The random number at column 0 of one row of a stream, 24 bits. */
OB_INLINE uint32_t
ob_ref_first(uint64_t key, uint64_t row)
{
    return ob_rng_at_row(key, row).a >> 8;
}

/* The same of a rounding that writes a plane: one for each weight, turned by step and micro-batch. */
OB_INLINE uint32_t
ob_ref_stepwise_first(const double *control, uint64_t micro, enum ob_stream stream, size_t output)
{
    uint64_t key =
        ob_rng_key((uint64_t)control[OB_CTL_SEED], (uint64_t)control[OB_CTL_LAYER], 0, 0, stream);
    uint64_t turn = (uint64_t)control[OB_CTL_STEP] * 2654435769u +
                    (micro & 0xFFFFFFFFu) * 3242174889u + (micro >> 32) * 2447445413u;
    return (ob_rng_at_row(key, output).a + (uint32_t)turn) >> 8;
}

/* Block-cyclic training: the output of row i of the planes, and how many rows there are; NULL: all rows */
OB_INLINE size_t
ob_ref_stride(const ob_planes *planes)
{
    return planes == NULL || planes->stripes < 2 ? 1 : planes->stripes;
}

OB_INLINE size_t
ob_ref_output(const ob_planes *planes, size_t i)
{
    return ob_ref_stride(planes) == 1 ? i : planes->stripe + i * planes->stripes;
}

OB_INLINE size_t
ob_ref_rows(const ob_planes *planes, size_t outputs)
{
    size_t rows = 0;
    while (ob_ref_output(planes, rows) < outputs) {
        rows++;
    }
    return rows;
}

OB_INLINE ob_status
ob_ref_check(const ob_weights *w)
{
    if (w->k > OB_MAX_K || w->n > OB_MAX_K) {
        return OB_OVERFLOW;
    }
    return w->scale_len == 1 || w->scale_len == w->n ? OB_OK : OB_INVALID;
}

/* reference_rules.c.  The residual of input k in row i of the planes; a vote of size u on it, by stochastic rounding with
 * `random` at column 0; what a step does to it then.  The latter two return 1 if T[n][k] changed. */
int ob_ref_residual(const ob_planes *planes, size_t inputs, size_t i, size_t k);
int ob_ref_apply(ob_planes *planes, uint8_t *packed, size_t inputs, size_t i, size_t k, float u,
                 uint32_t random);
int ob_ref_step(ob_planes *planes, uint8_t *packed, size_t inputs, size_t i, size_t k);
/* Votes u (K,) into the momentum of row i; a step's first micro-batch lets it decay. */
void ob_ref_vote_momentum(size_t inputs, const float *u, uint64_t micro, enum ob_stream stream,
                          size_t i, ob_planes *planes);

/* reference_flip.c */
float ob_ref_sum_row(size_t inputs, const float *q);
float ob_ref_mean(float sum, size_t count);

#endif
