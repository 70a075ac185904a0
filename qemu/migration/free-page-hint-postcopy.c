/*
 * Free page hints: postcopy
 *
 * Hinted pages are zero at a destination that has nothing there, and nobody
 * needs to send them, unless a vCPU or a device waits for one: then the
 * destination asks for it, and it is sent as a zero page.  Called by ram.c and
 * migration.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "migration/free-page-hint-compat.h"
#include "migration/misc.h"
#include "free-page-hint.h"
#include "free-page-hint-ram.h"
#include "migration.h"
#include "options.h"
#include "ram.h"
#include "trace.h"

bool free_page_hint_request(RAMBlock *rb, unsigned long page)
{
    FreePageHintMap map;
    uint64_t marked;

    if (!rb->hint) {
        return false;
    }
    map = free_page_hint_ram_map(rb);
    marked = free_page_hint_mark_host_page(&map, page);
    if (marked) {
        ram_dirty_pages_add(marked);
        free_page_hint_count(0, marked);
        trace_free_page_hint_request(rb->idstr, page, marked);
    }
    return marked;
}

void free_page_hint_reloaded(RAMBlock *rb)
{
    /* Before it has loaded its devices, a destination cannot recover */
    qatomic_set(&free_page_hint_pages.loaded, true);

    if (rb->hint) {
        FreePageHintMap map = free_page_hint_ram_map(rb);

        trace_free_page_hint_reloaded(rb->idstr,
                                      free_page_hint_clear_hinted(&map));
    }
}

/* Comes after the devices' states: see postcopy_start() */
#define PING_LOADED 3

void free_page_hint_pong(uint32_t value)
{
    if (value == PING_LOADED) {
        qatomic_set(&free_page_hint_pages.loaded, true);
    }
}

/*
 * A destination that waits for a page while it loads its devices ends postcopy
 * only when it has loaded them.  With preempt, the return path thread answers
 * it to the last.
 */
bool free_page_hint_in_demand(void)
{
    MigrationState *s = migrate_get_current();

    if (!migration_in_postcopy() || !migrate_postcopy_ram() ||
        migrate_postcopy_preempt() || !free_page_hint_pages.hinted ||
        qatomic_read(&free_page_hint_pages.loaded)) {
        return false;
    }
    /* As in migration_rate_limit(): whoever serves a request takes the post */
    if (qemu_sem_timedwait(&s->rate_limit_sem, 1) == 0) {
        qemu_sem_post(&s->rate_limit_sem);
    }
    return true;
}

bool free_page_hint_take(RAMBlock *rb, unsigned long page)
{
    /* In precopy, a page that was dirtied may not be forgotten yet */
    if (!migration_in_postcopy()) {
        return false;
    }
    clear_bit_atomic(page, rb->hint->hinted);
    return true;
}
