/* absmean.c - float weights to ternary codes and one scale (BitNet b1.58). */
#include <math.h>
#include <string.h>

#include "../base/alloc.h"
#include "../base/check.h"
#include "../base/cpu.h"
#include "../base/pool.h"
#include "../formats/tile16.h"
#include "../kernels/kernel.h"
#include "ops.h"

#define ROWS ((size_t)8) /* that are summed side by side */

typedef struct absmean_call {
    const ob_kernels *kernels;
    size_t n, k, k_steps;
    ob_dtype dt;
    const void *w;
    double *row_sum; /* (N,) */
    float half;      /* of the scale */
    uint8_t *packed;
} absmean_call;

static const void *
row_at(const absmean_call *c, size_t n)
{
    return (const char *)c->w + n * c->k * (c->dt == OB_F32 ? sizeof(float) : sizeof(uint16_t));
}

static void
sum_group(void *arg, size_t group, size_t thread)
{
    const absmean_call *c = arg;
    size_t n = group * ROWS;
    (void)thread;
    c->kernels->sum_rows(c->dt, OB_MIN(c->n - n, ROWS), c->k, row_at(c, n), c->row_sum + n);
}

/* One strip of 64 outputs; padding gets code 1, zero. */
static void
pack_strip(void *arg, size_t strip, size_t thread)
{
    const absmean_call *c = arg;
    size_t first = strip * 64, end = OB_MIN(c->n, first + 64);
    (void)thread;
    if (end < first + 64) {
        memset(c->packed + ob_tile16_byte(c->k_steps, first, 0), 0x55, c->k_steps * 256);
    }
    for (size_t n = first; n < end; n++) {
        c->kernels->ternarize_row(c->dt, c->k, row_at(c, n), c->half,
                                  c->packed + ob_tile16_byte(c->k_steps, n, 0));
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
    absmean_call c = {.kernels = ob_kernels_active(),
                      .n = n,
                      .k = k,
                      .k_steps = ob_padded_k(k) / 16,
                      .dt = dt,
                      .w = w,
                      .packed = packed};
    c.row_sum = ob_scratch_take(n * sizeof *c.row_sum);
    if (!c.row_sum) {
        return OB_NO_MEMORY;
    }
    uint64_t fp = ob_fp_default();
    ob_parallel(OB_CEIL_DIV(n, ROWS), sum_group, &c);
    for (size_t i = 0; i < n; i++) {
        total += c.row_sum[i];
    }
    ob_scratch_give(c.row_sum);
    float mean = count ? (float)(total / (double)count) : 0.0f;
    ob_fp_restore(fp);
    if (!isfinite(total)) {
        return OB_INVALID;
    }
    *scale = mean > 1e-5f ? mean : 1e-5f;
    c.half = *scale * 0.5f;
    ob_parallel(OB_CEIL_DIV(n, (size_t)64), pack_strip, &c);
    return OB_OK;
}
