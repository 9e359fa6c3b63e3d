/* vote.tmpl.h - a tile of dW = hq^T . xq, still in cache, becomes votes and by-products; dW is never stored.
 *
 *   g = float(acc) * g_scale_n                sums of g^2 by row and column, sketch sum of t_k g
 *   u = clamp((float(acc) * a_n) * c_k, +-clip)   handed to the rule's vote_row, 64 columns of one row
 *   row_code += sum_k T_nk acc_nk             the scale's gradient, exact int64
 *
 * A rule <name> defines (i: a row's index among those that own planes, n: among all outputs)
 *   vote_row_<name>(strip, i, n, u)    what a vote of 64 columns does in the backward; returns codes moved
 *   step_row_<name>(row)               what step() does with a row; returns codes moved */

/* 64 columns of so many tokens add up to less than 2^31: 64 * 2048 * 127^2 */
enum { NARROW_TOKENS = 2048 };

OB_INLINE int64_t
code_dot(const ob_vote_strip *s, size_t n, const int32_t *acc)
{
    code_row codes = code_row_at(s->codes, s->k_steps, n, s->strip);
    vi pair[2] = {vi_set1(0), vi_set1(0)}; /* two products of at most 65536 * 127^2 fit int32 */
    for (size_t v = 0; v < STRIP_VECTORS && v * LANES < s->columns; v++) {
        pair[v / 2] = add_coded(pair[v / 2], &codes, v, vi_load(acc + v * LANES));
    }
    if (s->tokens <= NARROW_TOKENS) {
        return vi_sum(vi_add(pair[0], pair[1]));
    }
    return vi_sum64(pair[0], pair[1]);
}

/* u - clamp(u, +-zone): what a rule of a coarse residual has of a vote (rules.def), nothing for most. */
OB_INLINE void
beyond_dead_zone(vf *u, float zone)
{
    for (size_t v = 0; v < STRIP_VECTORS && zone > 0.0f; v++) {
        vf above = vf_max(vf_add(u[v], vf_set1(-zone)), vf_set1(0.0f));
        u[v] = vf_add(above, vf_min(vf_add(u[v], vf_set1(zone)), vf_set1(0.0f)));
    }
}

OB_INLINE void
vote_tile_body(const ob_vote_strip *s, size_t i0, size_t rows, const ob_acc *acc, float dead_zone,
               uint64_t (*vote_row)(const ob_vote_strip *, size_t, size_t, const vf *))
{
    vf square[STRIP_VECTORS], c[STRIP_VECTORS], clip = vf_set1(s->clip);
    vi sign[STRIP_VECTORS];
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        square[v] = vf_load(s->col_square + v * LANES);
        c[v] = vf_load(s->c + v * LANES);
        sign[v] = vi_load((const int32_t *)s->sign + v * LANES);
    }
    for (size_t r = 0; r < rows; r++) {
        size_t i = i0 + r, n = s->row_first + s->row_stride * i;
        vf scale = vf_set1(s->g_scale[i]), a = vf_set1(s->a[i]);
        vf row_square = vf_set1(0.0f), row_sketch = vf_set1(0.0f), u[STRIP_VECTORS];
        for (size_t v = 0; v < STRIP_VECTORS; v++) {
            vf f = vi_to_f32(vi_load(acc[r] + v * LANES));
            vf g = vf_mul(f, scale), g2 = vf_mul(g, g), z = vf_bits(vi_xor(vf_to_bits(g), sign[v]));
            square[v] = vf_add(square[v], g2);
            row_square = v ? vf_add(row_square, g2) : g2;
            row_sketch = v ? vf_add(row_sketch, z) : z;
            u[v] = vf_clip(vf_mul(vf_mul(f, a), c[v]), clip);
        }
        vf_sum_pair(row_square, row_sketch, s->row_square + i, s->row_sketch + i);
        s->row_code[i] += code_dot(s, n, acc[r]);
        if (s->votes) {
            beyond_dead_zone(u, dead_zone);
            *s->moved += vote_row(s, i, n, u);
        }
    }
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        vf_store(s->col_square + v * LANES, square[v]);
    }
}

/* All but a layer's last strip are whole: their loop has no edges, and parameters of its own, which no store can change. */
OB_INLINE void
vote_tile_of(const ob_vote_strip *s, size_t i0, size_t rows, const ob_acc *acc, float dead_zone,
             uint64_t (*vote_row)(const ob_vote_strip *, size_t, size_t, const vf *))
{
    if (s->columns < OB_STRIP) {
        vote_tile_body(s, i0, rows, acc, dead_zone, vote_row);
        return;
    }
    ob_vote_strip whole = *s;
    whole.columns = OB_STRIP;
    vote_tile_body(&whole, i0, rows, acc, dead_zone, vote_row);
}

#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone)            \
    static void vote_tile_##name(const ob_vote_strip *s, size_t i0, size_t rows, \
                                 const ob_acc *acc)                              \
    {                                                                            \
        vote_tile_of(s, i0, rows, acc, dead_zone, vote_row_##name);              \
    }
#include "../flip_rules/rules.def"
#undef OB_RULE
