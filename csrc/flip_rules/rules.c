/* rules.c - what rules.def says of each flip rule. */
#include "../onebit.h"

static const struct {
    const char *name;
    int residual_bits, momentum_bits;
} rules[OB_RULE_COUNT] = {
#define OB_RULE(name, residual_bits, momentum_bits) {#name, residual_bits, momentum_bits},
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
