// SPDX-License-Identifier: GPL-2.0
/*
 * Free page hints: page cache that need not be migrated
 *
 * A guest that has been up for a day has little free memory and much page
 * cache. Where the host asks for it, the coldest of it is freed before the free
 * lists are walked: what is clean, in no page table and on an inactive list.
 * That costs neither a write nor a page fault, and a read from a disk only if
 * somebody wants it again.
 */
#include <linux/export.h>
#include <linux/free_page_hint_cache.h>
#include <linux/math.h>
#include <linux/memcontrol.h>
#include <linux/minmax.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/swap.h>

#include "internal.h"

/*
 * Pages looked at in one hold of the lists' lock, and between two checks of the
 * limits: under TCG, 1 MiB takes 0.5 to 2 ms to free. The last folio of a step
 * is looked at as a whole, however large.
 */
#define STEP_PAGES	MAX(SZ_1M / PAGE_SIZE, SWAP_CLUSTER_MAX)

/* Of each list, this part is looked at before the next part of any. */
#define PARTS		8

/* To free one page in so many is worth more than to pass over the others. */
#define WORTHWHILE	128

/* Somebody has asked that this memory is not reclaimed. */
static bool is_protected(struct mem_cgroup *memcg)
{
	return mem_cgroup_below_min(NULL, memcg) ||
	       mem_cgroup_below_low(NULL, memcg);
}

/* A rest that no folio may fit into is not worth a look at all of them. */
static bool is_enough(struct free_page_hint_cache *cache)
{
	return cache->full ||
	       cache->freed + SWAP_CLUSTER_MAX > cache->nr_pages;
}

/* Returns 0, or what the caller's check returned. */
static int free_from_lruvec(struct free_page_hint_cache *cache,
			    struct mem_cgroup *memcg, struct lruvec *lruvec,
			    unsigned int list, unsigned int part)
{
	unsigned long left = inactive_file_size(lruvec, list);

	left = DIV_ROUND_UP(left, part);
	for (;;) {
		/* What is isolated beyond the budget moves to the young end. */
		unsigned long step = min3(left, STEP_PAGES,
					  cache->nr_pages - cache->freed);
		unsigned long scanned = 0;
		int ret;

		/* Even where there is nothing to do: there can be many such. */
		cond_resched();
		ret = cache->check(cache->private);
		if (ret || !left || is_enough(cache) || is_protected(memcg))
			return ret;

		cache->freed += reclaim_clean_inactive_file(lruvec, list, step,
						cache->nr_pages - cache->freed,
						&scanned, &cache->full);
		cache->scanned += scanned;
		/* Others can have emptied it. */
		left = scanned ? left - min(left, scanned) : 0;
	}
}

/* A part of what is left in one list of every node and control group. */
static int free_part(struct free_page_hint_cache *cache, unsigned int list,
		     unsigned int part)
{
	struct pglist_data *pgdat;

	for_each_online_pgdat(pgdat) {
		struct mem_cgroup *memcg = mem_cgroup_iter(NULL, NULL, NULL);

		do {
			int ret;

			/*
			 * From the top down, and of all: that of a group follows
			 * from that of the group that it is in.
			 */
			mem_cgroup_calculate_protection(NULL, memcg);
			ret = free_from_lruvec(cache, memcg,
					       mem_cgroup_lruvec(memcg, pgdat),
					       list, part);
			if (ret || is_enough(cache)) {
				mem_cgroup_iter_break(NULL, memcg);
				return ret;
			}
		} while ((memcg = mem_cgroup_iter(NULL, memcg, NULL)));
	}

	return 0;
}

/**
 * free_page_hint_free_cache - free clean page cache that nobody has used lately
 * @cache: how much, how long, and the results
 *
 * Frees file pages that are clean, in no page table and on an inactive list, of
 * all nodes and of all control groups that do not protect them, the coldest
 * first: the coldest eighth of each list, then the next. Control groups are gone
 * through in their order, so that a small budget is that of the first ones. Dirty
 * and mapped pages, those that are locked in memory, that are on an active list,
 * or that belong to shmem stay. Nothing is written, swapped or moved, and no I/O
 * is waited for. Shadow entries are left behind, so that a page that is read again
 * soon is known as such.
 *
 * Goes by steps of 1 MiB, or of 32 pages or one folio if that is more. The lock
 * of the lists is held while a step's pages are looked at; before each step, a
 * group's protection and @cache->check are. What a step does not free is at the
 * young end of its list afterwards.
 *
 * With the multi-generational LRU, the inactive lists are those of all
 * generations but the two youngest, the oldest first, and pages that were read
 * twice or more stay, as they are not on an inactive list else.
 *
 * Ends when @cache->nr_pages were freed, or the next folio is larger than what is
 * left of that, when @cache->check says so,
 * or when everything on the inactive lists was looked at. To pass over a page that
 * stays, such as a mapped one, takes much less than to free one.
 *
 * Context: process context, may sleep.
 * Return: 0, or what @cache->check returned if that was not 0.
 */
int free_page_hint_free_cache(struct free_page_hint_cache *cache)
{
	unsigned int list, part;

	cache->freed = 0;
	cache->scanned = 0;
	cache->full = false;

	for (list = 0; list < NR_INACTIVE_FILE_LISTS; list++) {
		for (part = PARTS; part; part--) {
			unsigned long freed = cache->freed;
			unsigned long scanned = cache->scanned;
			int ret = free_part(cache, list, part);

			if (ret || is_enough(cache))
				return ret;

			freed = cache->freed - freed;
			scanned = cache->scanned - scanned;
			/* There is no such list. */
			if (!scanned)
				break;
			/* Not worth it: look at all the rest, once. */
			if (part > 2 && freed < scanned / WORTHWHILE)
				part = 2;
		}
	}

	return 0;
}
EXPORT_SYMBOL_GPL(free_page_hint_free_cache);

/**
 * free_page_hint_cache_size - how much page cache could be freed at most
 *
 * Adds up the lists that free_page_hint_free_cache() goes through, but for control
 * groups that are protected. Not one page is looked at: those that are dirty,
 * mapped, or with the multi-generational LRU read more than once, are in it. So
 * this is the most that could be freed now.
 *
 * Context: process context, may sleep.
 * Return: pages.
 */
unsigned long free_page_hint_cache_size(void)
{
	unsigned long size = 0;
	struct pglist_data *pgdat;

	for_each_online_pgdat(pgdat) {
		struct mem_cgroup *memcg = mem_cgroup_iter(NULL, NULL, NULL);

		do {
			struct lruvec *lruvec = mem_cgroup_lruvec(memcg, pgdat);
			unsigned int list;

			cond_resched();
			mem_cgroup_calculate_protection(NULL, memcg);
			if (is_protected(memcg))
				continue;
			for (list = 0; list < NR_INACTIVE_FILE_LISTS; list++)
				size += inactive_file_size(lruvec, list);
		} while ((memcg = mem_cgroup_iter(NULL, memcg, NULL)));
	}

	return size;
}
EXPORT_SYMBOL_GPL(free_page_hint_cache_size);
