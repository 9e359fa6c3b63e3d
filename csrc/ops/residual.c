/* residual.c - a residual as training starts, and how much of it has come to a bound. */
#include <string.h>

#include "../formats/tile16.h"
#include "ops.h"

/* Row i of the planes is output row.n. */
typedef struct residual_row {
    size_t n, k;
    ob_rule rule;
    const uint8_t *packed; /* its first byte of the tile16 plane; NULL: not given */
    uint8_t *residual;
} residual_row;

static residual_row
row_at(size_t i, size_t k, const uint8_t *packed, const ob_planes *planes)
{
    size_t steps = OB_CEIL_DIV(k, 16);
    residual_row row = {
        .n = ob_first_row(planes) + ob_row_stride(planes) * i, .k = k, .rule = planes->rule};
    row.packed = packed ? packed + ob_tile16_byte(steps, row.n, 0) : NULL;
    row.residual = planes->residual
                       ? (uint8_t *)planes->residual + i * ob_rule_residual_row_bytes(row.rule, k)
                       : NULL;
    return row;
}

static int
code_at(const residual_row *row, size_t k)
{
    return (row->packed[ob_tile16_byte(0, 0, k)] >> ob_tile16_shift(k) & 3) - 1;
}

/* Below 8 bits: where column k lies in its block of 64 columns. */
static uint8_t *
field_at(const residual_row *row, size_t k, unsigned *shift)
{
    unsigned bits = (unsigned)ob_rule_residual_bits(row->rule);
    *shift = bits * (unsigned)(k % 64 / (8 * bits));
    return row->residual + k / 64 * 8 * bits + k % 64 % (8 * bits);
}

/* Uniform within .3 cell: -4 .. 4 of 15 units, or the nearest of -1, 0, 1 of 3. */
static void
start_coarse(const residual_row *row, ob_rng_row rng)
{
    int four = ob_rule_residual_bits(row->rule) == 4;
    for (size_t k = 0; k < row->k; k++) {
        int ninth = (int)((uint64_t)ob_rng_draw(rng, (uint32_t)k) * 9 >> 32);
        int e = four ? ninth - 4 : ninth < 2 ? -1 : ninth > 6 ? 1 : 0;
        unsigned shift;
        uint8_t *byte = field_at(row, k, &shift);
        *byte = (uint8_t)(*byte | ((unsigned)e & (four ? 15u : 3u)) << shift);
    }
}

void
ob_start_residual(size_t n, size_t k, const uint8_t *packed, ob_planes *planes)
{
    size_t rows = ob_plane_rows(n, planes);
    /* micro 0 of this stream gives the starting codes of a layer */
    uint64_t key = ob_control_key(planes->control, 1.0, OB_STREAM_INIT);
    int bits = ob_rule_residual_bits(planes->rule);
    for (size_t i = 0; bits > 0 && k > 0 && i < rows; i++) {
        residual_row row = row_at(i, k, packed, planes);
        memset(row.residual, 0, ob_rule_residual_row_bytes(row.rule, k));
        if (bits < 8) {
            start_coarse(&row, ob_rng_at_row(key, row.n));
        }
        for (size_t j = 0; row.rule == OB_RULE_byte && j < k; j++) {
            ((int8_t *)row.residual)[j] = (int8_t)(85 * code_at(&row, j));
        }
    }
}

static int
is_saturated(const residual_row *row, size_t k)
{
    int bits = ob_rule_residual_bits(row->rule), units = ob_rule_units(row->rule), e;
    if (bits == 16) {
        e = ((const int16_t *)row->residual)[k];
        return e >= units / 2 || e <= -units / 2;
    }
    if (bits == 8) {
        int bound = row->rule == OB_RULE_byte ? 127 : units / 2;
        e = ((const int8_t *)row->residual)[k];
        return e >= bound || e <= -bound;
    }
    unsigned shift;
    const uint8_t *byte = field_at(row, k, &shift);
    unsigned field = *byte >> shift & ((1u << bits) - 1u), bound = ((unsigned)units - 1u) / 2u;
    int t = code_at(row, k);
    return t == 1 ? field == bound : t == -1 && field == (1u << bits) - bound;
}

uint64_t
ob_saturated(size_t n, size_t k, const uint8_t *packed, const ob_planes *planes)
{
    size_t rows = ob_plane_rows(n, planes);
    uint64_t count = 0;
    for (size_t i = 0; planes->residual && i < rows; i++) {
        residual_row row = row_at(i, k, packed, planes);
        for (size_t j = 0; j < k; j++) {
            count += (uint64_t)is_saturated(&row, j);
        }
    }
    return count;
}
