/* dispatch.c - choose an instruction set once; list, force, explain. */
#include "../base/cpu.h"
#include "../kernels/kernel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OB_ISA(name, needs) extern const ob_kernels ob_kernels__##name;
#include "isas.def"
#undef OB_ISA

static const struct {
    const char *name;
    uint32_t needs;
    const ob_kernels *kernels;
} isas[] = {
#define OB_ISA(name, needs) {#name, needs, &ob_kernels__##name},
#include "isas.def"
#undef OB_ISA
};

#if defined(__x86_64__) && !defined(OB_WITHOUT_trits_avx512vbmi)
void ob_dot_trits__avx512vbmi(size_t k, const uint8_t *trits_strip, const int8_t *x, int32_t sum,
                              int32_t *acc);
#define VBMI_DOT ob_dot_trits__avx512vbmi
#else
#define VBMI_DOT NULL
#endif

enum { ISA_COUNT = sizeof isas / sizeof isas[0] };

static pthread_once_t chosen = PTHREAD_ONCE_INIT;
static _Atomic(const ob_kernels *) active;
static char error[256]; /* written once, inside choose() */
static int has_vbmi;    /* likewise */

static void
explain_unknown(const char *wanted)
{
    size_t room = sizeof error;
    int used = snprintf(error, room, "ONEBIT_ISA='%.60s' is not in this build, which has", wanted);
    for (size_t i = 0; i < ISA_COUNT && used > 0 && (size_t)used < room; i++) {
        size_t at = (size_t)used;
        used += snprintf(error + at, room - at, "%s %s", i ? "," : "", isas[i].name);
    }
}

static void
choose(void)
{
    size_t best = 0, i = 0;
    has_vbmi = (ob_cpu_features() & OB_CPU_AVX512VBMI) != 0;
    for (i = 0; i < ISA_COUNT; i++) {
        best = ob_isa_supported(i) ? i : best;
    }
    const char *wanted = getenv("ONEBIT_ISA");
    if (wanted && *wanted) {
        for (i = 0; i < ISA_COUNT && strcmp(wanted, isas[i].name) != 0;) {
            i++;
        }
        if (i == ISA_COUNT) {
            explain_unknown(wanted);
        }
        else if (!ob_isa_supported(i)) {
            snprintf(error, sizeof error,
                     "ONEBIT_ISA='%s': this processor or its operating system lacks it", wanted);
        }
        else {
            best = i;
        }
    }
    atomic_store(&active, isas[best].kernels);
}

const ob_kernels *
ob_kernels_active(void)
{
    pthread_once(&chosen, choose);
    return atomic_load_explicit(&active, memory_order_acquire);
}

ob_dot_trits
ob_dot_trits_active(void)
{
    return isas[ob_isa_active()].needs & OB_CPU_AVX512VNNI && has_vbmi ? VBMI_DOT : NULL;
}

const ob_kernels *
ob_kernels_at(size_t i)
{
    return i < ISA_COUNT ? isas[i].kernels : NULL;
}

size_t
ob_isa_count(void)
{
    return ISA_COUNT;
}

const char *
ob_isa_name(size_t i)
{
    return i < ISA_COUNT ? isas[i].name : NULL;
}

int
ob_isa_supported(size_t i)
{
    return i < ISA_COUNT && (isas[i].needs & ~ob_cpu_features()) == 0;
}

size_t
ob_isa_active(void)
{
    const ob_kernels *now = ob_kernels_active();
    size_t i = 0;
    while (isas[i].kernels != now) {
        i++;
    }
    return i;
}

ob_status
ob_isa_force(size_t i)
{
    if (i >= ISA_COUNT) {
        return OB_INVALID;
    }
    if (!ob_isa_supported(i)) {
        return OB_UNSUPPORTED;
    }
    ob_kernels_active(); /* so that a first use later cannot undo this one */
    atomic_store(&active, isas[i].kernels);
    return OB_OK;
}

const char *
ob_isa_error(void)
{
    ob_kernels_active();
    return error[0] ? error : NULL;
}

void
ob_isa_tiles(size_t i, size_t *forward_rows, size_t *input_rows, size_t *weight_rows)
{
    const ob_kernels *kernels = isas[i].kernels;
    *forward_rows = kernels->forward_rows;
    *input_rows = kernels->input_rows;
    *weight_rows = kernels->weight_rows;
}
