/* rng.h - counter-based random numbers: a function of logical position only, so that order and tiling cannot matter.
 *
 *   key(seed, layer, step, micro, stream)      64 bits, SplitMix64 finaliser chained over the five fields
 *   (a, b) = halves of splitmix(key + row)     one pair per logical row
 *   draw(a, b, column) = keyed lowbias32       32 bits
 *   turn(step, micro)                          added to the draws of the roundings that write one weight vote after vote
 *
 * Their draws do not depend on step and micro otherwise: a weight keeps its number and turns it by the golden ratio at each
 * step, by the plastic number's inverse at each micro-batch, by its square at each rank (high word of micro): a Kronecker
 * sequence. Each single vote is rounded by a uniform number as before, but a weight's errors cancel over the steps instead
 * of adding up as independent ones do.
 *
 * SplitMix64: Steele, Lea, Flood 2014.  lowbias32: C. Wellons, hash-prospector; here with a second key word between its
 * two multiplications, so that two rows never walk the same sequence. */
#ifndef OB_RNG_H
#define OB_RNG_H

#include "config.h"

enum ob_stream {
    OB_STREAM_INPUT_GRAD = 1, /* SR of dY per token; row m, column n */
    OB_STREAM_WEIGHT_GRAD,    /* SR of dY per output column; row n, column m */
    OB_STREAM_VOTE,           /* SR of a vote into the residual, turned; row n, column k */
    OB_STREAM_MOMENTUM,       /* SR of the momentum codes, turned; row n, column k */
    OB_STREAM_MOMENTUM_STEP, /* SR of the momentum into the residual in step(), turned; row n, column k */
    OB_STREAM_SKETCH,        /* signs t_k; row 0, column k, micro 0 */
    OB_STREAM_INIT,          /* starting codes; row n, column k */
    OB_STREAM_COMBINE,       /* mean of the ranks' planes, micro 0; row n, column k */
    OB_STREAM_CAST /* SR of a step's votes into the rule's planes, turned, micro 0; row n, column k */
};

#define OB_RNG_GOLDEN 0x9E3779B9u
#define OB_RNG_PLASTIC 0xC13FA9A9u
#define OB_RNG_PLASTIC2 0x91E10DA5u
#define OB_RNG_MUL1 0x7FEB352Du
#define OB_RNG_MUL2 0x846CA68Bu

typedef struct ob_rng_row {
    uint32_t a, b, turn;
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
    ob_rng_row r = {(uint32_t)x, (uint32_t)(x >> 32), 0};
    return r;
}

OB_INLINE uint32_t
ob_rng_turn(uint64_t step, uint64_t micro)
{
    return (uint32_t)step * OB_RNG_GOLDEN + (uint32_t)micro * OB_RNG_PLASTIC +
           (uint32_t)(micro >> 32) * OB_RNG_PLASTIC2;
}

OB_INLINE ob_rng_row
ob_rng_turned_row(uint64_t key, uint64_t row, uint32_t turn)
{
    ob_rng_row r = ob_rng_at_row(key, row);
    r.turn = turn;
    return r;
}

/* 32 random bits at (row, column).  Vector kernels compute the same with column * OB_RNG_GOLDEN + a per lane. */
OB_INLINE uint32_t
ob_rng_draw(ob_rng_row row, uint32_t column)
{
    uint32_t x = column * OB_RNG_GOLDEN + row.a;
    x = (x ^ (x >> 16)) * OB_RNG_MUL1;
    x ^= row.b;
    x = (x ^ (x >> 15)) * OB_RNG_MUL2;
    return (x ^ (x >> 16)) + row.turn;
}

/* 24-bit uniform in [0, 1) */
OB_INLINE float
ob_rng_uniform(ob_rng_row row, uint32_t column)
{
    return (float)(ob_rng_draw(row, column) >> 8) * 0x1p-24f;
}

#endif
