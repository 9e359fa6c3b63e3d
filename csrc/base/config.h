/* config.h - compiler attributes; knows nothing of trits. */
#ifndef OB_CONFIG_H
#define OB_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#define OB_INLINE static inline __attribute__((always_inline, unused))
#define OB_ALIGNED(bytes) __attribute__((aligned(bytes)))
#define OB_MIN(a, b) ((a) < (b) ? (a) : (b))
#define OB_MAX(a, b) ((a) > (b) ? (a) : (b))
#define OB_CEIL_DIV(a, b) (((a) + (b) - 1) / (b))

#endif
