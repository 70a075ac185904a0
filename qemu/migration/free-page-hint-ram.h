/*
 * Free page hints: what the engine does to RAM
 *
 * Between free-page-hint.c, which knows when, and the dirty bitmaps.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_HINT_RAM_H
#define QEMU_MIGRATION_FREE_PAGE_HINT_RAM_H

#include "free-page-hint-bitmap.h"

/* ---- called by the engine, in the migration thread ---- */

/*
 * Allocate what a round needs.  Called with the BQL, so that no RAMBlock comes
 * or goes.  Returns false if there is no memory for it.
 */
bool free_page_hint_ram_alloc(void);

/*
 * Make sure that every write from now on is logged.  Gives up, and returns
 * false, as soon as free_page_hint_armed() says so.  Called without locks.
 */
bool free_page_hint_ram_arm(void);

/*
 * What is known without the guest was applied, and the guest will be asked.  In
 * debug builds, remember what RAM holds.  Called without locks.
 */
void free_page_hint_ram_scanned(void);

/*
 * The round is over: of pages that are to be sent, forget all writes until
 * then, as without hints.  Gives up once free_page_hint_cancelled().  Called
 * without locks.
 */
void free_page_hint_ram_defer(void);

/*
 * Apply some of @runs: as many as a hold of bitmap_mutex allows, see
 * free_page_hint_clear_runs().  They are stale if the dirty log was merged
 * since free_page_hint_ram_arm().  Called without locks, with an empty @tally.
 *
 * Returns the number of runs that are done.
 */
unsigned free_page_hint_ram_apply(FreePageHintRun *runs, unsigned n_runs,
                                  FreePageHintTally *tally);

/*
 * Of @runs, which are to be applied, count those in which nothing was populated
 * when that was looked up, and something is now.  Called without locks; to be
 * called with a few runs only, since @populated takes a microsecond or more.
 */
typedef bool FreePageHintPopulated(RAMBlock *rb, uint64_t first,
                                   uint64_t npages);
unsigned free_page_hint_ram_populated(const FreePageHintRun *runs,
                                      unsigned n_runs,
                                      FreePageHintPopulated *populated);

/* Does this round know @rb, and is it there?  In an RCU critical section. */
bool free_page_hint_ram_listed(RAMBlock *rb);

/*
 * Trace the counter of dirty pages, and in debug builds check it.  Called with
 * the BQL.
 */
void free_page_hint_ram_check(void);

/* ---- shared with free-page-hint-postcopy.c ---- */

typedef struct FreePageHintPages {
    /*
     * Protected by bitmap_mutex.  Pages that are hinted; not kept up to date
     * in postcopy.
     */
    uint64_t hinted;
    /*
     * The postcopy destination has loaded its devices.  Atomic: set by the
     * return path thread, read by the migration thread.
     */
    bool loaded;
} FreePageHintPages;

extern FreePageHintPages free_page_hint_pages;

/*
 * The bitmaps of @rb, which this round knows.  Called under bitmap_mutex, in an
 * RCU critical section.
 */
FreePageHintMap free_page_hint_ram_map(RAMBlock *rb);

/* ---- called back ---- */

/* @npages more are armed.  Returns false if the round is to end. */
bool free_page_hint_armed(uint64_t npages);

/* Nobody wants this migration any more. */
bool free_page_hint_cancelled(void);

/* Count pages that the guest wrote, or a postcopy destination asked for. */
void free_page_hint_count(uint64_t redirtied, uint64_t requested);

#endif
