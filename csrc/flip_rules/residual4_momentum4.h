/* residual4_momentum4.h - 10 bits for pre-training: votes into a 4-bit momentum, which moves residual4 in step(). */
#ifndef OB_RULE_RESIDUAL4_MOMENTUM4_H
#define OB_RULE_RESIDUAL4_MOMENTUM4_H

OB_INLINE uint64_t
vote_row_residual4_momentum4(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    (void)n;
    momentum_vote(4, s, i, u);
    return 0;
}

OB_INLINE uint64_t
step_row_residual4_momentum4(const ob_flip_row *row)
{
    uint64_t moved = 0;
    for (size_t first = 0, strip = 0; first < row->k; first += OB_STRIP, strip++) {
        vf m[STRIP_VECTORS];
        momentum_of_block(4, row, strip, m);
        code_row codes = code_row_at(row->packed, row->k_steps, row->n, strip);
        moved += residual4_move((uint8_t *)row->residual + strip * (OB_STRIP / 2), &codes,
                                OB_MIN(row->k - first, (size_t)OB_STRIP), m, row->step,
                                ob_rng_number(row->random, (uint32_t)first));
    }
    return moved;
}

#endif
