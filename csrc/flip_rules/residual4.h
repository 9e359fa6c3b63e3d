/* residual4.h - 4 bits: v = 15 T + e with |e| <= 7, so every v has one reading; codes move at vote time.
 *
 *   vote:  v = clamp(15 T + e + SR(step * u), +-22),  step = -15 * eta * guard;  T = rint(v / 15), e = v - 15 T
 *   step:  nothing left to do
 * Nibbles in blocks of 64 columns: byte j = column j (low) and column j + 32 (high). Started uniform within .3 cell, so
 * that the coarse grid does not wait in step. */
#ifndef OB_RULE_RESIDUAL4_H
#define OB_RULE_RESIDUAL4_H

/* Shared by the widths below 8: `units` per cell, e of one block as lanes; codes in, codes out. Returns codes moved. */
OB_INLINE uint64_t
coarse_move(float units, const code_row *codes, size_t columns, vi *e, const vf *u, float step,
            uint32_t random)
{
    vf high = vf_set1(units + (units - 1.0f) / 2.0f), low = vf_set1(-units - (units - 1.0f) / 2.0f);
    uint64_t moved = 0;
    for (size_t v = 0; v < STRIP_VECTORS && v * LANES < columns; v++) {
        vi r = number_lanes(random, v);
        vf d = vi_to_f32(stochastic_round(vf_mul(u[v], vf_set1(step)), r, 127.0f));
        vf t = vi_to_f32(vi_sub(load_codes(codes, v), vi_set1(1)));
        vf x = vf_add(vf_add(vf_mul(t, vf_set1(units)), vi_to_f32(e[v])), d);
        x = vf_max(vf_min(x, high), low);
        vi now = vi_rint(vf_mul(x, vf_set1(1.0f / units))); /* units is odd: never half way */
        e[v] = vi_from_f32(vf_add(x, vf_mul(vi_to_f32(now), vf_set1(-units))));
        moved += store_codes(codes, v, OB_MIN(columns - v * LANES, (size_t)LANES),
                             vi_add(now, vi_set1(1)));
    }
    return moved;
}

OB_INLINE uint64_t
residual4_move(uint8_t *residual, const code_row *codes, size_t columns, const vf *u, float step,
               uint32_t random)
{
    vi e[STRIP_VECTORS];
    load_nibbles(residual, e);
    uint64_t moved = coarse_move(15.0f, codes, columns, e, u, step, random);
    store_nibbles(residual, e);
    return moved;
}

OB_INLINE uint64_t
vote_row_residual4(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    code_row codes = code_row_at(s->codes, s->k_steps, n, s->strip);
    uint8_t *residual = (uint8_t *)s->residual + (i * s->strips + s->strip) * (OB_STRIP / 2);
    return residual4_move(residual, &codes, s->columns, u, s->step, random_of(s, i));
}

OB_INLINE uint64_t
step_row_residual4(const ob_flip_row *row)
{
    (void)row;
    return 0;
}

#endif
