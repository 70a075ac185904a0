/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Free page hints: the bounded queue between provider and engine
 */

#include "qemu/osdep.h"
#include "free-page-hint-queue.h"

bool free_page_hint_queue_alloc(FreePageHintQueue *q)
{
    *q = (FreePageHintQueue) {
        .runs = g_try_new(FreePageHintRun, FREE_PAGE_HINT_QUEUE_RUNS),
    };
    return q->runs;
}

uint64_t free_page_hint_queue_free(FreePageHintQueue *q)
{
    uint64_t npages = 0;

    for (; q->count; q->count--, q->head++) {
        npages += q->runs[q->head % FREE_PAGE_HINT_QUEUE_RUNS].npages;
    }
    g_clear_pointer(&q->runs, g_free);
    return npages;
}

bool free_page_hint_queue_has_room(FreePageHintQueue *q, unsigned runs)
{
    if (!q->runs || runs <= FREE_PAGE_HINT_QUEUE_RUNS - q->count) {
        return true;
    }
    q->starved = true;
    return false;
}

void free_page_hint_queue_put(FreePageHintQueue *q,
                              const FreePageHintRun *runs, unsigned n_runs)
{
    unsigned i;

    assert(n_runs <= FREE_PAGE_HINT_QUEUE_RUNS - q->count);
    for (i = 0; i < n_runs; i++) {
        q->runs[(q->head + q->count) % FREE_PAGE_HINT_QUEUE_RUNS] = runs[i];
        q->count++;
    }
}

unsigned free_page_hint_queue_take(FreePageHintQueue *q, FreePageHintRun *runs,
                                   unsigned max, bool *starved)
{
    unsigned n = MIN(q->count, max);
    unsigned i;

    for (i = 0; i < n; i++) {
        runs[i] = q->runs[(q->head + i) % FREE_PAGE_HINT_QUEUE_RUNS];
    }
    q->head = (q->head + n) % FREE_PAGE_HINT_QUEUE_RUNS;
    q->count -= n;
    *starved = n && q->starved;
    if (n) {
        q->starved = false;
    }
    return n;
}
