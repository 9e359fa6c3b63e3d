/* absmean.tmpl.h - float weights to codes: sums of |w| by rows, and 16 columns of a row to a dword of tile16. */

#define SUM_ROWS 8 /* one sum alone would wait four cycles for every addition */

OB_INLINE void
sum_rows_body(ob_dtype dt, size_t rows, size_t k, const void *w, double *sums)
{
    double sum[SUM_ROWS] = {0.0};
    for (size_t j = 0; j < k; j++) {
        for (size_t r = 0; r < rows; r++) {
            size_t at = r * k + j;
            float v = dt == OB_F32 ? ((const float *)w)[at]
                                   : float_of_bits((uint32_t)((const uint16_t *)w)[at] << 16);
            sum[r] += (double)__builtin_fabsf(v);
        }
    }
    memcpy(sums, sum, rows * sizeof *sum);
}

static void
sum_rows(ob_dtype dt, size_t rows, size_t k, const void *w, double *sums)
{
    if (rows < SUM_ROWS) {
        sum_rows_body(dt, rows, k, w, sums);
    }
    else if (dt == OB_F32) {
        sum_rows_body(OB_F32, SUM_ROWS, k, w, sums);
    }
    else {
        sum_rows_body(OB_BF16, SUM_ROWS, k, w, sums);
    }
}

/* rint(w / s), half to even and clamped, is not 0 where |w| > s/2: the quotient of the number after s/2 is nearer to the one
 * after 1/2 than to 1/2. */
static void
ternarize_row(ob_dtype dt, size_t k, const void *w, float half, uint8_t *packed)
{
    vf bound = vf_set1(half);
    for (size_t i = 0; i < k; i += LANES, packed += 256) {
        vf v = load_lanes(dt, w, i, k);
        vi above = vi_srl(vf_to_bits(vf_add(bound, vf_mul(v, vf_set1(-1.0f)))), 31);
        vi below = vi_srl(vf_to_bits(vf_add(bound, v)), 31);
        int8_t codes[LANES];
        uint64_t low, high;
        vi_store_i8(codes, vi_sub(vi_add(above, vi_set1(1)), below));
        memcpy(&low, codes, sizeof low);
        memcpy(&high, codes + 8, sizeof high);
        low |= high << 4;
        uint32_t dword = (uint32_t)(low | low >> 30);
        memcpy(packed, &dword, sizeof dword);
    }
}
