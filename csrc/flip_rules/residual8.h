/* residual8.h - the 8-bit residual: e counts 1/128 of a cell, votes land in it during the backward.
 *
 *   vote:  e = clamp(e + SR(step * u), +-127),  step = -128 * eta * guard
 *   step:  e > 64, T < 1: T += 1, e -= 128     e < -64, T > -1: T -= 1, e += 128     otherwise e = clamp(e, +-64)
 * +-1/2 cell is the dead zone, the other half is headroom until the step. Few residuals pass the threshold in a step,
 * so vectors only look for them and plain C moves the codes; residual16 shares it. */
#ifndef OB_RULE_RESIDUAL8_H
#define OB_RULE_RESIDUAL8_H

/* e = clamp(e + clamp(d, +-127), +-127) for the `columns` columns of a block */
OB_INLINE void
residual8_add(int8_t *residual, size_t columns, const vi *d)
{
    int8_t tail[OB_STRIP] = {0}, *e = residual;
    if (columns < OB_STRIP) {
        memcpy(tail, residual, columns);
        e = tail;
    }
    v_add64(e, d);
    if (columns < OB_STRIP) {
        memcpy(residual, tail, columns);
    }
}

OB_INLINE int
residual_load(int bits, const void *residual, size_t k)
{
    return bits == 8 ? ((const int8_t *)residual)[k] : ((const int16_t *)residual)[k];
}

OB_INLINE void
residual_store(int bits, void *residual, size_t k, int e)
{
    if (bits == 8) {
        ((int8_t *)residual)[k] = (int8_t)e;
    }
    else {
        ((int16_t *)residual)[k] = (int16_t)e;
    }
}

/* Which of the `columns` residuals from column `first` on are beyond half a cell. */
OB_INLINE uint64_t
residual_beyond(int bits, const void *residual, size_t first, size_t columns)
{
    int8_t block[OB_STRIP] = {0};
    if (bits == 8 && columns == OB_STRIP) {
        return v_mask_beyond64((const int8_t *)residual + first);
    }
    for (size_t k = 0; k < columns; k++) {
        int e = residual_load(bits, residual, first + k);
        block[k] = (int8_t)(bits == 8 ? e : e > 8192 || e < -8192 ? 127 : 0);
    }
    return v_mask_beyond64(block);
}

/* Lists the blocks of a row where residuals are beyond the threshold, then moves their codes one after the other: which
 * blocks those are, and how many codes each moves, is noise that no branch foresees. */
OB_INLINE uint64_t
residual_flip(int bits, const ob_flip_row *row)
{
    enum { BLOCKS = 64 };
    const int half = bits == 8 ? 64 : 8192;
    uint64_t beyond[BLOCKS], moved = 0;
    size_t block[BLOCKS];
    for (size_t k0 = 0; k0 < row->k;) {
        size_t count = 0, i = 0, end = OB_MIN(row->k, k0 + BLOCKS * OB_STRIP);
        for (; k0 < end; k0 += OB_STRIP) {
            size_t columns = OB_MIN(end - k0, (size_t)OB_STRIP);
            block[count] = k0;
            beyond[count] = residual_beyond(bits, row->residual, k0, columns);
            count += beyond[count] != 0;
        }
        while (i < count) {
            size_t k = block[i] + (size_t)__builtin_ctzll(beyond[i]);
            int e = residual_load(bits, row->residual, k), sign = e > 0 ? 1 : -1;
            int moves = move_code(row, k, sign);
            /* a code at its bound lets its residual wait at half a cell */
            residual_store(bits, row->residual, k, sign * half + moves * (e - sign * 3 * half));
            moved += (uint64_t)moves;
            beyond[i] &= beyond[i] - 1;
            i += beyond[i] == 0;
        }
    }
    return moved;
}

OB_INLINE uint64_t
vote_row_residual8(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    vi d[STRIP_VECTORS];
    (void)n;
    /* Not stochastic_round: residual8_add clamps, and |step * u| < 2^20 by ob_control_clip (ops.h). */
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        vf wanted = vf_mul(u[v], vf_set1(s->step));
        d[v] = vi_floor(vf_add_uniform(wanted, number_lanes(random_of(s, i), v)));
    }
    residual8_add((int8_t *)s->residual + i * s->k + s->strip * OB_STRIP, s->columns, d);
    return 0;
}

OB_INLINE uint64_t
step_row_residual8(const ob_flip_row *row)
{
    return residual_flip(8, row);
}

#endif
