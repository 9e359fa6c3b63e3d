/* pretend.c - the processor's features and those in OB_PRETEND, for instruction sets compiled for what it has: isa/avxvnni.c for
 * AVX-512's encoding of its instruction, isa/amxint8.c with soft_tiles.h.  Needs csrc/base/cpu.c built with
 * -Dob_cpu_features=ob_cpu_features_real. */
#include "../../csrc/base/cpu.h"

#include <stdio.h>
#include <unistd.h>

_Atomic int soft_tiles_held; /* threads that have not given their tiles back */

__attribute__((destructor)) static void
demand_released_tiles(void)
{
    if (soft_tiles_held) {
        fprintf(stderr, "%d threads still hold tiles\n", soft_tiles_held);
        _exit(4);
    }
}

uint32_t ob_cpu_features_real(void);

uint32_t
ob_cpu_features(void)
{
    return ob_cpu_features_real() | OB_PRETEND;
}
