/* pool_race.c - the thread pool under callers that race, resize, nest and fork; ONEBIT_POOL_JITTER adds delays.
 *
 *   pool_race [rounds] [forks]    prints one line of JSON; exits with 1 and a sentence if a promise of pool.h is broken */
#include "../../csrc/base/cpu.h"
#include "../../csrc/base/pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define TASKS 97
#define FLUSH_SUBNORMALS 0x9FC0u /* what some libraries leave in MXCSR */

static atomic_size_t regions;

typedef struct region {
    atomic_int runs[TASKS];
    atomic_int owner[OB_MAX_THREADS]; /* tasks running as this thread now */
    size_t tasks, nested;
} region;

static void
fail(const char *why)
{
    fprintf(stderr, "pool_race: %s\n", why);
    _exit(1);
}

static uint64_t
current_control(void)
{
    uint64_t control = ob_fp_default();
    ob_fp_restore(control);
    return control;
}

static void
nested_task(void *arg, size_t task, size_t thread)
{
    (void)task;
    if (thread != 0) {
        fail("a nested call did not run inline");
    }
    ++*(size_t *)arg;
}

static void
one_task(void *arg, size_t task, size_t thread)
{
    region *r = arg;
    if (thread >= OB_MAX_THREADS || atomic_fetch_add(&r->owner[thread], 1) != 0) {
        fail("two tasks at once with one thread index");
    }
    atomic_fetch_add(&r->runs[task], 1);
#if defined(__x86_64__)
    if ((current_control() & 0xFFC0) != 0x1F80) { /* the low bits are sticky flags */
        fail("a task saw a changed floating-point control");
    }
#endif
    if (task % 16 == 3) {
        size_t count = 0;
        ob_parallel(5, nested_task, &count);
        if (count != 5) {
            fail("a nested call lost tasks");
        }
    }
    atomic_fetch_sub(&r->owner[thread], 1);
}

static void
run_region_once(size_t tasks)
{
    region *r = calloc(1, sizeof *r);
    uint64_t before = ob_fp_default();
#if defined(__x86_64__)
    ob_fp_restore(FLUSH_SUBNORMALS);
#endif
    uint64_t mine = current_control();
    ob_parallel(tasks, one_task, r);
    if (current_control() != mine) {
        fail("the caller's floating-point control was not put back");
    }
    ob_fp_restore(before);
    for (size_t i = 0; i < TASKS; i++) {
        if (atomic_load(&r->runs[i]) != (i < tasks)) {
            fail("a task ran twice or never");
        }
    }
    free(r);
    atomic_fetch_add(&regions, 1);
}

static void *
caller(void *rounds)
{
    for (size_t i = 0; i < (size_t)(uintptr_t)rounds; i++) {
        run_region_once(i % (TASKS + 1));
    }
    return NULL;
}

static void *
resizer(void *rounds)
{
    static const size_t counts[] = {1, 2, 3, 5, 8, 2, 13, 4};
    for (size_t i = 0; i < (size_t)(uintptr_t)rounds; i++) {
        ob_set_num_threads(counts[i % 8]);
        usleep(300);
    }
    return NULL;
}

/* Fork while `other` threads are inside regions; every child must compute within ten seconds. */
static void
fork_often(size_t forks)
{
    for (size_t i = 0; i < forks; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(10);
            run_region_once(TASKS);
            run_region_once(TASKS / 2);
            _exit(0);
        }
        int status = 0;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            fail(WIFSIGNALED(status) ? "a forked child hung or died" : "a forked child failed");
        }
    }
}

int
main(int count, char **arguments)
{
    size_t rounds = count > 1 ? strtoul(arguments[1], NULL, 10) : 300;
    size_t forks = count > 2 ? strtoul(arguments[2], NULL, 10) : 50;
    if (ob_set_num_threads(0) != OB_INVALID || ob_set_num_threads(257) != OB_INVALID) {
        fail("a thread count out of range was accepted");
    }
    ob_set_num_threads(4);
    caller((void *)(uintptr_t)20); /* workers exist before the first fork */
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        pthread_create(&threads[i], NULL, i ? caller : resizer, (void *)(uintptr_t)rounds);
    }
    fork_often(forks);
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    printf("{\"regions\": %zu, \"forks\": %zu}\n", atomic_load(&regions), forks);
    return 0;
}
