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
 * free-page-hint-ram.c; this file decides when, keeps accounts and waits.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "exec/target_page.h"
#include "qapi/qapi-types-migration.h"
#include "system/kvm.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "free-page-hint.h"
#include "free-page-hint-queue.h"
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
    /* Only there while a round runs */
    FreePageHintQueue queue;
    int64_t ask_ns;
    FreePageHintInfo stats;
    /* Why nothing was looked up, or not everything */
    FreePageHintReason scan_reason;

    /* Migration thread only, in a round: something is looked up */
    bool scans;
    /* Migration thread only, in a round: what is left of the time to wait */
    int64_t left_ns;
    /* Migration thread only: when the scan has begun */
    int64_t scan_ns;
    /* Migration thread only: the guest's driver allocates what it hints */
    bool allocates;
    /* Migration thread only: hinted runs looked at, and populated since */
    unsigned sampled;
    unsigned dirtied;

    /* Set once. */
    const FreePageHintScanOps *scan_ops;
    const FreePageHintAskerOps *asker_ops;

    /* Written with the BQL and the lock, read with either. */
    const FreePageHintProviderOps *ops;
    void *opaque;
} hint;

static void __attribute__((constructor)) free_page_hint_init(void)
{
    qemu_mutex_init(&hint.lock);
    qemu_cond_init(&hint.cond);
    hint.reason = REASON_NONE;
    hint.scan_reason = REASON_NONE;
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

/* Called with hint.lock.  The first reason wins. */
static void free_page_hint_stop(FreePageHintReason reason)
{
    if (hint.state != FREE_PAGE_HINT_STATE_IDLE &&
        hint.state != FREE_PAGE_HINT_STATE_ENDED &&
        !hint.stats.complete && hint.reason == REASON_NONE) {
        hint.reason = reason;
        qemu_cond_signal(&hint.cond);
    }
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

/* Is @id the request that is being answered?  Called with hint.lock. */
static bool free_page_hint_current(uint32_t id)
{
    return free_page_hint_asking() && id == hint.id && !hint.stats.complete &&
           hint.reason == REASON_NONE;
}

static uint64_t us_since(int64_t ns)
{
    return (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - ns) / SCALE_US;
}

static uint64_t bytes_of(uint64_t npages)
{
    return npages << qemu_target_page_bits();
}

void free_page_hint_reset(void)
{
    if (hint.asker_ops) {
        hint.asker_ops->cancel();
    }

    QEMU_LOCK_GUARD(&hint.lock);

    free_page_hint_set_state(FREE_PAGE_HINT_STATE_IDLE);
    hint.reason = REASON_NONE;
    hint.scan_reason = REASON_NONE;
    hint.stats = (FreePageHintInfo) {};
}

/* ---- the round, in the migration thread ---- */

bool free_page_hint_supported(void)
{
    return migrate_mode() == MIG_MODE_NORMAL && !migrate_colo() &&
           !migrate_background_snapshot() && (kvm_enabled() || tcg_enabled());
}

/* Called with the BQL. */
static FreePageHintReason free_page_hint_unavailable(void)
{
    if (!free_page_hint_supported()) {
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

    QEMU_LOCK_GUARD(&hint.lock);

    return free_page_hint_queue_alloc(&hint.queue);
}

/* Called with hint.lock, by the migration thread. */
static bool free_page_hint_over(void)
{
    if (hint.reason == REASON_NONE &&
        migrate_get_current()->state != MIGRATION_STATUS_ACTIVE) {
        hint.reason = FREE_PAGE_HINT_REASON_CANCELLED;
    }
    return hint.reason != REASON_NONE;
}

/* What a scan does not need, such as a guest that answers, does not end it. */
bool free_page_hint_cancelled(void)
{
    return migrate_get_current()->state != MIGRATION_STATUS_ACTIVE;
}

bool free_page_hint_armed(uint64_t npages)
{
    QEMU_LOCK_GUARD(&hint.lock);

    hint.stats.armed_bytes += bytes_of(npages);
    return !free_page_hint_cancelled() &&
           (hint.scans || !free_page_hint_over());
}

/* Returns false if it was not finished. */
static bool free_page_hint_arm(void)
{
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    bool armed = free_page_hint_ram_arm();

    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        hint.stats.arm_time = us_since(start);
        trace_free_page_hint_arm(hint.stats.armed_bytes, hint.stats.arm_time);
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
    return qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - hint.scan_ns >=
           hint.left_ns ? FREE_PAGE_HINT_REASON_TIMEOUT : REASON_NONE;
}

static void free_page_hint_scan(void)
{
    FreePageHintReason reason;

    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_SCANNING);
    }
    hint.scan_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    reason = hint.scan_ops->scan();
    hint.left_ns -= qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - hint.scan_ns;
    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        hint.scan_reason = reason;
    }
}

/* Called with the BQL. */
static bool free_page_hint_ask(void)
{
    FreePageHintReason reason = free_page_hint_refusal();
    uint32_t id;

    if (reason == REASON_NONE && hint.left_ns <= 0) {
        reason = FREE_PAGE_HINT_REASON_TIMEOUT;
    }
    /* Again, since the guest ran, and may have been reset, while we armed */
    if (reason != REASON_NONE) {
        QEMU_LOCK_GUARD(&hint.lock);
        free_page_hint_stop(reason);
    }
    if (free_page_hint_stopped()) {
        return false;
    }

    /* The guest may answer before ask() returns: be ready for it */
    id = hint.ops->new_id(hint.opaque);
    hint.allocates = hint.ops->allocates(hint.opaque);
    hint.sampled = 0;
    hint.dirtied = 0;
    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        hint.id = id;
        hint.ask_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ASKED);
        trace_free_page_hint_ask(hint.id);
    }
    hint.ops->ask(hint.opaque);
    return true;
}

/* Take up to @max runs from the queue.  Called with hint.lock. */
static unsigned free_page_hint_dequeue(FreePageHintRun *runs, unsigned max)
{
    bool starved;
    unsigned n = free_page_hint_queue_take(&hint.queue, runs, max, &starved);

    if (starved && hint.ops) {
        hint.ops->resume(hint.opaque);
    }
    return n;
}

/* Called with hint.lock. */
static void free_page_hint_account(const FreePageHintTally *tally)
{
    hint.stats.hinted_bytes += bytes_of(tally->hinted);
    hint.stats.skipped_bytes += bytes_of(tally->cleared);
    hint.stats.too_small_bytes += bytes_of(tally->too_small);
    hint.stats.invalid_bytes += bytes_of(tally->invalid);
    hint.stats.stale_bytes += bytes_of(tally->stale);
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

    QEMU_LOCK_GUARD(&hint.lock);

    if (free_page_hint_over()) {
        return false;
    }
    if (left <= 0) {
        hint.reason = FREE_PAGE_HINT_REASON_TIMEOUT;
        return false;
    }
    if (*n_runs) {
        return true;
    }
    *n_runs = free_page_hint_dequeue(runs, APPLY_BATCH);
    if (*n_runs) {
        return true;
    }
    if (hint.stats.complete) {
        return false;
    }
    qemu_cond_timedwait(&hint.cond, &hint.lock, DIV_ROUND_UP(left, SCALE_MS));
    return true;
}

/*
 * A driver that allocates the blocks that it hints may be made to write to
 * them, by init_on_alloc for one.  In memory that was not populated, that does
 * harm: there is more of it then, here, and nothing less to be sent.
 */
static void free_page_hint_sample(const FreePageHintRun *runs, unsigned n_runs)
{
    if (!hint.scans || !hint.allocates) {
        return;
    }
    n_runs = MIN(n_runs, SAMPLE_RUNS);
    hint.sampled += n_runs;
    hint.dirtied += free_page_hint_ram_populated(runs, n_runs,
                                                 hint.scan_ops->populated);
    if (hint.dirtied >= DIRTIED_RUNS && hint.dirtied >= hint.sampled / 2) {
        QEMU_LOCK_GUARD(&hint.lock);
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
    int64_t deadline = hint.ask_ns + hint.left_ns;
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
        WITH_QEMU_LOCK_GUARD(&hint.lock) {
            free_page_hint_account(&tally);
        }
    }

    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        for (; done < n_runs; done++) {
            hint.stats.stale_bytes += bytes_of(runs[done].npages);
        }
    }
}

/* Drop what is left in the queue; from here on everything is stale. */
static void free_page_hint_finish(void)
{
    bool asked;

    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        asked = free_page_hint_asking();
        hint.stats.stale_bytes +=
            bytes_of(free_page_hint_queue_free(&hint.queue));
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
    free_page_hint_ram_check();
    bql_unlock();
}

void free_page_hint_round(void)
{
    FreePageHintReason reason, scan_reason = FREE_PAGE_HINT_REASON_DISABLED;
    bool asked;

    bql_lock();
    reason = free_page_hint_refusal();
    if (hint.scan_ops) {
        scan_reason = hint.scan_ops->unavailable();
    }
    hint.scans = scan_reason == REASON_NONE;
    if ((reason == REASON_NONE || hint.scans) && !free_page_hint_alloc()) {
        if (hint.scans) {
            hint.scan_ops->end();
        }
        reason = scan_reason = FREE_PAGE_HINT_REASON_NO_MEMORY;
        hint.scans = false;
    }
    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        hint.reason = reason;
        hint.scan_reason = scan_reason;
    }
    if (reason != REASON_NONE) {
        trace_free_page_hint_refused(FreePageHintReason_str(reason));
    }
    if (reason != REASON_NONE && !hint.scans) {
        /* Nobody was asked: the state stays IDLE */
        free_page_hint_cleanup();
        bql_unlock();
        return;
    }
    WITH_QEMU_LOCK_GUARD(&hint.lock) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_ARMING);
    }
    bql_unlock();

    hint.left_ns = (int64_t)migrate_free_page_hint_wait() * SCALE_MS;
    if (free_page_hint_arm()) {
        if (hint.scans) {
            free_page_hint_scan();
        }
        free_page_hint_ram_scanned();
    } else if (hint.scans) {
        QEMU_LOCK_GUARD(&hint.lock);
        hint.scan_reason = FREE_PAGE_HINT_REASON_CANCELLED;
    }

    bql_lock();
    asked = free_page_hint_ask();
    bql_unlock();
    if (asked) {
        free_page_hint_collect();
    }
    if (hint.scans) {
        hint.scan_ops->end();
    }
    free_page_hint_defer();
    free_page_hint_finish();
}

/* ---- who asks without a migration ---- */

void free_page_hint_register_asker(const FreePageHintAskerOps *ops)
{
    hint.asker_ops = ops;
}

FreePageHintReason free_page_hint_provider_ask(uint32_t *id)
{
    FreePageHintReason reason = free_page_hint_unavailable();

    if (reason == REASON_NONE && hint.ops->allocates(hint.opaque)) {
        reason = FREE_PAGE_HINT_REASON_NO_ARRAYS;
    }
    if (reason == REASON_NONE) {
        *id = hint.ops->new_id(hint.opaque);
        hint.ops->ask(hint.opaque);
    }
    return reason;
}

void free_page_hint_provider_resume(void)
{
    if (hint.ops) {
        hint.ops->resume(hint.opaque);
    }
}

void free_page_hint_provider_done(void)
{
    if (hint.ops) {
        hint.ops->done(hint.opaque);
    }
}

void free_page_hint_count(uint64_t redirtied, uint64_t requested)
{
    QEMU_LOCK_GUARD(&hint.lock);
    hint.stats.redirtied_bytes += bytes_of(redirtied);
    hint.stats.requested_bytes += bytes_of(requested);
}

/* ---- from other threads ---- */

void free_page_hint_abort(FreePageHintReason reason)
{
    if (hint.asker_ops) {
        hint.asker_ops->stop(reason);
    }

    QEMU_LOCK_GUARD(&hint.lock);
    free_page_hint_stop(reason);
}

void free_page_hint_cancel(void)
{
    QEMU_LOCK_GUARD(&hint.lock);
    free_page_hint_stop(FREE_PAGE_HINT_REASON_CANCELLED);
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

FreePageHintReason free_page_hint_scan_reason(void)
{
    QEMU_LOCK_GUARD(&hint.lock);
    return hint.scan_reason;
}

void free_page_hint_register_scan(const FreePageHintScanOps *ops)
{
    hint.scan_ops = ops;
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
    free_page_hint_abort(FREE_PAGE_HINT_REASON_NO_DEVICE);

    QEMU_LOCK_GUARD(&hint.lock);
    assert(hint.opaque == opaque);
    hint.ops = NULL;
    hint.opaque = NULL;
}

static bool asker_wants(uint32_t id)
{
    return hint.asker_ops && hint.asker_ops->wanted(id);
}

bool free_page_hint_wanted(uint32_t id)
{
    if (asker_wants(id)) {
        return true;
    }

    QEMU_LOCK_GUARD(&hint.lock);
    return free_page_hint_current(id);
}

bool free_page_hint_has_room(unsigned runs)
{
    if (hint.asker_ops && !hint.asker_ops->has_room(runs)) {
        return false;
    }

    QEMU_LOCK_GUARD(&hint.lock);
    return free_page_hint_queue_has_room(&hint.queue, runs);
}

void free_page_hint_submit(uint32_t id, const FreePageHintRun *runs,
                           unsigned n_runs, unsigned blocks,
                           uint64_t invalid_bytes)
{
    unsigned i;

    if (asker_wants(id)) {
        hint.asker_ops->submit(runs, n_runs, blocks, invalid_bytes);
        return;
    }

    QEMU_LOCK_GUARD(&hint.lock);

    if (!free_page_hint_current(id)) {
        for (i = 0; i < n_runs; i++) {
            hint.stats.stale_bytes += bytes_of(runs[i].npages);
        }
        return;
    }

    if (hint.state == FREE_PAGE_HINT_STATE_ASKED) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_REPORTING);
        hint.stats.ask_to_first = us_since(hint.ask_ns);
    }
    hint.stats.messages++;
    hint.stats.blocks += blocks;
    hint.stats.invalid_bytes += invalid_bytes;

    free_page_hint_queue_put(&hint.queue, runs, n_runs);
    qemu_cond_signal(&hint.cond);
}

void free_page_hint_end(uint32_t id)
{
    if (asker_wants(id)) {
        hint.asker_ops->end();
        return;
    }

    QEMU_LOCK_GUARD(&hint.lock);

    if (!free_page_hint_current(id)) {
        return;
    }
    hint.stats.complete = true;
    hint.stats.ask_to_end = us_since(hint.ask_ns);
    qemu_cond_signal(&hint.cond);
}

void free_page_hint_stale(uint64_t bytes)
{
    QEMU_LOCK_GUARD(&hint.lock);
    hint.stats.stale_bytes += bytes;
}

void free_page_hint_invalid_message(void)
{
    QEMU_LOCK_GUARD(&hint.lock);
    hint.stats.invalid_messages++;
}
