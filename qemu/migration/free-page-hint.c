/*
 * Free page hints: the engine
 *
 * Round 0 of a migration, see docs/devel/migration/free-page-hint.rst:
 *
 *   IDLE --> ARMING --> ASKED --> REPORTING --> ENDED
 *                \         \_____________________^
 *                 \______________________________^
 *
 * A write to a page after ARMING is in the dirty log and is merged into the
 * dirty bitmap by a later sync.  A hint that answers a request made after
 * ARMING can therefore clear the page's bit, as long as no such merge came in
 * between.  That is all that keeps the writes; the rest of this file keeps
 * accounts and waits.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "exec/cputlb.h"
#include "exec/memory.h"
#include "exec/target_page.h"
#include "qapi/qapi-types-migration.h"
#include "system/kvm.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "free-page-hint.h"
#include "free-page-hint-bitmap.h"
#include "free-page-hint-debug.h"
#include "migration.h"
#include "options.h"
#include "ram.h"
#include "trace.h"

/* Runs applied in one hold of bitmap_mutex: 4 GiB of 4 MiB blocks */
#define APPLY_BATCH 1024

/*
 * How far the caches are warmed ahead.  Of 2, 4, 8 and 16, 4 was fastest for
 * 4 MiB blocks of a 1 TiB guest in random order: 72 ns each, 220 ns without.
 */
#define APPLY_AHEAD 4

/* "no reason": hints were used, all of them */
#define REASON_NONE FREE_PAGE_HINT_REASON__MAX

static struct {
    /*
     * Protects all fields down to stats.  A leaf: nothing is waited for, and
     * no other lock is taken, while it is held.
     */
    QemuMutex lock;
    /* Signalled when there is something to apply or the round is to end */
    QemuCond cond;
    FreePageHintState state;
    /* Why the round ended early or did not start */
    FreePageHintReason reason;
    /* The request, in states ASKED and REPORTING */
    uint32_t id;
    /* The guest said that its report is complete */
    bool complete;
    /* Ring of FREE_PAGE_HINT_QUEUE_RUNS; only there while a round runs */
    FreePageHintRun *queue;
    unsigned head;
    unsigned count;
    /* The provider found too little room and waits for resume() */
    bool starved;
    int64_t ask_ns;
    FreePageHintInfo stats;

    /* Written with the BQL and the lock, read with either. */
    const FreePageHintProviderOps *ops;
    void *opaque;

    /* Protected by bitmap_mutex.  Counts the merges of the dirty log. */
    uint64_t epoch;

    /* Migration thread only.  The epoch in which the dirty log was armed. */
    uint64_t armed_epoch;
} hint;

static void __attribute__((constructor)) free_page_hint_init(void)
{
    qemu_mutex_init(&hint.lock);
    qemu_cond_init(&hint.cond);
    hint.reason = REASON_NONE;
}

/* The only writer of hint.state.  Called with hint.lock. */
static void free_page_hint_set_state(FreePageHintState state)
{
    assert(state == FREE_PAGE_HINT_STATE_IDLE ||
           (state > hint.state && hint.state != FREE_PAGE_HINT_STATE_ENDED));
    trace_free_page_hint_state(FreePageHintState_str(hint.state),
                               FreePageHintState_str(state));
    hint.state = state;
}

static bool free_page_hint_stopped(void)
{
    QEMU_LOCK_GUARD(&hint.lock);

    return hint.reason != REASON_NONE;
}

/* Called with hint.lock. */
static bool free_page_hint_asking(void)
{
    return hint.state == FREE_PAGE_HINT_STATE_ASKED ||
           hint.state == FREE_PAGE_HINT_STATE_REPORTING;
}

static uint64_t us_since(int64_t ns)
{
    return (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - ns) / SCALE_US;
}

static uint64_t block_pages(RAMBlock *rb)
{
    return rb->used_length >> qemu_target_page_bits();
}

/*
 * Called with the BQL and under bitmap_mutex, in an RCU critical section.  A
 * RAMBlock that grew has ended the migration: then nobody counts any more.
 */
static void free_page_hint_check(void)
{
    if ((FREE_PAGE_HINT_DEBUG ||
         trace_event_get_state_backends(TRACE_FREE_PAGE_HINT_CHECK)) &&
        migration_is_running() &&
        migrate_get_current()->state != MIGRATION_STATUS_CANCELLING) {
        free_page_hint_debug_counter();
    }
}

void free_page_hint_reset(void)
{
    QEMU_LOCK_GUARD(&hint.lock);

    free_page_hint_set_state(FREE_PAGE_HINT_STATE_IDLE);
    hint.reason = REASON_NONE;
    hint.complete = false;
    hint.stats = (FreePageHintInfo) {};
}

/* ---- the round, in the migration thread ---- */

/*
 * Called with the BQL.  The checks that need no provider come first, so that
 * the reason names what the operator can change.
 */
static FreePageHintReason free_page_hint_refusal(void)
{
    if (migrate_get_current()->state != MIGRATION_STATUS_ACTIVE) {
        return FREE_PAGE_HINT_REASON_CANCELLED;
    }
    if (!migrate_free_page_hint()) {
        return FREE_PAGE_HINT_REASON_DISABLED;
    }
    if (!migrate_free_page_hint_wait()) {
        return FREE_PAGE_HINT_REASON_NO_WAIT;
    }
    if (migrate_mode() != MIG_MODE_NORMAL || migrate_colo() ||
        migrate_background_snapshot() || !(kvm_enabled() || tcg_enabled())) {
        return FREE_PAGE_HINT_REASON_UNSUPPORTED;
    }
    if (!runstate_is_running()) {
        return FREE_PAGE_HINT_REASON_VM_STOPPED;
    }
    if (!hint.ops) {
        return FREE_PAGE_HINT_REASON_NO_DEVICE;
    }
    return hint.ops->unavailable(hint.opaque);
}

/* Called with the BQL, so that no RAMBlock comes or goes. */
static bool free_page_hint_alloc(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    QEMU_LOCK_GUARD(&hint.lock);

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb->bmap && rb->used_length) {
            /* As large as bmap: used_length may change while we run */
            rb->hint_bmap = bitmap_try_new(rb->max_length >>
                                           qemu_target_page_bits());
            if (!rb->hint_bmap) {
                return false;
            }
        }
    }

    hint.queue = g_try_new(FreePageHintRun, FREE_PAGE_HINT_QUEUE_RUNS);
    hint.head = 0;
    hint.count = 0;
    hint.starved = false;
    return hint.queue != NULL;
}

void free_page_hint_cleanup(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();

    if (trace_event_get_state_backends(TRACE_FREE_PAGE_HINT_KEPT)) {
        free_page_hint_debug_kept();
    }

    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        g_free(rb->hint_bmap);
        rb->hint_bmap = NULL;
        g_free(rb->hint_checksums);
        rb->hint_checksums = NULL;
    }
}

/*
 * Make sure that every write from now on is logged.
 *
 * KVM: with manual protection, a sync leaves pages writable whose bit is set,
 * and the deferred clear (clear_bmap) protects them only before they are sent.
 * Do it now, a chunk at a time: KVM holds its mmu_lock for a chunk, and has
 * flushed the TLBs when it returns.
 *
 * TCG: a page's TLB entry may still allow writes that bypass the log, from
 * before the dirty bits were cleared.  Reset them, and wait until each vCPU has
 * left the translation block that may have looked at one.
 *
 * Stops early if the round is to end: nobody is asked then.
 */
static void free_page_hint_arm(void)
{
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    uint64_t chunks = 0;
    RAMBlock *rb;

    /* First: a merge from here on needs the deferred clear done again */
    ram_bitmap_lock();
    hint.armed_epoch = hint.epoch;
    ram_bitmap_unlock();

    WITH_RCU_READ_LOCK_GUARD() {
        RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
            uint64_t page, step;

            if (!rb->hint_bmap) {
                continue;
            }

            step = 1ULL << rb->clear_bmap_shift;
            for (page = 0; page < block_pages(rb) && !free_page_hint_stopped();
                 page += step) {
                ram_bitmap_lock();
                ram_clear_dirty_log(rb, page);
                ram_bitmap_unlock();
                chunks++;
            }
        }
    }

    if (tcg_enabled()) {
        bql_lock();
        WITH_RCU_READ_LOCK_GUARD() {
            RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
                if (rb->hint_bmap) {
                    tlb_reset_dirty_range_all(rb->offset, rb->used_length);
                }
            }
        }
        memory_global_after_dirty_log_sync();
        bql_unlock();
    }

    if (FREE_PAGE_HINT_DEBUG) {
        free_page_hint_debug_armed();
    }

    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        hint.stats.arm_time = us_since(start);
        trace_free_page_hint_arm(chunks, hint.stats.arm_time);
    }
}

/* Called with the BQL. */
static bool free_page_hint_ask(void)
{
    FreePageHintReason reason = free_page_hint_refusal();
    uint32_t id;

    /* Again, since the guest ran, and may have been reset, while we armed */
    if (reason != REASON_NONE) {
        free_page_hint_abort(reason);
    }
    if (free_page_hint_stopped()) {
        return false;
    }

    /* The guest may answer before ask() returns: be ready for it */
    id = hint.ops->new_id(hint.opaque);
    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        hint.id = id;
        hint.ask_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ASKED);
        trace_free_page_hint_ask(hint.id);
    }
    hint.ops->ask(hint.opaque);
    return true;
}

/* Called in an RCU critical section. */
static bool free_page_hint_block_listed(RAMBlock *block)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb == block) {
            return rb->hint_bmap && rb->bmap;
        }
    }
    return false;
}

/* Clear the bits of @runs, as far as this migration would send the pages. */
static void free_page_hint_apply(FreePageHintRun *runs, unsigned n_runs)
{
    uint64_t hinted = 0, cleared = 0;
    unsigned invalid = 0, stale = 0;
    RAMBlock *listed = NULL;
    unsigned i;

    WITH_RCU_READ_LOCK_GUARD() {
        ram_bitmap_lock();
        if (hint.epoch != hint.armed_epoch) {
            stale = n_runs;
            n_runs = 0;
        }
        for (i = 0; i < n_runs; i++) {
            FreePageHintRun *run = &runs[i];
            RAMBlock *rb = run->block;

            if (rb != listed && !free_page_hint_block_listed(rb)) {
                invalid++;
                continue;
            }
            listed = rb;

            if (i + APPLY_AHEAD < n_runs && run[APPLY_AHEAD].block == rb) {
                free_page_hint_prefetch(rb->bmap, rb->hint_bmap,
                                        run[APPLY_AHEAD].first,
                                        run[APPLY_AHEAD].npages);
            }
            if (!free_page_hint_trim(&run->first, &run->npages,
                                     block_pages(rb),
                                     MAX(1, rb->page_size /
                                            qemu_target_page_size()))) {
                invalid++;
                continue;
            }
            hinted += run->npages;
            cleared += free_page_hint_clear(rb->bmap, rb->hint_bmap,
                                            run->first, run->npages);
            trace_free_page_hint_apply(rb->idstr, run->first, run->npages);
        }
        ram_dirty_pages_add(-cleared);
        ram_bitmap_unlock();
    }

    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        hint.stats.hinted_bytes += hinted << qemu_target_page_bits();
        hint.stats.skipped_bytes += cleared << qemu_target_page_bits();
        hint.stats.invalid += invalid;
        hint.stats.stale += stale;
    }
}

/* Take up to @max runs from the queue.  Called with hint.lock. */
static unsigned free_page_hint_dequeue(FreePageHintRun *runs, unsigned max)
{
    unsigned n = MIN(hint.count, max);
    unsigned i;

    for (i = 0; i < n; i++) {
        runs[i] = hint.queue[(hint.head + i) % FREE_PAGE_HINT_QUEUE_RUNS];
    }
    hint.head = (hint.head + n) % FREE_PAGE_HINT_QUEUE_RUNS;
    hint.count -= n;
    if (n && hint.starved && hint.ops) {
        hint.starved = false;
        hint.ops->resume(hint.opaque);
    }
    return n;
}

/*
 * Apply what the guest reports until its report is complete, the deadline has
 * passed, or something ended the round.
 */
static void free_page_hint_collect(void)
{
    g_autofree FreePageHintRun *runs = g_new(FreePageHintRun, APPLY_BATCH);
    int64_t deadline = hint.ask_ns +
                       (int64_t)migrate_free_page_hint_wait() *
                       SCALE_MS;

    qemu_mutex_lock(&hint.lock);
    while (hint.reason == REASON_NONE) {
        int64_t left = deadline - qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        unsigned n;

        if (migrate_get_current()->state != MIGRATION_STATUS_ACTIVE) {
            hint.reason = FREE_PAGE_HINT_REASON_CANCELLED;
            break;
        }
        if (left <= 0) {
            hint.reason = FREE_PAGE_HINT_REASON_TIMEOUT;
            break;
        }

        n = free_page_hint_dequeue(runs, APPLY_BATCH);
        if (n) {
            qemu_mutex_unlock(&hint.lock);
            free_page_hint_apply(runs, n);
            qemu_mutex_lock(&hint.lock);
            continue;
        }
        if (hint.complete) {
            break;
        }
        qemu_cond_timedwait(&hint.cond, &hint.lock,
                            DIV_ROUND_UP(left, SCALE_MS));
    }
    qemu_mutex_unlock(&hint.lock);
}

/* Drop what is left in the queue; from here on everything is stale. */
static void free_page_hint_finish(void)
{
    bool asked;

    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        asked = free_page_hint_asking();
        hint.stats.stale += hint.count;
        hint.count = 0;
        g_free(hint.queue);
        hint.queue = NULL;
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ENDED);
        trace_free_page_hint_end(hint.reason == REASON_NONE ? "complete" :
                                 FreePageHintReason_str(hint.reason),
                                 hint.stats.blocks, hint.stats.hinted_bytes,
                                 hint.stats.skipped_bytes,
                                 hint.stats.ask_to_end);
    }

    bql_lock();
    if (asked && hint.ops) {
        hint.ops->done(hint.opaque);
    }
    WITH_RCU_READ_LOCK_GUARD() {
        ram_bitmap_lock();
        free_page_hint_check();
        ram_bitmap_unlock();
    }
    bql_unlock();
}

void free_page_hint_round(void)
{
    FreePageHintReason reason;
    bool asked;

    bql_lock();
    reason = free_page_hint_refusal();
    if (reason == REASON_NONE && !free_page_hint_alloc()) {
        reason = FREE_PAGE_HINT_REASON_NO_MEMORY;
    }
    if (reason != REASON_NONE) {
        /* Nobody was asked: the state stays IDLE */
        free_page_hint_cleanup();
        bql_unlock();
        WITH_QEMU_LOCK_GUARD(&hint.lock) {
            hint.reason = reason;
        }
        trace_free_page_hint_refused(FreePageHintReason_str(reason));
        return;
    }
    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ARMING);
    }
    bql_unlock();

    free_page_hint_arm();

    bql_lock();
    asked = free_page_hint_ask();
    bql_unlock();
    if (asked) {
        free_page_hint_collect();
    }
    free_page_hint_finish();
}

/* ---- from ram.c ---- */

void free_page_hint_synced(void)
{
    uint64_t redirtied = 0;
    RAMBlock *rb;

    hint.epoch++;

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb->hint_bmap) {
            redirtied += free_page_hint_forget_dirty(rb->hint_bmap, rb->bmap,
                                                     block_pages(rb));
        }
    }

    if (redirtied) {
        QEMU_LOCK_GUARD(&hint.lock);
        hint.stats.redirtied_bytes += redirtied << qemu_target_page_bits();
    }
    free_page_hint_check();
    if (FREE_PAGE_HINT_DEBUG && !runstate_is_running()) {
        free_page_hint_debug_stopped();
    }
}

void free_page_hint_restore_all(void)
{
    uint64_t restored = 0;
    RAMBlock *rb;

    ram_bitmap_lock();
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb->hint_bmap) {
            restored += free_page_hint_restore(rb->bmap, rb->hint_bmap,
                                               block_pages(rb));
        }
    }
    ram_dirty_pages_add(restored);
    free_page_hint_check();
    ram_bitmap_unlock();
    trace_free_page_hint_restore(restored);
}

/* ---- from other threads ---- */

/* Called with hint.lock.  The first reason wins. */
static void free_page_hint_stop(FreePageHintReason reason)
{
    if ((free_page_hint_asking() ||
         hint.state == FREE_PAGE_HINT_STATE_ARMING) &&
        !hint.complete && hint.reason == REASON_NONE) {
        hint.reason = reason;
        qemu_cond_signal(&hint.cond);
    }
}

void free_page_hint_abort(FreePageHintReason reason)
{
    QEMU_LOCK_GUARD(&hint.lock);
    free_page_hint_stop(reason);
}

void free_page_hint_cancel(void)
{
    free_page_hint_abort(FREE_PAGE_HINT_REASON_CANCELLED);
}

FreePageHintInfo *free_page_hint_query(void)
{
    FreePageHintInfo *info = g_new(FreePageHintInfo, 1);

    QEMU_LOCK_GUARD(&hint.lock);
    *info = hint.stats;
    info->state = hint.state;
    info->has_reason = hint.reason != REASON_NONE;
    info->reason = hint.reason;
    return info;
}

void free_page_hint_register(const FreePageHintProviderOps *ops, void *opaque)
{
    QEMU_LOCK_GUARD(&hint.lock);
    assert(!hint.ops);
    hint.ops = ops;
    hint.opaque = opaque;
}

void free_page_hint_unregister(void *opaque)
{
    QEMU_LOCK_GUARD(&hint.lock);
    assert(hint.opaque == opaque);
    free_page_hint_stop(FREE_PAGE_HINT_REASON_NO_DEVICE);
    hint.ops = NULL;
    hint.opaque = NULL;
}

bool free_page_hint_wanted(uint32_t id)
{
    QEMU_LOCK_GUARD(&hint.lock);
    return free_page_hint_asking() && id == hint.id && !hint.complete &&
           hint.reason == REASON_NONE;
}

bool free_page_hint_has_room(unsigned runs)
{
    QEMU_LOCK_GUARD(&hint.lock);
    if (!hint.queue || runs <= FREE_PAGE_HINT_QUEUE_RUNS - hint.count) {
        return true;
    }
    hint.starved = true;
    return false;
}

void free_page_hint_submit(uint32_t id, const FreePageHintRun *runs,
                           unsigned n_runs, unsigned blocks, unsigned invalid)
{
    unsigned i;

    QEMU_LOCK_GUARD(&hint.lock);

    if (!free_page_hint_asking() || id != hint.id || hint.complete ||
        hint.reason != REASON_NONE) {
        hint.stats.stale += blocks;
        return;
    }

    if (hint.state == FREE_PAGE_HINT_STATE_ASKED) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_REPORTING);
        hint.stats.ask_to_first = us_since(hint.ask_ns);
    }
    hint.stats.arrays++;
    hint.stats.blocks += blocks;
    hint.stats.invalid += invalid;

    assert(n_runs <= FREE_PAGE_HINT_QUEUE_RUNS - hint.count);
    for (i = 0; i < n_runs; i++) {
        hint.queue[(hint.head + hint.count) % FREE_PAGE_HINT_QUEUE_RUNS] =
            runs[i];
        hint.count++;
    }
    qemu_cond_signal(&hint.cond);
}

void free_page_hint_end(uint32_t id)
{
    QEMU_LOCK_GUARD(&hint.lock);

    if (!free_page_hint_asking() || id != hint.id || hint.complete ||
        hint.reason != REASON_NONE) {
        hint.stats.stale++;
        return;
    }
    hint.complete = true;
    hint.stats.reports++;
    hint.stats.ask_to_end = us_since(hint.ask_ns);
    qemu_cond_signal(&hint.cond);
}

void free_page_hint_stale(unsigned entries)
{
    QEMU_LOCK_GUARD(&hint.lock);
    hint.stats.stale += entries;
}

void free_page_hint_invalid(unsigned entries)
{
    QEMU_LOCK_GUARD(&hint.lock);
    hint.stats.invalid += entries;
}
