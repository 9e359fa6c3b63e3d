/* check.h - size arithmetic that cannot wrap silently: 1 and *out on success, 0 on overflow. */
#ifndef OB_CHECK_H
#define OB_CHECK_H

#include "config.h"

OB_INLINE int
ob_mul(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

OB_INLINE int
ob_add(size_t a, size_t b, size_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

/* *out = a rounded up to a multiple of `multiple` (> 0) */
OB_INLINE int
ob_round_up(size_t a, size_t multiple, size_t *out)
{
    size_t rest = a % multiple;
    return ob_add(a, rest ? multiple - rest : 0, out);
}

#endif
