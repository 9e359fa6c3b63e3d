/* residual8_momentum4.h - for pre-training: votes go into a 4-bit momentum plane, step() adds it to the residual.
 *
 *   vote:  m = beta1 * m + (1 - beta1) * u
 *   step:  e = clamp(e + SR(step * m), +-127), then as residual8 */
#ifndef OB_RULE_RESIDUAL8_MOMENTUM4_H
#define OB_RULE_RESIDUAL8_MOMENTUM4_H

OB_INLINE uint64_t
residual8_momentum_step(int bits, const ob_flip_row *row)
{
    for (size_t first = 0; first < row->k; first += OB_STRIP) {
        vf m[STRIP_VECTORS];
        momentum_of_block(bits, row, first / OB_STRIP, m);
        residual8_add((int8_t *)row->residual + first, OB_MIN(row->k - first, (size_t)OB_STRIP), m,
                      row->step, row->rng, first);
    }
    return residual_flip(8, row);
}

OB_INLINE uint64_t
vote_row_residual8_momentum4(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    (void)n;
    momentum_vote(4, s, i, u);
    return 0;
}

OB_INLINE uint64_t
step_row_residual8_momentum4(const ob_flip_row *row)
{
    return residual8_momentum_step(4, row);
}

#endif
