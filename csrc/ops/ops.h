/* ops.h - what the macro-kernels share. */
#ifndef OB_OPS_H
#define OB_OPS_H

#include "../base/rng.h"
#include "../onebit.h"

OB_INLINE size_t
ob_dtype_bytes(ob_dtype dt)
{
    return dt == OB_F32 ? 4 : 2;
}

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

/* -units * eta * guard: a vote of 1 in units of the residual */
OB_INLINE float
ob_control_step(ob_rule rule, const double *control)
{
    return (-(float)ob_rule_units(rule) * (float)control[OB_CTL_ETA]) *
           (float)control[OB_CTL_GUARD];
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
