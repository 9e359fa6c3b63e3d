/* rules.c - what rules.def says of each flip rule. */
#include "../onebit.h"

static const struct {
    const char *name;
    int residual_bits, momentum_bits, units;
    float dead_zone;
} rules[OB_RULE_COUNT] = {
#define OB_RULE(name, residual_bits, momentum_bits, units, dead_zone) \
    {#name, residual_bits, momentum_bits, units, dead_zone},
#include "rules.def"
#undef OB_RULE
};

const char *
ob_rule_name(ob_rule rule)
{
    return rules[rule].name;
}

int
ob_rule_residual_bits(ob_rule rule)
{
    return rules[rule].residual_bits;
}

int
ob_rule_momentum_bits(ob_rule rule)
{
    return rules[rule].momentum_bits;
}

int
ob_rule_units(ob_rule rule)
{
    return rules[rule].units;
}

float
ob_rule_dead_zone(ob_rule rule)
{
    return rules[rule].dead_zone;
}

double
ob_rule_beta1(ob_rule rule)
{
    return rules[rule].momentum_bits > 0 ? 0.7 : 0.9;
}

int
ob_rule_moves_in_vote(ob_rule rule)
{
    return rules[rule].residual_bits < 8 && rules[rule].momentum_bits == 0;
}

/* Whole bytes per weight lie in order; less than a byte in blocks of 64 columns. */
static size_t
row_bytes(int bits, size_t k)
{
    return bits >= 8 ? k * (size_t)bits / 8 : (k + 63) / 64 * 8 * (size_t)bits;
}

size_t
ob_rule_residual_row_bytes(ob_rule rule, size_t k)
{
    return row_bytes(rules[rule].residual_bits, k);
}

size_t
ob_rule_momentum_row_bytes(ob_rule rule, size_t k)
{
    return (k + 63) / 64 * 8 * (size_t)rules[rule].momentum_bits;
}
