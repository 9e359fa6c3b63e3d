/* cpu.h - what the processor and its operating system offer; the only cpuid, xgetbv and floating-point control. */
#ifndef OB_CPU_H
#define OB_CPU_H

#include "config.h"

#define OB_CPU_AVX2 1u
#define OB_CPU_AVX512 2u /* F, BW, VL, DQ */
#define OB_CPU_AVX512VNNI 4u
#define OB_CPU_AVXVNNI 8u
#define OB_CPU_NEON 16u /* every AArch64 */
#define OB_CPU_NEONDOT 32u
#define OB_CPU_NEONI8MM 64u
#define OB_CPU_AVX512VBMI 128u
#define OB_CPU_AMXINT8 256u /* tile registers with int8 products, granted by Linux */

/* Bits the processor has and the operating system saves the registers of; 0 on other architectures. */
uint32_t ob_cpu_features(void);

/* Cores this process may use: its affinity mask, limited by the cgroup's cpu quota; at least 1. */
size_t ob_cpu_cores(void);

/* Floating-point control: round to nearest, subnormals kept, exceptions masked.  Returns what was in force, for
 * ob_fp_restore; sticky exception flags come back as they were. */
OB_INLINE uint64_t
ob_fp_default(void)
{
#if defined(__x86_64__)
    uint32_t saved, fresh = 0x1F80;
    __asm__ volatile("stmxcsr %0" : "=m"(saved));
    __asm__ volatile("ldmxcsr %0" : : "m"(fresh) : "memory");
    return saved;
#elif defined(__aarch64__)
    uint64_t saved, fresh = 0;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"(fresh) : "memory");
    return saved;
#else
    return 0;
#endif
}

OB_INLINE void
ob_fp_restore(uint64_t saved)
{
#if defined(__x86_64__)
    uint32_t control = (uint32_t)saved;
    __asm__ volatile("ldmxcsr %0" : : "m"(control) : "memory");
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(saved) : "memory");
#else
    (void)saved;
#endif
}

/* One turn of a waiting loop. */
OB_INLINE void
ob_cpu_relax(void)
{
#if defined(__x86_64__)
    __asm__ volatile("pause");
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
