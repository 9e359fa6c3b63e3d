/* reference_flip.c - one optimizer step of a layer's codes, one weight at a time. */
#include "reference.h"

/* The row sum of q (K,): strips of 64 columns as 16 lanes and a tree, strips in order. */
float
ob_ref_sum_row(size_t inputs, const float *q)
{
    float total = 0.0f;
    for (size_t first = 0; first < inputs; first += 64) {
        float strip[64] = {0.0f}, lane[16];
        for (size_t j = 0; j < 64 && first + j < inputs; j++) {
            strip[j] = q[first + j];
        }
        for (size_t l = 0; l < 16; l++) {
            lane[l] = ((strip[l] + strip[l + 16]) + strip[l + 32]) + strip[l + 48];
        }
        for (size_t half = 8; half > 0; half /= 2) {
            for (size_t l = 0; l < half; l++) {
                lane[l] = lane[l] + lane[l + half];
            }
        }
        total = first == 0 ? lane[0] : total + lane[0];
    }
    return total;
}

/* the mean of nothing is 0 */
float
ob_ref_mean(float sum, size_t count)
{
    return count > 0 ? sum / (float)count : 0.0f;
}

/* factor (len,) = running mean over steps of the step's sums */
static void
update_factor(size_t len, float *factor, const float *sum, float rho, const double *control)
{
    float keep = (float)control[OB_CTL_BETA2], share = (float)(1.0 - control[OB_CTL_BETA2]);
    for (size_t i = 0; i < len; i++) {
        float r = sum[i] * rho;
        factor[i] = control[OB_CTL_STEP] > 0 ? keep * factor[i] + share * r : r;
    }
}

/* How much the micro-batches of the step agree: |sum z|^2 / sum |z|^2 */
static float
agreement(size_t rows, const ob_planes *planes)
{
    double energy = planes->control[OB_CTL_SKETCH_ENERGY], square = 0.0;
    if (planes->control[OB_CTL_MICRO] == 1.0 || energy == 0.0) {
        return 1.0f;
    }
    for (size_t i = 0; i < rows; i++) {
        square += (double)planes->sketch[i] * (double)planes->sketch[i];
    }
    return (float)(square / energy);
}

/* u of weight (i, k), as the vote plane holds it */
static float
held(const ob_planes *planes, size_t inputs, size_t i, size_t k)
{
    return (float)planes->votes[i * inputs + k] / 1024.0f;
}

/* R_i over the mean of R, as the votes of this step used it */
static float
row_ratio(size_t rows, const ob_planes *planes, size_t i)
{
    double sum = 0.0;
    for (size_t j = 0; j < rows; j++) {
        sum += (double)planes->row_factor[j];
    }
    float q = planes->row_factor[i] / (float)(sum / (double)rows);
    return q > 0.0f ? q : 0.0f;
}

/* *sum = what a factor shall learn: `square` from the votes, unless there were none or it is too large to have been held */
static void
choose(float *sum, float rho, float square, float factor, float live)
{
    *sum = live > 0.0f && square <= 256.0f * factor ? square : *sum * rho;
}

/* row_sum (N',), col_sum (K,): mean g^2 of this step by row and column, where the vote plane tells it.  Scratch `x`
 * (max(N', K),) */
static void
measure_held(size_t rows, size_t inputs, ob_planes *planes, float rho, float *x)
{
    for (size_t i = 0; i < rows; i++) {
        float q = row_ratio(rows, planes, i);
        for (size_t k = 0; k < inputs; k++) {
            float u = held(planes, inputs, i, k);
            x[k] = (u * u) * planes->col_factor[k];
        }
        float square = ob_ref_mean(ob_ref_sum_row(inputs, x), inputs) * q;
        choose(&planes->row_sum[i], rho, square, planes->row_factor[i], inputs > 0 ? q : 0.0f);
    }
    for (size_t i = 0; i < rows; i++) {
        x[i] = row_ratio(rows, planes, i);
    }
    for (size_t k = 0; k < inputs; k++) {
        float total = 0.0f, c = planes->col_factor[k];
        for (size_t first = 0; first < rows; first += 64) {
            float block = 0.0f;
            for (size_t i = first; i < rows && i < first + 64; i++) {
                float u = held(planes, inputs, i, k);
                block += (u * u) * x[i];
            }
            total = first == 0 ? block : total + block;
        }
        float square = ob_ref_mean(total, rows) * c;
        choose(&planes->col_sum[k], rho, square, c, rows > 0 ? c : 0.0f);
    }
}

/* Row i: what its vote plane holds becomes one vote of the rule.  Returns how many codes moved. */
static uint64_t
cast_row(size_t inputs, size_t i, uint8_t *packed, ob_planes *planes, float *u)
{
    uint64_t moved = 0;
    uint32_t random =
        ob_ref_stepwise_first(planes->control, 0, OB_STREAM_CAST, ob_ref_output(planes, i));
    float clip = (float)planes->control[OB_CTL_CLIP];
    for (size_t k = 0; k < inputs; k++) {
        u[k] = fmaxf(-clip, fminf(clip, held(planes, inputs, i, k)));
        planes->votes[i * inputs + k] = 0;
    }
    if (ob_rule_momentum_bits(planes->rule) > 0) {
        ob_ref_vote_momentum(inputs, u, 0, OB_STREAM_CAST, i, planes);
        return 0;
    }
    for (size_t k = 0; k < inputs; k++) {
        moved += (uint64_t)ob_ref_apply(planes, packed, inputs, i, k, u[k], random);
    }
    return moved;
}

/* Row i: its momentum votes, then the residual moves codes.  Returns how many moved. */
static uint64_t
step_row(size_t inputs, size_t i, uint8_t *packed, ob_planes *planes)
{
    int bits = ob_rule_momentum_bits(planes->rule);
    uint64_t moved = 0;
    uint32_t random = ob_ref_stepwise_first(planes->control, 0, OB_STREAM_MOMENTUM_STEP,
                                            ob_ref_output(planes, i));
    size_t blocks = OB_CEIL_DIV(inputs, 64);
    for (size_t k = 0; k < inputs; k++) {
        if (bits > 0) {
            float s = ob_ref_load(OB_BF16, planes->momentum_scale, i * blocks + k / 64);
            uint8_t *row = planes->momentum + i * blocks * 8 * (size_t)bits;
            float u = (float)ob_ref_field(row, bits, k) * s;
            moved += (uint64_t)ob_ref_apply(planes, packed, inputs, i, k, u, random);
        }
        moved += (uint64_t)ob_ref_step(planes, packed, inputs, i, k);
    }
    return moved;
}

static double
clip(double v, double low, double high)
{
    return v < low ? low : v > high ? high : v;
}

static void
update_guard(double cells, double moved, double *control)
{
    double eta = control[OB_CTL_ETA], cap = control[OB_CTL_CAP];
    if (eta > control[OB_CTL_ETA_PEAK]) {
        control[OB_CTL_ETA_PEAK] = eta;
    }
    if (cap > 0 && eta > 0) {
        double allowed = cap * (eta / control[OB_CTL_ETA_PEAK]);
        double factor = moved > 0 ? clip(allowed / (moved / cells), 0.8, 1.05) : 1.05;
        control[OB_CTL_GUARD] = clip(control[OB_CTL_GUARD] * factor, 1e-3, 1.0);
    }
}

ob_status
ob_reference_flip(size_t n_count, size_t k_count, uint8_t *packed, ob_planes *planes,
                  uint64_t *moved)
{
    // packed (N,K); planes, factors and sums of the N' rows in training, col_* (K,)
    double *control = planes->control;
    size_t rows = ob_ref_rows(planes, n_count);
    *moved = 0;
    if (control[OB_CTL_MICRO] == 0) {
        return OB_OK;
    }
    float rho = agreement(rows, planes);
    if (control[OB_CTL_STEP] > 0 && planes->votes != NULL) {
        float *x = ob_alloc((OB_MAX(rows, k_count) + 1) * sizeof(float));
        if (x == NULL) {
            return OB_NO_MEMORY;
        }
        measure_held(rows, k_count, planes, rho, x);
        rho = 1.0f;
        for (size_t i = 0; i < rows; i++) {
            *moved += cast_row(k_count, i, packed, planes, x);
        }
        ob_free(x);
    }
    update_factor(rows, planes->row_factor, planes->row_sum, rho, control);
    update_factor(k_count, planes->col_factor, planes->col_sum, rho, control);
    for (size_t i = 0; control[OB_CTL_STEP] > 0 && i < rows; i++) {
        *moved += step_row(k_count, i, packed, planes);
    }
    *moved += (uint64_t)control[OB_CTL_VOTE_MOVED];
    update_guard((double)rows * (double)k_count, (double)*moved, control);
    control[OB_CTL_STEP] += 1;
    control[OB_CTL_MICRO] = 0;
    control[OB_CTL_NONFINITE] = 0;
    control[OB_CTL_SKETCH_ENERGY] = 0;
    control[OB_CTL_MOVED] = (double)*moved;
    control[OB_CTL_VOTE_MOVED] = 0;
    memset(planes->row_sum, 0, rows * sizeof(float));
    memset(planes->col_sum, 0, k_count * sizeof(float));
    memset(planes->sketch, 0, rows * sizeof(float));
    return OB_OK;
}
