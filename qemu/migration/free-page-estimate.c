/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Free page hints: what a migration would skip, without one
 *
 * One look at absent pages and one report of the guest, for whoever plans
 * migrations.  Nothing is armed or logged, and a migration does not wait for
 * this: when it begins, the estimate ends.  It is made by a coroutine of the
 * main loop, so that nobody waits for it who does not want to.
 *
 * What is found goes into bitmaps of its own, by the same rules as in a
 * migration, so that memory that is both absent and free counts once.
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/coroutine.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/rcu.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "block/aio.h"
#include "block/thread-pool.h"
#include "exec/target_page.h"
#include "migration/free-page-hint-compat.h"
#include "migration/misc.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qapi/error.h"
#include "qapi/clone-visitor.h"
#include "qapi/qapi-commands-migration.h"
#include "qapi/qapi-visit-migration.h"
#include "system/runstate.h"
#include "absent-pages.h"
#include "free-page-hint.h"
#include "free-page-hint-bitmap.h"
#include "free-page-hint-queue.h"
#include "migration.h"
#include "options.h"
#include "ram-empty.h"
#include "ram.h"
#include "trace.h"

/* Pages of work in one go, a millisecond: see free-page-hint-ram.c */
#define HOLD_PAGES (4 * MiB)

/* Runs taken from the queue in one go */
#define BATCH 1024

/*
 * A guest is not asked again for so many times as long as it took to answer: it
 * spends 1 % of a vCPU on that.  Nobody waits for more than a second, so that
 * it is more for a guest that takes longer than 10 ms.
 */
#define PAUSE_FACTOR 100
#define PAUSE_MAX_NS NANOSECONDS_PER_SECOND

#define REASON_NONE FREE_PAGE_HINT_REASON__MAX

/* Sizes of free blocks that are told apart: powers of two */
#define ORDERS 64

typedef struct EstimateBlock {
    /* Not dereferenced: only to be compared */
    RAMBlock *rb;
    FreePageHintMap map;
} EstimateBlock;

static struct {
    /* The BQL protects all fields, down to result. */
    bool running;
    /* The guest was asked, and is to be told when that is over. */
    bool asked;
    uint32_t id;
    bool complete;
    /* When it was */
    int64_t end_ns;
    FreePageHintReason reason;
    FreePageHintQueue queue;
    QemuCoSleep sleep;
    /* Bytes that the guest called free, by the size of the block */
    uint64_t orders[ORDERS];
    /* Bytes per second, or 0 if nobody asked for the time */
    uint64_t bandwidth;
    /* Page cache that a migration would let the guest free, in bytes */
    uint64_t cache_budget;
    /* What the guest says it could free, however much that is */
    bool has_cache;
    uint64_t cache_bytes;
    /* When the guest may be asked again */
    int64_t next_ns;
    /* Of the latest estimate, NULL while there is none */
    FreePageEstimate *result;

    /* EstimateBlock; who looks at absent pages has it, then the BQL. */
    GArray *blocks;
    /* Set with the BQL, read without: a migration has begun. */
    bool cancelled;
} estimate;

/* ---- from the provider: see FreePageHintAskerOps ---- */

static void estimate_wake_bh(void *opaque)
{
    qemu_co_sleep_wake(&estimate.sleep);
}

/* Not at once: whoever calls holds the BQL, but may be in any thread. */
static void estimate_wake(void)
{
    aio_bh_schedule_oneshot(qemu_get_aio_context(), estimate_wake_bh, NULL);
}

static bool estimate_wanted(uint32_t id)
{
    return estimate.asked && id == estimate.id && !estimate.complete &&
           estimate.reason == REASON_NONE;
}

static bool estimate_has_room(unsigned runs)
{
    return !estimate.asked ||
           free_page_hint_queue_has_room(&estimate.queue, runs);
}

static void estimate_submit(const FreePageHintRun *runs, unsigned n_runs,
                            unsigned blocks, uint64_t invalid_bytes)
{
    uint64_t bytes = invalid_bytes;
    unsigned i;

    free_page_hint_queue_put(&estimate.queue, runs, n_runs);
    for (i = 0; i < n_runs; i++) {
        bytes += runs[i].npages << qemu_target_page_bits();
    }
    /* All blocks of a message are of one size */
    if (blocks && bytes >= blocks) {
        estimate.orders[63 - clz64(bytes / blocks)] += bytes - invalid_bytes;
    }
    estimate_wake();
}

static void estimate_cache(uint64_t bytes)
{
    estimate.has_cache = true;
    estimate.cache_bytes = bytes;
}

static void estimate_end(void)
{
    estimate.complete = true;
    estimate.end_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    estimate_wake();
}

static void estimate_stop(FreePageHintReason reason)
{
    if (estimate.asked && !estimate.complete &&
        estimate.reason == REASON_NONE) {
        estimate.reason = reason;
        estimate_wake();
    }
}

/* The guest need not answer any more. */
static void estimate_done(void)
{
    if (estimate.asked) {
        estimate.asked = false;
        free_page_hint_provider_done();
    }
}

static void estimate_cancel(void)
{
    if (estimate.running) {
        qatomic_set(&estimate.cancelled, true);
        estimate_stop(FREE_PAGE_HINT_REASON_CANCELLED);
        estimate_done();
        estimate_wake();
    }
}

static const FreePageHintAskerOps estimate_ops = {
    .wanted = estimate_wanted,
    .has_room = estimate_has_room,
    .submit = estimate_submit,
    .cache = estimate_cache,
    .end = estimate_end,
    .stop = estimate_stop,
    .cancel = estimate_cancel,
};

static void free_page_estimate_register(void)
{
    free_page_hint_register_asker(&estimate_ops);
}

migration_init(free_page_estimate_register);

/* ---- bitmaps ---- */

static void estimate_free(void)
{
    unsigned i;

    for (i = 0; i < estimate.blocks->len; i++) {
        FreePageHintMap *map =
            &g_array_index(estimate.blocks, EstimateBlock, i).map;

        g_free(map->bmap);
        g_free(map->hinted);
        g_free(map->groups);
    }
    g_clear_pointer(&estimate.blocks, g_array_unref);
    free_page_hint_queue_free(&estimate.queue);
}

static bool estimate_alloc(uint64_t *total)
{
    bool queue = free_page_hint_queue_alloc(&estimate.queue);
    RAMBlock *rb;

    estimate.blocks = g_array_new(false, false, sizeof(EstimateBlock));

    RCU_READ_LOCK_GUARD();

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        uint64_t npages = rb->used_length >> qemu_target_page_bits();
        EstimateBlock block;

        *total += npages << qemu_target_page_bits();
        /* A migration hints nothing of these either */
        if (!npages || ram_stays_as_it_is(rb)) {
            continue;
        }
        block = (EstimateBlock) {
            .rb = rb,
            .map = {
                .bmap = bitmap_try_new(npages),
                .hinted = bitmap_try_new(npages),
                .groups = bitmap_try_new(free_page_hint_groups(npages)),
                .npages = npages,
                .host_ratio = migrate_postcopy_ram() ?
                    MAX(1, rb->page_size / qemu_target_page_size()) : 1,
            },
        };

        g_array_append_val(estimate.blocks, block);
        if (!block.map.bmap || !block.map.hinted || !block.map.groups) {
            return false;
        }
        bitmap_set(block.map.bmap, 0, npages);
    }
    return queue;
}

/* Returns how many runs are done. */
static unsigned estimate_apply(FreePageHintRun *runs, unsigned n_runs,
                               uint64_t *skipped)
{
    FreePageHintTally tally = {};
    uint64_t budget = HOLD_PAGES;
    unsigned done = 0;

    while (done < n_runs && budget) {
        EstimateBlock *block = NULL;
        unsigned i;

        for (i = 0; i < estimate.blocks->len && !block; i++) {
            block = &g_array_index(estimate.blocks, EstimateBlock, i);
            block = block->rb == runs[done].block ? block : NULL;
        }
        if (block) {
            done += free_page_hint_clear_runs(&block->map, &runs[done],
                                              n_runs - done, &budget, &tally);
        } else {
            budget -= MIN(budget, FREE_PAGE_HINT_RUN_PAGES);
            done++;
        }
    }
    *skipped += tally.cleared << qemu_target_page_bits();
    return done;
}

/* ---- the two sources ---- */

typedef struct EstimateLook {
    AbsentPagesLook *look;
    FreePageHintReason reason;
    int64_t deadline_ns;
    uint64_t absent_bytes;
} EstimateLook;

/* In a thread of the pool. */
static int estimate_look(void *opaque)
{
    EstimateLook *look = opaque;
    g_autofree FreePageHintRun *runs = g_new(FreePageHintRun,
                                             ABSENT_PAGES_LOOK_RUNS);
    int n;

    rcu_register_thread();
    while ((n = absent_pages_look_next(look->look, runs)) >= 0) {
        int done = 0;

        while (done < n) {
            done += estimate_apply(&runs[done], n - done, &look->absent_bytes);
        }
        if (qatomic_read(&estimate.cancelled)) {
            look->reason = FREE_PAGE_HINT_REASON_CANCELLED;
            break;
        }
        if (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) >= look->deadline_ns) {
            look->reason = FREE_PAGE_HINT_REASON_TIMEOUT;
            break;
        }
    }
    if (n == ABSENT_PAGES_LOOK_DENIED) {
        look->reason = FREE_PAGE_HINT_REASON_DENIED;
    }
    rcu_unregister_thread();
    return 0;
}

static void coroutine_fn estimate_absent(FreePageEstimate *e, int64_t deadline)
{
    EstimateLook look = { .deadline_ns = deadline };
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    look.look = absent_pages_look(&look.reason);
    if (look.look) {
        thread_pool_submit_co(estimate_look, &look);
        absent_pages_look_end(look.look);
    }
    e->absent_bytes = look.absent_bytes;
    e->has_absent_reason = look.reason != REASON_NONE;
    e->absent_reason = look.reason;
    e->scan_time = (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - start) / SCALE_US;
}

/*
 * Count some of what the guest has hinted, for a millisecond at most.  @runs
 * and @n_runs are what was taken from the queue, and of that @done was counted.
 */
static void estimate_collect(FreePageEstimate *e, FreePageHintRun *runs,
                             unsigned *n_runs, unsigned *done)
{
    bool starved;

    if (*done == *n_runs) {
        *done = 0;
        *n_runs = free_page_hint_queue_take(&estimate.queue, runs, BATCH,
                                            &starved);
        if (starved && estimate.asked) {
            free_page_hint_provider_resume();
        }
    }
    *done += estimate_apply(&runs[*done], *n_runs - *done, &e->free_bytes);
}

static void coroutine_fn estimate_ask(FreePageEstimate *e, int64_t deadline)
{
    g_autofree FreePageHintRun *runs = g_new(FreePageHintRun, BATCH);
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME), now = start;
    unsigned n_runs = 0, done = 0;

    estimate.reason = estimate.cancelled ? FREE_PAGE_HINT_REASON_CANCELLED :
                      now >= deadline ? FREE_PAGE_HINT_REASON_TIMEOUT :
                      free_page_hint_provider_ask(estimate.cache_budget,
                                                  &estimate.id);
    estimate.asked = estimate.reason == REASON_NONE;
    trace_free_page_estimate_ask(estimate.asked ? estimate.id : 0);

    while (estimate.asked && estimate.reason == REASON_NONE &&
           (!estimate.complete || estimate.queue.count || done < n_runs)) {
        estimate_collect(e, runs, &n_runs, &done);
        now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        if (now >= deadline) {
            estimate_stop(FREE_PAGE_HINT_REASON_TIMEOUT);
        } else if (estimate.queue.count || done < n_runs) {
            qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 0);
        } else if (!estimate.complete) {
            qemu_co_sleep_ns_wakeable(&estimate.sleep, QEMU_CLOCK_REALTIME,
                                      deadline - now);
        }
    }
    if (estimate.complete) {
        e->ask_to_end = (estimate.end_ns - start) / SCALE_US;
    }
    estimate_done();
}

/* Whoever asks in a loop is not to slow the guest down. */
static void coroutine_fn estimate_pause(void)
{
    int64_t left = estimate.next_ns - qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    if (left > 0) {
        trace_free_page_estimate_pause(left / SCALE_US);
    }
    while (left > 0 && !estimate.cancelled) {
        qemu_co_sleep_ns_wakeable(&estimate.sleep, QEMU_CLOCK_REALTIME, left);
        left = estimate.next_ns - qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    }
}

/* ---- the commands ---- */

static void estimate_sum(FreePageEstimate *e)
{
    unsigned order;

    e->complete = estimate.complete;
    e->has_reason = estimate.reason != REASON_NONE;
    e->reason = estimate.reason;
    for (order = ORDERS; order-- > 0;) {
        if (estimate.orders[order]) {
            FreePageEstimateBlocks *blocks = g_new(FreePageEstimateBlocks, 1);

            blocks->block_size = 1ULL << order;
            blocks->bytes = estimate.orders[order];
            QAPI_LIST_PREPEND(e->blocks, blocks);
        }
    }
    e->remaining_bytes = e->total_bytes - e->absent_bytes - e->free_bytes;
    if (estimate.has_cache && estimate.cache_budget) {
        e->has_cache_bytes = true;
        /* It can be neither absent nor free, whatever the guest says */
        e->cache_bytes = MIN(estimate.cache_bytes,
                             MIN(estimate.cache_budget, e->remaining_bytes));
    }
    if (estimate.bandwidth) {
        e->has_round_time = true;
        e->round_time = e->remaining_bytes * 1000.0 / estimate.bandwidth;
    }
    trace_free_page_estimate(e->total_bytes, e->absent_bytes, e->free_bytes,
                             e->has_reason ?
                             FreePageHintReason_str(e->reason) : "complete");
}

static void coroutine_fn estimate_co(void *opaque)
{
    int64_t wait = (int64_t)migrate_free_page_hint_wait() * SCALE_MS;
    FreePageEstimate *e = opaque;
    int64_t start;
    bool asks;

    estimate_pause();
    start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    asks = free_page_hint_unavailable() == REASON_NONE;
    /* As in a migration: see free_page_hint_scan() */
    estimate_absent(e, start + (asks ? wait / 2 : wait));
    estimate_ask(e, start + wait);
    estimate.next_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) +
        MIN(e->ask_to_end * SCALE_US * PAUSE_FACTOR, PAUSE_MAX_NS);
    estimate_sum(e);
    estimate_free();
    estimate.result = e;
    estimate.running = false;
}

void qmp_calc_free_page_estimate(bool has_bandwidth, uint64_t bandwidth,
                                 bool has_cache, uint64_t cache, Error **errp)
{
    FreePageEstimate *e;

    if (migration_is_running() || runstate_check(RUN_STATE_INMIGRATE)) {
        error_setg(errp, "there is no estimate during a migration");
        return;
    }
    if (estimate.running) {
        error_setg(errp, "an estimate is being made already");
        return;
    }
    if (has_bandwidth && !bandwidth) {
        error_setg(errp, "parameter 'bandwidth' must not be 0");
        return;
    }

    e = g_new0(FreePageEstimate, 1);
    if (!estimate_alloc(&e->total_bytes)) {
        error_setg(errp, "not enough memory for an estimate");
        qapi_free_FreePageEstimate(e);
        estimate_free();
        return;
    }
    g_clear_pointer(&estimate.result, qapi_free_FreePageEstimate);
    estimate.running = true;
    estimate.complete = false;
    estimate.bandwidth = bandwidth;
    estimate.cache_budget = has_cache ? cache : migrate_free_page_hint_cache();
    estimate.has_cache = false;
    qatomic_set(&estimate.cancelled, false);
    memset(estimate.orders, 0, sizeof(estimate.orders));
    aio_co_enter(qemu_get_aio_context(),
                 qemu_coroutine_create(estimate_co, e));
}

FreePageEstimateInfo *qmp_query_free_page_estimate(Error **errp)
{
    FreePageEstimateInfo *info = g_new0(FreePageEstimateInfo, 1);

    info->status = estimate.running ? FREE_PAGE_ESTIMATE_STATUS_MEASURING :
                   estimate.result ? FREE_PAGE_ESTIMATE_STATUS_MEASURED :
                   FREE_PAGE_ESTIMATE_STATUS_UNSTARTED;
    if (estimate.result) {
        info->estimate = QAPI_CLONE(FreePageEstimate, estimate.result);
    }
    return info;
}

void hmp_calc_free_page_estimate(Monitor *mon, const QDict *qdict)
{
    Error *err = NULL;

    qmp_calc_free_page_estimate(false, 0, false, 0, &err);
    hmp_handle_error(mon, err);
}

void hmp_info_free_page_estimate(Monitor *mon, const QDict *qdict)
{
    const FreePageEstimate *e = estimate.result;
    FreePageEstimateBlocksList *item;

    if (!e) {
        monitor_printf(mon, "free page estimate: %s\n",
                       estimate.running ? "measuring" : "unstarted");
        return;
    }
    monitor_printf(mon, "memory: %" PRIu64 " kbytes\n", e->total_bytes >> 10);
    monitor_printf(mon, "absent: %" PRIu64 " kbytes, found in %" PRIu64
                   " us%s%s%s\n", e->absent_bytes >> 10, e->scan_time,
                   e->has_absent_reason ? " (" : "",
                   e->has_absent_reason ?
                   FreePageHintReason_str(e->absent_reason) : "",
                   e->has_absent_reason ? ")" : "");
    monitor_printf(mon, "free besides: %" PRIu64 " kbytes, %s%s%s%s in %" PRIu64
                   " us\n", e->free_bytes >> 10,
                   e->complete ? "complete" : "incomplete",
                   e->has_reason ? " (" : "",
                   e->has_reason ? FreePageHintReason_str(e->reason) : "",
                   e->has_reason ? ")" : "", e->ask_to_end);
    for (item = e->blocks; item; item = item->next) {
        monitor_printf(mon, "free in blocks of %" PRIu64 " kbytes: %" PRIu64
                       " kbytes\n", item->value->block_size >> 10,
                       item->value->bytes >> 10);
    }
    monitor_printf(mon, "to be sent: %" PRIu64 " kbytes\n",
                   e->remaining_bytes >> 10);
    if (e->has_cache_bytes) {
        monitor_printf(mon, "page cache in that: %" PRIu64 " kbytes\n",
                       e->cache_bytes >> 10);
    }
}
