/* residual8_momentum4.h - for pre-training: votes go into a 4-bit momentum plane, step() adds it to the residual.
 *
 *   vote:  m = beta1 * m + (1 - beta1) * u    (beta1 = 1 after a step's first micro-batch)
 *   step:  e = clamp(e + SR(step * m), +-127), then as residual8
 * m is stored per row in blocks of 64 columns: linear codes -7..7 with stochastic rounding, one bfloat16 scale rounded
 * up, byte j of a block = column j (low nibble) and column j + 32 (high nibble). */
#ifndef OB_RULE_RESIDUAL8_MOMENTUM4_H
#define OB_RULE_RESIDUAL8_MOMENTUM4_H

OB_INLINE void
momentum4_load(const uint8_t *codes, uint16_t scale, vf *m)
{
    vf s = vf_set1(float_of_bits((uint32_t)scale << 16));
    for (size_t half = 0; half < 2; half++) {
        vi bytes = vi_load_i8((const int8_t *)codes + half * LANES);
        m[half] = vf_mul(vi_to_f32(vi_sra(vi_sll(bytes, 28), 28)), s);
        m[half + 2] = vf_mul(vi_to_f32(vi_sra(vi_sll(bytes, 24), 28)), s);
    }
}

OB_INLINE void
momentum4_store(uint8_t *codes, uint16_t *scale, const vf *m, ob_rng_row rng, size_t first)
{
    vi top = vi_set1(0);
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        top = vi_max(top, absolute_bits(m[v]));
    }
    float absmax = float_of_bits((uint32_t)vi_hmax(top)), seventh = absmax / 7.0f;
    if (absmax < OB_TINY) {
        memset(codes, 0, OB_STRIP / 2);
        *scale = 0;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &seventh, sizeof bits);
    *scale = (uint16_t)((bits + 0xFFFFu) >> 16); /* up, so that no code passes 7 */
    vf inverse = vf_set1(1.0f / float_of_bits((uint32_t)*scale << 16));
    vi code[STRIP_VECTORS];
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        code[v] = vi_from_f32(
            stochastic_round(vf_mul(m[v], inverse), uniform_lanes(rng, first + v * LANES), 7.0f));
    }
    for (size_t half = 0; half < 2; half++) {
        vi low = vi_and(code[half], vi_set1(15)),
           high = vi_sll(vi_and(code[half + 2], vi_set1(15)), 4);
        vi byte = vi_or(low, high); /* sign-extend: vi_store_i8 takes values of int8 */
        vi_store_i8((int8_t *)codes + half * LANES, vi_sra(vi_sll(byte, 24), 24));
    }
}

OB_INLINE void
vote_row_residual8_momentum4(const ob_vote_strip *s, size_t n, const vf *u)
{
    uint8_t *codes = s->momentum + (n * s->strips + s->strip) * (OB_STRIP / 2);
    uint16_t *scale = s->momentum_scale + n * s->strips + s->strip;
    vf m[STRIP_VECTORS], keep = vf_set1(s->beta1), take = vf_set1(s->one_minus_beta1);
    momentum4_load(codes, *scale, m);
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        m[v] = vf_add(vf_mul(keep, m[v]), vf_mul(take, u[v]));
    }
    momentum4_store(codes, scale, m, s->rng[n], s->strip * OB_STRIP);
}

OB_INLINE void
release_residual8_momentum4(const ob_flip_row *row, size_t strip)
{
    size_t first = strip * OB_STRIP;
    vf m[STRIP_VECTORS];
    momentum4_load(row->momentum + strip * (OB_STRIP / 2), row->momentum_scale[strip], m);
    residual_add(row->residual + first, OB_MIN(row->k - first, (size_t)OB_STRIP), m, row->step,
                 row->rng, first);
}

#endif
