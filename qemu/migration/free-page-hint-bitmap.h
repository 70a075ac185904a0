/*
 * Free page hints: what a hint does to the dirty bitmap
 *
 * Pure functions on bitmaps: no lock, no state, and a RAMBlock is only a
 * pointer to compare.  All positions and lengths are in target pages, relative
 * to the start of the block.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_HINT_BITMAP_H
#define QEMU_MIGRATION_FREE_PAGE_HINT_BITMAP_H

#include "migration/free-page-hint-provider.h"

/*
 * Pages that share a bit in FreePageHintMap.groups: 128 MiB of 4 KiB pages,
 * 4 KiB of bitmap
 */
#define FREE_PAGE_HINT_GROUP_PAGES 32768

/* What a run takes of a budget of pages, however short it is */
#define FREE_PAGE_HINT_RUN_PAGES 4096

/* The bitmaps of one RAMBlock */
typedef struct FreePageHintMap {
    /* RAMBlock->bmap: dirty pages */
    unsigned long *bmap;
    /* Pages that were hinted, and are not known to be dirty since */
    unsigned long *hinted;
    /* Groups of pages that can have bits in hinted; see below for its size */
    unsigned long *groups;
    /* Pages in the block */
    uint64_t npages;
    /* Target pages in a page that is skipped as a whole, a power of two */
    uint64_t host_ratio;
} FreePageHintMap;

/* What became of the pages of some runs */
typedef struct FreePageHintTally {
    /* Pages that lie in the block and can be skipped */
    uint64_t hinted;
    /* Pages of these that were dirty and are not any more */
    uint64_t cleared;
    /* Pages that cannot be skipped as the rest of their host page is not */
    uint64_t too_small;
    /* Pages of runs that leave the block, or that are in none of ours */
    uint64_t invalid;
    /* Pages of runs that came after a merge of the dirty log */
    uint64_t stale;
} FreePageHintTally;

/* Bits in FreePageHintMap.groups for a block of @npages */
static inline uint64_t free_page_hint_groups(uint64_t npages)
{
    return DIV_ROUND_UP(npages, FREE_PAGE_HINT_GROUP_PAGES);
}

/**
 * free_page_hint_clear_runs: take runs of pages out of the dirty bitmap
 *
 * Takes as many of @runs as are of the same block as the first one and as the
 * budget allows.  Of each, only whole host pages count.  Pages that were dirty
 * are cleared in bmap and set in hinted.  Pages that were clean already
 * (logically unplugged by virtio-mem, hinted before) change neither: they must
 * never be marked dirty by free_page_hint_mark_host_page().
 *
 * @map: the bitmaps of that block
 * @runs: may be anything; the one at which the budget ends is left with what
 *        remains of it
 * @n_runs: at least 1
 * @budget: pages of work, more than 0; reduced by what was done, to 0 at least.
 *          It may be exceeded by less than a host page.
 * @tally: what was done is added
 *
 * Returns the number of runs that are done.
 */
unsigned free_page_hint_clear_runs(const FreePageHintMap *map,
                                   FreePageHintRun *runs, unsigned n_runs,
                                   uint64_t *budget, FreePageHintTally *tally);

/**
 * free_page_hint_forget_dirty: forget the hinted pages that are dirty
 *
 * Looks at groups with hinted pages only.
 *
 * Returns the number of pages forgotten.
 */
uint64_t free_page_hint_forget_dirty(const FreePageHintMap *map);

/**
 * free_page_hint_mark_host_page: make the host page around @page dirty, if all
 * of it is hinted
 *
 * Then none of it was sent.  A host page of which a part was sent is there as a
 * whole already.
 *
 * Returns the number of pages that became dirty.
 */
uint64_t free_page_hint_mark_host_page(const FreePageHintMap *map,
                                       uint64_t page);

/**
 * free_page_hint_clear_hinted: take hinted host pages out of the dirty bitmap
 * again
 *
 * To be called when the dirty bitmap has what was not received.  Host pages
 * that are hinted as a whole were not sent, and those of which a part was
 * received are there as a whole: sending the rest would fail.
 *
 * Returns the number of pages cleared.
 */
uint64_t free_page_hint_clear_hinted(const FreePageHintMap *map);

#endif
