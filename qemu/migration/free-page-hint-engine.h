/*
 * Free page hints: what the two halves of the engine share
 *
 * free-page-hint.c is the round, in the migration thread;
 * free-page-hint-report.c is what other threads call.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_HINT_ENGINE_H
#define QEMU_MIGRATION_FREE_PAGE_HINT_ENGINE_H

#include "qemu/thread.h"
#include "qemu/timer.h"
#include "exec/target_page.h"
#include "free-page-hint.h"
#include "free-page-hint-queue.h"

/* "no reason": hints were used, all of them */
#define REASON_NONE FREE_PAGE_HINT_REASON__MAX

typedef struct FreePageHintEngine {
    /*
     * Protects all fields down to scan_reason.  A leaf: nothing is waited for,
     * and no other lock is taken, while it is held.
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

    /* Set once. */
    const FreePageHintAskerOps *asker_ops;

    /* Written with the BQL and the lock, read with either. */
    const FreePageHintProviderOps *ops;
    void *opaque;
} FreePageHintEngine;

extern FreePageHintEngine free_page_hint_engine;

/* The only writer of state.  Called with the lock. */
void free_page_hint_set_state(FreePageHintState state);

/* End a round that runs.  Called with the lock.  The first reason wins. */
void free_page_hint_stop(FreePageHintReason reason);

/* Is the guest being asked?  Called with the lock. */
bool free_page_hint_asking(void);

static inline uint64_t us_since(int64_t ns)
{
    return (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - ns) / SCALE_US;
}

static inline uint64_t bytes_of(uint64_t npages)
{
    return npages << qemu_target_page_bits();
}

#endif
