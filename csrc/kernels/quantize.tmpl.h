/* quantize.tmpl.h - activations and gradients to int8: per token, and per output column over the tokens. */

OB_INLINE uint32_t
row_absmax(ob_dtype dt, size_t n, const void *row, const float *s, size_t s_len)
{
    vi top = vi_set1(0);
    vf tensor_scale = vf_set1(s_len == 1 ? *s : 1.0f);
    for (size_t i = 0; i < n; i += LANES) {
        vf v = load_lanes(dt, row, i, n);
        if (s_len) {
            v = vf_mul(v, s_len == 1 ? tensor_scale : load_lanes(OB_F32, s, i, n));
        }
        top = vi_max(top, absolute_bits(v));
    }
    return (uint32_t)vi_hmax(top);
}

/* x (K,) -> q (padded K,) = rint(x * (127/a)) within +-127, a = max(absmax, 1e-5); *scale = a/127 */
OB_INLINE void
quantize_row_body(ob_dtype dt, size_t k, const void *x, int8_t *q, float *scale, int32_t *sum)
{
    uint32_t absmax = row_absmax(dt, k, x, NULL, 0);
    *sum = 0;
    if (absmax >= 0x7F800000u) {
        memset(q, 0, OB_CEIL_DIV(k, LANES) * LANES);
        *scale = OB_NAN_CANONICAL;
        return;
    }
    float a = float_of_bits(absmax) > 1e-5f ? float_of_bits(absmax) : 1e-5f;
    vf inverse = vf_set1(127.0f / a);
    vi total = vi_set1(0);
    for (size_t i = 0; i < k; i += LANES) {
        vi code =
            vi_rint(vf_mul(load_lanes(dt, x, i, k), inverse)); /* 127 and two roundings at most */
        total = vi_add(total, code);
        vi_store_i8(q + i, code);
    }
    *scale = a / 127.0f;
    *sum = vi_sum(total);
}

/* g = dy (N,) * s -> q (padded N,) = SR(g * (127/absmax)); *scale = absmax/127 */
OB_INLINE int
quantize_row_sr_body(ob_dtype dt, size_t n, const void *dy, const float *s, size_t s_len,
                     uint32_t random, int8_t *q, float *scale, int32_t *sum)
{
    uint32_t bits = row_absmax(dt, n, dy, s, s_len);
    float absmax = float_of_bits(bits);
    *sum = 0;
    if (bits >= 0x7F800000u || absmax < OB_TINY) {
        memset(q, 0, OB_CEIL_DIV(n, LANES) * LANES);
        *scale = bits >= 0x7F800000u ? OB_NAN_CANONICAL : 0.0f;
        return bits >= 0x7F800000u;
    }
    vf inverse = vf_set1(127.0f / absmax), tensor_scale = vf_set1(*s);
    vi total = vi_set1(0), r = number_lanes(random, 0);
    for (size_t i = 0; i < n; i += LANES) {
        vf g = vf_mul(load_lanes(dt, dy, i, n),
                      s_len == 1 ? tensor_scale : load_lanes(OB_F32, s, i, n));
        vi code = stochastic_round(vf_mul(g, inverse), r, 127.0f);
        r = vi_add(r, vi_set1((int32_t)(LANES * OB_RNG_SQRT2)));
        total = vi_add(total, code);
        vi_store_i8(q + i, code);
    }
    *scale = absmax / 127.0f;
    *sum = vi_sum(total);
    return 0;
}

/* dy (M, ld): per column the largest bits of |dy * sx| and the sequential sum of dy */
OB_INLINE void
column_absmax_body(ob_dtype dt, size_t m, size_t columns, const char *dy, size_t row_bytes,
                   const float *sx, uint32_t *absmax, float *sum)
{
    vi top[STRIP_VECTORS];
    vf total[STRIP_VECTORS];
    size_t bytes = columns * ob_dtype_bytes(dt);
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        top[v] = vi_set1(0), total[v] = vf_set1(0.0f);
    }
    for (size_t t = 0; t < m; t++) {
        vf scale = vf_set1(sx[t]);
        for (size_t byte = 0; byte < bytes; byte += 64) {
            __builtin_prefetch(dy + (t + 16) * row_bytes + byte); /* rows are pages apart */
        }
        for (size_t v = 0; v < STRIP_VECTORS && v * LANES < columns; v++) {
            vf g = load_lanes(dt, dy + t * row_bytes, v * LANES, columns);
            total[v] = vf_add(total[v], g);
            top[v] = vi_max(top[v], absolute_bits(vf_mul(g, scale)));
        }
    }
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        vi_store((int32_t *)absmax + v * LANES, top[v]);
        vf_store(sum + v * LANES, total[v]);
    }
}

/* 16 tokens x 64 columns at a time into a small tile, then its transpose into the rows of q */
OB_INLINE void
quantize_columns_sr_body(ob_dtype dt, size_t m, size_t columns, const void *dy, size_t ld,
                         const float *sx, const float *inverse, const uint32_t *random, int8_t *q,
                         size_t ldq, int32_t *sums)
{
    int32_t first[OB_STRIP] = {0};
    float inv[OB_STRIP] = {0};
    vi total[STRIP_VECTORS];
    memcpy(first, random, columns * sizeof *random);
    memcpy(inv, inverse, columns * sizeof *inverse);
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        total[v] = vi_set1(0);
    }
    for (size_t t0 = 0; t0 < ldq; t0 += LANES) {
        int8_t tile[LANES][OB_STRIP] = {{0}}, transposed[LANES][LANES];
        size_t tokens = t0 < m ? OB_MIN(m - t0, (size_t)LANES) : 0;
        for (size_t t = 0; t < tokens; t++) {
            const char *row = (const char *)dy + (t0 + t) * ld * ob_dtype_bytes(dt);
            vf scale = vf_set1(sx[t0 + t]);
            vi token = vi_set1((int32_t)ob_rng_number(0, (uint32_t)(t0 + t)));
            for (size_t v = 0; v < STRIP_VECTORS && v * LANES < columns; v++) {
                vf h = vf_mul(load_lanes(dt, row, v * LANES, columns), scale);
                vi r = vi_add(token, vi_load(first + v * LANES));
                vi code = stochastic_round(vf_mul(h, vf_load(inv + v * LANES)), r, 127.0f);
                total[v] = vi_add(total[v], code);
                vi_store_i8(tile[t] + v * LANES, code);
            }
        }
        for (size_t v = 0; v * LANES < columns; v++) {
            v_transpose16(tile[0] + v * LANES, OB_STRIP, transposed[0]);
            for (size_t j = 0; j < LANES && v * LANES + j < columns; j++) {
                int8_t *out = q + (v * LANES + j) * ldq + t0;
                if (ldq - t0 >= LANES) {
                    memcpy(out, transposed[j], LANES);
                }
                else {
                    memcpy(out, transposed[j], ldq - t0);
                }
            }
        }
    }
    for (size_t v = 0; v < STRIP_VECTORS; v++) {
        int32_t lanes[LANES];
        vi_store(lanes, total[v]);
        for (size_t j = 0; j < LANES && v * LANES + j < columns; j++) {
            sums[v * LANES + j] = lanes[j];
        }
    }
}

/* The dtype is made a constant of each copy of a body. */
static void
quantize_row(ob_dtype dt, size_t k, const void *x, int8_t *q, float *scale, int32_t *sum)
{
    if (dt == OB_F32) {
        quantize_row_body(OB_F32, k, x, q, scale, sum);
    }
    else {
        quantize_row_body(OB_BF16, k, x, q, scale, sum);
    }
}

static int
quantize_row_sr(ob_dtype dt, size_t n, const void *dy, const float *s, size_t s_len,
                uint32_t random, int8_t *q, float *scale, int32_t *sum)
{
    return dt == OB_F32 ? quantize_row_sr_body(OB_F32, n, dy, s, s_len, random, q, scale, sum)
                        : quantize_row_sr_body(OB_BF16, n, dy, s, s_len, random, q, scale, sum);
}

static void
column_absmax(ob_dtype dt, size_t m, size_t columns, const void *dy, size_t ld, const float *sx,
              uint32_t *absmax, float *sum)
{
    if (dt == OB_F32) {
        column_absmax_body(OB_F32, m, columns, dy, ld * sizeof(float), sx, absmax, sum);
    }
    else {
        column_absmax_body(OB_BF16, m, columns, dy, ld * sizeof(uint16_t), sx, absmax, sum);
    }
}

static void
quantize_columns_sr(ob_dtype dt, size_t m, size_t columns, const void *dy, size_t ld,
                    const float *sx, const float *inverse, const uint32_t *random, int8_t *q,
                    size_t ldq, int32_t *sums)
{
    if (columns < OB_STRIP) {
        quantize_columns_sr_body(dt, m, columns, dy, ld, sx, inverse, random, q, ldq, sums);
    }
    else if (dt == OB_F32) {
        quantize_columns_sr_body(OB_F32, m, OB_STRIP, dy, ld, sx, inverse, random, q, ldq, sums);
    }
    else {
        quantize_columns_sr_body(OB_BF16, m, OB_STRIP, dy, ld, sx, inverse, random, q, ldq, sums);
    }
}
