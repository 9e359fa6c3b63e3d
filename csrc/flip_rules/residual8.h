/* residual8.h - the 8-bit residual: e counts 1/128 of a cell, votes land in it during the backward.
 *
 *   vote:  e = clamp(e + SR(step * u), +-127),  step = -128 * eta * guard
 *   step:  nothing of its own; flip.tmpl.h moves the codes
 * +-1/2 cell is the dead zone, the other half is headroom until the step. */
#ifndef OB_RULE_RESIDUAL8_H
#define OB_RULE_RESIDUAL8_H

/* 64 columns of row n; u holds their votes in units of the learning rate. */
OB_INLINE void
residual_add(int8_t *residual, size_t columns, const vf *u, float step, ob_rng_row rng,
             size_t first)
{
    int8_t tail[OB_STRIP] = {0}, *e = residual;
    if (columns < OB_STRIP) {
        memcpy(tail, residual, columns);
        e = tail;
    }
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        vf d = stochastic_round(vf_mul(u[v], vf_set1(step)), uniform_lanes(rng, first + v * LANES),
                                127.0f);
        vf moved = vf_add(vi_to_f32(vi_load_i8(e + v * LANES)), d); /* whole numbers: exact */
        vi_store_i8(e + v * LANES,
                    vi_from_f32(vf_max(vf_min(moved, vf_set1(127.0f)), vf_set1(-127.0f))));
    }
    if (columns < OB_STRIP) {
        memcpy(residual, tail, columns);
    }
}

OB_INLINE void
vote_row_residual8(const ob_vote_strip *s, size_t n, const vf *u)
{
    residual_add(s->residual + n * s->k + s->strip * OB_STRIP, s->columns, u, s->step, s->rng[n],
                 s->strip * OB_STRIP);
}

OB_INLINE void
release_residual8(const ob_flip_row *row, size_t strip)
{
    (void)row;
    (void)strip;
}

#endif
