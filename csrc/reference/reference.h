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

/* One column of the momentum plane: two's complement nibbles in blocks of 64 columns (32 bytes), byte j holds column j
 * low and column j + 32 high. */
OB_INLINE int
ob_ref_nibble(const uint8_t *row, size_t k)
{
    unsigned byte = row[k / 64 * 32 + k % 32];
    int nibble = (int)(k % 64 < 32 ? byte & 15u : byte >> 4);
    return nibble < 8 ? nibble : nibble - 16;
}

OB_INLINE void
ob_ref_set_nibble(uint8_t *row, size_t k, int code)
{
    uint8_t *byte = &row[k / 64 * 32 + k % 32];
    unsigned nibble = (unsigned)code & 15u;
    *byte = (uint8_t)(k % 64 < 32 ? (*byte & 0xF0u) | nibble : (*byte & 0x0Fu) | nibble << 4);
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

/* SR(v) = clamp(floor(v + r), +-limit); clamped as a float, before it becomes an int */
OB_INLINE int
ob_ref_round(float v, ob_rng_row row, size_t column, float limit)
{
    float q = floorf(v + ob_rng_uniform(row, (uint32_t)column));
    return (int)fmaxf(-limit, fminf(limit, q));
}

/* The random rows of one stream of a layer at control's (seed, layer, step). */
OB_INLINE uint64_t
ob_ref_key(const double *control, uint64_t micro, enum ob_stream stream)
{
    return ob_rng_key((uint64_t)control[OB_CTL_SEED], (uint64_t)control[OB_CTL_LAYER],
                      (uint64_t)control[OB_CTL_STEP], micro, stream);
}

/* -128 * eta * guard: residual units per unit of vote */
OB_INLINE float
ob_ref_step(const double *control)
{
    return (-128.0f * (float)control[OB_CTL_ETA]) * (float)control[OB_CTL_GUARD];
}

OB_INLINE ob_status
ob_ref_check(const ob_weights *w)
{
    if (w->k > OB_MAX_K || w->n > OB_MAX_K) {
        return OB_OVERFLOW;
    }
    return w->scale_len == 1 || w->scale_len == w->n ? OB_OK : OB_INVALID;
}

#endif
