/* trits.tmpl.h - a strip of trits5 becomes a strip of tile16, for tiles that have no look-up of 64 bytes or many tokens.
 *
 * Bytes only and no branch, so that a compiler turns the inner loops into the file's own vectors. */

#define TRIT_LANES 64

/* Codes of 64 bytes: c[j][lane] = code j */
OB_INLINE void
split_trits(const uint8_t *restrict trits, uint8_t (*restrict c)[TRIT_LANES])
{
    for (size_t lane = 0; lane < TRIT_LANES; lane++) {
        uint8_t last, r = ob_trits5_split(trits[lane], &last);
        uint8_t c3 = (uint8_t)((r >= 27) + (r >= 54));
        r = (uint8_t)(r - 27 * c3);
        uint8_t c2 = (uint8_t)((r >= 9) + (r >= 18));
        r = (uint8_t)(r - 9 * c2);
        uint8_t c1 = (uint8_t)((r >= 3) + (r >= 6));
        c[0][lane] = (uint8_t)(r - 3 * c1);
        c[1][lane] = c1;
        c[2][lane] = c2;
        c[3][lane] = c3;
        c[4][lane] = last;
    }
}

/* Codes into the bit pairs `pair` of 64 bytes of tile16; pair 0 comes first.  Doubled, because bytes have no shift. */
OB_INLINE void
place_codes(const uint8_t *restrict c, int pair, uint8_t *restrict out)
{
    for (size_t lane = 0; lane < TRIT_LANES; lane++) {
        uint8_t code = c[lane];
#pragma GCC unroll 6
        for (int i = 0; i < 2 * pair; i++) {
            code = (uint8_t)(code + code);
        }
        out[lane] = pair ? out[lane] | code : code;
    }
}

/* Strip (steps, 4, 16, 4) of trits5 -> strip (k_steps, 4, 16, 4) of tile16; what lies beyond trits5's columns is 0. */
static void
decode_trits(size_t steps, size_t k_steps, const uint8_t *restrict trits, uint8_t *restrict packed)
{
    OB_ALIGNED(64) uint8_t c[5][TRIT_LANES];
    for (size_t i = 0; i < steps * 4; i++, trits += TRIT_LANES) {
        split_trits(trits, c);
        for (size_t j = 0; j < 5; j++) {
            size_t group = 5 * (i / 4) + j; /* of 4 inputs */
            uint8_t *out = packed + group / 4 * 256 + i % 4 * TRIT_LANES;
            if (group / 4 == k_steps) {
                break;
            }
            switch (group % 4) {
            case 0:
                place_codes(c[j], 0, out);
                break;
            case 1:
                place_codes(c[j], 1, out);
                break;
            case 2:
                place_codes(c[j], 2, out);
                break;
            default:
                place_codes(c[j], 3, out);
            }
        }
    }
}
