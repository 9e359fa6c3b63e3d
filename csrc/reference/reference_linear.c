/* reference_linear.c - forward, dX and absmean, one element at a time. */
#include "reference.h"

/* x (K,) -> q (K,), returns sx; a non-finite token gives q = 0 and NaN */
static float
quantize_token(ob_dtype dt, size_t inputs, const void *x, size_t first, int8_t *q)
{
    uint32_t absmax = 0;
    for (size_t k = 0; k < inputs; k++) {
        uint32_t bits = ob_ref_bits(ob_ref_load(dt, x, first + k)) & 0x7FFFFFFFu;
        absmax = bits > absmax ? bits : absmax;
    }
    if (absmax >= OB_REF_INF_BITS) {
        memset(q, 0, inputs);
        return ob_ref_float(OB_REF_NAN_BITS);
    }
    float a = fmaxf(ob_ref_float(absmax), 1e-5f);
    float inverse = 127.0f / a;
    for (size_t k = 0; k < inputs; k++) {
        float v = rintf(ob_ref_load(dt, x, first + k) * inverse);
        q[k] = (int8_t)fmaxf(-127.0f, fminf(127.0f, v));
    }
    return a / 127.0f;
}

/* T[n][k] in -1, 0, 1, of either packing; trits5: (ceil(N/64), ceil(K/20), 4, 16, 4), five codes a byte */
static int
forward_code(const ob_weights *w, size_t n, size_t k)
{
    if (w->packing == OB_FORMAT_tile16) {
        return ob_ref_code(w->packed, w->k, n, k);
    }
    static const int power[4] = {1, 3, 9, 27};
    size_t line = (n / 64 * OB_CEIL_DIV(w->k, 20) + k / 20) * 4 + n % 64 / 16;
    int byte = w->packed[line * 64 + n % 16 * 4 + k % 4], digit = (int)(k % 20 / 4);
    int four = byte < 192 ? byte % 64 : 64 + (byte - 192) % 17;
    int fifth = byte < 192 ? byte / 64 : (byte - 192) / 17;
    return (digit == 4 ? fifth : four / power[digit] % 3) - 1;
}

ob_status
ob_reference_linear_forward(const ob_weights *w, size_t m_count, ob_dtype dt, const void *x,
                            void *y, int8_t *xq, float *sx)
{
    // x (M,K) dt, packed (N,K), scale (1,) or (N,), bias (N,) -> y (M,N) dt, xq (M, padded K), sx (M,)
    ob_status status = ob_ref_check(w);
    if (status != OB_OK) {
        return status;
    }
    size_t padded = 16 * OB_CEIL_DIV(w->k, 16);
    int8_t *q = ob_alloc(padded ? padded : 1);
    if (q == NULL) {
        return OB_NO_MEMORY;
    }
    memset(q, 0, padded);
    for (size_t m = 0; m < m_count; m++) {
        float token_scale = quantize_token(dt, w->k, x, m * w->k, q);
        for (size_t n = 0; n < w->n; n++) {
            int32_t acc = 0;
            for (size_t k = 0; k < w->k; k++) {
                acc += forward_code(w, n, k) * q[k];
            }
            float v = (float)acc * (token_scale * ob_ref_scale(w, n));
            if (w->bias != NULL) {
                v = v + w->bias[n];
            }
            ob_ref_store(dt, y, m * w->n + n, v);
        }
        if (xq != NULL && sx != NULL) {
            memcpy(xq + m * padded, q, padded);
            sx[m] = token_scale;
        }
    }
    ob_free(q);
    return OB_OK;
}

/* dy (N,) of token m -> q (N,), returns d; a non-finite g = dy * s gives q = 0 and NaN */
static float
quantize_gradient(const ob_weights *w, ob_dtype dt, const void *dy, size_t m, uint32_t random,
                  int8_t *q)
{
    memset(q, 0, w->n);
    uint32_t absmax = 0;
    for (size_t n = 0; n < w->n; n++) {
        uint32_t bits =
            ob_ref_bits(ob_ref_load(dt, dy, m * w->n + n) * ob_ref_scale(w, n)) & 0x7FFFFFFFu;
        absmax = bits > absmax ? bits : absmax;
    }
    if (absmax >= OB_REF_INF_BITS) {
        return ob_ref_float(OB_REF_NAN_BITS);
    }
    float a = ob_ref_float(absmax);
    if (a < OB_REF_TINY) {
        return 0.0f;
    }
    float inverse = 127.0f / a;
    for (size_t n = 0; n < w->n; n++) {
        float g = ob_ref_load(dt, dy, m * w->n + n) * ob_ref_scale(w, n);
        q[n] = (int8_t)ob_ref_round(g * inverse, random, n, 127.0f);
    }
    return a / 127.0f;
}

ob_status
ob_reference_linear_backward_input(const ob_weights *w, size_t m_count, ob_dtype dt, const void *dy,
                                   void *dx, const double *control, size_t *nonfinite)
{
    // dy (M,N) dt, packed (N,K), scale (1,) or (N,) -> dx (M,K) dt
    ob_status status = ob_ref_check(w);
    if (status != OB_OK) {
        return status;
    }
    int8_t *q = ob_alloc(w->n ? w->n : 1);
    if (q == NULL) {
        return OB_NO_MEMORY;
    }
    uint64_t key = ob_ref_key(control, (uint64_t)control[OB_CTL_MICRO], OB_STREAM_INPUT_GRAD);
    *nonfinite = 0;
    for (size_t m = 0; m < m_count; m++) {
        float d = quantize_gradient(w, dt, dy, m, ob_ref_first(key, m), q);
        *nonfinite += isnan(d) ? 1 : 0;
        for (size_t k = 0; k < w->k; k++) {
            int32_t acc = 0;
            for (size_t n = 0; n < w->n; n++) {
                acc += ob_ref_code(w->packed, w->k, n, k) * q[n];
            }
            ob_ref_store(dt, dx, m * w->k + k, (float)acc * d);
        }
    }
    ob_free(q);
    return OB_OK;
}

ob_status
ob_reference_absmean(size_t n_count, size_t k_count, ob_dtype dt, const void *w, uint8_t *packed,
                     float *scale)
{
    // w (N,K) dt -> packed tile16, scale (1,)
    double total = 0.0;
    for (size_t n = 0; n < n_count; n++) {
        double row = 0.0;
        for (size_t k = 0; k < k_count; k++) {
            float v = ob_ref_load(dt, w, n * k_count + k);
            if (!isfinite(v)) {
                return OB_INVALID;
            }
            row += fabs((double)v);
        }
        total += row;
    }
    double count = (double)n_count * (double)k_count;
    float mean = count > 0.0 ? (float)(total / count) : 0.0f;
    *scale = fmaxf(mean, 1e-5f);
    // padding is code 1 in every bit pair: the value zero
    memset(packed, 0x55, OB_CEIL_DIV(n_count, 64) * OB_CEIL_DIV(k_count, 16) * 256);
    for (size_t n = 0; n < n_count; n++) {
        for (size_t k = 0; k < k_count; k++) {
            float t = rintf(ob_ref_load(dt, w, n * k_count + k) / *scale);
            ob_ref_set_code(packed, k_count, n, k, (int)fmaxf(-1.0f, fminf(1.0f, t)));
        }
    }
    return OB_OK;
}
