/* lanes.tmpl.h - small helpers on 16 lanes that every template uses: typed loads and stores with tails, random lanes. */

#define LANES 16
#define STRIP_VECTORS (OB_STRIP / LANES)

static const float OB_NAN_CANONICAL = __builtin_nanf(""); /* 0x7FC00000 */

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
    v = vf_one_nan(v);
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

/* ob_rng_number of columns 16v .. 16v + 15; a constant v costs nothing. */
OB_INLINE vi
number_lanes(uint32_t first, size_t v)
{
    vi column = vi_add(vi_iota(), vi_set1((int32_t)(LANES * v)));
    return vi_add(vi_mul(column, vi_set1((int32_t)OB_RNG_SQRT2)), vi_set1((int32_t)first));
}

/* The number of row i's first column in this strip */
OB_INLINE uint32_t
random_of(const ob_vote_strip *s, size_t i)
{
    return ob_rng_number(s->random[i], (uint32_t)(s->strip * OB_STRIP));
}

/* SR(v) = clamp(floor(v + r * 2^-32), +-limit); a whole limit may come first */
OB_INLINE vi
stochastic_round(vf v, vi r, float limit)
{
    vf sum = vf_add_uniform(v, r);
    return vi_floor(vf_max(vf_min(sum, vf_set1(limit)), vf_set1(-limit)));
}
