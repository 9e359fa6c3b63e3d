/* amxint8.c - AMX with int8 (Xeon from Sapphire Rapids on): tdpbssd on tile registers of 16 rows x 64 bytes.
 *
 * Hot loop         per 64 inputs of 16 rows x 64 columns
 *   tdpbssd        4: 16 x 16 outputs, 64 products each     one in 16 cycles    the limit, 8 x vpdpbusd's
 *   tileloadd      5: 16 rows; 16 columns, four times       eight cycles each from the first cache
 * A panel's group of four is a row of a tile as it stands.  Codes -1..1 and activations are signed: no offsets.
 * Everything but the products of five rows and more is AVX-512's: the table is in isa/avx512vnni.c. */
#define OB_SIGNED_PANELS 1
#include "amxint8.h"

#include "forward_avx512vnni.h"
#include "panels_avx512.h"
#include "tiles_amx.h"

enum {
    STEP = 64, /* inputs of a tile */
    STEP_BYTES = STEP * OB_STRIP,
    VNNI_ROWS = 4 /* up to here vpdpbusd on packed codes is faster than a panel for a tile */
};

/* Tiles 0..3: sums, 16 columns each; 4: activations of the same rows; 5..7: the panel's.  Or, of 16 rows all, 0..3: sums
 * of two times 16 rows and two times 16 columns; 4, 5: activations; 6, 7: the panel's. */
enum { ROW_TILES = 5, TILES = 8 };

/* Rows that this thread's tile registers are configured for; 0: not at all. */
static _Thread_local size_t configured;

void
ob_amxint8_leave(void)
{
    if (configured) {
        tiles_release();
        configured = 0;
    }
}

/* Tiles for `rows` rows, sums zero. */
static void
enter_tiles(size_t rows)
{
    if (configured != rows) {
        tile_config config = {.palette = 1};
        for (size_t t = 0; t < TILES; t++) {
            config.row_bytes[t] = STEP;
            config.rows[t] = (uint8_t)(t < ROW_TILES ? rows : 16);
        }
        tiles_configure(&config);
        configured = rows;
    }
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
}

/* sums += s8 (rows, 64) . panel (16, 64, 4) */
OB_INLINE void
tile_step(const uint8_t *panel, const int8_t *s8, size_t ld)
{
    tile_load(4, s8, ld);
    tile_load(5, panel, 4 * OB_STRIP);
    tile_load(6, panel + 64, 4 * OB_STRIP);
    tile_load(7, panel + 128, 4 * OB_STRIP);
    tile_multiply(0, 4, 5);
    tile_load(5, panel + 192, 4 * OB_STRIP);
    tile_multiply(1, 4, 6);
    tile_multiply(2, 4, 7);
    tile_multiply(3, 4, 5);
}

/* The same where only `inputs` < 64 of them exist. */
static void
tile_rest(size_t rows, size_t inputs, const uint8_t *panel, const int8_t *s8, size_t ld)
{
    OB_ALIGNED(64) uint8_t columns[STEP_BYTES] = {0};
    OB_ALIGNED(64) int8_t some[16][STEP] = {{0}};
    memcpy(columns, panel, inputs * OB_STRIP);
    for (size_t r = 0; r < rows; r++) {
        memcpy(some[r], s8 + r * ld, inputs);
    }
    tile_step(columns, some[0], STEP);
}

OB_INLINE void
store_sums(ob_acc *acc)
{
    tile_store(0, acc[0], sizeof *acc);
    tile_store(1, acc[0] + 16, sizeof *acc);
    tile_store(2, acc[0] + 32, sizeof *acc);
    tile_store(3, acc[0] + 48, sizeof *acc);
}

/* ------------------------------------------------------------------ integer tiles */
/* acc (rows <= 16, 64) = s8 (rows, inputs) . panel */
OB_INLINE void
panel_tile(size_t rows, size_t inputs, const uint8_t *panel, const int8_t *s8, size_t ld,
           ob_acc *acc)
{
    enter_tiles(rows);
    for (; inputs >= STEP; inputs -= STEP, panel += STEP_BYTES, s8 += STEP) {
        tile_step(panel, s8, ld);
    }
    if (inputs) {
        tile_rest(rows, inputs, panel, s8, ld);
    }
    store_sums(acc);
}

/* 32 rows, 32 columns at a time, inputs a multiple of 64: 1.07 x two times 16 rows where the panel comes from the
 * second cache, slower where it is in the first. */
static void
square_tile(size_t inputs, const uint8_t *panel, const int8_t *s8, size_t ld, ob_acc *acc)
{
    for (size_t column = 0; column < OB_STRIP; column += 32) {
        const uint8_t *w = panel + 4 * column;
        enter_tiles(16);
        for (size_t i = 0; i < inputs; i += STEP, w += STEP_BYTES) {
            tile_load(4, s8 + i, ld);
            tile_load(6, w, 4 * OB_STRIP);
            tile_load(7, w + 64, 4 * OB_STRIP);
            tile_multiply(0, 4, 6);
            tile_load(5, s8 + 16 * ld + i, ld);
            tile_multiply(1, 4, 7);
            tile_multiply(2, 5, 6);
            tile_multiply(3, 5, 7);
        }
        tile_store(0, acc[0] + column, sizeof *acc);
        tile_store(1, acc[0] + column + 16, sizeof *acc);
        tile_store(2, acc[16] + column, sizeof *acc);
        tile_store(3, acc[16] + column + 16, sizeof *acc);
    }
}

static void
panel_tiles(size_t rows, size_t inputs, const uint8_t *panel, const int8_t *s8, size_t ld,
            ob_acc *acc)
{
    for (size_t r = 0; r < rows; r += 16) {
        panel_tile(OB_MIN(rows - r, (size_t)16), inputs, panel, s8 + r * ld, ld, acc + r);
    }
}

/* A panel of 64 inputs at a time, two ahead of the products: what was just stored does not load as a tile at once. */
static void
dot_codes(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx, ob_acc *acc)
{
    OB_ALIGNED(64) uint8_t panel[4][STEP_BYTES];
    size_t steps = k_steps / 4;
    enter_tiles(rows);
    for (size_t i = 0; i < OB_MIN(steps, (size_t)2); i++) {
        decode_forward_panel(4, q + 1024 * i, panel[i]);
    }
    for (size_t i = 0; i < steps; i++) {
        if (i + 2 < steps) {
            decode_forward_panel(4, q + 1024 * (i + 2), panel[(i + 2) % 4]);
        }
        tile_step(panel[i % 4], x + STEP * i, ldx);
    }
    if (k_steps % 4) {
        decode_forward_panel(k_steps % 4, q + 1024 * steps, panel[0]);
        tile_rest(rows, k_steps % 4 * 16, panel[0], x + STEP * steps, ldx);
    }
    store_sums(acc);
}

void
ob_amxint8_dot_forward(size_t rows, size_t k_steps, const uint8_t *q, const int8_t *x, size_t ldx,
                       const int32_t *sum, ob_acc *acc)
{
    if (rows == 1 && k_steps <= VECTOR_STEPS) {
        forward_vector(k_steps, q, x, sum, acc);
    }
    else if (rows <= VNNI_ROWS) {
#define TILE(r) forward_tile(r, 4, k_steps, q, x, ldx, sum, acc)
        BY_ROWS(TILE)
#undef TILE
    }
    else {
        dot_codes(rows, k_steps, q, x, ldx, acc);
    }
}

void
ob_amxint8_dot_input(size_t rows, size_t n_padded, const uint8_t *panel, const int8_t *q,
                     size_t ldq, const int32_t *sum, ob_acc *acc)
{
    (void)sum;
    if (rows == 32 && n_padded % STEP == 0) {
        square_tile(n_padded, panel, q, ldq, acc);
    }
    else {
        panel_tiles(rows, n_padded, panel, q, ldq, acc);
    }
}

void
ob_amxint8_dot_weight(size_t rows, size_t m_padded, const uint8_t *panel, const int8_t *h,
                      size_t ldh, const int32_t *sum, ob_acc *acc)
{
    (void)sum;
    panel_tiles(rows, m_padded, panel, h, ldh, acc);
}

void
ob_amxint8_decode_forward_panel(size_t k_steps, const uint8_t *packed_strip, uint8_t *panel)
{
    decode_forward_panel(k_steps, packed_strip, panel);
}

void
ob_amxint8_decode_input_panel(size_t n, size_t k_steps, const uint8_t *packed, size_t strip,
                              uint8_t *panel)
{
    decode_input_panel(n, k_steps, packed, strip, panel);
}

void
ob_amxint8_pack_token_panel(size_t m, const int8_t *xq, size_t ldx, size_t strip, uint8_t *panel)
{
    pack_token_panel(m, xq, ldx, strip, panel);
}
