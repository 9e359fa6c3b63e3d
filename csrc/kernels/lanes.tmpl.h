/* lanes.tmpl.h - small helpers on 16 lanes that every template uses: typed loads and stores with tails, random lanes. */

#define LANES 16
#define STRIP_VECTORS (OB_STRIP / LANES)

static const float OB_NAN_CANONICAL = __builtin_nanf("");

OB_INLINE float
float_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Entries i .. i+15 of a row of n float32 or bfloat16; zeros beyond the end. */
OB_INLINE vf
load_lanes(ob_dtype dt, const void *row, size_t i, size_t n)
{
    if (dt == OB_F32) {
        const float *p = (const float *)row + i;
        if (n - i >= LANES) {
            return vf_load(p);
        }
        float tail[LANES] = {0};
        memcpy(tail, p, (n - i) * sizeof *p);
        return vf_load(tail);
    }
    const uint16_t *p = (const uint16_t *)row + i;
    if (n - i >= LANES) {
        return vf_bits(vi_sll(vi_load_u16(p), 16));
    }
    uint16_t tail[LANES] = {0};
    memcpy(tail, p, (n - i) * sizeof *p);
    return vf_bits(vi_sll(vi_load_u16(tail), 16));
}

OB_INLINE vi
absolute_bits(vf v)
{
    return vi_and(vf_to_bits(v), vi_set1(0x7FFFFFFF));
}

/* Every NaN becomes 0x7FC00000: sign and payload depend on the machine and on the order of operands. */
OB_INLINE vf
canonical_nan(vf v)
{
    /* all ones where the magnitude is > 0x7F800000: the difference is negative exactly for NaN */
    vi nan = vi_sra(vi_sub(vi_set1(0x7F800000), absolute_bits(v)), 31);
    return vf_bits(vi_or(vi_and(nan, vi_set1(0x7FC00000)), vi_andnot(nan, vf_to_bits(v))));
}

/* float32 without other NaN than the canonical -> bfloat16 bits in the low half of each lane: nearest, half to even. */
OB_INLINE vi
bf16_lanes(vf v)
{
    vi bits = vf_to_bits(v), lsb = vi_and(vi_srl(bits, 16), vi_set1(1));
    return vi_srl(vi_add(bits, vi_add(lsb, vi_set1(0x7FFF))), 16);
}

OB_INLINE void
store_lanes(ob_dtype dt, void *row, size_t i, size_t n, vf v)
{
    v = canonical_nan(v);
    if (dt == OB_F32) {
        float *p = (float *)row + i;
        if (n - i >= LANES) {
            vf_store(p, v);
            return;
        }
        float tail[LANES];
        vf_store(tail, v);
        memcpy(p, tail, (n - i) * sizeof *p);
        return;
    }
    uint16_t *p = (uint16_t *)row + i;
    if (n - i >= LANES) {
        vi_store_u16(p, bf16_lanes(v));
        return;
    }
    uint16_t tail[LANES];
    vi_store_u16(tail, bf16_lanes(v));
    memcpy(p, tail, (n - i) * sizeof *p);
}

/* base/rng.h on 16 lanes.  The shift after the second key word distributes over it, so that the two are one constant. */
OB_INLINE int32_t
hash_key(ob_rng_row rng)
{
    return (int32_t)(rng.b ^ rng.b >> 15);
}

/* position = column * OB_RNG_GOLDEN + a */
OB_INLINE vi
draw_at(vi position, vi key)
{
    vi x = vi_mul(vi_xor(position, vi_srl(position, 16)), vi_set1((int32_t)OB_RNG_MUL1));
    x = vi_mul(vi_xor(vi_xor(x, vi_srl(x, 15)), key), vi_set1((int32_t)OB_RNG_MUL2));
    return vi_xor(x, vi_srl(x, 16));
}

/* Uniforms of columns first + 16v .. of one row; a constant v costs nothing. */
OB_INLINE vf
uniform_lanes(ob_rng_row rng, size_t first, size_t v)
{
    vi column = vi_add(vi_iota(), vi_set1((int32_t)(LANES * v)));
    vi position = vi_add(vi_mul(column, vi_set1((int32_t)OB_RNG_GOLDEN)),
                         vi_set1((int32_t)((uint32_t)first * OB_RNG_GOLDEN + rng.a)));
    return vf_uniform(
        vi_add(draw_at(position, vi_set1(hash_key(rng))), vi_set1((int32_t)rng.turn)));
}

/* SR(v) = clamp(floor(v + r), +-limit); a whole limit may come first */
OB_INLINE vi
stochastic_round(vf v, vf r, float limit)
{
    return vi_floor(vf_max(vf_min(vf_add(v, r), vf_set1(limit)), vf_set1(-limit)));
}
