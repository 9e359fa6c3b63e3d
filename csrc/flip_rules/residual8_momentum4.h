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
        vi d[STRIP_VECTORS];
        uint32_t random = ob_rng_number(row->random, (uint32_t)first);
        momentum_of_block(bits, row, first / OB_STRIP, m);
        for (size_t v = 0; v < STRIP_VECTORS; v++) {
            vf wanted = vf_mul(m[v], vf_set1(row->step));
            d[v] = stochastic_round(wanted, number_lanes(random, v), 127.0f);
        }
        residual8_add((int8_t *)row->residual + first, OB_MIN(row->k - first, (size_t)OB_STRIP), d);
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
