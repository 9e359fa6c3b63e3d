/* flip.tmpl.h - one row's step, block by block: the rule's step_block moves the codes. */

OB_INLINE uint64_t
flip_row_body(const ob_flip_row *row, uint64_t (*step_block)(const ob_flip_row *, size_t))
{
    uint64_t moved = 0;
    for (size_t strip = 0; strip * OB_STRIP < row->k; strip++) {
        moved += step_block(row, strip);
    }
    return moved;
}

#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone) \
    static uint64_t flip_row_##name(const ob_flip_row *row)           \
    {                                                                 \
        return flip_row_body(row, step_block_##name);                 \
    }
#include "../flip_rules/rules.def"
#undef OB_RULE
