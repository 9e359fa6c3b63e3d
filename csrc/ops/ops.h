/* ops.h - what the macro-kernels share. */
#ifndef OB_OPS_H
#define OB_OPS_H

#include "../base/rng.h"
#include "../onebit.h"

/* The domain that every operation shares: K within int32's reach, a scale per tensor or per row, tile16 (or `also`). */
OB_INLINE ob_status
ob_check_weights(const ob_weights *w, ob_format_id also)
{
    if (w->packing != OB_FORMAT_tile16 && w->packing != also) {
        return OB_UNSUPPORTED;
    }
    if (w->k > OB_MAX_K || w->n > SIZE_MAX / 64) {
        return OB_OVERFLOW;
    }
    return w->scale_len == 1 || w->scale_len == w->n ? OB_OK : OB_INVALID;
}

/* Steps are counted anew in each stripe, which draws its own numbers. */
OB_INLINE uint64_t
ob_control_key(const double *control, double micro, enum ob_stream stream)
{
    uint64_t step = (uint64_t)control[OB_CTL_STEP] + ((uint64_t)control[OB_CTL_STRIPE] << 32);
    return ob_rng_key((uint64_t)control[OB_CTL_SEED], (uint64_t)control[OB_CTL_LAYER], step,
                      (uint64_t)micro, stream);
}

/* Of the streams that write one weight step by step (base/rng.h): step and micro-batch are in ob_control_turn alone. */
OB_INLINE uint64_t
ob_control_stepwise_key(const double *control, enum ob_stream stream)
{
    return ob_rng_key((uint64_t)control[OB_CTL_SEED], (uint64_t)control[OB_CTL_LAYER], 0, 0,
                      stream);
}

OB_INLINE uint32_t
ob_control_turn(const double *control, double micro)
{
    return ob_rng_turn((uint64_t)control[OB_CTL_STEP], (uint64_t)micro);
}

/* -units * min(eta, OB_ETA_LIMIT) * guard: a vote of 1 in units of the residual */
OB_INLINE float
ob_control_step(ob_rule rule, const double *control)
{
    float eta = (float)control[OB_CTL_ETA];
    eta = control[OB_CTL_CAP] > 0 && eta > OB_ETA_LIMIT ? OB_ETA_LIMIT : eta;
    return (-(float)ob_rule_units(rule) * eta) * (float)control[OB_CTL_GUARD];
}

/* What u is clipped at: CLIP, but no more than what saturates a residual anyway, so that |step * u| stays below 2^20 */
OB_INLINE float
ob_control_clip(ob_rule rule, const double *control, float step)
{
    float clip = (float)control[OB_CTL_CLIP], enough = 0x1p19f / -step + ob_rule_dead_zone(rule);
    return ob_rule_momentum_bits(rule) || clip < enough ? clip : enough;
}

/* Row i of the planes is output ob_first_row + ob_row_stride * i. */
OB_INLINE size_t
ob_row_stride(const ob_planes *planes)
{
    return planes->stripes > 1 ? planes->stripes : 1;
}

OB_INLINE size_t
ob_first_row(const ob_planes *planes)
{
    return planes->stripes > 1 ? planes->stripe : 0;
}

OB_INLINE size_t
ob_plane_rows(size_t n, const ob_planes *planes)
{
    return ob_active_rows(n, planes->stripes, planes->stripe);
}

#endif
