/* residual8_momentum8.h - residual8_momentum4 with 8-bit momentum codes. */
#ifndef OB_RULE_RESIDUAL8_MOMENTUM8_H
#define OB_RULE_RESIDUAL8_MOMENTUM8_H

OB_INLINE uint64_t
vote_row_residual8_momentum8(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    (void)n;
    momentum_vote(8, s, i, u);
    return 0;
}

OB_INLINE uint64_t
step_row_residual8_momentum8(const ob_flip_row *row)
{
    return residual8_momentum_step(8, row);
}

#endif
