/* pool.c - see pool.h.
 *
 * Own workers: one region at a time.  `state` says everything a worker must know to join it: generation (bits 32..63), open
 * (bit 31), thread count (bits 16..30), workers inside (bits 0..15).  A worker joins by a compare-and-swap while the region
 * is open and leaves by a subtraction; the caller closes the region when no task is left and waits only for those inside.
 * So a worker that the system has not woken yet delays nobody.  A lent team has its runtime's barrier at the end. */
#define _GNU_SOURCE /* usleep, RTLD_NOLOAD */
#include "pool.h"
#include "cpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define OPEN ((uint64_t)1 << 31)
#define GENERATION ((uint64_t)1 << 32)
#define INSIDE(state) ((state) & 0xFFFF)
#define THREADS(state) ((size_t)((state) >> 16 & 0x7FFF))
#define SPIN_NANOSECONDS 50000

static struct pool {
    pthread_mutex_t busy;  /* held by the caller whose region it is */
    pthread_mutex_t mutex; /* for the two conditions only */
    pthread_cond_t wake, done;
    pthread_t threads[OB_MAX_THREADS]; /* [i] runs as thread i + 1 */
    size_t workers;                    /* started; busy held */
    _Atomic uint64_t state;
    atomic_int quit; /* workers with index >= state's thread count leave */
    /* the region */
    void (*run)(void *, size_t, size_t);
    void *arg;
    size_t tasks;
    OB_ALIGNED(64) atomic_size_t next;
    size_t limit;          /* of a lent team */
    atomic_size_t members; /* of a lent team that have come */
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static pthread_once_t configured = PTHREAD_ONCE_INIT;
static atomic_size_t wanted; /* threads; 0: as many as usual */
static size_t cores, usual;
static unsigned jitter; /* microseconds */
static _Thread_local int inside;

/* The OpenMP runtime that lends its threads; not to the children of a fork, where libgomp would wait for ever. */
typedef void (*parallel_function)(void (*run)(void *), void *arg, unsigned threads, unsigned flags);
typedef int (*count_function)(void);
static _Atomic(parallel_function) team;
static _Atomic(count_function) team_threads;

static void
forget_threads(void) /* in a forked child, where none of the parent's workers exists */
{
    atomic_store(&team, NULL);
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.workers = 0;
    atomic_store(&pool.state, 0);
    atomic_store(&pool.quit, 0);
}

static size_t
environment_number(const char *name, size_t least, size_t most, size_t otherwise)
{
    const char *text = getenv(name);
    char *end = NULL;
    long long value = text ? strtoll(text, &end, 10) : 0;
    int number = text && end != text && *end == 0;
    int inside_range = value >= (long long)least && value <= (long long)most;
    return number && inside_range ? (size_t)value : otherwise;
}

static void
configure(void)
{
    cores = ob_cpu_cores();
    usual = OB_MIN(cores, (size_t)OB_MAX_THREADS);
    size_t unset = 0, threads = environment_number("ONEBIT_NUM_THREADS", 1, OB_MAX_THREADS, 0);
    atomic_compare_exchange_strong(&wanted, &unset, threads);
    jitter = (unsigned)environment_number("ONEBIT_POOL_JITTER", 1, 100000, 0);
    pthread_atfork(NULL, NULL, forget_threads);
}

size_t
ob_num_threads(void)
{
    pthread_once(&configured, configure);
    size_t threads = atomic_load(&wanted);
    count_function count = atomic_load(&team_threads);
    if (!threads && count) {
        int theirs = count();
        threads = theirs > 0 ? OB_MIN((size_t)theirs, (size_t)OB_MAX_THREADS) : 0;
    }
    return threads ? threads : usual;
}

ob_status
ob_set_num_threads(size_t threads)
{
    if (threads < 1 || threads > OB_MAX_THREADS) {
        return OB_INVALID;
    }
    pthread_once(&configured, configure);
    atomic_store(&wanted, threads);
    return OB_OK;
}

ob_status
ob_share_threads(const char *openmp)
{
    parallel_function parallel = NULL;
    count_function count = NULL;
    pthread_once(&configured, configure); /* children of a fork must forget the team */
    if (openmp) {
        void *library = *openmp ? dlopen(openmp, RTLD_NOW | RTLD_NOLOAD) : NULL; /* stays open */
        void *first = library ? dlsym(library, "GOMP_parallel") : NULL;
        void *second = library ? dlsym(library, "omp_get_max_threads") : NULL;
        if (!first || !second) {
            return OB_UNSUPPORTED;
        }
        memcpy(&parallel, &first, sizeof parallel);
        memcpy(&count, &second, sizeof count);
    }
    atomic_store(&team_threads, count);
    atomic_store(&team, parallel);
    return OB_OK;
}

static void
delay(size_t task, size_t thread)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t x = ((uint64_t)now.tv_nsec + task * 7919 + thread) * 0x9E3779B97F4A7C15u;
    usleep((useconds_t)((x >> 33) % jitter));
}

static void
run_tasks(size_t thread)
{
    for (;;) {
        size_t task = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (task >= pool.tasks) {
            return;
        }
        if (jitter) {
            delay(task, thread);
        }
        pool.run(pool.arg, task, thread);
    }
}

static int
spin_is_over(uint64_t *until)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t at = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    *until = *until ? *until : at + SPIN_NANOSECONDS;
    for (int i = 0; i < 16; i++) {
        ob_cpu_relax();
    }
    return at >= *until;
}

/* Is there something this worker must do in `state`? */
static int
calls(uint64_t state, size_t thread, uint64_t seen)
{
    int open = (state & OPEN) && state / GENERATION != seen && thread < THREADS(state);
    return open || atomic_load(&pool.quit);
}

static uint64_t
wait_for_region(size_t thread, uint64_t seen)
{
    uint64_t state = atomic_load(&pool.state), until = 0;
    int spin = THREADS(state) <= cores; /* else waiting would take a core from work */
    while (!calls(state, thread, seen)) {
        if (spin && !spin_is_over(&until)) {
            state = atomic_load(&pool.state);
            continue;
        }
        pthread_mutex_lock(&pool.mutex);
        while (!calls(state = atomic_load(&pool.state), thread, seen)) {
            pthread_cond_wait(&pool.wake, &pool.mutex);
        }
        pthread_mutex_unlock(&pool.mutex);
    }
    return state;
}

/* Enter the region that `state` shows; 0: it was closed meanwhile. */
static int
join(uint64_t state)
{
    uint64_t generation = state / GENERATION;
    while ((state & OPEN) && state / GENERATION == generation) {
        if (atomic_compare_exchange_weak(&pool.state, &state, state + 1)) {
            return 1;
        }
    }
    return 0;
}

static void *
worker(void *index)
{
    size_t thread = (size_t)(uintptr_t)index;
    uint64_t seen = UINT64_MAX; /* of the 2^32 generations none */
    inside = 1;
    ob_fp_default();
    for (;;) {
        uint64_t state = wait_for_region(thread, seen);
        if (atomic_load(&pool.quit)) {
            return NULL;
        }
        seen = state / GENERATION;
        if (!join(state)) {
            continue;
        }
        run_tasks(thread);
        state = atomic_fetch_sub(&pool.state, 1);
        if (!(state & OPEN) && INSIDE(state) == 1) {
            pthread_mutex_lock(&pool.mutex);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.mutex);
        }
    }
}

static void
wake_workers(void)
{
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.mutex);
}

/* Make `threads` - 1 workers if the system allows; returns the threads there are.  busy held. */
static size_t
resize(size_t threads)
{
    if (pool.workers + 1 > threads) { /* rare: start anew rather than choose who leaves */
        atomic_store(&pool.quit, 1);
        wake_workers();
        while (pool.workers) {
            pthread_join(pool.threads[--pool.workers], NULL);
        }
        atomic_store(&pool.quit, 0);
    }
    if (pool.workers + 1 < threads) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all,
                        &before); /* inherited: signals are the application's threads' affair */
        while (pool.workers + 1 < threads &&
               pthread_create(&pool.threads[pool.workers], NULL, worker,
                              (void *)(uintptr_t)(pool.workers + 1)) == 0) {
            pool.workers++;
        }
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    return pool.workers + 1;
}

static void
run_region(size_t threads)
{
    uint64_t generation = atomic_load(&pool.state) / GENERATION + 1;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.state, generation * GENERATION | OPEN | (uint64_t)threads << 16);
    wake_workers();
    run_tasks(0);
    uint64_t until = 0;
    atomic_fetch_and(&pool.state, ~OPEN);
    while (INSIDE(atomic_load(&pool.state))) {
        if (threads <= cores && !spin_is_over(&until)) {
            continue;
        }
        pthread_mutex_lock(&pool.mutex);
        while (INSIDE(atomic_load(&pool.state))) {
            pthread_cond_wait(&pool.done, &pool.mutex);
        }
        pthread_mutex_unlock(&pool.mutex);
    }
}

/* What each thread of a lent team does. */
static void
take_part(void *none)
{
    (void)none;
    size_t thread = atomic_fetch_add(&pool.members, 1);
    uint64_t control = ob_fp_default();
    int before = inside;
    inside = 1;
    if (thread < pool.limit) {
        run_tasks(thread);
    }
    inside = before;
    ob_fp_restore(control);
}

void
ob_parallel(size_t tasks, void (*run)(void *arg, size_t task, size_t thread), void *arg)
{
    ob_parallel_on(ob_num_threads(), tasks, run, arg);
}

void
ob_parallel_on(size_t threads, size_t tasks, void (*run)(void *arg, size_t task, size_t thread),
               void *arg)
{
    if (!tasks) {
        return;
    }
    uint64_t control = ob_fp_default();
    int nested = inside;
    inside = 1;
    if (tasks > 1 && threads > 1 && !nested && pthread_mutex_trylock(&pool.busy) == 0) {
        pool.run = run;
        pool.arg = arg;
        pool.tasks = tasks;
        parallel_function parallel = atomic_load(&team);
        count_function count = atomic_load(&team_threads);
        if (parallel && count && count() == (int)threads) { /* another number would end threads */
            pool.limit = threads;
            atomic_store(&pool.next, 0);
            atomic_store(&pool.members, 0);
            parallel(take_part, NULL, (unsigned)threads, 0);
        }
        else {
            run_region(resize(threads));
        }
        pthread_mutex_unlock(&pool.busy);
    }
    else {
        for (size_t task = 0; task < tasks; task++) {
            if (jitter) {
                delay(task, 0);
            }
            run(arg, task, 0);
        }
    }
    inside = nested;
    ob_fp_restore(control);
}
