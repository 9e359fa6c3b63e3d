/* residual16.h - the 16-bit residual for very long runs or many micro-batches: e counts 1/16384 of a cell.
 *
 *   vote:  e = clamp(e + SR(step * u), +-16256),  step = -16384 * eta * guard
 *   step:  as residual8 with 8192 for 64 and 16384 for 128
 * +-16256 is the same +-127/128 of a cell as with 8 bits; SR(v) = clamp(floor(v + r), +-16256). */
#ifndef OB_RULE_RESIDUAL16_H
#define OB_RULE_RESIDUAL16_H

OB_INLINE uint64_t
vote_row_residual16(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    (void)n;
    int16_t *e = (int16_t *)s->residual + i * s->k + s->strip * OB_STRIP;
    for (size_t v = 0; v < STRIP_VECTORS && v * LANES < s->columns; v++) {
        vi r = number_lanes(random_of(s, i), v);
        vi d = stochastic_round(vf_mul(u[v], vf_set1(s->step)), r, 16256.0f);
        size_t count = OB_MIN(s->columns - v * LANES, (size_t)LANES);
        vf moved = vi_to_f32(vi_add(load_words(e + v * LANES, count), d));
        moved = vf_max(vf_min(moved, vf_set1(16256.0f)), vf_set1(-16256.0f));
        store_words(e + v * LANES, count, vi_from_f32(moved));
    }
    return 0;
}

OB_INLINE uint64_t
step_row_residual16(const ob_flip_row *row)
{
    return residual_flip(16, row);
}

#endif
