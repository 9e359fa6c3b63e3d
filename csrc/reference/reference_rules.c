/* reference_rules.c - every flip rule on one weight, and the momentum on a row of them. */
#include "reference.h"

static uint8_t *
residual_row(const ob_planes *planes, size_t inputs, size_t i)
{
    int bits = ob_rule_residual_bits(planes->rule);
    size_t columns = bits < 8 ? OB_CEIL_DIV(inputs, 64) * 64 : inputs;
    return (uint8_t *)planes->residual + i * (columns * (size_t)bits / 8);
}

int
ob_ref_residual(const ob_planes *planes, size_t inputs, size_t i, size_t k)
{
    int bits = ob_rule_residual_bits(planes->rule);
    if (bits == 0) {
        return 0;
    }
    uint8_t *row = residual_row(planes, inputs, i);
    return bits == 16 ? ((const int16_t *)row)[k] : ob_ref_field(row, bits, k);
}

static void
set_residual(ob_planes *planes, size_t inputs, size_t i, size_t k, int e)
{
    int bits = ob_rule_residual_bits(planes->rule);
    uint8_t *row = residual_row(planes, inputs, i);
    if (bits == 16) {
        ((int16_t *)row)[k] = (int16_t)e;
    }
    else if (bits > 0) {
        ob_ref_set_field(row, bits, k, e);
    }
}

/* -units * eta * guard: residual units per unit of vote */
static float
units_per_vote(const ob_planes *planes)
{
    float units = (float)ob_rule_units(planes->rule), eta = (float)planes->control[OB_CTL_ETA];
    if (planes->control[OB_CTL_CAP] > 0) {
        eta = fminf(eta, OB_ETA_LIMIT);
    }
    return (-units * eta) * (float)planes->control[OB_CTL_GUARD];
}

/* Give T[n][k] the value `now`; 1 if it had another. */
static int
move_code(const ob_planes *planes, uint8_t *packed, size_t inputs, size_t i, size_t k, int now)
{
    size_t n = ob_ref_output(planes, i);
    int before = ob_ref_code(packed, inputs, n, k);
    ob_ref_set_code(packed, inputs, n, k, now);
    return now != before;
}

int
ob_ref_apply(ob_planes *planes, uint8_t *packed, size_t inputs, size_t i, size_t k, float u,
             uint32_t random)
{
    int bits = ob_rule_residual_bits(planes->rule), units = ob_rule_units(planes->rule);
    int limit = bits == 16 ? 16256 : 127, e = ob_ref_residual(planes, inputs, i, k);
    float zone = ob_rule_dead_zone(planes->rule);
    float beyond = u > zone ? u - zone : u < -zone ? u + zone : 0.0f;
    int vote = ob_ref_round(beyond * units_per_vote(planes), random, k, (float)limit);
    if (bits >= 8) {
        set_residual(planes, inputs, i, k, ob_ref_clamp(e + vote, limit));
        return 0;
    }
    /* code and residual are one number, units * T + e, which has one reading */
    int half = (units - 1) / 2;
    int t = ob_ref_code(packed, inputs, ob_ref_output(planes, i), k);
    int sum = ob_ref_clamp(units * t + e + vote, units + half);
    int now = sum > half ? 1 : sum < -half ? -1 : 0;
    set_residual(planes, inputs, i, k, sum - units * now);
    return move_code(planes, packed, inputs, i, k, now);
}

int
ob_ref_step(ob_planes *planes, uint8_t *packed, size_t inputs, size_t i, size_t k)
{
    int cell = ob_rule_units(planes->rule), half = cell / 2;
    int e = ob_ref_residual(planes, inputs, i, k);
    if (ob_rule_residual_bits(planes->rule) < 8) {
        return 0;
    }
    if (planes->rule == OB_RULE_byte) { /* code and residual are one number: its reading is due */
        return move_code(planes, packed, inputs, i, k, e > half ? 1 : e < -half ? -1 : 0);
    }
    int t = ob_ref_code(packed, inputs, ob_ref_output(planes, i), k);
    int up = e > half && t < 1, down = e < -half && t > -1;
    set_residual(planes, inputs, i, k, up ? e - cell : down ? e + cell : ob_ref_clamp(e, half));
    return move_code(planes, packed, inputs, i, k, t + up - down);
}

/* bfloat16 >= a >= 0, the nearest */
static uint16_t
bf16_up(float a)
{
    return (uint16_t)((ob_ref_bits(a) + 0xFFFFu) >> 16);
}

/* Votes of row i into the momentum, block by block of 64 columns. */
void
ob_ref_vote_momentum(size_t inputs, const float *u, uint64_t micro, enum ob_stream stream, size_t i,
                     ob_planes *planes)
{
    const double *control = planes->control;
    uint32_t random = ob_ref_stepwise_first(control, micro, stream, ob_ref_output(planes, i));
    float beta1 = micro == 0 ? (float)control[OB_CTL_BETA1] : 1.0f;
    float share = (float)(1.0 - control[OB_CTL_BETA1]);
    int bits = ob_rule_momentum_bits(planes->rule);
    float top = bits == 8 ? 127.0f : 7.0f;
    size_t blocks = OB_CEIL_DIV(inputs, 64);
    uint8_t *codes = planes->momentum + i * blocks * 8 * (size_t)bits;
    for (size_t block = 0; block < blocks; block++) {
        uint16_t *scale = &planes->momentum_scale[i * blocks + block];
        float s = ob_ref_load(OB_BF16, scale, 0), m[64], a = 0.0f;
        size_t first = block * 64, count = OB_MIN(inputs - first, (size_t)64);
        for (size_t j = 0; j < count; j++) {
            float old = (float)ob_ref_field(codes, bits, first + j) * s;
            m[j] = beta1 * old + share * u[first + j];
            a = fmaxf(a, fabsf(m[j]));
        }
        *scale = a < OB_REF_TINY ? 0 : bf16_up(a / top);
        float inverse = 1.0f / ob_ref_load(OB_BF16, scale, 0);
        for (size_t j = 0; j < count; j++) {
            int code = a < OB_REF_TINY ? 0 : ob_ref_round(m[j] * inverse, random, first + j, top);
            ob_ref_set_field(codes, bits, first + j, code);
        }
    }
}
