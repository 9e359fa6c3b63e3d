/* pool.h - the project's threads; onebit.h declares ob_num_threads, ob_set_num_threads and ob_share_threads. */
#ifndef OB_POOL_H
#define OB_POOL_H

#include "../onebit.h"
#include "config.h"

#define OB_MAX_THREADS 256

/* Run run(arg, task, thread) once for every task in [0, tasks), in any order; returns when all have run.
 *
 * Tasks are handed out one by one, the caller takes part, and thread is in [0, the count): no two tasks with
 * the same index run at the same time within one call, so it may address this call's scratch.  A call runs inline, as
 * thread 0, if there is one task or thread, if it comes from inside a task, or while another thread uses the pool: a
 * result may not depend on who ran a task.  Every task sees the default floating-point control (ob_fp_default); the
 * caller's is put back.
 *
 * Workers start with the first call that needs them, block all signals, and do not survive fork: a child starts its own,
 * also if the parent forked in the middle of a call.  The count: ob_set_num_threads; else ONEBIT_NUM_THREADS (1..256) at
 * first use; else the count of the OpenMP runtime that lends its threads (ob_share_threads); else ob_cpu_cores().  While
 * it is that runtime's own count, its threads take the workers' place: the call ends when all of them have come, and each
 * thread that calls has a team of its own.  ONEBIT_POOL_JITTER=microseconds delays every task at random, for tests. */
void ob_parallel(size_t tasks, void (*run)(void *arg, size_t task, size_t thread), void *arg);

/* The same with thread in [0, threads): for callers whose scratch was cut for that many, since another thread may set
 * the number at any time. */
void ob_parallel_on(size_t threads, size_t tasks,
                    void (*run)(void *arg, size_t task, size_t thread), void *arg);

#endif
