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
agreement(size_t outputs, const ob_planes *planes)
{
    double energy = planes->control[OB_CTL_SKETCH_ENERGY], square = 0.0;
    if (planes->control[OB_CTL_MICRO] == 1.0 || energy == 0.0) {
        return 1.0f;
    }
    for (size_t n = 0; n < outputs; n++) {
        square += (double)planes->sketch[n] * (double)planes->sketch[n];
    }
    return (float)(square / energy);
}

/* Momentum of row n into its residual. */
static void
add_momentum(size_t inputs, size_t n, ob_planes *planes)
{
    ob_rng_row random = ob_rng_at_row(ob_ref_key(planes->control, 0, OB_STREAM_MOMENTUM_STEP), n);
    size_t blocks = OB_CEIL_DIV(inputs, 64);
    int8_t *e = planes->residual + n * inputs;
    for (size_t k = 0; k < inputs; k++) {
        float s = ob_ref_load(OB_BF16, planes->momentum_scale, n * blocks + k / 64);
        float m = (float)ob_ref_nibble(planes->momentum + n * blocks * 32, k) * s;
        int move = ob_ref_round(m * ob_ref_step(planes->control), random, k, 127.0f);
        e[k] = (int8_t)ob_ref_clamp(e[k] + move, 127);
    }
}

/* Residual of row n into its codes: half a cell (64) and room to move: a code moves and gives one cell (128) back. */
static uint64_t
move_codes(size_t inputs, size_t n, uint8_t *packed, int8_t *residual)
{
    uint64_t moved = 0;
    for (size_t k = 0; k < inputs; k++) {
        int e = residual[n * inputs + k], t = ob_ref_code(packed, inputs, n, k);
        int up = e > 64 && t < 1, down = e < -64 && t > -1;
        e = up ? e - 128 : down ? e + 128 : ob_ref_clamp(e, 64);
        residual[n * inputs + k] = (int8_t)e;
        ob_ref_set_code(packed, inputs, n, k, t + up - down);
        moved += (uint64_t)(up + down);
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
    // packed (N,K), residual (N,K), momentum (N, ceil(K/64), 32), factors and sums (N,) (K,)
    double *control = planes->control;
    *moved = 0;
    if (control[OB_CTL_MICRO] == 0) {
        return OB_OK;
    }
    float rho = agreement(n_count, planes);
    update_factor(n_count, planes->row_factor, planes->row_sum, rho, control);
    update_factor(k_count, planes->col_factor, planes->col_sum, rho, control);
    for (size_t n = 0; control[OB_CTL_STEP] > 0 && n < n_count; n++) {
        if (ob_rule_momentum_bits(planes->rule) > 0) {
            add_momentum(k_count, n, planes);
        }
        *moved += move_codes(k_count, n, packed, planes->residual);
    }
    update_guard((double)n_count * (double)k_count, (double)*moved, control);
    control[OB_CTL_STEP] += 1;
    control[OB_CTL_MICRO] = 0;
    control[OB_CTL_NONFINITE] = 0;
    control[OB_CTL_SKETCH_ENERGY] = 0;
    control[OB_CTL_MOVED] = (double)*moved;
    memset(planes->row_sum, 0, n_count * sizeof(float));
    memset(planes->col_sum, 0, k_count * sizeof(float));
    memset(planes->sketch, 0, n_count * sizeof(float));
    return OB_OK;
}
