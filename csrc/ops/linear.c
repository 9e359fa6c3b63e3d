/* linear.c - forward and dX of a ternary layer: quantise tokens, then 64-column strips x blocks of tokens.
 *
 * Every output tile belongs to one task, so threads never share a sum. */
#include <string.h>

#include "../base/alloc.h"
#include "../base/check.h"
#include "../base/pool.h"
#include "../kernels/kernel.h"
#include "ops.h"

size_t
ob_padded_k(size_t k)
{
    return OB_CEIL_DIV(k, 16) * 16;
}

enum {
    QUANTIZE_ROWS = 16,
    TASK_TOKENS = 48,       /* pay for a panel's decoding */
    DIRECT_ROWS = 8,        /* up to here dot_trits beats decoding */
    PANEL_BYTES = 512 << 10 /* that stay in a core's second cache */
};

/* Tokens of one task: all of them if the strips alone feed the threads, else as few as keep every thread busy. */
static size_t
tokens_per_task(size_t m, size_t strips, size_t tile_rows, size_t threads)
{
    size_t wanted = OB_CEIL_DIV(4 * threads, OB_MIN(strips, 4 * threads));
    size_t tiles = OB_CEIL_DIV(OB_CEIL_DIV(m, tile_rows), wanted);
    size_t least = OB_CEIL_DIV((size_t)TASK_TOKENS, tile_rows);
    return OB_MIN(m, OB_MAX(tiles, least) * tile_rows);
}

/* Rows of the next tile: a remainder of 7 or 8 under a height of 6 is cut in halves, not 6 + 1.  Of 16 rows and more, a kernel
 * makes tiles of 16 itself. */
static size_t
tile_height(size_t left, size_t rows)
{
    if (left <= rows || rows >= 16) {
        return OB_MIN(left, rows);
    }
    return left + 4 <= 2 * rows ? OB_CEIL_DIV(left, (size_t)2) : rows;
}

typedef struct product {
    const ob_kernels *kernels;
    const ob_weights *w;
    const double *control;
    ob_dtype dt;
    size_t m, inner, padded, outer; /* contraction length, its padding, output length */
    const void *in;
    void *out;
    int8_t *q;       /* (M, padded) */
    float *scale;    /* (M,) */
    int32_t *sum;    /* (M,) */
    uint8_t *panels; /* one per thread; NULL in a forward: dot_forward decodes */
    uint8_t *strips; /* tile16 of trits5, one per thread; NULL: packed as tile16, or dot_trits */
    ob_dot_trits dot_trits;
    uint64_t key;
    size_t threads;       /* panels */
    size_t block, blocks; /* tokens per task, tasks per strip */
    size_t nonfinite;
} product;

static const char *
row_of(const void *base, ob_dtype dt, size_t index)
{
    return (const char *)base + index * ob_dtype_bytes(dt);
}

static void
quantize_forward_rows(void *arg, size_t task, size_t thread)
{
    product *p = arg;
    size_t end = OB_MIN(p->m, (task + 1) * QUANTIZE_ROWS);
    (void)thread;
    for (size_t t = task * QUANTIZE_ROWS; t < end; t++) {
        p->kernels->quantize_row(p->dt, p->inner, row_of(p->in, p->dt, t * p->inner),
                                 p->q + t * p->padded, p->scale + t, p->sum + t);
    }
}

static void
quantize_gradient_rows(void *arg, size_t task, size_t thread)
{
    product *p = arg;
    size_t end = OB_MIN(p->m, (task + 1) * QUANTIZE_ROWS), bad = 0;
    (void)thread;
    for (size_t t = task * QUANTIZE_ROWS; t < end; t++) {
        bad += (size_t)p->kernels->quantize_row_sr(
            p->dt, p->inner, row_of(p->in, p->dt, t * p->inner), p->w->scale, p->w->scale_len,
            ob_rng_first(p->key, t, 0), p->q + t * p->padded, p->scale + t, p->sum + t);
    }
    if (bad) {
        __atomic_fetch_add(&p->nonfinite, bad, __ATOMIC_RELAXED);
    }
}

/* y of tokens t .. t + rows - 1 and the strip that starts at output n0 */
static void
store_outputs(const product *p, size_t n0, size_t t, size_t rows, const ob_acc *acc)
{
    const ob_weights *w = p->w;
    p->kernels->store_rows(p->dt, rows, OB_MIN(w->n - n0, (size_t)OB_STRIP), acc, p->scale + t,
                           w->scale + (w->scale_len == 1 ? 0 : n0), w->scale_len,
                           w->bias ? w->bias + n0 : NULL,
                           (char *)p->out + (t * w->n + n0) * ob_dtype_bytes(p->dt), w->n);
}

/* Tokens t .. end - 1 with a strip of tile16; many of them pay for its panel. */
static void
forward_tokens(const product *p, const uint8_t *packed, size_t n0, size_t t, size_t end,
               size_t thread)
{
    uint8_t *panel = p->panels && end - t >= p->kernels->panel_tokens
                         ? p->panels + thread * p->padded * OB_STRIP
                         : NULL;
    if (panel) {
        p->kernels->decode_forward_panel(p->padded / 16, packed, panel);
    }
    for (size_t rows; t < end; t += rows) {
        ob_acc acc[OB_MAX_ROWS];
        const int8_t *q = p->q + t * p->padded;
        if (panel) {
            rows = tile_height(end - t, p->kernels->input_rows);
            p->kernels->dot_input(rows, p->padded, panel, q, p->padded, p->sum + t, acc);
        }
        else {
            rows = tile_height(end - t, p->kernels->forward_rows);
            p->kernels->dot_forward(rows, p->padded / 16, packed, q, p->padded, p->sum + t, acc);
        }
        store_outputs(p, n0, t, rows, (const ob_acc *)acc);
    }
    ob_kernels_leave(p->kernels);
}

static void
forward_task(void *arg, size_t task, size_t thread)
{
    const product *p = arg;
    size_t strip = task / p->blocks, t = task % p->blocks * p->block;
    forward_tokens(p, p->w->packed + strip * p->padded * 16, strip * OB_STRIP, t,
                   OB_MIN(p->m, t + p->block), thread);
}

/* The same from trits5: token by token where that is fastest, else by way of a tile16 strip. */
static void
forward_trits_task(void *arg, size_t task, size_t thread)
{
    const product *p = arg;
    size_t strip = task / p->blocks, t = task % p->blocks * p->block, n0 = strip * OB_STRIP;
    size_t steps = ob_trits5_steps(p->inner), end = OB_MIN(p->m, t + p->block);
    const uint8_t *trits = p->w->packed + strip * steps * 256;
    if (p->strips) {
        uint8_t *packed = p->strips + thread * p->padded * 16;
        p->kernels->decode_trits(steps, p->padded / 16, trits, packed);
        forward_tokens(p, packed, n0, t, end, thread);
        return;
    }
    for (; t < end; t++) {
        ob_acc acc;
        p->dot_trits(p->inner, trits, p->q + t * p->padded, p->sum[t], acc);
        store_outputs(p, n0, t, 1, (const ob_acc *)&acc);
    }
}

static void
input_task(void *arg, size_t task, size_t thread)
{
    const product *p = arg;
    const ob_weights *w = p->w;
    size_t strip = task / p->blocks, k0 = strip * OB_STRIP,
           columns = OB_MIN(w->k - k0, (size_t)OB_STRIP);
    size_t end = OB_MIN(p->m, (task % p->blocks + 1) * p->block);
    uint8_t *panel = p->panels + thread * p->padded * OB_STRIP;
    p->kernels->decode_input_panel(w->n, ob_padded_k(w->k) / 16, w->packed, strip, panel);
    for (size_t t = task % p->blocks * p->block, rows; t < end; t += rows) {
        ob_acc acc[OB_MAX_ROWS];
        rows = tile_height(end - t, p->kernels->input_rows);
        p->kernels->dot_input(rows, p->padded, panel, p->q + t * p->padded, p->padded, p->sum + t,
                              acc);
        p->kernels->store_rows(p->dt, rows, columns, (const ob_acc *)acc, p->scale + t, NULL, 0,
                               NULL, (char *)p->out + (t * w->k + k0) * ob_dtype_bytes(p->dt),
                               w->k);
    }
    ob_kernels_leave(p->kernels);
}

static void
run_product(product *p, size_t tile_rows, void (*quantize)(void *, size_t, size_t),
            void (*tile)(void *, size_t, size_t))
{
    size_t strips = OB_CEIL_DIV(p->outer, (size_t)OB_STRIP);
    ob_parallel(OB_CEIL_DIV(p->m, (size_t)QUANTIZE_ROWS), quantize, p);
    if (p->m == 0 || strips == 0) {
        return;
    }
    p->block = tokens_per_task(p->m, strips, tile_rows, p->threads);
    p->blocks = OB_CEIL_DIV(p->m, p->block);
    ob_parallel_on(p->threads, strips * p->blocks, tile, p);
}

ob_status
ob_linear_forward(const ob_weights *w, size_t m, ob_dtype dt, const void *x, void *y, int8_t *xq,
                  float *sx)
{
    ob_status status = ob_check_weights(w, OB_FORMAT_trits5);
    size_t padded = ob_padded_k(w->k), threads = ob_num_threads(), q_bytes, panel_bytes, bytes;
    const ob_kernels *kernels = ob_kernels_active();
    int trits = w->packing == OB_FORMAT_trits5;
    ob_dot_trits dot_trits = trits ? ob_dot_trits_active() : NULL;
    int decode = trits && (!dot_trits || m > DIRECT_ROWS);
    if (status != OB_OK) {
        return status;
    }
    if (!ob_mul(m, padded, &q_bytes) || !ob_mul(m, w->n, &bytes) || bytes > SIZE_MAX / 4 ||
        !ob_mul(padded * OB_STRIP, threads, &panel_bytes)) {
        return OB_OVERFLOW;
    }
    int panel = m >= kernels->panel_tokens && padded * OB_STRIP <= PANEL_BYTES;
    int32_t *sum = ob_scratch_take(m * sizeof *sum);
    int8_t *q = xq ? xq : ob_scratch_take(q_bytes);
    float *scale = sx ? sx : ob_scratch_take(m * sizeof *scale);
    uint8_t *panels = panel ? ob_scratch_take(panel_bytes) : NULL;
    uint8_t *strips = decode ? ob_scratch_take(panel_bytes / 4) : NULL;
    if (sum && q && scale && (panels || !panel) && (strips || !decode)) {
        product p = {.kernels = kernels,
                     .w = w,
                     .dt = dt,
                     .m = m,
                     .inner = w->k,
                     .padded = padded,
                     .outer = w->n,
                     .in = x,
                     .out = y,
                     .q = q,
                     .scale = scale,
                     .sum = sum,
                     .panels = panels,
                     .strips = strips,
                     .dot_trits = dot_trits,
                     .threads = threads};
        run_product(&p, p.kernels->input_rows, quantize_forward_rows,
                    trits ? forward_trits_task : forward_task);
    }
    else {
        status = OB_NO_MEMORY;
    }
    ob_scratch_give(strips);
    ob_scratch_give(panels);
    ob_scratch_give(sx ? NULL : scale);
    ob_scratch_give(xq ? NULL : q);
    ob_scratch_give(sum);
    return status;
}

ob_status
ob_linear_backward_input(const ob_weights *w, size_t m, ob_dtype dt, const void *dy, void *dx,
                         const double *control, size_t *nonfinite)
{
    ob_status status = ob_check_weights(w, OB_FORMAT_tile16);
    size_t padded = ob_padded_k(w->n), threads = ob_num_threads(), q_bytes, panel_bytes, bytes;
    if (status != OB_OK) {
        return status;
    }
    if (w->n > OB_MAX_K || !ob_mul(m, padded, &q_bytes) || !ob_mul(m, w->k, &bytes) ||
        bytes > SIZE_MAX / 4 || !ob_mul(padded * OB_STRIP, threads, &panel_bytes)) {
        return OB_OVERFLOW;
    }
    int32_t *sum = ob_scratch_take(m * sizeof *sum);
    int8_t *q = ob_scratch_take(q_bytes);
    float *scale = ob_scratch_take(m * sizeof *scale);
    uint8_t *panels = ob_scratch_take(panel_bytes);
    if (sum && q && scale && panels) {
        product p = {.kernels = ob_kernels_active(),
                     .w = w,
                     .dt = dt,
                     .m = m,
                     .inner = w->n,
                     .padded = padded,
                     .outer = w->k,
                     .in = dy,
                     .out = dx,
                     .q = q,
                     .scale = scale,
                     .sum = sum,
                     .panels = panels,
                     .threads = threads,
                     .key = ob_control_key(control, control[OB_CTL_MICRO], OB_STREAM_INPUT_GRAD)};
        run_product(&p, p.kernels->input_rows, quantize_gradient_rows, input_task);
        *nonfinite = p.nonfinite;
    }
    else {
        status = OB_NO_MEMORY;
    }
    ob_scratch_give(panels);
    ob_scratch_give(scale);
    ob_scratch_give(q);
    ob_scratch_give(sum);
    return status;
}
