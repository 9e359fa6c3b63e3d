/* vote.c - the weight side of the backward: multiply by 64-column strips, vote (vote_outputs.c has quantised dY).
 *
 * A task is one strip of input columns times some blocks of rows, which it walks in order: it packs the strip's tokens
 * once. Column sums are kept per block and row sums per strip, and added in order afterwards, so no result depends on
 * the threads. */
#include <math.h>
#include <string.h>

#include "../base/alloc.h"
#include "../base/check.h"
#include "../base/cpu.h"
#include "../base/pool.h"
#include "../kernels/kernel.h"
#include "ops.h"
#include "vote.h"

enum {
    ROW_BLOCK = 256,
    VOTE_ROWS = 8,   /* at a time, while the next tile's planes are on their way */
    TASK_BLOCKS = 4, /* per packing; all rows at once: 4 % slower at 6912 inputs, equal at 2560 */
    TASKS_PER_THREAD = 4
};

/* Ask for what the votes of rows first .. end-1 will touch: lines a whole row apart, which no hardware foresees. */
static void
prefetch_rows(const ob_planes *planes, const ob_vote_strip *strip, size_t first, size_t end)
{
    size_t bits = strip->held ? 16 : (size_t)ob_rule_residual_bits(planes->rule);
    size_t row = strip->held ? 2 * strip->k : ob_rule_residual_row_bytes(planes->rule, strip->k);
    const char *at = strip->held ? (const char *)strip->held : strip->residual;
    for (size_t i = first; bits && i < end; i++) {
        const char *line = at + i * row + 8 * bits * strip->strip;
        __builtin_prefetch(line, 1);
        __builtin_prefetch(line + (bits * strip->columns - 1) / 8, 1);
    }
    for (size_t i = first; strip->momentum && !strip->held && i < end; i++) {
        size_t block = 8 * (size_t)ob_rule_momentum_bits(planes->rule);
        __builtin_prefetch(strip->momentum + (i * strip->strips + strip->strip) * block, 1);
        __builtin_prefetch(strip->momentum_scale + i * strip->strips + strip->strip, 1);
    }
}

static void
vote_block(const vote_call *v, ob_vote_strip *strip, size_t block, const uint8_t *panel,
           void (*tile)(const ob_vote_strip *, size_t, size_t, const ob_acc *))
{
    size_t end = OB_MIN(v->rows, (block + 1) * ROW_BLOCK);
    strip->col_square = v->col_square + (block * v->strips + strip->strip) * OB_STRIP;
    memset(strip->col_square, 0, OB_STRIP * sizeof(float));
    for (size_t i = block * ROW_BLOCK, rows; i < end; i += rows) {
        ob_acc acc[OB_MAX_ROWS];
        rows = OB_MIN(end - i, v->kernels->weight_rows);
        v->kernels->dot_weight(rows, v->m_padded, panel, v->hq + i * v->m_padded, v->m_padded,
                               v->h_sum + i, acc);
        for (size_t r = 0, some; r < rows; r += some) {
            some = OB_MIN(rows - r, (size_t)VOTE_ROWS);
            if (strip->votes) {
                prefetch_rows(v->planes, strip, OB_MIN(i + rows + r, v->rows),
                              OB_MIN(i + rows + r + some, v->rows));
            }
            tile(strip, i + r, some, (const ob_acc *)acc + r);
        }
    }
}

static void
vote_strip(void *arg, size_t task, size_t thread)
{
    vote_call *v = arg;
    const ob_weights *w = v->w;
    const double *control = v->control;
    uint8_t *panel = v->panels + thread * OB_STRIP * v->m_padded;
    size_t first = task / v->strips * v->task_blocks, index = task % v->strips;
    size_t end = OB_MIN(v->blocks, first + v->task_blocks);
    uint64_t moved = 0;
    ob_rule rule = v->planes ? v->planes->rule : (ob_rule)0;
    ob_vote_strip strip = {
        .columns = OB_MIN(w->k - index * OB_STRIP, (size_t)OB_STRIP),
        .tokens = v->m,
        .strip = index,
        .codes = v->planes && v->planes->codes ? v->planes->codes : (uint8_t *)(uintptr_t)w->packed,
        .k_steps = ob_padded_k(w->k) / 16,
        .row_first = v->first,
        .row_stride = v->stride,
        .g_scale = v->g_scale,
        .a = v->a,
        .c = v->c + index * OB_STRIP,
        .sign = v->sign + index * OB_STRIP,
        .random = v->random,
        .k = w->k,
        .strips = v->strips,
        .row_square = v->row_square + index * v->rows,
        .row_sketch = v->row_sketch + index * v->rows,
        .row_code = v->row_code + thread * v->rows,
        .moved = &moved,
    };
    if (v->planes) {
        strip.votes = control[OB_CTL_STEP] > 0;
        strip.step = ob_control_step(rule, control);
        strip.held = v->planes->votes;
        strip.clip = strip.held ? (float)OB_VOTE_LIMIT : ob_control_clip(rule, control, strip.step);
        strip.beta1 = v->micro == 0 ? (float)control[OB_CTL_BETA1] : 1.0f;
        strip.one_minus_beta1 = (float)(1.0 - control[OB_CTL_BETA1]);
        strip.residual = v->planes->residual;
        strip.momentum = v->planes->momentum;
        strip.momentum_scale = v->planes->momentum_scale;
    }
    v->kernels->pack_token_panel(v->m, v->xq, ob_padded_k(w->k), index, panel);
    for (size_t block = first; block < end; block++) {
        vote_block(v, &strip, block, panel,
                   strip.held ? v->kernels->hold_tile : v->kernels->vote_tile[rule]);
    }
    ob_kernels_leave(v->kernels);
    __atomic_fetch_add(&v->moved, moved, __ATOMIC_RELAXED);
}

/* Coefficients of rows and columns, random numbers, sketch signs. */
static void
prepare_votes(vote_call *v)
{
    const ob_weights *w = v->w;
    float inverse_loss_scale = v->planes ? (float)(1.0 / v->control[OB_CTL_GRAD_SCALE]) : 1.0f,
          mean = 0.0f;
    uint64_t sketch = ob_control_key(v->control, 0.0, OB_STREAM_SKETCH), key = 0;
    uint32_t turn = 0;
    ob_rng_row sketch_row = ob_rng_at_row(sketch, 0);
    int votes = v->planes && v->control[OB_CTL_STEP] > 0;
    if (votes) {
        double total = 0.0;
        for (size_t i = 0; i < v->rows; i++) {
            total += v->planes->row_factor[i];
        }
        mean = (float)(total / (double)v->rows);
        enum ob_stream stream = !v->planes->votes && ob_rule_momentum_bits(v->planes->rule)
                                    ? OB_STREAM_MOMENTUM
                                    : OB_STREAM_VOTE;
        key = ob_control_stepwise_key(v->control, stream);
        turn = ob_control_turn(v->control, (double)v->micro);
    }
    for (size_t i = 0; i < v->rows; i++) {
        size_t n = v->first + v->stride * i;
        float ratio = votes ? v->planes->row_factor[i] / mean : 0.0f;
        v->g_scale[i] = v->h_scale[i] * (w->scale[w->scale_len == 1 ? 0 : n] * inverse_loss_scale);
        float a = ratio > 0.0f ? v->g_scale[i] / sqrtf(ratio) : 0.0f;
        v->a[i] = fabsf(a) < 0x1p90f ? a : 0.0f; /* its products with acc are finite */
        v->random[i] = ob_rng_first(key, n, turn);
    }
    for (size_t k = 0; k < v->strips * OB_STRIP; k++) {
        float factor = votes && k < w->k ? v->planes->col_factor[k] : 0.0f;
        v->c[k] = factor > 0.0f ? 1.0f / sqrtf(factor) : 0.0f;
        v->sign[k] = ob_rng_draw(sketch_row, (uint32_t)k) & 0x80000000u;
    }
}

/* This chunk's sums into the planes, strips in order. */
static void
collect_sums(vote_call *v)
{
    ob_planes *planes = v->planes;
    size_t rows = v->rows, k_count = v->w->k;
    double energy = 0.0;
    for (size_t j = 1; j < v->strips; j++) {
        for (size_t i = 0; i < rows; i++) {
            v->row_square[i] += v->row_square[j * rows + i];
            v->row_sketch[i] += v->row_sketch[j * rows + i];
        }
    }
    for (size_t i = 0; i < rows; i++) {
        float sketch = k_count ? v->row_sketch[i] : 0.0f;
        planes->row_sum[i] += k_count ? v->row_square[i] / (float)k_count : 0.0f;
        planes->sketch[i] += sketch;
        energy += (double)sketch * (double)sketch;
    }
    for (size_t k = 0; k < k_count && rows; k++) {
        float square = v->col_square[k];
        for (size_t b = 1; b < v->blocks; b++) {
            square += v->col_square[b * v->strips * OB_STRIP + k];
        }
        planes->col_sum[k] += square / (float)rows;
    }
    planes->control[OB_CTL_SKETCH_ENERGY] += energy;
    planes->control[OB_CTL_MICRO] += 1.0;
    planes->control[OB_CTL_VOTE_MOVED] += (double)v->moved;
}

/* A tensor's scale gets the active rows' share times the number of stripes. */
static void
collect_scale_gradient(vote_call *v, float *ds)
{
    double total = 0.0;
    for (size_t i = 0; i < v->rows; i++) {
        int64_t sum = 0;
        for (size_t t = 0; t < v->threads; t++) {
            sum += v->row_code[t * v->rows + i];
        }
        if (v->w->scale_len == 1) {
            total += (double)sum * (double)v->h_scale[i];
        }
        else {
            ds[v->first + v->stride * i] += (float)sum * v->h_scale[i];
        }
    }
    if (v->w->scale_len == 1) {
        ds[0] += (float)(total * (double)v->stride);
    }
}

static void
vote_chunk(vote_call *v, float *ds, float *db)
{
    size_t n_count = v->w->n;
    v->moved = 0;
    if (v->strips && (v->planes || ds)) {
        prepare_votes(v);
        memset(v->row_code, 0, v->threads * v->rows * sizeof *v->row_code);
        ob_parallel_on(v->threads, v->strips * OB_CEIL_DIV(v->blocks, v->task_blocks), vote_strip,
                       v);
        if (ds) {
            collect_scale_gradient(v, ds);
        }
    }
    if (v->planes) {
        collect_sums(v);
    }
    if (db) {
        for (size_t n = 0; n < n_count; n++) {
            db[n] += v->bias_sum[n];
        }
    }
}

/* One block for all scratch of a call: allocations either all succeed before the first write, or nothing happens. */
static void *
take_scratch(vote_call *v, size_t m)
{
    size_t n = v->rows, padded_k = v->strips * OB_STRIP, hq, panels, gathered, rows, codes;
    v->m_padded = OB_CEIL_DIV(m, (size_t)4) * 4;
    if (!ob_mul(n, v->m_padded, &hq) || !ob_mul(v->threads * OB_STRIP, v->m_padded, &panels) ||
        !ob_mul(v->stride > 1 ? panels : 0, ob_dtype_bytes(v->dt), &gathered) ||
        !ob_mul(v->strips * sizeof(float), n, &rows) ||
        !ob_mul(v->threads * sizeof(int64_t), n, &codes) ||
        OB_MAX(OB_MAX(hq, panels), OB_MAX(gathered, OB_MAX(rows, codes))) > SIZE_MAX / 16) {
        return NULL;
    }
    const struct {
        void *field;
        size_t bytes;
    } parts[] = {
        {&v->hq, hq},
        {&v->panels, panels},
        {&v->gathered, gathered},
        {&v->row_square, rows},
        {&v->row_sketch, rows},
        {&v->row_code, codes},
        {&v->h_scale, n * sizeof(float)},
        {&v->g_scale, n * sizeof(float)},
        {&v->a, n * sizeof(float)},
        {&v->bias_sum, v->w->n * sizeof(float)},
        {&v->h_sum, n * sizeof(int32_t)},
        {&v->random, n * sizeof(uint32_t)},
        {&v->c, padded_k * sizeof(float)},
        {&v->sign, padded_k * sizeof(uint32_t)},
        {&v->col_square, v->blocks * padded_k * sizeof(float)},
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        total += OB_CEIL_DIV(parts[i].bytes, (size_t)64) * 64;
    }
    char *block = ob_scratch_take(total), *at = block;
    for (size_t i = 0; block && i < sizeof parts / sizeof *parts; i++) {
        memcpy(parts[i].field, &at, sizeof at);
        at += OB_CEIL_DIV(parts[i].bytes, (size_t)64) * 64;
    }
    return block;
}

/* Point the call at tokens first .. of the whole batch, and quantise their dY; 0 if it is not finite. */
static int
load_chunk(vote_call *v, size_t chunk, size_t m, const char *dy, const int8_t *xq, const float *sx)
{
    size_t first = chunk * OB_TOKENS_PER_VOTE;
    v->m = OB_MIN(m - first, (size_t)OB_TOKENS_PER_VOTE);
    v->m_padded = OB_CEIL_DIV(v->m, (size_t)4) * 4;
    v->dy = dy + first * v->w->n * ob_dtype_bytes(v->dt);
    v->xq = xq + first * ob_padded_k(v->w->k);
    v->sx = sx + first;
    v->micro = (size_t)v->control[OB_CTL_MICRO] + (v->planes ? 0 : chunk);
    v->key = ob_control_key(v->control, (double)v->micro, OB_STREAM_WEIGHT_GRAD);
    ob_vote_quantize(v);
    return !v->nonfinite;
}

static void
refuse_nonfinite(const ob_weights *w, ob_planes *planes, size_t chunks, float *ds, float *db,
                 size_t *nonfinite)
{
    *nonfinite = 1;
    for (size_t n = 0; ds && n < w->scale_len; n++) {
        ds[n] = NAN;
    }
    for (size_t n = 0; db && n < w->n; n++) {
        db[n] = NAN;
    }
    if (planes) {
        planes->control[OB_CTL_NONFINITE] += 1.0;
        planes->control[OB_CTL_MICRO] += (double)chunks;
    }
}

ob_status
ob_vote(const ob_weights *w, size_t m, ob_dtype dt, const void *dy, const int8_t *xq,
        const float *sx, ob_planes *planes, const double *control, float *ds, float *db,
        size_t *nonfinite)
{
    ob_status status = ob_check_weights(w, OB_FORMAT_tile16);
    size_t chunks = OB_CEIL_DIV(m, (size_t)OB_TOKENS_PER_VOTE), bytes;
    if (status != OB_OK) {
        return status;
    }
    if (!ob_mul(m, w->n, &bytes) || bytes > SIZE_MAX / 4 || !ob_mul(m, ob_padded_k(w->k), &bytes)) {
        return OB_OVERFLOW;
    }
    vote_call v = {.kernels = ob_kernels_active(),
                   .w = w,
                   .planes = planes,
                   .control = planes ? planes->control : control,
                   .dt = dt,
                   .strips = OB_CEIL_DIV(w->k, (size_t)OB_STRIP),
                   .threads = ob_num_threads(),
                   .rows = w->n,
                   .stride = 1};
    if (planes) {
        v.rows = ob_plane_rows(w->n, planes);
        v.first = ob_first_row(planes);
        v.stride = ob_row_stride(planes);
    }
    v.blocks = OB_CEIL_DIV(v.rows, (size_t)ROW_BLOCK);
    v.task_blocks = v.blocks * v.strips / (v.threads * TASKS_PER_THREAD);
    v.task_blocks = OB_MAX(OB_MIN(v.task_blocks, (size_t)TASK_BLOCKS), (size_t)1);
    void *scratch = take_scratch(&v, OB_MIN(m, (size_t)OB_TOKENS_PER_VOTE));
    if (!scratch) {
        return OB_NO_MEMORY;
    }
    uint64_t fp = ob_fp_default(); /* the sums between the tasks too */
    *nonfinite = 0;
    for (size_t chunk = 0; chunks > 1 && chunk < chunks;
         chunk++) { /* all chunks are looked at before the first vote */
        if (!load_chunk(&v, chunk, m, dy, xq, sx)) {
            break;
        }
    }
    for (size_t chunk = 0; !v.nonfinite && chunk < chunks; chunk++) {
        if (load_chunk(&v, chunk, m, dy, xq, sx)) {
            vote_chunk(&v, ds, db);
        }
    }
    if (v.nonfinite) {
        refuse_nonfinite(w, planes, chunks, ds, db, nonfinite);
    }
    ob_fp_restore(fp);
    ob_scratch_give(scratch);
    return OB_OK;
}
