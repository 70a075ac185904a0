/*
 * Free page hints: what the engine does to RAM
 *
 * A write to a page after free_page_hint_ram_arm() is in the dirty log and is
 * merged into the dirty bitmap by a later sync.  A hint that answers a request
 * made after that can therefore clear the page's bit, as long as no such merge
 * came in between.  That is all that keeps the writes.
 *
 * What nobody hinted need not be armed: free_page_hint_ram_defer() makes that
 * as it was.  Else pages that the guest writes before they are sent for the
 * first time would be sent twice, because of hints.
 *
 * Whatever a guest hints, bitmap_mutex and RCU are held for a bounded amount of
 * work at a time, so that whoever wants to stop the round need not wait.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/units.h"
#include "exec/cputlb.h"
#include "exec/target_page.h"
#include "migration/free-page-hint-compat.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "free-page-hint.h"
#include "free-page-hint-debug.h"
#include "free-page-hint-ram.h"
#include "migration.h"
#include "options.h"
#include "ram-empty.h"
#include "ram.h"
#include "trace.h"

/*
 * Pages of work in one hold, whatever the runs are like: 16 GiB of 4 KiB pages,
 * whose bits are in 1 MiB.
 */
#define HOLD_PAGES (4 * MiB)

/* Pages armed in one hold of RCU, or a chunk if that is more: 1 GiB */
#define ARM_PAGES (256 * KiB)

/*
 * Pages whose log's clear is deferred again in one hold of bitmap_mutex: 32 Ki
 * runs of bits at most, if every second page is hinted.
 */
#define DEFER_PAGES (64 * KiB)

static struct {
    /* Protected by bitmap_mutex.  Counts the merges of the dirty log. */
    uint64_t epoch;

    /* Migration thread only.  The epoch in which the dirty log was armed. */
    uint64_t armed_epoch;

    /*
     * What is to be freed, even if its RAMBlock is gone by then.  Written with
     * the BQL, by the migration thread or when it has ended.
     */
    GPtrArray *blocks;
} ram_hint;

FreePageHintPages free_page_hint_pages;

static uint64_t block_pages(RAMBlock *rb)
{
    return rb->used_length >> qemu_target_page_bits();
}

FreePageHintMap free_page_hint_ram_map(RAMBlock *rb)
{
    FreePageHintMap map = {
        .bmap = rb->bmap,
        .hinted = rb->hint->hinted,
        .groups = rb->hint->groups,
        .npages = block_pages(rb),
        .host_ratio = 1,
    };

    /* Postcopy places whole host pages; precopy sends any target page */
    if (migrate_postcopy_ram()) {
        map.host_ratio = MAX(1, rb->page_size / qemu_target_page_size());
    }
    return map;
}

bool free_page_hint_ram_listed(RAMBlock *block)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb == block) {
            return rb->hint && rb->bmap;
        }
    }
    return false;
}

/* ---- allocation ---- */

static void block_free(gpointer data)
{
    FreePageHintBlock *block = data;

    g_free(block->hinted);
    g_free(block->groups);
    g_free(block);
}

bool free_page_hint_ram_alloc(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();

    free_page_hint_pages.hinted = 0;
    qatomic_set(&free_page_hint_pages.loaded, false);
    ram_hint.blocks = g_ptr_array_new_with_free_func(block_free);
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        /* As large as bmap: used_length may change while we run */
        uint64_t npages = rb->max_length >> qemu_target_page_bits();
        FreePageHintBlock *block;

        /* What the destination does not empty has to be sent, zero pages too */
        if (!rb->bmap || !rb->used_length || ram_stays_as_it_is(rb)) {
            continue;
        }
        block = g_new0(FreePageHintBlock, 1);
        g_ptr_array_add(ram_hint.blocks, block);
        block->hinted = bitmap_try_new(npages);
        block->groups = bitmap_try_new(free_page_hint_groups(npages));
        if (!block->hinted || !block->groups) {
            return false;
        }
        rb->hint = block;
    }
    return true;
}

void free_page_hint_cleanup(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();

    if (trace_event_get_state_backends(TRACE_FREE_PAGE_HINT_KEPT)) {
        free_page_hint_debug_kept();
    }

    /* Also of a DIMM that was unplugged meanwhile and may come back */
    INTERNAL_RAMBLOCK_FOREACH(rb) {
        rb->hint = NULL;
    }
    free_page_hint_pages.hinted = 0;
    g_clear_pointer(&ram_hint.blocks, g_ptr_array_unref);
    free_page_hint_debug_cleanup();
}

/* ---- arming ---- */

/*
 * KVM: with manual protection, a sync leaves pages writable whose bit is set,
 * and the deferred clear (clear_bmap) protects them only before they are sent.
 * Do it now, a chunk at a time: KVM holds its mmu_lock for a chunk, and has
 * flushed the TLBs when it returns.
 *
 * Returns the number of pages from @page on that are done, 0 if there are none.
 */
static uint64_t arm_pages(RAMBlock *rb, uint64_t page)
{
    uint64_t chunk, end;
    uint64_t first = page;

    RCU_READ_LOCK_GUARD();

    if (!free_page_hint_ram_listed(rb) || page >= block_pages(rb)) {
        return 0;
    }
    chunk = rb->clear_bmap ? 1ULL << rb->clear_bmap_shift : block_pages(rb);
    end = MIN(page + MAX(ARM_PAGES, chunk), block_pages(rb));
    for (; page < end; page += chunk) {
        ram_bitmap_lock();
        ram_clear_dirty_log(rb, page);
        ram_bitmap_unlock();
    }
    return end - first;
}

/*
 * TCG: a page's TLB entry may still allow writes that bypass the log, from
 * before the dirty bits were cleared.  Reset them, and wait until each vCPU has
 * left the translation block that may have looked at one.
 */
static void arm_tlbs(void)
{
    RAMBlock *rb;

    bql_lock();
    WITH_RCU_READ_LOCK_GUARD() {
        RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
            if (rb->hint) {
                tlb_reset_dirty_range_all(rb->offset, rb->used_length);
            }
        }
    }
    memory_global_after_dirty_log_sync();
    bql_unlock();
}

/* A block that goes away later is found to be missing; none comes. */
static GPtrArray *listed_blocks(void)
{
    GPtrArray *blocks = g_ptr_array_new();
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb->hint) {
            g_ptr_array_add(blocks, rb);
        }
    }
    return blocks;
}

bool free_page_hint_ram_arm(void)
{
    g_autoptr(GPtrArray) blocks = listed_blocks();
    unsigned i;

    /* First: a merge from here on needs the deferred clear done again */
    ram_bitmap_lock();
    ram_hint.armed_epoch = ram_hint.epoch;
    ram_bitmap_unlock();

    for (i = 0; i < blocks->len; i++) {
        uint64_t page = 0, npages;

        while ((npages = arm_pages(g_ptr_array_index(blocks, i), page))) {
            page += npages;
            if (!free_page_hint_armed(npages)) {
                return false;
            }
        }
    }

    if (tcg_enabled()) {
        arm_tlbs();
    }
    return true;
}

void free_page_hint_ram_scanned(void)
{
    if (FREE_PAGE_HINT_DEBUG) {
        free_page_hint_debug_scanned();
    }
}

/*
 * Returns the number of pages from @page on that are done, 0 if there are none.
 */
static uint64_t defer_pages(RAMBlock *rb, uint64_t page)
{
    uint64_t npages;

    RCU_READ_LOCK_GUARD();

    if (!free_page_hint_ram_listed(rb) || page >= block_pages(rb) ||
        !rb->clear_bmap) {
        return 0;
    }
    npages = MIN(block_pages(rb) - page, DEFER_PAGES);
    ram_bitmap_lock();
    memory_region_defer_clear_dirty_bitmap(rb->mr,
                                           page << qemu_target_page_bits(),
                                           npages << qemu_target_page_bits(),
                                           rb->bmap);
    bitmap_set(rb->clear_bmap, page >> rb->clear_bmap_shift,
               DIV_ROUND_UP(npages, 1ULL << rb->clear_bmap_shift));
    ram_bitmap_unlock();
    return npages;
}

void free_page_hint_ram_defer(void)
{
    g_autoptr(GPtrArray) blocks = listed_blocks();
    unsigned i;

    for (i = 0; i < blocks->len; i++) {
        uint64_t page = 0, npages;

        while ((npages = defer_pages(g_ptr_array_index(blocks, i), page)) &&
               !free_page_hint_cancelled()) {
            page += npages;
        }
    }
}

/* ---- hints ---- */

unsigned free_page_hint_ram_apply(FreePageHintRun *runs, unsigned n_runs,
                                  FreePageHintTally *tally)
{
    uint64_t budget = HOLD_PAGES;
    bool traced = trace_event_get_state_backends(TRACE_FREE_PAGE_HINT_APPLY);
    RAMBlock *listed = NULL;
    unsigned done = 0;

    RCU_READ_LOCK_GUARD();
    ram_bitmap_lock();
    while (done < n_runs && budget) {
        FreePageHintRun *run = &runs[done];
        RAMBlock *rb = run->block;
        uint64_t hinted = tally->hinted;
        FreePageHintMap map;

        if (ram_hint.epoch != ram_hint.armed_epoch) {
            tally->stale += run->npages;
            done++;
            continue;
        }
        if (rb != listed && !free_page_hint_ram_listed(rb)) {
            tally->invalid += run->npages;
            done++;
            budget -= MIN(budget, FREE_PAGE_HINT_RUN_PAGES);
            continue;
        }
        listed = rb;
        map = free_page_hint_ram_map(rb);
        done += free_page_hint_clear_runs(&map, run, traced ? 1 : n_runs - done,
                                          &budget, tally);
        hinted = tally->hinted - hinted;
        if (traced && hinted) {
            trace_free_page_hint_apply(rb->idstr, run->first - hinted, hinted);
        }
    }
    free_page_hint_pages.hinted += tally->cleared;
    ram_dirty_pages_add(-tally->cleared);
    ram_bitmap_unlock();

    trace_free_page_hint_hold(done, HOLD_PAGES - budget, tally->cleared);
    return done;
}

/* Called in an RCU critical section. */
static bool run_found_absent(const FreePageHintRun *run)
{
    RAMBlock *rb = run->block;
    uint64_t end = run->first + run->npages;
    bool found;

    ram_bitmap_lock();
    found = free_page_hint_ram_listed(rb) && run->npages &&
            run->first < end && end <= block_pages(rb) &&
            find_next_zero_bit(rb->hint->hinted, end, run->first) >= end;
    ram_bitmap_unlock();
    return found;
}

unsigned free_page_hint_ram_populated(const FreePageHintRun *runs,
                                      unsigned n_runs,
                                      FreePageHintPopulated *populated)
{
    unsigned n = 0;
    unsigned i;

    RCU_READ_LOCK_GUARD();

    for (i = 0; i < n_runs; i++) {
        const FreePageHintRun *run = &runs[i];

        n += run_found_absent(run) &&
             populated(run->block, run->first, run->npages);
    }
    return n;
}

void free_page_hint_ram_check(void)
{
    RCU_READ_LOCK_GUARD();

    ram_bitmap_lock();
    free_page_hint_debug_counter();
    ram_bitmap_unlock();
}

/* ---- from ram.c ---- */

/*
 * Which pages are hinted still matters to a switch to postcopy, and to those
 * who look on; else it is a number in the statistics, for which nobody waits
 * while the guest stands.
 */
static bool hinted_is_exact(void)
{
    return runstate_is_running() || migrate_postcopy_ram() ||
           FREE_PAGE_HINT_DEBUG ||
           trace_event_get_state_backends(TRACE_FREE_PAGE_HINT_KEPT);
}

void free_page_hint_synced(void)
{
    uint64_t redirtied = 0;
    RAMBlock *rb;

    ram_hint.epoch++;

    if (free_page_hint_pages.hinted && hinted_is_exact()) {
        RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
            if (rb->hint) {
                FreePageHintMap map = free_page_hint_ram_map(rb);

                redirtied += free_page_hint_forget_dirty(&map);
            }
        }
        free_page_hint_pages.hinted -= redirtied;
        free_page_hint_count(redirtied, 0);
    }
    free_page_hint_debug_counter();
    if (FREE_PAGE_HINT_DEBUG && !runstate_is_running()) {
        free_page_hint_debug_stopped();
    }
}
