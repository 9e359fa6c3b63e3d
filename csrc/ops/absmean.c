/* absmean.c - float weights to ternary codes and one scale (BitNet b1.58). */
#include <math.h>
#include <string.h>

#include "../base/alloc.h"
#include "../base/check.h"
#include "../base/cpu.h"
#include "../base/pool.h"
#include "../formats/tile16.h"
#include "ops.h"

typedef struct absmean_call {
    size_t n, k, k_steps;
    ob_dtype dt;
    const void *w;
    double *row_sum; /* (N,) */
    float scale;
    uint8_t *packed;
} absmean_call;

static float
weight_at(const absmean_call *c, size_t index)
{
    if (c->dt == OB_F32) {
        return ((const float *)c->w)[index];
    }
    uint32_t bits = (uint32_t)((const uint16_t *)c->w)[index] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void
sum_row(void *arg, size_t n, size_t thread)
{
    absmean_call *c = arg;
    double sum = 0.0;
    (void)thread;
    for (size_t k = 0; k < c->k; k++) {
        sum += fabs((double)weight_at(c, n * c->k + k));
    }
    c->row_sum[n] = sum;
}

/* One strip of 64 outputs; padding gets code 1, zero. */
static void
pack_strip(void *arg, size_t strip, size_t thread)
{
    absmean_call *c = arg;
    uint8_t *plane = c->packed + strip * c->k_steps * 256;
    size_t rows = OB_MIN(c->n - strip * 64, (size_t)64);
    (void)thread;
    memset(plane, 0x55, c->k_steps * 256);
    for (size_t o = 0; o < rows; o++) {
        for (size_t k = 0; k < c->k; k++) {
            float q = weight_at(c, (strip * 64 + o) * c->k + k) / c->scale;
            /* rint, half to even, clamped: +-0.5 goes to 0; code 1 becomes 2 or 0 */
            unsigned change = q > 0.5f ? 3u : q < -0.5f ? 1u : 0u;
            uint8_t *byte = plane + ob_tile16_byte(0, o, k);
            *byte = (uint8_t)(*byte ^ change << ob_tile16_shift(k));
        }
    }
}

ob_status
ob_absmean(size_t n, size_t k, ob_dtype dt, const void *w, uint8_t *packed, float *scale)
{
    size_t count;
    double total = 0.0;
    if (k > OB_MAX_K || !ob_mul(n, k, &count) || count > SIZE_MAX / 4) {
        return OB_OVERFLOW;
    }
    absmean_call c = {
        .n = n, .k = k, .k_steps = ob_padded_k(k) / 16, .dt = dt, .w = w, .packed = packed};
    c.row_sum = ob_scratch_take(n * sizeof *c.row_sum);
    if (!c.row_sum) {
        return OB_NO_MEMORY;
    }
    uint64_t fp = ob_fp_default();
    ob_parallel(n, sum_row, &c);
    for (size_t i = 0; i < n; i++) {
        total += c.row_sum[i];
    }
    ob_scratch_give(c.row_sum);
    float mean = count ? (float)(total / (double)count) : 0.0f;
    ob_fp_restore(fp);
    if (!isfinite(total)) {
        return OB_INVALID;
    }
    c.scale = mean > 1e-5f ? mean : 1e-5f;
    ob_parallel(OB_CEIL_DIV(n, (size_t)64), pack_strip, &c);
    *scale = c.scale;
    return OB_OK;
}
