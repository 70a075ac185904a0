/*
 * Free page hints: the engine
 *
 * Between the start of dirty logging and the first page of RAM, the migration
 * thread runs "round 0": it arms the dirty log, asks a provider (a device that
 * talks to the guest) which pages are free, and takes the answers out of the
 * dirty bitmap.  docs/devel/migration/free-page-hint.rst has the argument why
 * no write is lost.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_HINT_H
#define QEMU_MIGRATION_FREE_PAGE_HINT_H

#include "qapi/qapi-types-migration.h"
#include "exec/ramblock.h"
#include "migration/free-page-hint-provider.h"

/* ---- for migration.c ---- */

/*
 * Forget the previous migration's hints.  Called with the BQL when a new
 * migration is set up.
 */
void free_page_hint_reset(void);

/*
 * Round 0.  Called by the migration thread, without the BQL, in state ACTIVE
 * and before the first page of RAM is sent.  Returns after at most
 * free-page-hint-wait ms plus the time to arm the dirty log; never fails: a
 * round that cannot run only leaves its reason behind.
 */
void free_page_hint_round(void);

/* End a running round at once.  Any thread. */
void free_page_hint_cancel(void);

/* What query-migrate tells; to be freed by the caller.  Any thread. */
FreePageHintInfo *free_page_hint_query(void);

/* ---- for migration-hmp-cmds.c ---- */

/* Print @info for "info migrate". */
void hmp_info_free_page_hint(Monitor *mon, const FreePageHintInfo *info);

/* ---- for ram.c ---- */

/*
 * The dirty log was merged into the dirty bitmaps: hints that were asked for
 * before are stale from now on, and pages dirtied since are no longer hinted.
 * Called under bitmap_mutex, in an RCU critical section.
 */
void free_page_hint_synced(void);

/*
 * Mark all hinted pages dirty, for a switch to postcopy: the destination can
 * only fault in pages that are sent one day.  Called without bitmap_mutex, in
 * an RCU critical section.
 */
void free_page_hint_restore_all(void);

/*
 * Was @page of @rb hinted and not dirtied since?  Then nobody needs its
 * contents, and a zero page does.  Called under bitmap_mutex, or in postcopy,
 * when the bits do not change any more.
 */
static inline bool free_page_hint_test(RAMBlock *rb, unsigned long page)
{
    return rb->hint_bmap && test_bit(page, rb->hint_bmap);
}

/* Free the bitmaps.  Called with the BQL, when nobody sends RAM any more. */
void free_page_hint_cleanup(void);

#endif
