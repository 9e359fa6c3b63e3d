/* residual2.h - 2 bits: v = 3 T + e with |e| <= 1; codes move at vote time, as residual4.
 *
 * Quarters in blocks of 64 columns: bits 2q of byte j = column j + 16 q, two's complement. */
#ifndef OB_RULE_RESIDUAL2_H
#define OB_RULE_RESIDUAL2_H

OB_INLINE uint64_t
vote_row_residual2(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    code_row codes = code_row_at(s->codes, s->k_steps, n, s->strip);
    uint8_t *residual = (uint8_t *)s->residual + (i * s->strips + s->strip) * (OB_STRIP / 4);
    vi bytes = vi_load_i8((const int8_t *)residual), e[STRIP_VECTORS];
    e[0] = vi_sra(vi_sll(bytes, 30), 30);
    e[1] = vi_sra(vi_sll(bytes, 28), 30);
    e[2] = vi_sra(vi_sll(bytes, 26), 30);
    e[3] = vi_sra(vi_sll(bytes, 24), 30);
    uint64_t moved = coarse_move(3.0f, &codes, s->columns, e, u, s->step, random_of(s, i));
    vi three = vi_set1(3), low = vi_or(vi_and(e[0], three), vi_sll(vi_and(e[1], three), 2));
    vi high = vi_or(vi_sll(vi_and(e[2], three), 4), vi_sll(vi_and(e[3], three), 6));
    vi_store_i8((int8_t *)residual, vi_sra(vi_sll(vi_or(low, high), 24), 24)); /* values of int8 */
    return moved;
}

OB_INLINE uint64_t
step_row_residual2(const ob_flip_row *row)
{
    (void)row;
    return 0;
}

#endif
