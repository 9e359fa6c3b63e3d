/* rng.h - counter-based random numbers: a function of logical position only, so that order and tiling cannot matter.
 *
 *   key(seed, layer, step, micro, stream)      64 bits, SplitMix64 finaliser chained over the five fields
 *   (a, b) = halves of splitmix(key + row)     one pair per logical row
 *
 * Stochastic rounding compares with numbers that turn, a Kronecker sequence: a + column * (sqrt 2 - 1) mod 1. Each of them
 * is uniform, because a is, and together they cover the circle more evenly than independent ones: what rounding adds to a
 * sum over the columns mostly cancels.
 *
 * The roundings that write one weight vote after vote have the same a at every step, and turn it: by the golden ratio
 * at each step, by the plastic number's inverse at each micro-batch, by its square at each rank (high word of micro).
 * So a weight's errors cancel over the steps as well.
 *
 * Signs and starting values are independent: draw(a, b, column) = keyed lowbias32.
 *
 * SplitMix64: Steele, Lea, Flood 2014.  lowbias32: C. Wellons, hash-prospector; here with a second key word between its
 * two multiplications, so that two rows never walk the same sequence.  Kronecker sequences: Niederreiter, Random Number
 * Generation and Quasi-Monte Carlo Methods, 1992. */
#ifndef OB_RNG_H
#define OB_RNG_H

#include "config.h"

enum ob_stream {
    OB_STREAM_INPUT_GRAD = 1, /* SR of dY per token; row m, column n */
    OB_STREAM_WEIGHT_GRAD,    /* SR of dY per output column; row n, column m */
    OB_STREAM_VOTE,           /* SR of a vote into the residual, step by step; row n, column k */
    OB_STREAM_MOMENTUM,       /* SR of the momentum codes, step by step; row n, column k */
    OB_STREAM_MOMENTUM_STEP, /* SR of the momentum into the residual in step(), step by step; row n, column k */
    OB_STREAM_SKETCH,  /* independent signs t_k; row 0, column k, micro 0 */
    OB_STREAM_INIT,    /* independent starting codes and residuals; row n, column k */
    OB_STREAM_COMBINE, /* mean of the ranks' planes, micro 0; row n, column k */
    OB_STREAM_CAST /* SR of a step's votes into the rule's planes, step by step, micro 0; row n, column k */
};

#define OB_RNG_SQRT2 0x6A09E700u /* 24 bits, as all numbers that round; odd in those */
#define OB_RNG_GOLDEN 0x9E3779B9u
#define OB_RNG_PLASTIC 0xC13FA9A9u
#define OB_RNG_PLASTIC2 0x91E10DA5u
#define OB_RNG_MUL1 0x7FEB352Du
#define OB_RNG_MUL2 0x846CA68Bu

typedef struct ob_rng_row {
    uint32_t a, b;
} ob_rng_row;

OB_INLINE uint64_t
ob_splitmix64(uint64_t x)
{
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

OB_INLINE uint64_t
ob_rng_key(uint64_t seed, uint64_t layer, uint64_t step, uint64_t micro, enum ob_stream stream)
{
    uint64_t key = ob_splitmix64(seed);
    key = ob_splitmix64(key ^ layer);
    key = ob_splitmix64(key ^ step);
    key = ob_splitmix64(key ^ micro);
    return ob_splitmix64(key ^ (uint64_t)stream);
}

OB_INLINE ob_rng_row
ob_rng_at_row(uint64_t key, uint64_t row)
{
    uint64_t x = ob_splitmix64(key + row);
    ob_rng_row r = {(uint32_t)x, (uint32_t)(x >> 32)};
    return r;
}

/* What the numbers of a weight's votes turn by */
OB_INLINE uint32_t
ob_rng_turn(uint64_t step, uint64_t micro)
{
    return (uint32_t)step * OB_RNG_GOLDEN + (uint32_t)micro * OB_RNG_PLASTIC +
           (uint32_t)(micro >> 32) * OB_RNG_PLASTIC2;
}

/* The number of a row's column 0, a multiple of 2^8, in units of 2^-32 */
OB_INLINE uint32_t
ob_rng_first(uint64_t key, uint64_t row, uint32_t turn)
{
    return (ob_rng_at_row(key, row).a + turn) & 0xFFFFFF00u;
}

/* The number of a column, in the same units */
OB_INLINE uint32_t
ob_rng_number(uint32_t first, uint32_t column)
{
    return first + column * OB_RNG_SQRT2;
}

/* 32 independent bits at (row, column) */
OB_INLINE uint32_t
ob_rng_draw(ob_rng_row row, uint32_t column)
{
    uint32_t x = column * OB_RNG_GOLDEN + row.a;
    x = (x ^ (x >> 16)) * OB_RNG_MUL1;
    x ^= row.b;
    x = (x ^ (x >> 15)) * OB_RNG_MUL2;
    return x ^ (x >> 16);
}

#endif
