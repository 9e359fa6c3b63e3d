/* residual8.h - the 8-bit residual: e counts 1/128 of a cell, votes land in it during the backward.
 *
 *   vote:  e = clamp(e + SR(step * u), +-127),  step = -128 * eta * guard
 *   step:  e > 64, T < 1: T += 1, e -= 128     e < -64, T > -1: T -= 1, e += 128     otherwise e = clamp(e, +-64)
 * +-1/2 cell is the dead zone, the other half is headroom until the step. Where votes push on against a code's bound,
 * many residuals pass the threshold in every step; elsewhere few do, and vectors only look for them. */
#ifndef OB_RULE_RESIDUAL8_H
#define OB_RULE_RESIDUAL8_H

/* e += SR(step * u) for the `columns` columns of a block that begins at column `first`. */
OB_INLINE void
residual8_add(int8_t *residual, size_t columns, const vf *u, float step, ob_rng_row rng,
              size_t first)
{
    int8_t tail[OB_STRIP] = {0}, *e = residual;
    vi d[STRIP_VECTORS];
    if (columns < OB_STRIP) {
        memcpy(tail, residual, columns);
        e = tail;
    }
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        d[v] = stochastic_round(vf_mul(u[v], vf_set1(step)), uniform_lanes(rng, first, v), 127.0f);
    }
    v_add64(e, d);
    if (columns < OB_STRIP) {
        memcpy(residual, tail, columns);
    }
}

OB_INLINE vi
clamp_lanes(vi a, int32_t low, int32_t high)
{
    vi top = vi_set1(high);
    return vi_max(vi_sub(top, vi_max(vi_sub(top, a), vi_set1(0))), vi_set1(low));
}

OB_INLINE uint64_t
residual8_flip(const ob_flip_row *row, size_t strip)
{
    size_t k0 = strip * OB_STRIP, columns = OB_MIN(row->k - k0, (size_t)OB_STRIP);
    int8_t *residual = (int8_t *)row->residual + k0, tail[OB_STRIP] = {0}, *e = residual;
    uint64_t moved = 0;
    if (columns < OB_STRIP) {
        memcpy(tail, residual, columns);
        e = tail;
    }
    for (uint64_t beyond = v_mask_beyond64(e); beyond;) {
        size_t v = (size_t)__builtin_ctzll(beyond) / LANES; /* the first 16 columns with any */
        code_row codes = code_row_at(row->packed, row->k_steps, row->n, strip);
        beyond &= ~((uint64_t)0xFFFF << v * LANES);
        vi r = vi_load_i8(e + v * LANES), code = load_codes(&codes, v);
        vi up = vi_srl(vi_sub(vi_set1(64), r), 31), down = vi_srl(vi_add(r, vi_set1(64)), 31);
        vi now = clamp_lanes(vi_sub(vi_add(code, up), down), 0, 2);
        /* a code at its bound lets its residual wait at half a cell */
        r = clamp_lanes(vi_sub(r, vi_sll(vi_sub(now, code), 7)), -64, 64);
        vi_store_i8(e + v * LANES, r);
        moved += store_codes(&codes, v, OB_MIN(columns - v * LANES, (size_t)LANES), now);
    }
    if (columns < OB_STRIP) {
        memcpy(residual, tail, columns);
    }
    return moved;
}

OB_INLINE uint64_t
vote_row_residual8(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    (void)n;
    size_t first = s->strip * OB_STRIP;
    residual8_add((int8_t *)s->residual + i * s->k + first, s->columns, u, s->step, s->rng[i],
                  first);
    return 0;
}

OB_INLINE uint64_t
step_block_residual8(const ob_flip_row *row, size_t strip)
{
    return residual8_flip(row, strip);
}

#endif
