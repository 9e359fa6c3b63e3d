/* held.tmpl.h - the vote plane: votes held as int16 during a step, in units of 1/1024 of u, and cast at once by its end.
 *
 *   vote:  V = clamp(V + SR(1024 * u), +-32767), u clamped to +-31
 *   step:  u = V / 1024 gives the sums of g^2 (in the factors of its votes), then clamp(u, +-clip) goes to vote_row */

OB_INLINE uint64_t
hold_row(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    (void)n;
    int16_t *held = s->held + i * s->k + s->strip * OB_STRIP;
    vf high = vf_set1(32767.0f), low = vf_set1(-32767.0f);
    for (size_t v = 0; v < STRIP_VECTORS && v * LANES < s->columns; v++) {
        size_t count = OB_MIN(s->columns - v * LANES, (size_t)LANES);
        vi r = number_lanes(random_of(s, i), v);
        vi d = vi_floor(vf_add_uniform(vf_mul(u[v], vf_set1(OB_VOTE_UNITS)), r));
        vf sum = vi_to_f32(vi_add(load_words(held + v * LANES, count), d)); /* whole: exact */
        store_words(held + v * LANES, count, vi_from_f32(vf_max(vf_min(sum, high), low)));
    }
    return 0;
}

static void
hold_tile(const ob_vote_strip *s, size_t i0, size_t rows, const ob_acc *acc)
{
    vote_tile_of(s, i0, rows, acc, 0.0f, hold_row);
}

OB_INLINE uint64_t
cast_row_body(const ob_cast_row *row, float dead_zone,
              uint64_t (*vote_row)(const ob_vote_strip *, size_t, size_t, const vf *))
{
    ob_vote_strip s = row->vote;
    vf high = vf_set1(s.clip), low = vf_set1(-s.clip), ratio = vf_set1(row->ratio);
    float total = 0.0f;
    uint64_t moved = 0;
    for (s.strip = 0; s.strip < s.strips; s.strip++) {
        size_t first = s.strip * OB_STRIP;
        vf u[STRIP_VECTORS], row_square = vf_set1(0.0f);
        s.columns = OB_MIN(s.k - first, (size_t)OB_STRIP);
        for (size_t v = 0; v < STRIP_VECTORS; v++) {
            size_t k = v * LANES, count = OB_MIN(s.columns - OB_MIN(s.columns, k), (size_t)LANES);
            float *col = row->col_square + first + k;
            vf all = vf_mul(vi_to_f32(load_words(row->held + first + k, count)),
                            vf_set1(1.0f / OB_VOTE_UNITS));
            vf square = vf_mul(all, all),
               part = vf_mul(square, vf_load(row->col_factor + first + k));
            vf_store(col, vf_add(vf_load(col), vf_mul(square, ratio)));
            row_square = v ? vf_add(row_square, part) : part;
            u[v] = vf_max(vf_min(all, high), low);
        }
        total = s.strip ? total + vf_sum(row_square) : vf_sum(row_square);
        beyond_dead_zone(u, dead_zone);
        moved += vote_row(&s, 0, row->n, u);
    }
    *row->row_square = total;
    memset(row->held, 0, s.k * sizeof *row->held);
    return moved;
}

#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone) \
    static uint64_t cast_row_##name(const ob_cast_row *row)           \
    {                                                                 \
        return cast_row_body(row, dead_zone, vote_row_##name);        \
    }
#include "../flip_rules/rules.def"
#undef OB_RULE
