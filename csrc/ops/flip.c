/* flip.c - one optimizer step of a layer: votes held, codes, factors, guard, counters; and Adam on its scale. */
#include <math.h>
#include <string.h>

#include "../base/alloc.h"
#include "../base/check.h"
#include "../base/cpu.h"
#include "../base/pool.h"
#include "../kernels/kernel.h"
#include "ops.h"

typedef struct flip_call {
    const ob_kernels *kernels;
    size_t rows, k, first, stride; /* rows that own planes, and which outputs they are */
    uint8_t *packed;
    const ob_planes *planes;
    uint64_t key, moved;
    uint32_t turn;
    float step;
    /* with a vote plane; scratch */
    uint64_t cast_key;
    float mean;        /* of the row factors */
    float *col_factor; /* (strips, 64) zero beyond K */
    float *col_square; /* (tasks, strips, 64) */
    float *row_square; /* (rows,) */
} flip_call;

/* The factors that the votes used, as ob_vote prepares them */
static float
row_ratio(const flip_call *f, size_t i)
{
    float ratio = f->planes->row_factor[i] / f->mean;
    return ratio > 0.0f ? ratio : 0.0f;
}

/* Row i's held votes become one vote of the rule. */
static uint64_t
cast_votes(const flip_call *f, const ob_flip_row *row, size_t i, size_t task)
{
    const ob_planes *p = f->planes;
    size_t strips = OB_CEIL_DIV(f->k, (size_t)OB_STRIP);
    uint32_t random = ob_rng_first(f->cast_key, row->n, f->turn);
    ob_cast_row cast = {
        .vote =
            {
                .codes = f->packed,
                .k_steps = row->k_steps,
                .random = &random,
                .step = f->step,
                .clip = ob_control_clip(p->rule, p->control, f->step),
                .beta1 = (float)p->control[OB_CTL_BETA1],
                .one_minus_beta1 = (float)(1.0 - p->control[OB_CTL_BETA1]),
                .residual = row->residual,
                .momentum = row->momentum,
                .momentum_scale = row->momentum_scale,
                .k = f->k,
                .strips = strips,
            },
        .n = row->n,
        .held = p->votes + i * f->k,
        .ratio = row_ratio(f, i),
        .col_factor = f->col_factor,
        .col_square = f->col_square + task * strips * OB_STRIP,
        .row_square = f->row_square + i,
    };
    return f->kernels->cast_row[p->rule](&cast);
}

/* 64 rows: a strip of the packed plane, so that few tasks write one cache line of codes. */
static void
flip_rows(void *arg, size_t task, size_t thread)
{
    flip_call *f = arg;
    const ob_planes *p = f->planes;
    size_t strips = OB_CEIL_DIV(f->k, (size_t)OB_STRIP);
    size_t end = OB_MIN(f->rows, (task + 1) * OB_STRIP);
    size_t residual_bytes = ob_rule_residual_row_bytes(p->rule, f->k);
    size_t momentum_bytes = ob_rule_momentum_row_bytes(p->rule, f->k);
    uint64_t moved = 0;
    (void)thread;
    for (size_t i = task * OB_STRIP; i < end; i++) {
        size_t n = f->first + f->stride * i;
        ob_flip_row row = {.k = f->k,
                           .random = ob_rng_first(f->key, n, f->turn),
                           .step = f->step,
                           .packed = f->packed,
                           .k_steps = ob_padded_k(f->k) / 16,
                           .n = n};
        if (residual_bytes) {
            row.residual = (char *)p->residual + i * residual_bytes;
        }
        if (momentum_bytes) {
            row.momentum = p->momentum + i * momentum_bytes;
            row.momentum_scale = p->momentum_scale + i * strips;
        }
        if (p->votes) {
            moved += cast_votes(f, &row, i, task);
        }
        moved += f->kernels->flip_row[p->rule](&row);
    }
    __atomic_fetch_add(&f->moved, moved, __ATOMIC_RELAXED);
}

size_t
ob_active_rows(size_t n, size_t stripes, size_t stripe)
{
    if (stripes < 2) {
        return n;
    }
    return n > stripe ? OB_CEIL_DIV(n - stripe, stripes) : 0;
}

static void
update_factor(size_t count, float *factor, const float *sum, float rho, const double *control)
{
    float keep = (float)control[OB_CTL_BETA2], take = (float)(1.0 - control[OB_CTL_BETA2]);
    for (size_t i = 0; i < count; i++) {
        float r = sum[i] * rho;
        factor[i] = control[OB_CTL_STEP] > 0 ? keep * factor[i] + take * r : r;
    }
}

/* How much the micro-batches agree: 1 for one, else |sum z|^2 / sum |z|^2. */
static float
agreement(size_t n, const ob_planes *planes)
{
    double energy = planes->control[OB_CTL_SKETCH_ENERGY], total = 0.0;
    if (planes->control[OB_CTL_MICRO] <= 1 || !(energy > 0)) {
        return 1.0f;
    }
    for (size_t i = 0; i < n; i++) {
        total += (double)planes->sketch[i] * (double)planes->sketch[i];
    }
    return (float)(total / energy);
}

/* This step's mean of g^2 where the votes tell, instead of a sum over micro-batches: they do unless the row or column cast
 * none, or grew so much that many of its votes met their bound. */
static void
prefer_votes(float *sum, float rho, float square, float factor, int live)
{
    *sum = live && square <= 256.0f * factor ? square : *sum * rho;
}

/* row_sum, col_sum = what the factors shall learn of this step */
static void
measure_votes(const flip_call *f, float rho)
{
    const ob_planes *p = f->planes;
    size_t padded = OB_CEIL_DIV(f->k, (size_t)OB_STRIP) * OB_STRIP;
    for (size_t i = 0; i < f->rows; i++) {
        float ratio = row_ratio(f, i);
        prefer_votes(p->row_sum + i, rho, f->row_square[i] / (float)f->k * ratio, p->row_factor[i],
                     ratio > 0.0f);
    }
    for (size_t k = 0; k < f->k; k++) {
        float square = f->rows ? f->col_square[k] : 0.0f, factor = p->col_factor[k];
        for (size_t task = 1; task < OB_CEIL_DIV(f->rows, (size_t)OB_STRIP); task++) {
            square += f->col_square[task * padded + k];
        }
        prefer_votes(p->col_sum + k, rho, square / (float)f->rows * factor, factor, factor > 0.0f);
    }
}

/* Scratch of a call with a vote plane; NULL: out of memory */
static float *
open_votes(flip_call *f)
{
    size_t padded = OB_CEIL_DIV(f->k, (size_t)OB_STRIP) * OB_STRIP, squares, floats, bytes;
    if (!ob_mul(OB_CEIL_DIV(f->rows, (size_t)OB_STRIP), padded, &squares) ||
        !ob_add(squares, padded + f->rows, &floats) || !ob_mul(floats, sizeof(float), &bytes)) {
        return NULL;
    }
    float *scratch = ob_scratch_take(bytes);
    if (scratch) {
        f->col_factor = memset(scratch, 0, bytes);
        f->col_square = scratch + padded;
        f->row_square = f->col_square + squares;
        memcpy(f->col_factor, f->planes->col_factor, f->k * sizeof(float));
        double total = 0.0;
        for (size_t i = 0; i < f->rows; i++) {
            total += f->planes->row_factor[i];
        }
        f->mean = (float)(total / (double)f->rows);
    }
    return scratch;
}

static void
update_guard(double *control, uint64_t moved, double numel)
{
    double eta = control[OB_CTL_ETA], cap = control[OB_CTL_CAP], factor = 1.05;
    if (eta > control[OB_CTL_ETA_PEAK]) {
        control[OB_CTL_ETA_PEAK] = eta;
    }
    if (!(cap > 0) || !(eta > 0)) {
        return;
    }
    if (moved) {
        factor = cap * (eta / control[OB_CTL_ETA_PEAK]) / ((double)moved / numel);
    }
    factor = OB_MIN(OB_MAX(factor, 0.8), 1.05);
    control[OB_CTL_GUARD] = OB_MIN(OB_MAX(control[OB_CTL_GUARD] * factor, 1e-3), 1.0);
}

static void
forget_sums(size_t rows, size_t k, ob_planes *planes)
{
    memset(planes->row_sum, 0, rows * sizeof(float));
    memset(planes->sketch, 0, rows * sizeof(float));
    memset(planes->col_sum, 0, k * sizeof(float));
    planes->control[OB_CTL_SKETCH_ENERGY] = 0.0;
    planes->control[OB_CTL_NONFINITE] = 0.0;
}

void
ob_discard(size_t n, size_t k, ob_planes *planes)
{
    size_t rows = ob_plane_rows(n, planes);
    forget_sums(rows, k, planes);
    if (planes->votes) {
        memset(planes->votes, 0, rows * k * sizeof *planes->votes);
    }
}

/* The codes of a layer past its first step, and with a vote plane the sums for its factors. */
static ob_status
move_codes(size_t n, size_t k, uint8_t *packed, ob_planes *planes, float *rho, uint64_t *moved)
{
    const double *control = planes->control;
    flip_call f = {.kernels = ob_kernels_active(),
                   .rows = ob_plane_rows(n, planes),
                   .k = k,
                   .first = ob_first_row(planes),
                   .stride = ob_row_stride(planes),
                   .packed = packed,
                   .planes = planes,
                   .key = ob_control_stepwise_key(control, OB_STREAM_MOMENTUM_STEP),
                   .cast_key = ob_control_stepwise_key(control, OB_STREAM_CAST),
                   .turn = ob_control_turn(control, 0.0),
                   .step = ob_control_step(planes->rule, control)};
    float *scratch = planes->votes ? open_votes(&f) : NULL;
    if (planes->votes && !scratch) {
        return OB_NO_MEMORY;
    }
    if (planes->votes || !ob_rule_moves_in_vote(planes->rule)) {
        ob_parallel(OB_CEIL_DIV(f.rows, (size_t)OB_STRIP), flip_rows, &f);
    }
    if (planes->votes) {
        measure_votes(&f, *rho);
        *rho = 1.0f;
    }
    ob_scratch_give(scratch);
    *moved = f.moved + (uint64_t)control[OB_CTL_VOTE_MOVED];
    return OB_OK;
}

ob_status
ob_flip(size_t n, size_t k, uint8_t *packed, ob_planes *planes, uint64_t *moved)
{
    double *control = planes->control;
    size_t rows = ob_plane_rows(n, planes);
    ob_status status = OB_OK;
    *moved = 0;
    if (!(control[OB_CTL_MICRO] > 0)) {
        return OB_OK;
    }
    uint64_t fp = ob_fp_default();
    float rho = agreement(rows, planes);
    if (control[OB_CTL_STEP] > 0) {
        status = move_codes(n, k, packed, planes, &rho, moved);
    }
    if (status == OB_OK) {
        update_guard(control, *moved, (double)rows * (double)k);
        update_factor(rows, planes->row_factor, planes->row_sum, rho, control);
        update_factor(k, planes->col_factor, planes->col_sum, rho, control);
        forget_sums(rows, k, planes);
        control[OB_CTL_STEP] += 1.0;
        control[OB_CTL_MICRO] = 0.0;
        control[OB_CTL_MOVED] = (double)*moved;
        control[OB_CTL_VOTE_MOVED] = 0.0;
    }
    ob_fp_restore(fp);
    return status;
}

ob_status
ob_scale_step(size_t len, float *scale, const float *grad, float *exp_avg, float *exp_avg_sq,
              double lr, double *control)
{
    uint64_t fp = ob_fp_default();
    float b1 = (float)control[OB_CTL_BETA1], take1 = (float)(1.0 - control[OB_CTL_BETA1]);
    float b2 = (float)control[OB_CTL_BETA2], take2 = (float)(1.0 - control[OB_CTL_BETA2]);
    float inverse = (float)(1.0 / control[OB_CTL_GRAD_SCALE]),
          rate = (float)(lr * control[OB_CTL_SCALE_INIT]);
    control[OB_CTL_BETA1_POWER] *= control[OB_CTL_BETA1];
    control[OB_CTL_BETA2_POWER] *= control[OB_CTL_BETA2];
    float correct1 = (float)(1.0 - control[OB_CTL_BETA1_POWER]),
          correct2 = (float)(1.0 - control[OB_CTL_BETA2_POWER]);
    for (size_t i = 0; i < len; i++) {
        float g = grad[i] * inverse;
        exp_avg[i] = b1 * exp_avg[i] + take1 * g;
        exp_avg_sq[i] = b2 * exp_avg_sq[i] + (take2 * g) * g;
        float s =
            scale[i] - (rate * (exp_avg[i] / correct1)) / (sqrtf(exp_avg_sq[i] / correct2) + 1e-8f);
        s = s > 1e-8f ? s : 1e-8f;
        scale[i] = 1.0f / (1.0f / s);
    }
    ob_fp_restore(fp);
    return OB_OK;
}
