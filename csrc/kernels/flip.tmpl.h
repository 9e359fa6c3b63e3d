/* flip.tmpl.h - one row's step: the rule's own update of the residual, then residual into codes.
 *
 *   e > 64, T < 1: T += 1, e -= 128     e < -64, T > -1: T -= 1, e += 128     otherwise e = clamp(e, +-64)
 * Few residuals pass the threshold in a step, so vectors only look for them and plain C moves the codes. */

/* Move column k of the row; returns 1 if its code changed. */
OB_INLINE uint64_t
flip_one(const ob_flip_row *row, size_t k)
{
    size_t n = row->n;
    uint8_t *byte = row->packed + (((n / 64) * row->k_steps + k / 16) * 4 + (n % 64) / 16) * 64 +
                    (n % 16) * 4 + k % 4;
    unsigned shift = 2 * (unsigned)((k % 16) / 4), code = (*byte >> shift) & 3u;
    int e = row->residual[k], up = e > 0;
    if (up ? code == 2 : code == 0) { /* saturated: wait at half a cell */
        row->residual[k] = (int8_t)(up ? 64 : -64);
        return 0;
    }
    code = up ? code + 1 : code - 1;
    *byte = (uint8_t)((*byte & ~(3u << shift)) | (code << shift));
    row->residual[k] = (int8_t)(up ? e - 128 : e + 128);
    return 1;
}

OB_INLINE uint64_t
flip_row_body(const ob_flip_row *row, void (*release)(const ob_flip_row *, size_t))
{
    uint64_t moved = 0;
    for (size_t k0 = 0; k0 < row->k; k0 += OB_STRIP) {
        release(row, k0 / OB_STRIP);
        uint64_t beyond;
        if (row->k - k0 >= OB_STRIP) {
            beyond = v_mask_beyond64(row->residual + k0);
        }
        else {
            int8_t tail[OB_STRIP] = {0};
            memcpy(tail, row->residual + k0, row->k - k0);
            beyond = v_mask_beyond64(tail);
        }
        for (; beyond; beyond &= beyond - 1) {
            moved += flip_one(row, k0 + (size_t)__builtin_ctzll(beyond));
        }
    }
    return moved;
}

#define OB_RULE(name, residual_bits, momentum_bits)         \
    static uint64_t flip_row_##name(const ob_flip_row *row) \
    {                                                       \
        return flip_row_body(row, release_##name);          \
    }
#include "../flip_rules/rules.def"
#undef OB_RULE
