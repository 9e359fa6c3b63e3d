/* peak.c - the int8 multiply-add that an instruction set's products are made of, from registers only: what no kernel of
 * it can beat.  For the benchmark.  Assembly, so that this file needs nobody's compiler flags. */
#include <string.h>

#include "../kernels/kernel.h"
#include "tiles_amx.h"

#define CHAINS 12 /* instructions a round, of independent sums: two a cycle of latency 5 need 10 */

#if defined(__x86_64__)
#define PEAK(name, instruction, r)                                                               \
    static void name(size_t rounds)                                                              \
    {                                                                                            \
        __asm__ volatile(".p2align 5\n1:\n"                                                      \
                         ".irp i,0,1,2,3,4,5,6,7,8,9,10,11\n" instruction " %%" r "14,%%" r      \
                         "15,%%" r "\\i\n.endr\n"                                                \
                         "dec %0\njnz 1b\nvzeroupper"                                            \
                         : "+r"(rounds)                                                          \
                         :                                                                       \
                         : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                           "xmm8", "xmm9", "xmm10", "xmm11");                                    \
    }
PEAK(multiply_avx2, "vpmaddubsw", "ymm")
#ifndef OB_WITHOUT_avxvnni
PEAK(multiply_avxvnni, "%{vex%} vpdpbusd", "ymm")
#endif
#ifndef OB_WITHOUT_avx512vnni
PEAK(multiply_avx512vnni, "vpdpbusd", "zmm")
#endif
#ifndef OB_WITHOUT_amxint8
static void
multiply_amxint8(size_t rounds)
{
    tile_config config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = 16;
    }
    __asm__ volatile("ldtilecfg %1\n"
                     ".p2align 5\n1:\n"
                     ".irp i,0,1,2,3,0,1,2,3,0,1,2,3\ntdpbssd %%tmm5,%%tmm4,%%tmm\\i\n.endr\n"
                     "dec %0\njnz 1b\ntilerelease"
                     : "+r"(rounds)
                     : "m"(config)
                     : "cc");
}
#endif
#elif defined(__aarch64__)
#define PEAK(name, arch, instruction, sums, bytes)                                           \
    static void name(size_t rounds)                                                          \
    {                                                                                        \
        __asm__ volatile(".arch " arch "\n1:\n"                                              \
                         ".irp i,0,1,2,3,4,5,6,7,8,9,10,11\n" instruction " v\\i\\()." sums  \
                         ",v14." bytes ",v15." bytes "\n.endr\n"                             \
                         "subs %0,%0,#1\nb.ne 1b"                                            \
                         : "+r"(rounds)                                                      \
                         :                                                                   \
                         : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", \
                           "v10", "v11");                                                    \
    }
PEAK(multiply_neon, "armv8-a", "smlal", "8h", "8b")
#ifndef OB_WITHOUT_neondot
PEAK(multiply_neondot, "armv8.2-a+dotprod", "sdot", "4s", "16b")
#endif
#ifndef OB_WITHOUT_neoni8mm
PEAK(multiply_neoni8mm, "armv8.2-a+i8mm", "smmla", "4s", "16b")
#endif
#endif

static const struct {
    const char *isa;
    size_t multiplies; /* per instruction */
    void (*run)(size_t rounds);
} peaks[] = {
#if defined(__x86_64__)
    {"avx2", 32, multiply_avx2},
#ifndef OB_WITHOUT_avxvnni
    {"avxvnni", 32, multiply_avxvnni},
#endif
#ifndef OB_WITHOUT_avx512vnni
    {"avx512vnni", 64, multiply_avx512vnni},
#endif
#ifndef OB_WITHOUT_amxint8
    {"amxint8", 16384, multiply_amxint8},
#endif
#elif defined(__aarch64__)
    {"neon", 8, multiply_neon},
#ifndef OB_WITHOUT_neondot
    {"neondot", 16, multiply_neondot},
#endif
#ifndef OB_WITHOUT_neoni8mm
    {"neoni8mm", 32, multiply_neoni8mm},
#endif
#endif
    {"", 0, NULL},
};

uint64_t
ob_isa_multiply(size_t rounds)
{
    const char *active = ob_kernels_active()->name;
    for (size_t i = 0; rounds > 0 && peaks[i].run; i++) {
        if (!strcmp(peaks[i].isa, active)) {
            peaks[i].run(rounds);
            return (uint64_t)rounds * CHAINS * peaks[i].multiplies;
        }
    }
    return 0;
}
