/* residual8.h - the 8-bit residual: e counts 1/128 of a cell, votes land in it during the backward.
 *
 *   vote:  e = clamp(e + SR(step * u), +-127),  step = -128 * eta * guard
 *   step:  e > 64, T < 1: T += 1, e -= 128     e < -64, T > -1: T -= 1, e += 128     otherwise e = clamp(e, +-64)
 * +-1/2 cell is the dead zone, the other half is headroom until the step. Few residuals pass the threshold in a step,
 * so vectors only look for them and plain C moves the codes. */
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

OB_INLINE uint64_t
residual8_flip(const ob_flip_row *row, size_t strip)
{
    int8_t *residual = row->residual, tail[OB_STRIP] = {0};
    size_t k0 = strip * OB_STRIP, columns = OB_MIN(row->k - k0, (size_t)OB_STRIP);
    uint64_t moved = 0, beyond;
    if (columns < OB_STRIP) {
        memcpy(tail, residual + k0, columns);
    }
    for (beyond = v_mask_beyond64(columns < OB_STRIP ? tail : residual + k0); beyond;
         beyond &= beyond - 1) {
        size_t k = k0 + (size_t)__builtin_ctzll(beyond);
        int e = residual[k], up = e > 0;
        uint64_t changed = move_code(row, k, up);
        /* a code at its bound lets its residual wait at half a cell */
        residual[k] = (int8_t)(changed ? (up ? e - 128 : e + 128) : (up ? 64 : -64));
        moved += changed;
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
