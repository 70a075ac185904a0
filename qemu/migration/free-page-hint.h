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

#include "qemu/bitops.h"
#include "qapi/qapi-types-migration.h"
#include "migration/free-page-hint-compat.h"
#include "migration/free-page-hint-provider.h"
#include "free-page-hint-ram.h"

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

/* What query-migrate reports; to be freed by the caller.  Any thread. */
FreePageHintInfo *free_page_hint_query(void);

/* ---- for what looks up pages on the host ---- */

/*
 * What the host itself can find out about pages, after the dirty log was armed
 * and before the guest is asked.  All of it is called by the migration thread.
 */
typedef struct FreePageHintScanOps {
    /*
     * Called with the BQL before a round.  Returns FREE_PAGE_HINT_REASON__MAX
     * if there is something to look up, otherwise why not.
     */
    FreePageHintReason (*unavailable)(void);
    /*
     * Called without locks, when the dirty log is armed.  Uses
     * free_page_hint_ram_apply(), and looks at free_page_hint_scan_over() about
     * once in a millisecond.  Returns why it could not look at everything, or
     * FREE_PAGE_HINT_REASON__MAX.
     */
    FreePageHintReason (*scan)(void);
    /*
     * Is something of this memory, of which scan() has found that nothing was
     * populated, populated now?  Called in an RCU critical section.
     */
    FreePageHintPopulated *populated;
    /* Called without locks when the round has ended, if it was available. */
    void (*end)(void);
} FreePageHintScanOps;

/* Called once, before main(). */
void free_page_hint_register_scan(const FreePageHintScanOps *ops);

/*
 * Is the time of the scan over, or the migration?  Returns the reason, or
 * FREE_PAGE_HINT_REASON__MAX.
 */
FreePageHintReason free_page_hint_scan_over(void);

/*
 * Why was nothing looked up, or not everything?  FREE_PAGE_HINT_REASON__MAX if
 * there is no such reason.  Any thread.
 */
FreePageHintReason free_page_hint_scan_reason(void);

/* Can round 0 do anything with this machine and this kind of migration? */
bool free_page_hint_supported(void);

/* ---- for who asks without a migration ---- */

/*
 * What answers the request of somebody else than a migration.  There is at most
 * one such request, and none while a migration runs.  All of it is called with
 * the BQL.
 */
typedef struct FreePageHintAskerOps {
    /* Is @id the request, and not at its end? */
    bool (*wanted)(uint32_t id);
    /* See free_page_hint_has_room(). */
    bool (*has_room)(unsigned runs);
    /* One message of the guest: see free_page_hint_submit(). */
    void (*submit)(const FreePageHintRun *runs, unsigned n_runs,
                   unsigned blocks, uint64_t invalid_bytes);
    /* Page cache that the guest says it could free. */
    void (*cache)(uint64_t bytes);
    /* The guest's report is complete. */
    void (*end)(void);
    /* The guest cannot answer any more, or never could. */
    void (*stop)(FreePageHintReason reason);
    /* A migration begins: nothing is asked any more when this returns. */
    void (*cancel)(void);
} FreePageHintAskerOps;

/* Called once, before main(). */
void free_page_hint_register_asker(const FreePageHintAskerOps *ops);

/* Why can the guest not be asked?  Called with the BQL. */
FreePageHintReason free_page_hint_unavailable(void);

/*
 * Ask the guest, also how much of @cache bytes of page cache it could free.
 * Called with the BQL, while no migration runs.  Returns why that cannot be, or
 * FREE_PAGE_HINT_REASON__MAX and the request's id.  A driver that would have to
 * allocate the memory that it hints is not asked.
 */
FreePageHintReason free_page_hint_provider_ask(uint64_t cache, uint32_t *id);

/* There is room again, after has_room() has said no.  Called with the BQL. */
void free_page_hint_provider_resume(void);

/* No more is wanted of the guest.  Called with the BQL. */
void free_page_hint_provider_done(void);

/* ---- for migration-hmp-cmds.c ---- */

/* Print @info for "info migrate". */
void hmp_info_free_page_hint(Monitor *mon, const FreePageHintInfo *info);

/* ---- for ram.c ---- */

/* What RAMBlock->hint points to while a migration uses hints */
typedef struct FreePageHintBlock {
    /*
     * Pages that a hint took out of bmap and that were not dirtied since.
     * Protected by bitmap_mutex; but in postcopy, whoever sends a page clears
     * its bit without that, atomically.
     */
    unsigned long *hinted;
    /* See FreePageHintMap.  Protected by bitmap_mutex. */
    unsigned long *groups;
} FreePageHintBlock;

/*
 * The dirty log was merged into the dirty bitmaps: hints that were asked for
 * before are stale from now on, and pages dirtied since are no longer hinted.
 * Called with the BQL and under bitmap_mutex, in an RCU critical section.
 */
void free_page_hint_synced(void);

/* Free the bitmaps.  Called with the BQL, when nobody sends RAM any more. */
void free_page_hint_cleanup(void);

/* ---- for ram.c and migration.c, in postcopy ---- */

/*
 * A postcopy destination asks for @page of @rb, which is not dirty.  If it is a
 * page that was hinted, and so never sent, make its host page dirty: it will be
 * sent as a zero page.  Otherwise it was sent already.  Called under
 * bitmap_mutex.
 *
 * Returns whether the page is to be sent.
 */
bool free_page_hint_request(RAMBlock *rb, unsigned long page);

/*
 * After a cut link, bmap of @rb is what a postcopy destination has not
 * received.  Hinted pages are among that; they are sent only when it asks.
 * Called while nobody sends.
 */
void free_page_hint_reloaded(RAMBlock *rb);

/* Use free_page_hint_is_zero(). */
bool free_page_hint_take(RAMBlock *rb, unsigned long page);

/*
 * Is @page of @rb, which is about to be sent, to arrive as zero whatever it
 * holds here?  So it is in postcopy for hinted pages.  Called once for a page
 * that is sent, by its sender.
 */
static inline bool free_page_hint_is_zero(RAMBlock *rb, unsigned long page)
{
    return rb->hint && test_bit(page, rb->hint->hinted) &&
           free_page_hint_take(rb, page);
}

/*
 * May the destination still need hinted pages in order to load its devices, and
 * be unable to get them once postcopy has ended?  If so, let a moment pass.
 * Called by the migration thread, without locks, when there is nothing more to
 * send than requests.
 */
bool free_page_hint_in_demand(void);

/* The destination has come to the ping @value.  Return path thread. */
void free_page_hint_pong(uint32_t value);

#endif
