/* soft_tiles.h - isa/tiles_amx.h in plain C, put in its place (-include) to run isa/amxint8.c on processors without tiles.
 *
 * Every use is held to what the instructions demand: a configuration of this thread, rows and bytes that agree. */
#ifndef SOFT_TILES_H
#define SOFT_TILES_H

#include "../../csrc/isa/tiles_amx.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef tiles_configure
#undef tiles_release
#undef tile_zero
#undef tile_load
#undef tile_store
#undef tile_multiply

extern _Atomic int soft_tiles_held; /* pretend.c */
static _Thread_local tile_config soft_config;
static _Thread_local uint8_t soft_tile[8][16][64];

#define SOFT_DEMAND(truth)                                   \
    do {                                                     \
        if (!(truth)) {                                      \
            fprintf(stderr, "soft_tiles: not %s\n", #truth); \
            abort();                                         \
        }                                                    \
    } while (0)

static inline void
tiles_configure(const tile_config *config)
{
    static const uint8_t none[14];
    SOFT_DEMAND(config->palette == 1 && config->start_row == 0);
    SOFT_DEMAND(!memcmp(config->reserved, none, sizeof none));
    for (int t = 0; t < 16; t++) {
        int used = t < 8 && config->rows[t];
        SOFT_DEMAND(config->rows[t] <= 16 && config->row_bytes[t] <= 64);
        SOFT_DEMAND(used ? config->row_bytes[t] > 0 : config->rows[t] + config->row_bytes[t] == 0);
    }
    soft_tiles_held += soft_config.palette == 0;
    soft_config = *config;
    memset(soft_tile, 0, sizeof soft_tile);
}

static inline void
tiles_release(void)
{
    SOFT_DEMAND(soft_config.palette == 1);
    soft_tiles_held--;
    memset(&soft_config, 0, sizeof soft_config);
}

static inline void
tile_zero(int t)
{
    SOFT_DEMAND(soft_config.rows[t]);
    memset(soft_tile[t], 0, sizeof soft_tile[t]);
}

static inline void
tile_load(int t, const void *from, size_t stride)
{
    SOFT_DEMAND(soft_config.rows[t]);
    memset(soft_tile[t], 0, sizeof soft_tile[t]);
    for (size_t r = 0; r < soft_config.rows[t]; r++) {
        memcpy(soft_tile[t][r], (const char *)from + r * stride, soft_config.row_bytes[t]);
    }
}

static inline void
tile_store(int t, void *to, size_t stride)
{
    SOFT_DEMAND(soft_config.rows[t]);
    for (size_t r = 0; r < soft_config.rows[t]; r++) {
        memcpy((char *)to + r * stride, soft_tile[t][r], soft_config.row_bytes[t]);
    }
}

static inline void
tile_multiply(int sums, int a, int b)
{
    const tile_config *c = &soft_config;
    SOFT_DEMAND(c->rows[sums] && c->rows[sums] == c->rows[a]);
    SOFT_DEMAND(c->row_bytes[sums] == c->row_bytes[b] && c->row_bytes[a] == 4 * c->rows[b]);
    for (int r = 0; r < c->rows[sums]; r++) {
        int32_t sum[16], group[16];
        memcpy(sum, soft_tile[sums][r], sizeof sum);
        for (int g = 0; g < 16; g++) { /* bytes beyond a row's are zero */
            const int8_t *x = (const int8_t *)soft_tile[a][r] + 4 * g;
            const int8_t *w = (const int8_t *)soft_tile[b][g];
            for (int j = 0; j < 16; j++) {
                group[j] = x[0] * w[4 * j] + x[1] * w[4 * j + 1] + x[2] * w[4 * j + 2] +
                           x[3] * w[4 * j + 3];
            }
            for (int j = 0; j < 16; j++) {
                sum[j] = (int32_t)((uint32_t)sum[j] + (uint32_t)group[j]); /* may wrap */
            }
        }
        memcpy(soft_tile[sums][r], sum, sizeof sum);
    }
}

#endif
