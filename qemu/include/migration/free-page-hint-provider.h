/*
 * Free page hints: what a device that can ask the guest has to offer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_FREE_PAGE_HINT_PROVIDER_H
#define MIGRATION_FREE_PAGE_HINT_PROVIDER_H

#include "qapi/qapi-types-migration.h"
#include "exec/cpu-common.h"

/* Consecutive pages of one RAMBlock that the guest called free */
typedef struct FreePageHintRun {
    /* Not dereferenced before the engine has found it in the block list */
    RAMBlock *block;
    /* In target pages.  May leave the block: the engine checks. */
    uint64_t first;
    uint64_t npages;
} FreePageHintRun;

/* Runs that the engine queues at most */
#define FREE_PAGE_HINT_QUEUE_RUNS 32768

typedef struct FreePageHintProviderOps {
    /*
     * Called with the BQL before a round.  Returns FREE_PAGE_HINT_REASON__MAX
     * if the guest can be asked, otherwise why not.
     */
    FreePageHintReason (*unavailable)(void *opaque);
    /*
     * Called with the BQL.  Does the guest's driver allocate the blocks that it
     * hints, so that it may write to them?
     */
    bool (*allocates)(void *opaque);
    /*
     * Called with the BQL.  Returns an id that no earlier request had, also
     * none that was made on another host.  Does not publish it yet.
     */
    uint32_t (*new_id)(void *opaque);
    /*
     * Called with the BQL.  Publishes the id that new_id() returned, with what
     * the guest may free of its page cache and how long that may take.  With
     * @cache_ms 0 it frees nothing, and says how much that would be.
     */
    void (*ask)(void *opaque, uint64_t cache_bytes, uint32_t cache_ms);
    /*
     * Called with the BQL when the round has ended.  Tells the guest that no
     * hints are wanted any more and that it may use all of its memory.
     */
    void (*done)(void *opaque);
    /*
     * Called by any thread, under the engine's lock or with the BQL, when there
     * is room in the queue again.  Must not block nor call the engine.
     */
    void (*resume)(void *opaque);
} FreePageHintProviderOps;

/*
 * Register or unregister the provider: there is at most one.  Called with the
 * BQL.  When free_page_hint_unregister() returns, no callback runs and none
 * will.
 */
void free_page_hint_register(const FreePageHintProviderOps *ops, void *opaque);
void free_page_hint_unregister(void *opaque);

/*
 * The functions below are called with the BQL and never block on anything but a
 * lock that is held for a short, bounded time.  In particular none waits for
 * bitmap_mutex.
 */

/* Is @id the request that is being answered? */
bool free_page_hint_wanted(uint32_t id);

/*
 * Does the queue have room for @runs runs, at most FREE_PAGE_HINT_QUEUE_RUNS?
 * If not, resume() is called later.  Without a round the answer is yes, as
 * nothing would be queued.
 */
bool free_page_hint_has_room(unsigned runs);

/**
 * free_page_hint_submit: hand over what one message of the guest held
 *
 * @id: the request it answers; if it is not the current one, all is dropped
 * @runs: the hints, checked by the provider to lie in RAM
 * @n_runs: no more than free_page_hint_has_room() said there is room for
 * @blocks: free blocks in the message (before they were merged to runs)
 * @invalid_bytes: bytes of these that are no RAM
 */
void free_page_hint_submit(uint32_t id, const FreePageHintRun *runs,
                           unsigned n_runs, unsigned blocks,
                           uint64_t invalid_bytes);

/*
 * Count the page cache that the guest says it freed for @id, and how long, or
 * that it could free, if it had no time for that.
 */
void free_page_hint_cache(uint32_t id, uint64_t bytes, uint64_t us);

/* The guest's report @id is complete. */
void free_page_hint_end(uint32_t id);

/* Count @bytes that a message hinted which answered no current request. */
void free_page_hint_stale(uint64_t bytes);

/* Count a message that made no sense. */
void free_page_hint_invalid_message(void);

/* The guest cannot answer any more: end the round with @reason. */
void free_page_hint_abort(FreePageHintReason reason);

#endif
