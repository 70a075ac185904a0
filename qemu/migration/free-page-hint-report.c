/*
 * Free page hints: the guest's report
 *
 * What the provider calls when the guest has said something, what ends a round
 * from outside, and what others may know of it: all that is called by other
 * threads than that of the migration.  The other end of the queue is in
 * free-page-hint.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/module.h"
#include "system/runstate.h"
#include "free-page-hint.h"
#include "free-page-hint-engine.h"
#include "options.h"
#include "trace.h"

FreePageHintEngine free_page_hint_engine;
static FreePageHintEngine *const hint = &free_page_hint_engine;

static void free_page_hint_register_engine(void)
{
    qemu_mutex_init(&hint->lock);
    qemu_cond_init(&hint->cond);
    hint->reason = REASON_NONE;
    hint->scan_reason = REASON_NONE;
}

migration_init(free_page_hint_register_engine);

void free_page_hint_set_state(FreePageHintState state)
{
    assert(state == FREE_PAGE_HINT_STATE_IDLE ||
           (state > hint->state && hint->state != FREE_PAGE_HINT_STATE_ENDED));
    trace_free_page_hint_state(FreePageHintState_str(hint->state),
                               FreePageHintState_str(state));
    hint->state = state;
}

void free_page_hint_stop(FreePageHintReason reason)
{
    if (hint->state != FREE_PAGE_HINT_STATE_IDLE &&
        hint->state != FREE_PAGE_HINT_STATE_ENDED &&
        !hint->stats.complete && hint->reason == REASON_NONE) {
        hint->reason = reason;
        qemu_cond_signal(&hint->cond);
    }
}

bool free_page_hint_asking(void)
{
    return hint->state == FREE_PAGE_HINT_STATE_ASKED ||
           hint->state == FREE_PAGE_HINT_STATE_REPORTING;
}

/* Is @id the request that is being answered?  Called with hint->lock. */
static bool free_page_hint_current(uint32_t id)
{
    return free_page_hint_asking() && id == hint->id && !hint->stats.complete &&
           hint->reason == REASON_NONE;
}

void free_page_hint_reset(void)
{
    if (hint->asker_ops) {
        hint->asker_ops->cancel();
    }

    QEMU_LOCK_GUARD(&hint->lock);

    free_page_hint_set_state(FREE_PAGE_HINT_STATE_IDLE);
    /* A background snapshot has no round, that could say why */
    hint->reason = migrate_background_snapshot() ?
                   FREE_PAGE_HINT_REASON_UNSUPPORTED : REASON_NONE;
    hint->scan_reason = hint->reason;
    hint->stats = (FreePageHintInfo) {};
}

/* ---- the provider ---- */

void free_page_hint_register(const FreePageHintProviderOps *ops, void *opaque)
{
    QEMU_LOCK_GUARD(&hint->lock);
    assert(!hint->ops);
    hint->ops = ops;
    hint->opaque = opaque;
}

void free_page_hint_unregister(void *opaque)
{
    free_page_hint_abort(FREE_PAGE_HINT_REASON_NO_DEVICE);

    QEMU_LOCK_GUARD(&hint->lock);
    assert(hint->opaque == opaque);
    hint->ops = NULL;
    hint->opaque = NULL;
}

FreePageHintReason free_page_hint_unavailable(void)
{
    if (!free_page_hint_supported()) {
        return FREE_PAGE_HINT_REASON_UNSUPPORTED;
    }
    if (!runstate_is_running()) {
        return FREE_PAGE_HINT_REASON_VM_STOPPED;
    }
    if (!hint->ops) {
        return FREE_PAGE_HINT_REASON_NO_DEVICE;
    }
    return hint->ops->unavailable(hint->opaque);
}

/* ---- who asks without a migration ---- */

void free_page_hint_register_asker(const FreePageHintAskerOps *ops)
{
    hint->asker_ops = ops;
}

FreePageHintReason free_page_hint_provider_ask(uint64_t cache, uint32_t *id)
{
    FreePageHintReason reason = free_page_hint_unavailable();

    if (reason == REASON_NONE && hint->ops->allocates(hint->opaque)) {
        reason = FREE_PAGE_HINT_REASON_NO_ARRAYS;
    }
    if (reason == REASON_NONE) {
        *id = hint->ops->new_id(hint->opaque);
        /* To ask what is free is no reason to free anything: no time */
        hint->ops->ask(hint->opaque, cache, 0);
    }
    return reason;
}

void free_page_hint_provider_resume(void)
{
    if (hint->ops) {
        hint->ops->resume(hint->opaque);
    }
}

void free_page_hint_provider_done(void)
{
    if (hint->ops) {
        hint->ops->done(hint->opaque);
    }
}

/* ---- the report ---- */

void free_page_hint_abort(FreePageHintReason reason)
{
    if (hint->asker_ops) {
        hint->asker_ops->stop(reason);
    }

    QEMU_LOCK_GUARD(&hint->lock);
    free_page_hint_stop(reason);
}

static bool asker_wants(uint32_t id)
{
    return hint->asker_ops && hint->asker_ops->wanted(id);
}

void free_page_hint_cache(uint32_t id, uint64_t bytes, uint64_t us)
{
    if (asker_wants(id)) {
        hint->asker_ops->cache(bytes);
        return;
    }

    QEMU_LOCK_GUARD(&hint->lock);
    if (free_page_hint_current(id)) {
        hint->stats.cache_freed_bytes = bytes;
        hint->stats.cache_time = us;
    }
}

bool free_page_hint_wanted(uint32_t id)
{
    if (asker_wants(id)) {
        return true;
    }

    QEMU_LOCK_GUARD(&hint->lock);
    return free_page_hint_current(id);
}

bool free_page_hint_has_room(unsigned runs)
{
    if (hint->asker_ops && !hint->asker_ops->has_room(runs)) {
        return false;
    }

    QEMU_LOCK_GUARD(&hint->lock);
    return free_page_hint_queue_has_room(&hint->queue, runs);
}

void free_page_hint_submit(uint32_t id, const FreePageHintRun *runs,
                           unsigned n_runs, unsigned blocks,
                           uint64_t invalid_bytes)
{
    unsigned i;

    if (asker_wants(id)) {
        hint->asker_ops->submit(runs, n_runs, blocks, invalid_bytes);
        return;
    }

    QEMU_LOCK_GUARD(&hint->lock);

    if (!free_page_hint_current(id)) {
        for (i = 0; i < n_runs; i++) {
            hint->stats.stale_bytes += bytes_of(runs[i].npages);
        }
        return;
    }

    if (hint->state == FREE_PAGE_HINT_STATE_ASKED) {
        free_page_hint_set_state(FREE_PAGE_HINT_STATE_REPORTING);
        hint->stats.ask_to_first = us_since(hint->ask_ns);
    }
    hint->stats.messages++;
    hint->stats.blocks += blocks;
    hint->stats.invalid_bytes += invalid_bytes;

    free_page_hint_queue_put(&hint->queue, runs, n_runs);
    qemu_cond_signal(&hint->cond);
}

void free_page_hint_end(uint32_t id)
{
    if (asker_wants(id)) {
        hint->asker_ops->end();
        return;
    }

    QEMU_LOCK_GUARD(&hint->lock);

    if (!free_page_hint_current(id)) {
        return;
    }
    hint->stats.complete = true;
    hint->stats.ask_to_end = us_since(hint->ask_ns);
    qemu_cond_signal(&hint->cond);
}

void free_page_hint_stale(uint64_t bytes)
{
    QEMU_LOCK_GUARD(&hint->lock);
    hint->stats.stale_bytes += bytes;
}

void free_page_hint_invalid_message(void)
{
    QEMU_LOCK_GUARD(&hint->lock);
    hint->stats.invalid_messages++;
}

/* ---- from migration.c and others ---- */

void free_page_hint_cancel(void)
{
    QEMU_LOCK_GUARD(&hint->lock);
    free_page_hint_stop(FREE_PAGE_HINT_REASON_CANCELLED);
}

FreePageHintInfo *free_page_hint_query(void)
{
    FreePageHintInfo *info = g_new(FreePageHintInfo, 1);

    QEMU_LOCK_GUARD(&hint->lock);
    *info = hint->stats;
    info->state = hint->state;
    info->has_reason = hint->reason != REASON_NONE;
    info->reason = hint->reason;
    return info;
}

FreePageHintReason free_page_hint_scan_reason(void)
{
    QEMU_LOCK_GUARD(&hint->lock);
    return hint->scan_reason;
}

void free_page_hint_count(uint64_t redirtied, uint64_t requested)
{
    QEMU_LOCK_GUARD(&hint->lock);
    hint->stats.redirtied_bytes += bytes_of(redirtied);
    hint->stats.requested_bytes += bytes_of(requested);
}
