/*
 * Free page hints: what a hint does to the dirty bitmap
 *
 * Pure functions on bitmaps: no RAMBlock, no lock, no state.  All positions
 * and lengths are in target pages, relative to the start of the bitmap.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_HINT_BITMAP_H
#define QEMU_MIGRATION_FREE_PAGE_HINT_BITMAP_H

/**
 * free_page_hint_trim: shrink a run to the whole host pages within it
 *
 * A host page can only be skipped as a whole: postcopy places host pages, and
 * a part that is sent populates all of it anyway.
 *
 * @first: first page of the run; rounded up to a host page
 * @npages: length of the run, any value; rounded down to whole host pages
 * @block_pages: pages in the block
 * @host_ratio: target pages in a host page, a power of two
 *
 * Returns false, with @first and @npages unspecified, if the run leaves the
 * block or holds no whole host page.
 */
bool free_page_hint_trim(uint64_t *first, uint64_t *npages,
                         uint64_t block_pages, uint64_t host_ratio);

/**
 * free_page_hint_clear: take a run of pages out of the dirty bitmap
 *
 * Pages that were dirty are cleared in @bmap and set in @hinted.  Pages that
 * were clean already (logically unplugged by virtio-mem, hinted before) change
 * neither: they must never come back through free_page_hint_restore().
 *
 * Returns the number of pages cleared.
 */
uint64_t free_page_hint_clear(unsigned long *bmap, unsigned long *hinted,
                              uint64_t first, uint64_t npages);

/**
 * free_page_hint_prefetch: have the words of a run ready for
 * free_page_hint_clear()
 *
 * A guest that has run for a while tells its blocks in no order, and the
 * bitmaps of a large guest are larger than the caches.  To be called some runs
 * ahead, so that several runs wait for memory at the same time.  Nothing but
 * time depends on @first and @npages.
 */
void free_page_hint_prefetch(const unsigned long *bmap,
                             const unsigned long *hinted,
                             uint64_t first, uint64_t npages);

/**
 * free_page_hint_forget_dirty: forget the hinted pages that are dirty
 *
 * Returns the number of pages forgotten.
 */
uint64_t free_page_hint_forget_dirty(unsigned long *hinted,
                                     const unsigned long *bmap,
                                     uint64_t npages);

/**
 * free_page_hint_restore: make all hinted pages dirty again
 *
 * @hinted stays as it is.  Returns the number of pages that became dirty.
 */
uint64_t free_page_hint_restore(unsigned long *bmap,
                                const unsigned long *hinted,
                                uint64_t npages);

#endif
