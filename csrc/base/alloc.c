/* alloc.c - see alloc.h. */
#include "alloc.h"
#include "check.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#define ALIGNMENT ((size_t)64)
#define HUGE_PAGE ((size_t)2 << 20)
/* Room for the header before a huge block; a mapping is still whole pages where they are larger. */
#define PAGE ((size_t)4096)

/* Blocks from SLAB_BLOCK to a huge page share slabs of huge pages: most planes are that small, and a walk over pages of
 * 4 KiB is slower. */
#if defined(__SANITIZE_ADDRESS__)
#define SLAB_BLOCK HUGE_PAGE /* none: malloc'ed, it watches their ends */
#else
#define SLAB_BLOCK ((size_t)64 << 10)
#endif
#define SLAB ((size_t)32 << 20) /* of addresses: there are only the pages that were touched */

/* Recycled scratch and results: enough for a layer step on every thread, little enough to forget. */
#define SPARE_BLOCKS 128
#define SPARE_BYTES ((size_t)256 << 20)
#define PAGE_FAULTS ((size_t)64 << 10) /* malloc keeps smaller results */

typedef struct header {  /* in the 64 bytes before every block */
    size_t bytes;        /* asked for: what the counters know */
    size_t capacity;     /* usable */
    size_t mapped;       /* length of the mapping, 0 if there is none of its own */
    void *base;          /* what to free or unmap; the slab */
    struct header *next; /* in the slab, by address */
} header;

typedef struct slab { /* the first 64 bytes of a mapped block */
    struct slab *next;
    header *first;
} slab;

static atomic_size_t live, peak, largest;
static _Atomic int64_t fail_after = -1;

static pthread_mutex_t spare_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static struct spare {
    void *block;
    size_t capacity;   /* as in its header, which is in no cache */
} spare[SPARE_BLOCKS]; /* oldest first */
static size_t spare_count, spare_bytes;

static pthread_mutex_t slab_lock = PTHREAD_MUTEX_INITIALIZER; /* taken after spare_lock */
static slab *slabs;

static header *
header_of(void *block)
{
    return (header *)((char *)block - ALIGNMENT);
}

static void
raise_to(atomic_size_t *mark, size_t value)
{
    size_t seen = atomic_load(mark);
    while (seen < value && !atomic_compare_exchange_weak(mark, &seen, value)) {
    }
}

static void *
count_in(void *block, size_t bytes)
{
    header_of(block)->bytes = bytes;
    raise_to(&peak, atomic_fetch_add(&live, bytes) + bytes);
    raise_to(&largest, bytes);
    return block;
}

static int
should_fail(void)
{
    int64_t left = atomic_load(&fail_after);
    while (left > 0 && !atomic_compare_exchange_weak(&fail_after, &left, left - 1)) {
    }
    return left == 1;
}

static char *
align_up(char *p, size_t alignment)
{
    return p + (-(uintptr_t)p & (alignment - 1));
}

static void *
map_block(size_t bytes)
{
    size_t mapped;
    if (!ob_add(bytes, HUGE_PAGE + PAGE, &mapped) || !ob_round_up(mapped, PAGE, &mapped)) {
        return NULL;
    }
    char *base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        return NULL;
    }
    char *block = align_up(base + PAGE, HUGE_PAGE);
#if defined(MADV_HUGEPAGE)
    madvise(block, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE); /* refused: only slower */
#endif
    *header_of(block) = (header){bytes, (size_t)(base + mapped - block), mapped, base, NULL};
    return block;
}

static void
lock_both(void)
{
    pthread_mutex_lock(&spare_lock);
    pthread_mutex_lock(&slab_lock);
}

static void
unlock_both(void)
{
    pthread_mutex_unlock(&slab_lock);
    pthread_mutex_unlock(&spare_lock);
}

static void
follow_forks(void)
{
    pthread_atfork(lock_both, unlock_both, unlock_both);
}

/* The first gap of a slab that holds a header and `capacity` bytes; NULL: there is none. */
static void *
take_from(slab *s, size_t capacity)
{
    header **link = &s->first;
    char *gap = (char *)s + ALIGNMENT, *end = (char *)s + SLAB;
    for (; *link && (size_t)((char *)*link - gap) < ALIGNMENT + capacity; link = &(*link)->next) {
        gap = (char *)*link + ALIGNMENT + (*link)->capacity;
    }
    if (!*link && (size_t)(end - gap) < ALIGNMENT + capacity) {
        return NULL;
    }
    header *h = (header *)gap;
    *h = (header){0, capacity, 0, s, *link};
    *link = h;
    return gap + ALIGNMENT;
}

static void *
take_small(size_t capacity)
{
    void *block = NULL;
    pthread_once(&fork_once, follow_forks);
    pthread_mutex_lock(&slab_lock);
    for (slab *s = slabs; s && !block; s = s->next) {
        block = take_from(s, capacity);
    }
    slab *fresh = block ? NULL : map_block(SLAB);
    if (fresh) {
        *fresh = (slab){slabs, NULL};
        slabs = fresh;
        block = take_from(fresh, capacity);
    }
    pthread_mutex_unlock(&slab_lock);
    return block;
}

static void
give_small(header *h)
{
    slab *s = h->base, **at = &slabs;
    pthread_mutex_lock(&slab_lock);
    header **link = &s->first;
    while (*link != h) {
        link = &(*link)->next;
    }
    *link = h->next;
    if (!s->first) {
        while (*at != s) {
            at = &(*at)->next;
        }
        *at = s->next;
        munmap(header_of(s)->base, header_of(s)->mapped);
    }
    pthread_mutex_unlock(&slab_lock);
}

static void *
new_block(size_t bytes)
{
    if (bytes >= HUGE_PAGE) {
        return map_block(bytes);
    }
    size_t capacity = OB_CEIL_DIV(bytes, ALIGNMENT) * ALIGNMENT; /* no shared cache line */
    if (capacity >= SLAB_BLOCK) {
        return take_small(capacity);
    }
    char *base = malloc(capacity + 2 * ALIGNMENT);
    if (!base) {
        return NULL;
    }
    char *block = align_up(base, ALIGNMENT) + ALIGNMENT;
    *header_of(block) = (header){bytes, capacity, 0, base, NULL};
    return block;
}

static void
release(void *block)
{
    header *h = header_of(block);
    if (h->mapped) {
        munmap(h->base, h->mapped);
    }
    else if (h->capacity >= SLAB_BLOCK) {
        give_small(h);
    }
    else {
        free(h->base);
    }
}

void *
ob_alloc(size_t bytes)
{
    void *block = should_fail() ? NULL : new_block(bytes);
    return block ? count_in(block, bytes) : NULL;
}

void
ob_free(void *block)
{
    if (block) {
        atomic_fetch_sub(&live, header_of(block)->bytes);
        release(block);
    }
}

static void *
spare_remove(size_t i)
{
    void *block = spare[i].block;
    spare_bytes -= spare[i].capacity;
    spare_count--;
    for (; i < spare_count; i++) {
        spare[i] = spare[i + 1];
    }
    return block;
}

/* A block of at most `most` bytes if a spare one will do, else a new one. */
static void *
take(size_t bytes, size_t most)
{
    if (should_fail()) {
        return NULL;
    }
    pthread_once(&fork_once, follow_forks);
    pthread_mutex_lock(&spare_lock);
    size_t best = SPARE_BLOCKS, best_capacity = most;
    for (size_t i = 0; i < spare_count; i++) {
        size_t capacity = spare[i].capacity;
        if (capacity >= bytes && capacity <= best_capacity) {
            best = i;
            best_capacity = capacity;
        }
    }
    void *block = best < SPARE_BLOCKS ? spare_remove(best) : NULL;
    pthread_mutex_unlock(&spare_lock);
    block = block ? block : new_block(bytes);
    return block ? count_in(block, bytes) : NULL;
}

void *
ob_scratch_take(size_t bytes)
{
    return take(bytes, bytes > SIZE_MAX / 8 ? 0 : 4 * bytes + 4 * PAGE);
}

void *
ob_alloc_result(size_t bytes)
{
    if (bytes < PAGE_FAULTS) {
        return ob_alloc(bytes);
    }
    return take(bytes, bytes > SIZE_MAX / 8 ? 0 : bytes + bytes / 4 + PAGE); /* may be kept long */
}

void
ob_free_result(void *block)
{
    if (block && header_of(block)->bytes < PAGE_FAULTS) {
        ob_free(block);
        return;
    }
    ob_scratch_give(block);
}

void
ob_scratch_give(void *block)
{
    if (!block) {
        return;
    }
    size_t capacity = header_of(block)->capacity;
    atomic_fetch_sub(&live, header_of(block)->bytes);
    if (capacity > SPARE_BYTES) {
        release(block);
        return;
    }
    pthread_mutex_lock(&spare_lock);
    while (spare_count == SPARE_BLOCKS || spare_bytes + capacity > SPARE_BYTES) {
        release(spare_remove(0));
    }
    spare[spare_count++] = (struct spare){block, capacity};
    spare_bytes += capacity;
    pthread_mutex_unlock(&spare_lock);
}

void
ob_alloc_fail_after(int64_t calls)
{
    atomic_store(&fail_after, calls);
}

size_t
ob_alloc_live_bytes(void)
{
    return atomic_load(&live);
}

size_t
ob_alloc_peak_bytes(void)
{
    return atomic_load(&peak);
}

size_t
ob_alloc_largest(void)
{
    return atomic_load(&largest);
}

void
ob_alloc_reset_peak(void)
{
    atomic_store(&peak, atomic_load(&live));
    atomic_store(&largest, 0);
}
