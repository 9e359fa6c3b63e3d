/* stochastic.h - no memory at all: T = clamp(T + SR(step * u), +-1), step = -eta * guard, at vote time.
 *
 * The control of every claim: writing with a quantum of a whole cell randomises the weights. */
#ifndef OB_RULE_STOCHASTIC_H
#define OB_RULE_STOCHASTIC_H

OB_INLINE uint64_t
vote_row_stochastic(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    code_row codes = code_row_at(s->codes, s->k_steps, n, s->strip);
    vi e[STRIP_VECTORS];
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        e[v] = vi_set1(0);
    }
    return coarse_move(1.0f, &codes, s->columns, e, u, s->step, random_of(s, i));
}

OB_INLINE uint64_t
step_row_stochastic(const ob_flip_row *row)
{
    (void)row;
    return 0;
}

#endif
