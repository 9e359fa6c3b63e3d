/* guard_alloc.c - see guard.h. */
#include "guard.h"

#include "../../csrc/base/alloc.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE ((size_t)4096)
#define ARENAS 1024

typedef struct arena {
    unsigned char *room; /* between two forbidden pages */
    size_t room_bytes;
    unsigned char *block; /* NULL: free */
    size_t bytes;
} arena;

int guard_at_end = 1;

static arena arenas[ARENAS];
static size_t arena_count, taken;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void
stop(const char *why)
{
    fprintf(stderr, "guard: %s\n", why);
    abort();
}

static arena *
new_arena(size_t room_bytes)
{
    if (arena_count == ARENAS) {
        stop("too many arenas");
    }
    unsigned char *base =
        mmap(NULL, room_bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base + PAGE, room_bytes, PROT_READ | PROT_WRITE)) {
        stop("no memory");
    }
    arena *a = &arenas[arena_count++];
    *a = (arena){.room = base + PAGE, .room_bytes = room_bytes};
    return a;
}

void *
guard_take(size_t bytes, size_t alignment)
{
    size_t room_bytes = (bytes / PAGE + 1) * PAGE;
    pthread_mutex_lock(&lock);
    arena *a = NULL;
    for (size_t i = 0; i < arena_count && !a; i++) {
        a = !arenas[i].block && arenas[i].room_bytes == room_bytes ? &arenas[i] : NULL;
    }
    a = a ? a : new_arena(room_bytes);
    size_t end = (room_bytes - bytes) / alignment * alignment;
    a->block = a->room + (guard_at_end ? end : 0);
    a->bytes = bytes;
    taken++;
    pthread_mutex_unlock(&lock);
    memset(a->room, GUARD_FILL, room_bytes);
    return a->block;
}

void
guard_give(void *block)
{
    if (!block) {
        return;
    }
    pthread_mutex_lock(&lock);
    arena *a = NULL;
    for (size_t i = 0; i < arena_count && !a; i++) {
        a = arenas[i].block == block ? &arenas[i] : NULL;
    }
    if (!a) {
        stop("a block given back that was never taken");
    }
    for (size_t i = 0; i < a->room_bytes; i++) {
        int inside = a->room + i >= a->block && a->room + i < a->block + a->bytes;
        if (!inside && a->room[i] != GUARD_FILL) {
            stop("a byte beside a block was written");
        }
    }
    a->block = NULL;
    taken--;
    pthread_mutex_unlock(&lock);
}

size_t
guard_taken(void)
{
    return taken;
}

void *
ob_alloc(size_t bytes)
{
    return guard_take(bytes, 64);
}

void
ob_free(void *block)
{
    guard_give(block);
}

void *
ob_scratch_take(size_t bytes)
{
    return guard_take(bytes, 64);
}

void
ob_scratch_give(void *block)
{
    guard_give(block);
}
