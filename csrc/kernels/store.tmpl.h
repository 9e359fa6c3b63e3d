/* store.tmpl.h - the float end of forward and dX: out = float(acc) * (row_scale * s) + bias. */

OB_INLINE void
store_rows_body(ob_dtype dt, size_t rows, size_t columns, const ob_acc *acc, const float *row_scale,
                const float *s, size_t s_len, const float *bias, void *out, size_t ld)
{
    for (size_t r = 0; r < rows; r++) {
        char *row = (char *)out + r * ld * ob_dtype_bytes(dt);
        vf scale = vf_set1(row_scale[r]);
        vf common = s && s_len == 1 ? vf_mul(scale, vf_set1(*s)) : scale;
        for (size_t j = 0; j < columns; j += LANES) {
            vf factor = s && s_len != 1 ? vf_mul(scale, load_lanes(OB_F32, s, j, columns)) : common;
            vf y = vf_mul(vi_to_f32(vi_load(acc[r] + j)), factor);
            if (bias) {
                y = vf_add(y, load_lanes(OB_F32, bias, j, columns));
            }
            store_lanes(dt, row, j, columns, y);
        }
    }
}

static void
store_rows(ob_dtype dt, size_t rows, size_t columns, const ob_acc *acc, const float *row_scale,
           const float *s, size_t s_len, const float *bias, void *out, size_t ld)
{
    if (columns < OB_STRIP) {
        store_rows_body(dt, rows, columns, acc, row_scale, s, s_len, bias, out, ld);
    }
    else if (dt == OB_F32) {
        store_rows_body(OB_F32, rows, OB_STRIP, acc, row_scale, s, s_len, bias, out, ld);
    }
    else {
        store_rows_body(OB_BF16, rows, OB_STRIP, acc, row_scale, s, s_len, bias, out, ld);
    }
}
