/* reference_flip.c - one optimizer step of a layer's codes, one weight at a time. */
#include "reference.h"

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

/* Row i: its momentum votes, then the residual moves codes.  Returns how many moved. */
static uint64_t
step_row(size_t inputs, size_t i, uint8_t *packed, ob_planes *planes)
{
    int bits = ob_rule_momentum_bits(planes->rule);
    uint64_t key = ob_ref_key(planes->control, 0, OB_STREAM_MOMENTUM_STEP), moved = 0;
    ob_rng_row random = ob_rng_at_row(key, ob_ref_output(planes, i));
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
