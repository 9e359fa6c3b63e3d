/* tiles_amx.h - the tile registers: eight, of up to 16 rows x 64 bytes, named by literal numbers.
 *
 * Why asm and not the intrinsics: gcc's forget that ldtilecfg and tileloadd read memory. */
#ifndef OB_TILES_AMX_H
#define OB_TILES_AMX_H

#include <stdint.h>

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Gives the registers these shapes and zeros. */
#define tiles_configure(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(config)))
#define tiles_release() __asm__ volatile("tilerelease")
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t::)
/* Row r is at `from + r * stride` bytes. */
#define tile_load(t, from, stride)                                        \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t                      \
                     :                                                    \
                     : "r"((const void *)(from)), "r"((intptr_t)(stride)) \
                     : "memory")
#define tile_store(t, to, stride)                                 \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)"          \
                     :                                            \
                     : "r"((void *)(to)), "r"((intptr_t)(stride)) \
                     : "memory")
/* sums (R, 16) int32 += a (R, 64) int8 . b (16, 16, 4) int8 */
#define tile_multiply(sums, a, b) \
    __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sums::)

#endif
