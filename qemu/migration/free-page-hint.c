/*
 * Free page hints: the engine
 *
 * Round 0 of a migration, see docs/devel/migration/free-page-hint.rst:
 *
 *   IDLE --> ARMING --> SCANNING --> ASKED --> REPORTING --> ENDED
 *                \____________\______^  \__________________^
 *                 \____________\___________________________^
 *
 * Two sources of knowledge: what the host can look up, if anything registers
 * for that, and what the guest says.  The round runs if there is one of them.
 * What arming and a hint do to RAM, and why no write is lost, is in
 * free-page-hint-ram.c; what the guest says comes by way of
 * free-page-hint-report.c.  This file decides when, keeps accounts and waits.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "system/kvm.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "free-page-hint.h"
#include "free-page-hint-engine.h"
#include "free-page-hint-ram.h"
#include "migration.h"
#include "options.h"
#include "trace.h"

/* Runs taken from the queue in one go: 4 GiB of 4 MiB blocks */
#define APPLY_BATCH 1024

/*
 * Of the runs that come at once, so many are looked at; that takes a
 * microsecond each.
 */
#define SAMPLE_RUNS 16

/* So many dirtied blocks are no accident: at most 32 MiB of a Linux guest */
#define DIRTIED_RUNS 8

static FreePageHintEngine *const hint = &free_page_hint_engine;

/* Set once. */
static const FreePageHintScanOps *scan_ops;

/* Migration thread only. */
static struct {
    /* Something is looked up */
    bool scans;
    /* What is left of the time to wait */
    int64_t left_ns;
    /* When the scan has to be over */
    int64_t scan_deadline_ns;
    /* The guest's driver allocates what it hints */
    bool allocates;
    /* Hinted runs looked at, and populated since */
    unsigned sampled;
    unsigned dirtied;
} this_round;

void free_page_hint_register_scan(const FreePageHintScanOps *ops)
{
    scan_ops = ops;
}

/*
 * Machine types up to 7.2 end the channel for pages that are asked for as soon
 * as nothing is dirty, before the destination has all that it may ask for.
 */
static bool answers_to_the_last(void)
{
    return !migrate_postcopy_preempt() ||
           !migrate_get_current()->preempt_pre_7_2;
}

bool free_page_hint_supported(void)
{
    return migrate_mode() == MIG_MODE_NORMAL && !migrate_colo() &&
           !migrate_background_snapshot() && answers_to_the_last() &&
           (kvm_enabled() || tcg_enabled());
}

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
    return free_page_hint_unavailable();
}

/* Called with the BQL. */
static bool free_page_hint_alloc(void)
{
    if (!free_page_hint_ram_alloc()) {
        return false;
    }

    QEMU_LOCK_GUARD(&hint->lock);

    return free_page_hint_queue_alloc(&hint->queue);
}

/* Called with hint->lock, by the migration thread. */
static bool free_page_hint_over(void)
{
    if (hint->reason == REASON_NONE &&
        migrate_get_current()->state != MIGRATION_STATUS_ACTIVE) {
        hint->reason = FREE_PAGE_HINT_REASON_CANCELLED;
    }
    return hint->reason != REASON_NONE;
}

/* What a scan does not need, such as a guest that answers, does not end it. */
bool free_page_hint_cancelled(void)
{
    return migrate_get_current()->state != MIGRATION_STATUS_ACTIVE;
}

bool free_page_hint_armed(uint64_t npages)
{
    QEMU_LOCK_GUARD(&hint->lock);

    hint->stats.armed_bytes += bytes_of(npages);
    return !free_page_hint_cancelled() &&
           (this_round.scans || !free_page_hint_over());
}

/* Returns false if it was not finished. */
static bool free_page_hint_arm(void)
{
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    bool armed = free_page_hint_ram_arm();

    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        hint->stats.arm_time = us_since(start);
        trace_free_page_hint_arm(hint->stats.armed_bytes, hint->stats.arm_time);
    }
    return armed;
}

static void free_page_hint_defer(void)
{
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    free_page_hint_ram_defer();
    trace_free_page_hint_defer(us_since(start));
}

FreePageHintReason free_page_hint_scan_over(void)
{
    if (free_page_hint_cancelled()) {
        return FREE_PAGE_HINT_REASON_CANCELLED;
    }
    return qemu_clock_get_ns(QEMU_CLOCK_REALTIME) >=
           this_round.scan_deadline_ns ?
           FREE_PAGE_HINT_REASON_TIMEOUT : REASON_NONE;
}

static void free_page_hint_scan(void)
{
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    FreePageHintReason reason;
    bool asks;

    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_SCANNING);
        asks = !free_page_hint_over();
    }
    /* A scan that finds little must not cost what the guest has to say */
    this_round.scan_deadline_ns = start + (asks ? this_round.left_ns / 2 :
                                                  this_round.left_ns);
    reason = scan_ops->scan();
    this_round.left_ns -= qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - start;
    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        hint->scan_reason = reason;
    }
}

/* Called with the BQL. */
static bool free_page_hint_ask(void)
{
    FreePageHintReason reason = free_page_hint_refusal();
    uint32_t id, cache_ms;
    bool stopped;

    if (reason == REASON_NONE && this_round.left_ns <= 0) {
        reason = FREE_PAGE_HINT_REASON_TIMEOUT;
    }
    /* Again, since the guest ran, and may have been reset, while we armed */
    if (reason != REASON_NONE) {
        QEMU_LOCK_GUARD(&hint->lock);
        free_page_hint_stop(reason);
    }
    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        stopped = hint->reason != REASON_NONE;
    }
    if (stopped) {
        return false;
    }

    /* The guest may answer before ask() returns: be ready for it */
    id = hint->ops->new_id(hint->opaque);
    this_round.allocates = hint->ops->allocates(hint->opaque);
    this_round.sampled = 0;
    this_round.dirtied = 0;
    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        hint->id = id;
        hint->ask_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ASKED);
        trace_free_page_hint_ask(hint->id);
    }
    /* The other half is for the report; no time at all would be a question */
    cache_ms = this_round.left_ns / 2 / SCALE_MS;
    hint->ops->ask(hint->opaque, cache_ms ? migrate_free_page_hint_cache() : 0,
                   cache_ms);
    return true;
}

/* Take up to @max runs from the queue.  Called with hint->lock. */
static unsigned free_page_hint_dequeue(FreePageHintRun *runs, unsigned max)
{
    bool starved;
    unsigned n = free_page_hint_queue_take(&hint->queue, runs, max, &starved);

    if (starved && hint->ops) {
        hint->ops->resume(hint->opaque);
    }
    return n;
}

/* Called with hint->lock. */
static void free_page_hint_account(const FreePageHintTally *tally)
{
    hint->stats.hinted_bytes += bytes_of(tally->hinted);
    hint->stats.skipped_bytes += bytes_of(tally->cleared);
    hint->stats.too_small_bytes += bytes_of(tally->too_small);
    hint->stats.invalid_bytes += bytes_of(tally->invalid);
    hint->stats.stale_bytes += bytes_of(tally->stale);
}

/*
 * Find out how to go on after a hold of bitmap_mutex, or a wait.  Fills @runs
 * if @n_runs is 0, as far as there are any.  Returns false if the round is to
 * end.
 */
static bool free_page_hint_next(FreePageHintRun *runs, unsigned *n_runs,
                                int64_t deadline)
{
    int64_t left = deadline - qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    QEMU_LOCK_GUARD(&hint->lock);

    if (free_page_hint_over()) {
        return false;
    }
    if (left <= 0) {
        hint->reason = FREE_PAGE_HINT_REASON_TIMEOUT;
        return false;
    }
    if (*n_runs) {
        return true;
    }
    *n_runs = free_page_hint_dequeue(runs, APPLY_BATCH);
    if (*n_runs) {
        return true;
    }
    if (hint->stats.complete) {
        return false;
    }
    qemu_cond_timedwait(&hint->cond, &hint->lock, DIV_ROUND_UP(left, SCALE_MS));
    return true;
}

/*
 * A driver that allocates the blocks that it hints may be made to write to
 * them, by init_on_alloc for one.  In memory that was not populated, that does
 * harm: there is more of it then, here, and nothing less to be sent.
 */
static void free_page_hint_sample(const FreePageHintRun *runs, unsigned n_runs)
{
    if (!this_round.scans || !this_round.allocates) {
        return;
    }
    n_runs = MIN(n_runs, SAMPLE_RUNS);
    this_round.sampled += n_runs;
    this_round.dirtied += free_page_hint_ram_populated(runs, n_runs,
                                                 scan_ops->populated);
    if (this_round.dirtied >= DIRTIED_RUNS &&
        this_round.dirtied >= this_round.sampled / 2) {
        QEMU_LOCK_GUARD(&hint->lock);
        free_page_hint_stop(FREE_PAGE_HINT_REASON_DIRTIED);
    }
}

/*
 * Apply what the guest reports until its report is complete, the deadline has
 * passed, or something ended the round.
 */
static void free_page_hint_collect(void)
{
    g_autofree FreePageHintRun *runs = g_new(FreePageHintRun, APPLY_BATCH);
    int64_t deadline = hint->ask_ns + this_round.left_ns;
    unsigned n_runs = 0, done = 0;

    while (free_page_hint_next(runs, &n_runs, deadline)) {
        FreePageHintTally tally = {};

        if (!done) {
            free_page_hint_sample(runs, n_runs);
        }
        if (n_runs) {
            done += free_page_hint_ram_apply(&runs[done], n_runs - done,
                                             &tally);
        }
        if (done == n_runs) {
            n_runs = done = 0;
        }
        WITH_QEMU_LOCK_GUARD(&hint->lock) {
            free_page_hint_account(&tally);
        }
    }

    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        for (; done < n_runs; done++) {
            hint->stats.stale_bytes += bytes_of(runs[done].npages);
        }
    }
}

/* Drop what is left in the queue; from here on everything is stale. */
static void free_page_hint_finish(void)
{
    bool asked;

    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        asked = free_page_hint_asking();
        hint->stats.stale_bytes +=
            bytes_of(free_page_hint_queue_free(&hint->queue));
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ENDED);
        trace_free_page_hint_end(hint->reason == REASON_NONE ? "complete" :
                                 FreePageHintReason_str(hint->reason),
                                 hint->stats.blocks, hint->stats.hinted_bytes,
                                 hint->stats.skipped_bytes,
                                 hint->stats.ask_to_end);
    }

    bql_lock();
    if (asked && hint->ops) {
        hint->ops->done(hint->opaque);
    }
    free_page_hint_ram_check();
    bql_unlock();
}

void free_page_hint_round(void)
{
    FreePageHintReason reason, scan_reason = FREE_PAGE_HINT_REASON_DISABLED;
    bool asked;

    bql_lock();
    reason = free_page_hint_refusal();
    if (scan_ops) {
        scan_reason = scan_ops->unavailable();
    }
    this_round.scans = scan_reason == REASON_NONE;
    if ((reason == REASON_NONE || this_round.scans) &&
        !free_page_hint_alloc()) {
        if (this_round.scans) {
            scan_ops->end();
        }
        reason = scan_reason = FREE_PAGE_HINT_REASON_NO_MEMORY;
        this_round.scans = false;
    }
    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        hint->reason = reason;
        hint->scan_reason = scan_reason;
    }
    if (reason != REASON_NONE) {
        trace_free_page_hint_refused(FreePageHintReason_str(reason));
    }
    if (reason != REASON_NONE && !this_round.scans) {
        /* Nobody was asked: the state stays IDLE */
        free_page_hint_cleanup();
        bql_unlock();
        return;
    }
    WITH_QEMU_LOCK_GUARD(&hint->lock) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ARMING);
    }
    bql_unlock();

    this_round.left_ns = (int64_t)migrate_free_page_hint_wait() * SCALE_MS;
    if (free_page_hint_arm()) {
        if (this_round.scans) {
            free_page_hint_scan();
        }
        free_page_hint_ram_scanned();
    } else if (this_round.scans) {
        QEMU_LOCK_GUARD(&hint->lock);
        hint->scan_reason = FREE_PAGE_HINT_REASON_CANCELLED;
    }

    bql_lock();
    asked = free_page_hint_ask();
    bql_unlock();
    if (asked) {
        free_page_hint_collect();
    }
    if (this_round.scans) {
        scan_ops->end();
    }
    free_page_hint_defer();
    free_page_hint_finish();
}
