/* cpu.c - see cpu.h. */
#define _GNU_SOURCE /* sched_getaffinity */
#include "cpu.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

static int
has(uint32_t word, unsigned bit)
{
    return (word >> bit) & 1;
}

/* Linux saves the tile registers (8 KiB a thread) of a process that has asked for them, and from then on refuses signal
 * stacks that could not hold them; it refuses the request if there is one.  torch asks too. */
static int
tiles_granted(void)
{
#if defined(__linux__)
    enum {
        ARCH_REQ_XCOMP_PERM = 0x1023,
        XFEATURE_XTILEDATA = 18
    }; /* asm/prctl.h, from Linux 5.16 */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

uint32_t
ob_cpu_features(void)
{
    uint32_t a, b, c, d;
    enum { OSXSAVE = 27, AVX = 28 }; /* the first says that xgetbv exists */
    if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, OSXSAVE) || !has(c, AVX)) {
        return 0;
    }
    uint32_t saved, high;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 0x06) != 0x06 /* xmm, ymm */ || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return 0;
    }
    uint32_t features = has(b, 5) ? OB_CPU_AVX2 : 0, subleaves = a;
    int zmm_saved = (saved & 0xE0) == 0xE0; /* masks, upper halves, zmm16-31 */
    if (zmm_saved && has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31)) { /* F DQ BW VL */
        features |= OB_CPU_AVX512 | (has(c, 11) ? OB_CPU_AVX512VNNI : 0) |
                    (has(c, 1) ? OB_CPU_AVX512VBMI : 0);
        int tiles_saved = (saved & 0x60000) == 0x60000;
        if (tiles_saved && has(d, 24) && has(d, 25) && tiles_granted()) { /* AMX-TILE, AMX-INT8 */
            features |= OB_CPU_AMXINT8;
        }
    }
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        features |= has(a, 4) ? OB_CPU_AVXVNNI : 0;
    }
    return features;
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

uint32_t
ob_cpu_features(void)
{
    enum { ASIMDDP = 1 << 20, I8MM = 1 << 13 }; /* of <asm/hwcap.h>, where old headers lack them */
    return OB_CPU_NEON | (getauxval(AT_HWCAP) & ASIMDDP ? OB_CPU_NEONDOT : 0) |
           (getauxval(AT_HWCAP2) & I8MM ? OB_CPU_NEONI8MM : 0);
}
#else
uint32_t
ob_cpu_features(void)
{
    return 0;
}
#endif

#if defined(__linux__)
#define PATH_BYTES 1024

/* Cores granted by one cgroup folder, rounded up; SIZE_MAX if it sets no limit.  v2: cpu.max holds "quota period" or
 * "max period"; v1: two files, a quota of -1 for none. */
static size_t
folder_quota(const char *folder, int version)
{
    char path[PATH_BYTES + 32];
    long long quota = -1, period = -1;
    snprintf(path, sizeof path, "%s/%s", folder, version == 2 ? "cpu.max" : "cpu.cfs_quota_us");
    FILE *file = fopen(path, "re");
    if (!file) {
        return SIZE_MAX;
    }
    int got = fscanf(file, version == 2 ? "%lld %lld" : "%lld", &quota, &period);
    fclose(file);
    if (version == 1 && got == 1) {
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        file = fopen(path, "re");
        got += file ? fscanf(file, "%lld", &period) : 0;
        if (file) {
            fclose(file);
        }
    }
    return got == 2 && quota > 0 && period > 0 ? (size_t)OB_CEIL_DIV(quota, period) : SIZE_MAX;
}

/* The least quota of a cgroup and all above it: a parent's limit binds its children. */
static size_t
chain_quota(const char *mount, const char *group, int version)
{
    char folder[PATH_BYTES];
    int length = snprintf(folder, sizeof folder, "%s%s", mount, group);
    size_t least = SIZE_MAX, root = strlen(mount);
    if (length < 0 || (size_t)length >= sizeof folder) {
        return least;
    }
    for (;;) {
        size_t quota = folder_quota(folder, version);
        least = OB_MIN(least, quota);
        char *slash = strrchr(folder, '/');
        if ((size_t)(slash - folder) < root) {
            return least;
        }
        *slash = 0;
    }
}

static size_t
cgroup_quota(void)
{
    FILE *file = fopen("/proc/self/cgroup", "re");
    char line[PATH_BYTES];
    size_t least = SIZE_MAX;
    while (file && fgets(line, sizeof line, file)) { /* hierarchy:controllers:/group */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) {
            continue;
        }
        *controllers++ = *group++ = 0;
        size_t quota = SIZE_MAX;
        if (!*controllers) {
            quota = chain_quota("/sys/fs/cgroup", group, 2);
        }
        else if (!strcmp(controllers, "cpu") || !strcmp(controllers, "cpu,cpuacct") ||
                 !strcmp(controllers, "cpuacct,cpu")) {
            quota = chain_quota("/sys/fs/cgroup/cpu", group, 1);
        }
        least = OB_MIN(least, quota);
    }
    if (file) {
        fclose(file);
    }
    return least;
}

static size_t
affinity_cores(void)
{
    cpu_set_t
        set[4096 /
            sizeof(cpu_set_t)]; /* 32768 cores; the kernel refuses a set smaller than its own */
    if (sched_getaffinity(0, sizeof set, set) == 0) {
        return (size_t)CPU_COUNT_S(sizeof set, set);
    }
    return 0;
}
#else
static size_t
cgroup_quota(void)
{
    return SIZE_MAX;
}

static size_t
affinity_cores(void)
{
    return 0;
}
#endif

size_t
ob_cpu_cores(void)
{
    size_t cores = affinity_cores(), quota = cgroup_quota();
    if (!cores) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        cores = online > 0 ? (size_t)online : 1;
    }
    return OB_MIN(cores, quota);
}
