/*
 * Free page hints: what builds with FREE_PAGE_HINT_DEBUG check
 *
 * The argument of free-page-hint-ram.c ends in this: a page that is still
 * hinted when the guest has stopped was not written since the dirty log was
 * armed.  Here that is looked up.  A checksum of each page is taken after that,
 * before the guest is asked, and compared after the merge that follows the stop
 * of the guest.  What the host found to be absent until then has to be zero.  A
 * page that is zero now may have been discarded, by the balloon say; zeroes are
 * what the destination has.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <zlib.h>
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/rcu.h"
#include "exec/target_page.h"
#include "migration/misc.h"
#include "free-page-hint.h"
#include "free-page-hint-debug.h"
#include "migration.h"
#include "ram.h"
#include "trace.h"

/* Of RAMBlock * to uint32_t[].  Migration thread, then with the BQL. */
static GHashTable *checksums;

static uint64_t block_pages(RAMBlock *rb)
{
    return rb->used_length >> qemu_target_page_bits();
}

static uint8_t *page_host(RAMBlock *rb, uint64_t page)
{
    return rb->host + (page << qemu_target_page_bits());
}

static uint32_t page_checksum(RAMBlock *rb, uint64_t page)
{
    return crc32(0, page_host(rb, page), qemu_target_page_size());
}

static uint32_t zero_checksum(void)
{
    g_autofree uint8_t *zeroes = g_malloc0(qemu_target_page_size());

    return crc32(0, zeroes, qemu_target_page_size());
}

void free_page_hint_debug_counter(void)
{
    uint64_t counter = ram_dirty_pages_add(0);
    uint64_t bits = 0;
    RAMBlock *rb;

    /* A RAMBlock that grew has ended the migration: nobody counts any more */
    if ((!FREE_PAGE_HINT_DEBUG &&
         !trace_event_get_state_backends(TRACE_FREE_PAGE_HINT_CHECK)) ||
        !migration_is_running() ||
        migrate_get_current()->state == MIGRATION_STATUS_CANCELLING) {
        return;
    }

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        bits += bitmap_count_one(rb->bmap, block_pages(rb));
    }
    trace_free_page_hint_check(counter, bits);
    assert(!FREE_PAGE_HINT_DEBUG || counter == bits);
}

void free_page_hint_debug_scanned(void)
{
    uint32_t zero = zero_checksum();
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();

    checksums = g_hash_table_new_full(NULL, NULL, NULL, g_free);
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb->hint) {
            uint32_t *sums = g_new(uint32_t, rb->max_length >>
                                   qemu_target_page_bits());
            uint64_t page;

            for (page = 0; page < block_pages(rb); page++) {
                /* Nothing was there: a look would populate shared memory */
                sums[page] = test_bit(page, rb->hint->hinted) ?
                             zero : page_checksum(rb, page);
            }
            g_hash_table_insert(checksums, rb, sums);
        }
    }
}

void free_page_hint_debug_stopped(void)
{
    uint64_t checked = 0;
    RAMBlock *rb;

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        uint32_t *sums = checksums ? g_hash_table_lookup(checksums, rb) : NULL;
        uint64_t page;

        if (!rb->hint || !sums) {
            continue;
        }
        for (page = find_first_bit(rb->hint->hinted, block_pages(rb));
             page < block_pages(rb);
             page = find_next_bit(rb->hint->hinted, block_pages(rb),
                                  page + 1)) {
            checked++;
            if (page_checksum(rb, page) != sums[page] &&
                !buffer_is_zero(page_host(rb, page), qemu_target_page_size())) {
                error_report("free page hints: page 0x%" PRIx64 " of block %s "
                             "was written, and the write is lost", page,
                             rb->idstr);
                abort();
            }
        }
    }
    trace_free_page_hint_unwritten(checked);
}

void free_page_hint_debug_kept(void)
{
    uint64_t kept = 0;
    RAMBlock *rb;

    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        uint64_t page = 0;

        while (rb->hint && page < block_pages(rb)) {
            uint64_t first = find_next_bit(rb->hint->hinted, block_pages(rb),
                                           page);

            page = find_next_zero_bit(rb->hint->hinted, block_pages(rb), first);
            if (first < page) {
                trace_free_page_hint_kept(rb->idstr, first, page - first);
                kept += page - first;
            }
        }
    }
    trace_free_page_hint_kept_all(kept);
}

void free_page_hint_debug_cleanup(void)
{
    g_clear_pointer(&checksums, g_hash_table_unref);
}
