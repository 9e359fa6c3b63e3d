/* vote_outputs.c - the weight side of the backward, first half: dY quantised by output column over the tokens. */
#include <string.h>

#include "../base/pool.h"
#include "ops.h"
#include "vote.h"

/* Columns first + stride * i of dY for the 64 rows from i0, side by side; where they are already, nothing is copied. */
static const char *
gather_columns(vote_call *v, size_t i0, size_t columns, size_t thread, size_t *ld)
{
    size_t bytes = ob_dtype_bytes(v->dt);
    *ld = v->w->n;
    if (v->stride == 1) {
        return v->dy + i0 * bytes;
    }
    char *out = v->gathered + thread * v->m * OB_STRIP * bytes;
    *ld = OB_STRIP;
    for (size_t t = 0; t < v->m; t++) {
        const char *in = v->dy + (t * v->w->n + v->first + v->stride * i0) * bytes;
        for (size_t j = 0; j < columns; j++) {
            memcpy(out + (t * OB_STRIP + j) * bytes, in + v->stride * j * bytes, bytes);
        }
    }
    return out;
}

/* Absmax of 64 output columns; a finite strip is quantised while its dY is in cache. */
static void
quantize_outputs(void *arg, size_t task, size_t thread)
{
    vote_call *v = arg;
    size_t i0 = task * OB_STRIP, columns = OB_MIN(v->rows - i0, (size_t)OB_STRIP), ld;
    const char *dy = gather_columns(v, i0, columns, thread, &ld);
    uint32_t absmax[OB_STRIP];
    float sum[OB_STRIP], inverse[OB_STRIP];
    uint32_t random[OB_STRIP];
    int bad = 0;
    v->kernels->column_absmax(v->dt, v->m, columns, dy, ld, v->sx, absmax, sum);
    for (size_t j = 0; j < columns; j++) {
        size_t n = v->first + v->stride * (i0 + j);
        float top;
        memcpy(&top, absmax + j, sizeof top);
        bad |= absmax[j] >= 0x7F800000u;
        inverse[j] = top < OB_TINY ? 0.0f : 127.0f / top;
        v->h_scale[i0 + j] = top < OB_TINY ? 0.0f : top / 127.0f;
        if (v->stride == 1) {
            v->bias_sum[n] = sum[j];
        }
        random[j] = ob_rng_first(v->key, n, 0);
    }
    if (bad) {
        __atomic_store_n(&v->nonfinite, 1, __ATOMIC_RELAXED);
    }
    else {
        v->kernels->quantize_columns_sr(v->dt, v->m, columns, dy, ld, v->sx, inverse, random,
                                        v->hq + i0 * v->m_padded, v->m_padded, v->h_sum + i0);
    }
}

/* The bias has every row, also when only a stripe of them is in training; so has the check for what is not finite. */
static void
inspect_outputs(void *arg, size_t task, size_t thread)
{
    vote_call *v = arg;
    size_t n0 = task * OB_STRIP, columns = OB_MIN(v->w->n - n0, (size_t)OB_STRIP);
    uint32_t absmax[OB_STRIP];
    float sum[OB_STRIP];
    (void)thread;
    v->kernels->column_absmax(v->dt, v->m, columns, v->dy + n0 * ob_dtype_bytes(v->dt), v->w->n,
                              v->sx, absmax, sum);
    memcpy(v->bias_sum + n0, sum, columns * sizeof *sum);
    for (size_t j = 0; j < columns; j++) {
        if (absmax[j] >= 0x7F800000u) {
            __atomic_store_n(&v->nonfinite, 1, __ATOMIC_RELAXED);
        }
    }
}

void
ob_vote_quantize(vote_call *v)
{
    if (v->stride > 1) {
        ob_parallel(OB_CEIL_DIV(v->w->n, (size_t)OB_STRIP), inspect_outputs, v);
    }
    ob_parallel_on(v->threads, OB_CEIL_DIV(v->rows, (size_t)OB_STRIP), quantize_outputs, v);
}
