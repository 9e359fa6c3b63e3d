/* guard.h - blocks that end (or begin) exactly at a page nobody may touch; linked in place of base/alloc.c, so that the
 * core's own scratch lies there too.
 *
 * A block's room is filled with GUARD_FILL when taken, so that reading what was never written shows, and what lies
 * around the block in its page must still hold it when the block is given back. */
#ifndef GUARD_H
#define GUARD_H

#include <stddef.h>

#define GUARD_FILL 0xA5

extern int guard_at_end; /* 1: the end of a block touches the forbidden page; 0: its beginning */

void *guard_take(size_t bytes,
                 size_t alignment); /* at the end, alignment may leave a few bytes of slack */
void guard_give(void *block);
size_t guard_taken(void); /* blocks not given back */

#endif
