/* limits.c - what the machine can do at best, measured the way the operations run: on the pool's threads, in calls of the
 * same size.  For the benchmark. */
#include "../base/pool.h"
#include "../kernels/kernel.h"

#define CHUNK ((size_t)1 << 18) /* bytes of a task */
#define AHEAD 4096 /* bytes: far enough for DRAM, near enough for one page's neighbour */
#define LINE 64

typedef struct sweep {
    uint64_t *words;
    size_t bytes; /* a multiple of LINE */
    uint64_t mask;
    size_t rounds;
    uint64_t total;
} sweep;

static void
multiply_task(void *arg, size_t task, size_t thread)
{
    sweep *s = arg;
    (void)task;
    (void)thread;
    __atomic_fetch_add(&s->total, ob_isa_multiply(s->rounds), __ATOMIC_RELAXED);
}

uint64_t
ob_limit_multiply(size_t rounds)
{
    sweep s = {.rounds = rounds};
    ob_parallel(ob_num_threads(), multiply_task, &s);
    return s.total;
}

static void
read_task(void *arg, size_t task, size_t thread)
{
    sweep *s = arg;
    const uint64_t *word = s->words + task * (CHUNK / sizeof *word);
    const size_t lines = OB_MIN(CHUNK, s->bytes - task * CHUNK) / LINE;
    uint64_t seen[8] = {0};
    (void)thread;
    for (size_t i = 0; i < lines; i++, word += 8) {
        __builtin_prefetch((const char *)word + AHEAD);
        for (size_t j = 0; j < 8; j++) {
            seen[j] |= word[j];
        }
    }
    for (size_t j = 1; j < 8; j++) {
        seen[0] |= seen[j];
    }
    __atomic_fetch_or(&s->total, seen[0], __ATOMIC_RELAXED);
}

uint64_t
ob_limit_read(const void *data, size_t bytes)
{
    sweep s = {.words = (uint64_t *)(uintptr_t)data, .bytes = bytes / LINE * LINE};
    ob_parallel(OB_CEIL_DIV(s.bytes, CHUNK), read_task, &s);
    return s.total;
}

static void
update_task(void *arg, size_t task, size_t thread)
{
    sweep *s = arg;
    uint64_t *word = s->words + task * (CHUNK / sizeof *word);
    const size_t words = OB_MIN(CHUNK, s->bytes - task * CHUNK) / sizeof *word;
    (void)thread;
    for (size_t i = 0; i < words; i++) {
        word[i] ^= s->mask;
    }
}

void
ob_limit_update(void *data, size_t bytes)
{
    static volatile uint64_t nothing; /* so that the stores are not optimised away */
    sweep s = {.words = data, .bytes = bytes / LINE * LINE, .mask = nothing};
    ob_parallel(OB_CEIL_DIV(s.bytes, CHUNK), update_task, &s);
}
