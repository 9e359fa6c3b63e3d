/* alloc.h - the only malloc of the project; ob_alloc and its counters are declared in onebit.h.
 *
 * ob_alloc: 64-byte aligned, contents undefined; blocks of 2 MiB and more are mapped on a 2 MiB boundary with huge pages
 * advised, those of 64 KiB and more lie side by side in such mappings.  Zero bytes give a valid pointer.  All functions may
 * be called from any thread.
 *
 * Scratch: blocks that live for one call.  They are recycled, as results are, so that a hot call does not fault its pages
 * in again; only a taken block counts as live.  A take is one call for ob_alloc_fail_after, recycled or not, so that tests meet it. */
#ifndef OB_ALLOC_H
#define OB_ALLOC_H

#include "../onebit.h"
#include "config.h"

void *ob_scratch_take(size_t bytes); /* like ob_alloc; NULL: out of memory */
void ob_scratch_give(void *block);   /* NULL is allowed */

#endif
