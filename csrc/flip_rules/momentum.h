/* momentum.h - a low-bit running mean of the votes, in blocks of 64 columns with one bfloat16 scale, rounded up.
 *
 *   m = beta1 * m + (1 - beta1) * u    (beta1 = 1 after a step's first micro-batch)
 * Linear codes with stochastic rounding: 4 bits -7..7, byte j of a block = column j (low nibble) and column j + 32 (high
 * nibble); 8 bits -127..127 in order. */
#ifndef OB_MOMENTUM_H
#define OB_MOMENTUM_H

OB_INLINE size_t
momentum_bytes(int bits)
{
    return (size_t)bits * OB_STRIP / 8;
}

OB_INLINE void
momentum_load(int bits, const uint8_t *codes, uint16_t scale, vf *m)
{
    vf s = vf_set1(float_of_bits((uint32_t)scale << 16));
    if (bits == 8) {
        for (size_t v = 0; v < STRIP_VECTORS; v++) {
            m[v] = vf_mul(vi_to_f32(vi_load_i8((const int8_t *)codes + v * LANES)), s);
        }
        return;
    }
    vi nibbles[STRIP_VECTORS];
    load_nibbles(codes, nibbles);
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        m[v] = vf_mul(vi_to_f32(nibbles[v]), s);
    }
}

OB_INLINE void
momentum_store(int bits, uint8_t *codes, uint16_t *scale, const vf *m, uint32_t random)
{
    float top_code = bits == 8 ? 127.0f : 7.0f;
    vi top = vi_set1(0), code[STRIP_VECTORS];
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        top = vi_max(top, absolute_bits(m[v]));
    }
    float absmax = float_of_bits((uint32_t)vi_hmax(top)), unit = absmax / top_code;
    if (absmax < OB_TINY) {
        memset(codes, 0, momentum_bytes(bits));
        *scale = 0;
        return;
    }
    uint32_t unit_bits;
    memcpy(&unit_bits, &unit, sizeof unit_bits);
    *scale = (uint16_t)((unit_bits + 0xFFFFu) >> 16); /* up, so that no code passes the top */
    vf inverse = vf_set1(1.0f / float_of_bits((uint32_t)*scale << 16));
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        code[v] = stochastic_round(vf_mul(m[v], inverse), number_lanes(random, v), top_code);
        if (bits == 8) {
            vi_store_i8((int8_t *)codes + v * LANES, code[v]);
        }
    }
    if (bits == 4) {
        store_nibbles(codes, code);
    }
}

OB_INLINE void
momentum_vote(int bits, const ob_vote_strip *s, size_t i, const vf *u)
{
    uint8_t *codes = s->momentum + (i * s->strips + s->strip) * momentum_bytes(bits);
    uint16_t *scale = s->momentum_scale + i * s->strips + s->strip;
    vf m[STRIP_VECTORS], keep = vf_set1(s->beta1), take = vf_set1(s->one_minus_beta1);
    momentum_load(bits, codes, *scale, m);
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        m[v] = vf_add(vf_mul(keep, m[v]), vf_mul(take, u[v]));
    }
    momentum_store(bits, codes, scale, m, random_of(s, i));
}

OB_INLINE void
momentum_of_block(int bits, const ob_flip_row *row, size_t strip, vf *m)
{
    momentum_load(bits, row->momentum + strip * momentum_bytes(bits), row->momentum_scale[strip],
                  m);
}

#endif
