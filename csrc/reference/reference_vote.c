/* reference_vote.c - the weight side of the backward, one element at a time. */
#include "reference.h"

/* One micro-batch of at most OB_TOKENS_PER_VOTE tokens: what the votes see of it. */
typedef struct micro_batch {
    const ob_weights *w;
    size_t tokens, padded; /* M, padded K */
    ob_dtype dt;
    const void *dy; /* (M,N), from token `first` */
    size_t first;
    const int8_t *xq; /* (M, padded K) */
    const float *sx;  /* (M,) */
    const double *control;
    uint64_t micro;
    int8_t *hq;     /* (N,M) scratch */
    float *h_scale; /* (N,) scratch */
    int32_t *acc;   /* (N,K) scratch */
} micro_batch;

static float
weighted_gradient(const micro_batch *b, size_t m, size_t n)
{
    return ob_ref_load(b->dt, b->dy, (b->first + m) * b->w->n + n) * b->sx[m];
}

static ob_status
allocate(micro_batch *b, size_t tokens)
{
    b->hq = ob_alloc(b->w->n * tokens + 1);
    b->h_scale = ob_alloc((b->w->n + 1) * sizeof(float));
    b->acc = ob_alloc((b->w->n * b->w->k + 1) * sizeof(int32_t));
    return b->hq != NULL && b->h_scale != NULL && b->acc != NULL ? OB_OK : OB_NO_MEMORY;
}

static void
release(micro_batch *b)
{
    ob_free(b->hq);
    ob_free(b->h_scale);
    ob_free(b->acc);
}

/* dy * sx (M,N) -> hq (N,M), h_scale (N,): stochastic rounding per output column over the tokens */
static void
quantize_outputs(micro_batch *b)
{
    uint64_t key = ob_ref_key(b->control, b->micro, OB_STREAM_WEIGHT_GRAD);
    memset(b->hq, 0, b->w->n * b->tokens);
    for (size_t n = 0; n < b->w->n; n++) {
        uint32_t absmax = 0;
        for (size_t m = 0; m < b->tokens; m++) {
            uint32_t bits = ob_ref_bits(weighted_gradient(b, m, n)) & 0x7FFFFFFFu;
            absmax = bits > absmax ? bits : absmax;
        }
        float a = ob_ref_float(absmax);
        b->h_scale[n] = 0.0f;
        if (a < OB_REF_TINY) {
            continue;
        }
        b->h_scale[n] = a / 127.0f;
        float inverse = 127.0f / a;
        uint32_t random = ob_ref_first(key, n);
        for (size_t m = 0; m < b->tokens; m++) {
            b->hq[n * b->tokens + m] =
                (int8_t)ob_ref_round(weighted_gradient(b, m, n) * inverse, random, m, 127.0f);
        }
    }
}

/* acc (N,K) = hq (N,M) . xq (M,K) */
static void
multiply(micro_batch *b)
{
    size_t inputs = b->w->k;
    memset(b->acc, 0, b->w->n * inputs * sizeof(int32_t));
    for (size_t n = 0; n < b->w->n; n++) {
        for (size_t m = 0; m < b->tokens; m++) {
            for (size_t k = 0; k < inputs; k++) {
                b->acc[n * inputs + k] += b->hq[n * b->tokens + m] * b->xq[m * b->padded + k];
            }
        }
    }
}

/* s'_n: the weight scale without the loss scale */
static float
unscaled(const micro_batch *b, size_t n)
{
    return ob_ref_scale(b->w, n) * (float)(1.0 / b->control[OB_CTL_GRAD_SCALE]);
}

static float
gradient(const micro_batch *b, size_t n, size_t k)
{
    return (float)b->acc[n * b->w->k + k] * (b->h_scale[n] * unscaled(b, n));
}

/* col_sum[k] += mean over the rows in training of g^2, which are summed in blocks of 256 */
static void
measure_column(const micro_batch *b, size_t k, ob_planes *planes)
{
    size_t rows = ob_ref_rows(planes, b->w->n);
    float total = 0.0f;
    for (size_t first = 0; first < rows; first += 256) {
        float block = 0.0f;
        for (size_t i = first; i < rows && i < first + 256; i++) {
            float g = gradient(b, ob_ref_output(planes, i), k);
            block += g * g;
        }
        total = first == 0 ? block : total + block;
    }
    planes->col_sum[k] += ob_ref_mean(total, rows);
}

/* row_sum (N',) += mean_k g^2, col_sum (K,) += mean_n g^2, sketch (N',) += sum_k t_k g, and the sketch's energy */
static void
measure(const micro_batch *b, ob_planes *planes, float *row)
{
    size_t rows = ob_ref_rows(planes, b->w->n), inputs = b->w->k;
    ob_rng_row signs = ob_rng_at_row(ob_ref_key(b->control, 0, OB_STREAM_SKETCH), 0);
    double energy = 0.0;
    for (size_t i = 0; i < rows; i++) {
        size_t n = ob_ref_output(planes, i);
        for (size_t k = 0; k < inputs; k++) {
            row[k] = gradient(b, n, k) * gradient(b, n, k);
        }
        planes->row_sum[i] += ob_ref_mean(ob_ref_sum_row(inputs, row), inputs);
        for (size_t k = 0; k < inputs; k++) {
            float g = gradient(b, n, k);
            row[k] = ob_rng_draw(signs, (uint32_t)k) >> 31 ? -g : g;
        }
        float z = ob_ref_sum_row(inputs, row);
        planes->sketch[i] += z;
        energy += (double)z * (double)z;
    }
    planes->control[OB_CTL_SKETCH_ENERGY] += energy;
    for (size_t k = 0; k < inputs; k++) {
        measure_column(b, k, planes);
    }
}

/* ds (1,) or (N,) += sum_k T_nk dW_nk over every `stride`-th row from `first`, a tensor's times stride */
static void
differentiate_scale(const micro_batch *b, size_t first, size_t stride, float *ds)
{
    double tensor = 0.0;
    for (size_t n = first; n < b->w->n; n += stride) {
        int64_t d = 0;
        for (size_t k = 0; k < b->w->k; k++) {
            d += (int64_t)ob_ref_code(b->w->packed, b->w->k, n, k) * b->acc[n * b->w->k + k];
        }
        tensor += (double)d * (double)b->h_scale[n];
        if (b->w->scale_len != 1) {
            ds[n] += (float)d * b->h_scale[n];
        }
    }
    if (b->w->scale_len == 1) {
        ds[0] += (float)(tensor * (double)stride);
    }
}

/* db (N,) += sum_m dy_mn */
static void
differentiate_bias(const micro_batch *b, float *db)
{
    for (size_t n = 0; n < b->w->n; n++) {
        float sum = 0.0f;
        for (size_t m = 0; m < b->tokens; m++) {
            sum += ob_ref_load(b->dt, b->dy, (b->first + m) * b->w->n + n);
        }
        db[n] += sum;
    }
}

/* Votes of row i into the residual, and into the codes where the rule moves them at once. */
static void
vote_residual(size_t inputs, const float *u, const micro_batch *b, size_t i, ob_planes *planes)
{
    uint32_t random =
        ob_ref_stepwise_first(b->control, b->micro, OB_STREAM_VOTE, ob_ref_output(planes, i));
    for (size_t k = 0; k < inputs; k++) {
        planes->control[OB_CTL_VOTE_MOVED] +=
            ob_ref_apply(planes, planes->codes, inputs, i, k, u[k], random);
    }
}

/* Votes of row i into the vote plane, in 1/1024. */
static void
hold_votes(size_t inputs, const float *u, const micro_batch *b, size_t i, ob_planes *planes)
{
    uint32_t random =
        ob_ref_stepwise_first(b->control, b->micro, OB_STREAM_VOTE, ob_ref_output(planes, i));
    for (size_t k = 0; k < inputs; k++) {
        int16_t *held = &planes->votes[i * inputs + k];
        int vote = ob_ref_round(u[k] * 1024.0f, random, k, 40000.0f);
        *held = (int16_t)ob_ref_clamp(*held + vote, 32767);
    }
}

static void
cast_votes(const micro_batch *b, ob_planes *planes, float *u)
{
    size_t rows = ob_ref_rows(planes, b->w->n), inputs = b->w->k;
    double sum = 0.0;
    for (size_t i = 0; i < rows; i++) {
        sum += (double)planes->row_factor[i];
    }
    float average = (float)(sum / (double)rows);
    float clip = planes->votes != NULL ? 31.0f : (float)b->control[OB_CTL_CLIP];
    for (size_t i = 0; i < rows; i++) {
        size_t n = ob_ref_output(planes, i);
        float q = planes->row_factor[i] / average;
        float a = q > 0.0f ? (b->h_scale[n] * unscaled(b, n)) / sqrtf(q) : 0.0f;
        a = fabsf(a) < 0x1p90f ? a : 0.0f;
        for (size_t k = 0; k < inputs; k++) {
            float col = planes->col_factor[k];
            float c = col > 0.0f ? 1.0f / sqrtf(col) : 0.0f;
            float v = ((float)b->acc[n * inputs + k] * a) * c;
            u[k] = fmaxf(-clip, fminf(clip, v));
        }
        if (planes->votes != NULL) {
            hold_votes(inputs, u, b, i, planes);
        }
        else if (ob_rule_momentum_bits(planes->rule) > 0) {
            ob_ref_vote_momentum(inputs, u, b->micro, OB_STREAM_MOMENTUM, i, planes);
        }
        else {
            vote_residual(inputs, u, b, i, planes);
        }
    }
}

/* Is any dy * sx of the call non-finite? */
static int
any_nonfinite(const micro_batch *b, size_t m_count)
{
    for (size_t m = 0; m < m_count; m++) {
        for (size_t n = 0; n < b->w->n; n++) {
            if (!isfinite(weighted_gradient(b, m, n))) {
                return 1;
            }
        }
    }
    return 0;
}

static void
fill_nan(size_t count, float *x)
{
    for (size_t i = 0; x != NULL && i < count; i++) {
        x[i] = ob_ref_float(OB_REF_NAN_BITS);
    }
}

ob_status
ob_reference_vote(const ob_weights *w, size_t m_count, ob_dtype dt, const void *dy,
                  const int8_t *xq, const float *sx, ob_planes *planes, const double *control,
                  float *ds, float *db, size_t *nonfinite)
{
    // dy (M,N) dt, xq (M, padded K), sx (M,), packed (N,K) -> planes, ds (1,) or (N,), db (N,)
    const double *state = planes != NULL ? planes->control : control;
    size_t padded = 16 * OB_CEIL_DIV(w->k, 16), chunk = OB_MIN(m_count, (size_t)OB_TOKENS_PER_VOTE);
    ob_status status = state == NULL ? OB_INVALID : ob_ref_check(w);
    if (status != OB_OK) {
        return status;
    }
    micro_batch b = {w,    0,    padded, dt, dy, 0, xq, sx, state, (uint64_t)state[OB_CTL_MICRO],
                     NULL, NULL, NULL};
    float *row = ob_alloc((w->k + 1) * sizeof(float)); /* one row of g or u */
    status = row == NULL ? OB_NO_MEMORY : allocate(&b, chunk);
    *nonfinite = status == OB_OK && any_nonfinite(&b, m_count);
    if (*nonfinite) {
        fill_nan(w->scale_len, ds);
        fill_nan(w->n, db);
        if (planes != NULL) {
            planes->control[OB_CTL_NONFINITE] += 1;
            planes->control[OB_CTL_MICRO] +=
                (double)OB_CEIL_DIV(m_count, (size_t)OB_TOKENS_PER_VOTE);
        }
    }
    for (size_t m = 0; status == OB_OK && !*nonfinite && m < m_count; m += chunk, b.micro++) {
        b.tokens = OB_MIN(m_count - m, chunk);
        b.first = m;
        b.xq = xq + m * padded;
        b.sx = sx + m;
        quantize_outputs(&b);
        multiply(&b);
        if (ds != NULL) {
            differentiate_scale(&b, ob_ref_output(planes, 0), ob_ref_stride(planes), ds);
        }
        if (db != NULL) {
            differentiate_bias(&b, db);
        }
        if (planes != NULL) {
            measure(&b, planes, row);
            if (state[OB_CTL_STEP] > 0) {
                cast_votes(&b, planes, row);
            }
            planes->control[OB_CTL_MICRO] += 1;
        }
    }
    release(&b);
    ob_free(row);
    return status;
}

ob_status
ob_reference_weight_gradient(const ob_weights *w, size_t m_count, ob_dtype dt, const void *dy,
                             const int8_t *xq, const float *sx, const double *control, double *dw)
{
    // dy (M,N) dt, xq (M, padded K), sx (M,) -> dw (N,K) = acc * h_scale; NaN if a dy * sx is non-finite
    ob_status status = m_count > OB_TOKENS_PER_VOTE ? OB_INVALID : ob_ref_check(w);
    if (status != OB_OK) {
        return status;
    }
    micro_batch b = {w,  m_count, 16 * OB_CEIL_DIV(w->k, 16),      dt,   dy,   0,   xq,
                     sx, control, (uint64_t)control[OB_CTL_MICRO], NULL, NULL, NULL};
    status = allocate(&b, m_count);
    if (status == OB_OK) {
        double mask = any_nonfinite(&b, m_count) ? (double)ob_ref_float(OB_REF_NAN_BITS) : 1.0;
        if (!isnan(mask)) {
            quantize_outputs(&b);
            multiply(&b);
        }
        for (size_t i = 0; i < w->n * w->k; i++) {
            dw[i] = isnan(mask) ? mask : (double)b.acc[i] * (double)b.h_scale[i / w->k];
        }
    }
    release(&b);
    return status;
}
