/* byte.h - one byte in all: v = 85 T + e in +-127 holds code and residual; the packed codes follow in step().
 *
 *   vote:  v = clamp(v + SR(step * u), +-127),  step = -85 * eta * guard
 *   step:  T = rint(v / 85)
 * 85 levels a cell: coarser than residual8, and nothing else persists (8 bits if the codes are derived, 10 if kept). */
#ifndef OB_RULE_BYTE_H
#define OB_RULE_BYTE_H

OB_INLINE uint64_t
vote_row_byte(const ob_vote_strip *s, size_t i, size_t n, const vf *u)
{
    return vote_row_residual8(s, i, n, u); /* the same sum on another grid */
}

OB_INLINE uint64_t
step_row_byte(const ob_flip_row *row)
{
    uint64_t moved = 0;
    for (size_t first = 0; first < row->k; first += OB_STRIP) {
        size_t columns = OB_MIN(row->k - first, (size_t)OB_STRIP);
        code_row codes = code_row_at(row->packed, row->k_steps, row->n, first / OB_STRIP);
        int8_t v[OB_STRIP] = {0};
        memcpy(v, (const int8_t *)row->residual + first, columns);
        for (size_t j = 0; j < STRIP_VECTORS && j * LANES < columns; j++) {
            vi t = vi_rint(vf_mul(vi_to_f32(vi_load_i8(v + j * LANES)), vf_set1(1.0f / 85.0f)));
            moved += store_codes(&codes, j, OB_MIN(columns - j * LANES, (size_t)LANES),
                                 vi_add(t, vi_set1(1)));
        }
    }
    return moved;
}

#endif
