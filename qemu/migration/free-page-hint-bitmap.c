/*
 * Free page hints: what a hint does to the dirty bitmap
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "free-page-hint-bitmap.h"

/* Pages whose bits are in 64 bytes, the cache line of most hosts */
#define CACHE_LINE_PAGES (64 * BITS_PER_BYTE)
/* A block of 4 MiB; of a longer run, the hardware sees where it goes */
#define PREFETCH_PAGES 1024

bool free_page_hint_trim(uint64_t *first, uint64_t *npages,
                         uint64_t block_pages, uint64_t host_ratio)
{
    uint64_t start, end;

    if (*first >= block_pages || *npages > block_pages - *first) {
        return false;
    }

    start = ROUND_UP(*first, host_ratio);
    end = ROUND_DOWN(*first + *npages, host_ratio);
    if (start >= end) {
        return false;
    }

    *first = start;
    *npages = end - start;
    return true;
}

uint64_t free_page_hint_clear(unsigned long *bmap, unsigned long *hinted,
                              uint64_t first, uint64_t npages)
{
    uint64_t last = first + npages - 1;
    uint64_t cleared = 0;
    uint64_t k;

    if (!npages) {
        return 0;
    }

    for (k = BIT_WORD(first); k <= BIT_WORD(last); k++) {
        unsigned long mask = ~0UL;
        unsigned long bits;

        if (k == BIT_WORD(first)) {
            mask &= BITMAP_FIRST_WORD_MASK(first);
        }
        if (k == BIT_WORD(last)) {
            mask &= BITMAP_LAST_WORD_MASK(last + 1);
        }

        bits = bmap[k] & mask;
        bmap[k] &= ~bits;
        hinted[k] |= bits;
        /* Before the first round nearly all are set, and counting is slow */
        cleared += bits == ~0UL ? BITS_PER_LONG : ctpopl(bits);
    }
    return cleared;
}

void free_page_hint_prefetch(const unsigned long *bmap,
                             const unsigned long *hinted,
                             uint64_t first, uint64_t npages)
{
    uint64_t end = first + MIN(npages, PREFETCH_PAGES);
    uint64_t page;

    for (page = first; page < end; page += CACHE_LINE_PAGES) {
        __builtin_prefetch(&bmap[BIT_WORD(page)], 1);
        __builtin_prefetch(&hinted[BIT_WORD(page)], 1);
    }
}

uint64_t free_page_hint_forget_dirty(unsigned long *hinted,
                                     const unsigned long *bmap,
                                     uint64_t npages)
{
    uint64_t forgotten = 0;
    uint64_t k;

    for (k = 0; k < BITS_TO_LONGS(npages); k++) {
        unsigned long bits = hinted[k] & bmap[k];

        if (bits) {
            hinted[k] &= ~bits;
            forgotten += ctpopl(bits);
        }
    }
    return forgotten;
}

uint64_t free_page_hint_restore(unsigned long *bmap,
                                const unsigned long *hinted,
                                uint64_t npages)
{
    uint64_t restored = 0;
    uint64_t k;

    for (k = 0; k < BITS_TO_LONGS(npages); k++) {
        restored += ctpopl(hinted[k] & ~bmap[k]);
        bmap[k] |= hinted[k];
    }
    return restored;
}
