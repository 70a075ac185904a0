/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Free page hints: the bounded queue between provider and engine
 *
 * Has no lock: its user does.
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_HINT_QUEUE_H
#define QEMU_MIGRATION_FREE_PAGE_HINT_QUEUE_H

#include "migration/free-page-hint-provider.h"

typedef struct FreePageHintQueue {
    /* Ring of FREE_PAGE_HINT_QUEUE_RUNS, or NULL while nothing is queued */
    FreePageHintRun *runs;
    unsigned head;
    unsigned count;
    /* The provider found too little room and waits */
    bool starved;
} FreePageHintQueue;

/* Returns false if there is no memory for it. */
bool free_page_hint_queue_alloc(FreePageHintQueue *q);

/* Returns the number of pages in the runs that were still there. */
uint64_t free_page_hint_queue_free(FreePageHintQueue *q);

/*
 * Is there room for @runs?  If not, that is remembered.  Without memory, there
 * is, as nothing would be queued.
 */
bool free_page_hint_queue_has_room(FreePageHintQueue *q, unsigned runs);

/* Queue @n_runs runs, for which there is room. */
void free_page_hint_queue_put(FreePageHintQueue *q,
                              const FreePageHintRun *runs, unsigned n_runs);

/*
 * Take up to @max runs, as many as there are.  Sets @starved if somebody waits
 * for the room that this makes.
 *
 * Returns the number of runs.
 */
unsigned free_page_hint_queue_take(FreePageHintQueue *q, FreePageHintRun *runs,
                                   unsigned max, bool *starved);

#endif
