// SPDX-License-Identifier: GPL-2.0
/*
 * Free page hints: report which memory is free right now
 *
 * Reads the allocator's free lists without taking anything out of them. What
 * it finds can be allocated again before the caller hears of it. This is for
 * callers that tolerate that: live migration logs all writes since before it
 * asked, and sends what was written again.
 */
#include <linux/export.h>
#include <linux/free_page_hint.h>
#include <linux/gfp.h>
#include <linux/list.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/page-isolation.h>
#include <linux/pfn.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/timekeeping.h>

#define CREATE_TRACE_POINTS
#include <trace/events/free_page_hint.h>

/* Where a walk stands in one free list. */
struct list_pos {
	struct list_head *list;
	/* Entries still to be read: ends walks in which @first got lost. */
	unsigned long left;
	/* The entry that was read first. To meet it again means: been round. */
	phys_addr_t first;
	bool started;
	bool done;
};

/*
 * Read the next entries of a list, and bring the first unread one to its front.
 *
 * The lock is dropped after each batch, and then any entry can leave the list:
 * none can serve as a bookmark. So the list itself does: it is rotated until
 * the unread entries are at its front. The next batch starts there, whatever
 * came and went in between, and the entries that were read are the last to be
 * allocated. A whole walk over a quiet list restores its order.
 *
 * Only the list's head is moved, by the same list_rotate_to_front() and under
 * the same lock as in page_reporting.c. No entry, count, flag or migrate type
 * changes, so nr_free, NR_FREE_PAGES, PageBuddy and PageReported stay true. The
 * allocator takes entries of one list in any order. Page reporting brings its
 * first unreported entry to the front before it drops the lock, only in order
 * to find it quickly; it skips reported entries by their flag, so that a
 * rotation in between costs it time, as an allocation in between does. In turn,
 * its rotation can bring the first entry of this walk near the front, so that
 * the walk ends early: what it misses then are blocks that were reported.
 */
static unsigned int read_batch(struct free_page_hint_walk *walk,
			       struct list_pos *pos, unsigned int max)
{
	unsigned int nr = 0;
	struct page *page;

	list_for_each_entry(page, pos->list, buddy_list) {
		/* 64 bits wide where physical addresses are, as on PAE. */
		phys_addr_t addr = PFN_PHYS(page_to_pfn(page));

		if (pos->started && addr == pos->first) {
			pos->done = true;
			break;
		}
		if (nr == max)
			break;
		if (!pos->started) {
			pos->first = addr;
			pos->started = true;
		}
		walk->batch[nr++] = addr;
	}

	/* The end of the list: all that it holds now was in this batch. */
	if (list_entry_is_head(page, pos->list, buddy_list))
		pos->done = true;
	else if (!list_is_first(&page->buddy_list, pos->list))
		list_rotate_to_front(&page->buddy_list, pos->list);

	return nr;
}

static int walk_list(struct free_page_hint_walk *walk, struct zone *zone,
		     unsigned int mt)
{
	struct free_area *area = &zone->free_area[walk->order];
	struct list_pos pos = { .list = &area->free_list[mt] };
	unsigned int max = min(walk->batch_len, FREE_PAGE_HINT_MAX_BATCH);

	/* Racy, but what enters the list now may be missed anyway. */
	if (list_empty(pos.list))
		return 0;

	/*
	 * nr_free counts the lists of all migrate types. That is enough of a
	 * bound, as it is the meeting with the first entry that ends a walk:
	 * being the first to go to the list's tail, it is unlikely to leave.
	 */
	pos.left = READ_ONCE(area->nr_free);

	while (!pos.done && pos.left) {
		/* Reading the clock can take longer than reading the list. */
		bool timed = trace_free_page_hint_batch_enabled();
		u64 hold_ns = 0;
		unsigned int nr;
		int ret;

		spin_lock_irq(&zone->lock);
		if (timed)
			hold_ns = ktime_get_ns();
		nr = read_batch(walk, &pos, min(pos.left, max));
		if (timed)
			hold_ns = ktime_get_ns() - hold_ns;
		spin_unlock_irq(&zone->lock);

		trace_free_page_hint_batch(zone_to_nid(zone), zone_idx(zone),
					   walk->order, mt, nr, hold_ns);
		walk->holds++;
		pos.left -= nr;

		if (nr) {
			walk->blocks += nr;
			ret = walk->fn(walk->batch, nr, walk->private);
			if (ret)
				return ret;
		}
		cond_resched();
	}

	return 0;
}

static int walk_zone(struct free_page_hint_walk *walk, struct zone *zone)
{
	unsigned int mt;
	int ret;

	for (mt = 0; mt < MIGRATE_TYPES; mt++) {
		/* On their way out, to be offlined or allocated. */
		if (is_migrate_isolate(mt))
			continue;

		ret = walk_list(walk, zone, mt);
		if (ret)
			return ret;
	}

	return 0;
}

/**
 * free_page_hint_drain - move free pages to where a walk sees them
 *
 * Free pages in per-CPU lists keep the blocks around them split: 84 MiB in a
 * guest of 8 GiB that had just freed 6 GiB. Frees them as the allocator does
 * itself, with a zone's lock held for a CPU's batch of pages, 2016 with the
 * defaults. Call once, before a report's walks. Does nothing while somebody else
 * drains.
 *
 * Context: process context, may sleep.
 */
void free_page_hint_drain(void)
{
	drain_all_pages(NULL);
}
EXPORT_SYMBOL_GPL(free_page_hint_drain);

/**
 * free_page_hint_walk - report all free blocks of one order
 * @walk: the order, the function that takes the blocks, and the results
 *
 * Calls @walk->fn with the physical addresses of the blocks in all free lists
 * of @walk->order, in batches: all nodes, all zones, all migrate types but
 * MIGRATE_ISOLATE. A larger free block is in the lists of its own order only:
 * to get all blocks from some order up, walk each order, largest first.
 *
 * Each block was free, and of this order, at some time after the call began.
 * Blocks that are freed, merged or split meanwhile may be missed or reported
 * twice. A zone's lock is held for one batch at a time and not during
 * @walk->fn. Nothing is allocated, nothing is taken out of the allocator.
 *
 * Context: process context, may sleep.
 * Return: 0, what @walk->fn returned if that was not 0, or -EINVAL.
 */
int free_page_hint_walk(struct free_page_hint_walk *walk)
{
	struct zone *zone;
	int ret;

	walk->blocks = 0;
	walk->holds = 0;

	if (walk->order > MAX_PAGE_ORDER || !walk->batch_len)
		return -EINVAL;

	for_each_populated_zone(zone) {
		ret = walk_zone(walk, zone);
		if (ret)
			return ret;
	}

	return 0;
}
EXPORT_SYMBOL_GPL(free_page_hint_walk);
