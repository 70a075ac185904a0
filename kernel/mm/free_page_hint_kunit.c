// SPDX-License-Identifier: GPL-2.0
/*
 * KUnit tests for free page hints
 *
 * They run against the allocator of the running system, which others use at the
 * same time. A test that needs it to hold still for a moment tries several
 * times and expects an exact result once.
 */
#include <kunit/test.h>
#include <linux/align.h>
#include <linux/array_size.h>
#include <linux/bsearch.h>
#include <linux/err.h>
#include <linux/free_page_hint.h>
#include <linux/gfp.h>
#include <linux/irqflags.h>
#include <linux/jiffies.h>
#include <linux/kconfig.h>
#include <linux/kthread.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/module.h>
#include <linux/nodemask.h>
#include <linux/page-isolation.h>
#include <linux/pfn.h>
#include <linux/sched.h>
#include <linux/sort.h>
#include <linux/spinlock.h>
#include <linux/vmalloc.h>
#include <linux/vmstat.h>

#include "free_page_hint_compat.h"

#define TRIES	50

/* A set of blocks, in the order in which they were found. */
struct blocks {
	phys_addr_t *addrs;
	unsigned long nr;
	unsigned long max;
};

/* What a walk did. */
struct told {
	struct kunit *test;
	struct blocks *blocks;
	unsigned int order;
	unsigned int batch_len;
	unsigned int calls;
	unsigned int largest;
	/* Return -E2BIG in this call, the first being 1. */
	unsigned int stop_at;
};

KUNIT_DEFINE_ACTION_WRAPPER(vfree_action, vfree, const void *);

static struct zone *next_populated_zone(struct zone *zone)
{
	struct zone *zones;
	int node;

	for_each_online_node(node) {
		zones = NODE_DATA(node)->node_zones;
		for (int i = 0; i < MAX_NR_ZONES; i++) {
			if (!zone && populated_zone(&zones[i]))
				return &zones[i];
			if (zone == &zones[i])
				zone = NULL;
		}
	}

	return NULL;
}

/* As in /proc/buddyinfo. */
static unsigned long count_free(unsigned int order)
{
	unsigned long nr = 0;
	struct zone *zone;

	for (zone = next_populated_zone(NULL); zone;
	     zone = next_populated_zone(zone))
		nr += READ_ONCE(zone->free_area[order].nr_free);

	return nr;
}

static void blocks_init(struct kunit *test, struct blocks *blocks,
			unsigned long max)
{
	blocks->nr = 0;
	blocks->max = max;
	blocks->addrs = vmalloc_array(max, sizeof(*blocks->addrs));
	KUNIT_ASSERT_NOT_NULL(test, blocks->addrs);
	KUNIT_ASSERT_EQ(test, 0, kunit_add_action_or_reset(test, vfree_action,
							   blocks->addrs));
}

static void blocks_add(struct blocks *blocks, phys_addr_t addr)
{
	if (blocks->nr < blocks->max)
		blocks->addrs[blocks->nr++] = addr;
}

static int cmp_addr(const void *a, const void *b)
{
	phys_addr_t x = *(const phys_addr_t *)a, y = *(const phys_addr_t *)b;

	return x < y ? -1 : x > y;
}

static void blocks_sort(struct blocks *blocks)
{
	sort(blocks->addrs, blocks->nr, sizeof(*blocks->addrs), cmp_addr, NULL);
}

static bool blocks_equal(const struct blocks *a, const struct blocks *b)
{
	return a->nr == b->nr && a->nr < a->max && b->nr < b->max &&
	       !memcmp(a->addrs, b->addrs, a->nr * sizeof(*a->addrs));
}

static bool blocks_have(const struct blocks *blocks, phys_addr_t addr)
{
	for (unsigned long i = 0; i < blocks->nr; i++)
		if (blocks->addrs[i] == addr)
			return true;

	return false;
}

/* Does any block, of PAGE_SIZE << order, overlap the page or pages? */
static bool blocks_overlap(const struct blocks *blocks, unsigned int order,
			   struct page *page, unsigned int page_order)
{
	phys_addr_t start = PFN_PHYS(page_to_pfn(page));
	phys_addr_t end = start + ((phys_addr_t)PAGE_SIZE << page_order);

	for (unsigned long i = 0; i < blocks->nr; i++) {
		phys_addr_t addr = blocks->addrs[i];

		if (addr < end && start < addr + ((phys_addr_t)PAGE_SIZE << order))
			return true;
	}

	return false;
}

/* Ends the walk at the first promise that it breaks. */
static int told_fn(const phys_addr_t *addrs, unsigned int nr, void *private)
{
	struct told *told = private;
	struct kunit *test = told->test;
	phys_addr_t mask = ((phys_addr_t)PAGE_SIZE << told->order) - 1;

	if (irqs_disabled()) {
		KUNIT_FAIL(test, "called with the zone's lock held");
		return -EIO;
	}
	if (!nr || nr > told->batch_len || nr > FREE_PAGE_HINT_MAX_BATCH) {
		KUNIT_FAIL(test, "a batch of %u, asked for %u", nr,
			   told->batch_len);
		return -EIO;
	}

	told->largest = max(told->largest, nr);
	if (++told->calls == told->stop_at)
		return -E2BIG;

	for (unsigned int i = 0; i < nr; i++) {
		if (addrs[i] & mask || !pfn_valid(PHYS_PFN(addrs[i]))) {
			KUNIT_FAIL(test, "no block of order %u at %pap",
				   told->order, &addrs[i]);
			return -EIO;
		}
		if (told->blocks)
			blocks_add(told->blocks, addrs[i]);
	}

	return 0;
}

static int walk(struct told *told, struct free_page_hint_walk *walk)
{
	struct kunit *test = told->test;
	struct free_page_hint_walk unused;
	phys_addr_t *batch;
	int ret;

	/* Of its own, so that writing past its end is found out. */
	batch = vmalloc_array(told->batch_len ?: 1, sizeof(*batch));
	KUNIT_ASSERT_NOT_NULL(test, batch);

	walk = walk ?: &unused;
	*walk = (struct free_page_hint_walk) {
		.order = told->order,
		.batch = batch,
		.batch_len = told->batch_len,
		.fn = told_fn,
		.private = told,
	};
	told->calls = 0;
	told->largest = 0;
	if (told->blocks)
		told->blocks->nr = 0;
	ret = free_page_hint_walk(walk);
	vfree(batch);

	KUNIT_EXPECT_GE(test, walk->holds, told->calls);
	return ret;
}

/* Finds free blocks in another way: by looking at every page. */
static void scan_pages(struct blocks *blocks, unsigned int order)
{
	unsigned long step = 1UL << order;
	struct zone *zone;

	blocks->nr = 0;
	for (zone = next_populated_zone(NULL); zone;
	     zone = next_populated_zone(zone)) {
		unsigned long pfn = ALIGN(zone->zone_start_pfn, step);

		while (pfn < zone_end_pfn(zone)) {
			spin_lock_irq(&zone->lock);
			for (int i = 0; i < 1024 && pfn < zone_end_pfn(zone);
			     i++, pfn += step) {
				struct page *page = pfn_to_online_page(pfn);

				if (page && page_zone(page) == zone &&
				    PageBuddy(page) &&
				    page_private(page) == order)
					blocks_add(blocks, PFN_PHYS(pfn));
			}
			spin_unlock_irq(&zone->lock);
			cond_resched();
		}
	}
}

/* The free lists as they are, in their order. */
static void read_lists(struct blocks *blocks, unsigned int order)
{
	struct zone *zone;

	blocks->nr = 0;
	for (zone = next_populated_zone(NULL); zone;
	     zone = next_populated_zone(zone)) {
		spin_lock_irq(&zone->lock);
		for (int mt = 0; mt < MIGRATE_TYPES; mt++) {
			struct list_head *list;
			struct page *page;

			list = &zone->free_area[order].free_list[mt];
			list_for_each_entry(page, list, buddy_list)
				blocks_add(blocks, PFN_PHYS(page_to_pfn(page)));
		}
		spin_unlock_irq(&zone->lock);
	}
}

struct params {
	unsigned int order;
	unsigned int batch_len;
};

static const struct params params[] = {
	{ MAX_PAGE_ORDER, 1 },
	{ MAX_PAGE_ORDER, 7 },
	{ MAX_PAGE_ORDER, 64 },
	{ MAX_PAGE_ORDER, FREE_PAGE_HINT_MAX_BATCH },
	{ MAX_PAGE_ORDER, FREE_PAGE_HINT_MAX_BATCH * 4 },
	{ MAX_PAGE_ORDER - 1, 64 },
	{ 4, 1 },
	{ 4, 256 },
	{ 0, 256 },
};

static void params_desc(const struct params *p, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "order %u, batches of %u",
		 p->order, p->batch_len);
}

KUNIT_ARRAY_PARAM(walk, params, params_desc);

/* Tells each free block once, and nothing else. */
static void tells_what_a_scan_finds(struct kunit *test)
{
	const struct params *p = test->param_value;
	unsigned long max = count_free(p->order) * 2 + 1000;
	struct blocks blocks, before, after;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = p->order,
		.batch_len = p->batch_len,
	};
	int try;

	blocks_init(test, &blocks, max);
	blocks_init(test, &before, max);
	blocks_init(test, &after, max);

	for (try = 0; try < TRIES; try++) {
		scan_pages(&before, p->order);
		KUNIT_ASSERT_EQ(test, 0, walk(&told, NULL));
		scan_pages(&after, p->order);
		if (!blocks_equal(&before, &after))
			continue;
		blocks_sort(&blocks);
		blocks_sort(&after);
		if (blocks_equal(&blocks, &after))
			break;
	}

	KUNIT_EXPECT_LT_MSG(test, try, TRIES, "told %lu blocks, there are %lu",
			    blocks.nr, after.nr);
	if (p->order == MAX_PAGE_ORDER)
		KUNIT_EXPECT_GT(test, blocks.nr, 0);
}

/* Leaves the free lists as they were, order and all. */
static void leaves_lists_alone(struct kunit *test)
{
	const struct params *p = test->param_value;
	unsigned long max = count_free(p->order) * 2 + 1000;
	struct blocks before, after;
	struct told told = {
		.test = test,
		.order = p->order,
		.batch_len = p->batch_len,
	};
	int try;

	blocks_init(test, &before, max);
	blocks_init(test, &after, max);

	for (try = 0; try < TRIES; try++) {
		read_lists(&before, p->order);
		KUNIT_ASSERT_EQ(test, 0, walk(&told, NULL));
		read_lists(&after, p->order);
		if (blocks_equal(&before, &after))
			break;
	}

	KUNIT_EXPECT_LT(test, try, TRIES);
}

/* Hints cover 97 % of what /proc/buddyinfo shows, whatever goes on. */
static void covers_buddyinfo(struct kunit *test)
{
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = MAX_PAGE_ORDER,
		.batch_len = 64,
	};
	unsigned long nr_free = count_free(MAX_PAGE_ORDER), different = 0;

	if (nr_free < 100)
		kunit_skip(test, "only %lu free blocks", nr_free);

	blocks_init(test, &blocks, nr_free * 2 + 1000);
	KUNIT_ASSERT_EQ(test, 0, walk(&told, NULL));
	blocks_sort(&blocks);
	for (unsigned long i = 0; i < blocks.nr; i++)
		if (!i || blocks.addrs[i] != blocks.addrs[i - 1])
			different++;

	KUNIT_EXPECT_GE(test, different * 100, nr_free * 97);
	kunit_info(test, "%lu of %lu blocks", different, nr_free);
}

/* A block that was freed is told. */
static void tells_a_freed_block(struct kunit *test)
{
	unsigned long max = count_free(MAX_PAGE_ORDER) * 2 + 1000;
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = MAX_PAGE_ORDER,
		.batch_len = 64,
	};
	int try;

	blocks_init(test, &blocks, max);
	for (try = 0; try < TRIES; try++) {
		struct page *page = alloc_pages(GFP_KERNEL, MAX_PAGE_ORDER);

		KUNIT_ASSERT_NOT_NULL(test, page);
		__free_pages(page, MAX_PAGE_ORDER);
		KUNIT_ASSERT_EQ(test, 0, walk(&told, NULL));
		if (blocks_have(&blocks, PFN_PHYS(page_to_pfn(page))))
			break;
	}

	KUNIT_EXPECT_LT(test, try, TRIES);
}

/* No block of any order overlaps memory that is in use. */
static void never_tells_used_memory(struct kunit *test)
{
	static const unsigned int orders[] = { MAX_PAGE_ORDER, 3, 0 };
	struct page *pages[ARRAY_SIZE(orders)];
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.batch_len = 64,
	};
	unsigned long max = 0;
	unsigned int i;

	for (told.order = 0; told.order <= MAX_PAGE_ORDER; told.order++)
		max = max(max, count_free(told.order));
	blocks_init(test, &blocks, max * 2 + 1000);

	for (i = 0; i < ARRAY_SIZE(orders); i++)
		pages[i] = alloc_pages(GFP_KERNEL, orders[i]);

	for (told.order = 0; told.order <= MAX_PAGE_ORDER; told.order++) {
		KUNIT_EXPECT_EQ(test, 0, walk(&told, NULL));
		KUNIT_EXPECT_LT(test, blocks.nr, blocks.max);
		for (i = 0; i < ARRAY_SIZE(orders); i++)
			if (pages[i])
				KUNIT_EXPECT_FALSE(test,
						   blocks_overlap(&blocks,
								  told.order,
								  pages[i],
								  orders[i]));
	}

	for (i = 0; i < ARRAY_SIZE(orders); i++) {
		KUNIT_EXPECT_NOT_NULL(test, pages[i]);
		if (pages[i])
			__free_pages(pages[i], orders[i]);
	}
}

/* Nor one that is isolated, on its way out: to be offlined, say. */
static void never_tells_isolated_blocks(struct kunit *test)
{
	unsigned long max = 0;
	bool was_free = false;
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.batch_len = 64,
	};
	int try;

	/* Not exported: a module cannot isolate. */
	if (!IS_ENABLED(CONFIG_MEMORY_ISOLATION) ||
	    IS_MODULE(CONFIG_FREE_PAGE_HINT_KUNIT_TEST))
		kunit_skip(test, "cannot isolate blocks");

	for (told.order = 0; told.order <= MAX_PAGE_ORDER; told.order++)
		max = max(max, count_free(told.order));
	blocks_init(test, &blocks, max * 2 + 1000);

	for (try = 0; try < TRIES && !was_free; try++) {
		struct page *page = alloc_pages(GFP_KERNEL, MAX_PAGE_ORDER);
		unsigned long pfn;
		int mt;

		KUNIT_ASSERT_NOT_NULL(test, page);
		pfn = page_to_pfn(page);
		mt = get_pageblock_migratetype(page);
		__free_pages(page, MAX_PAGE_ORDER);
		if (isolate_range(pfn, pfn + MAX_ORDER_NR_PAGES, mt))
			continue;

		/* It may have been split into blocks of a migrate type each. */
		for (told.order = pageblock_order;
		     told.order <= MAX_PAGE_ORDER; told.order++) {
			scan_pages(&blocks, told.order);
			was_free |= blocks_overlap(&blocks, told.order, page,
						   MAX_PAGE_ORDER);
			KUNIT_EXPECT_EQ(test, 0, walk(&told, NULL));
			KUNIT_EXPECT_FALSE(test,
					   blocks_overlap(&blocks, told.order,
							  page,
							  MAX_PAGE_ORDER));
		}
		undo_isolate_range(pfn, pfn + MAX_ORDER_NR_PAGES, mt);
	}

	KUNIT_EXPECT_TRUE(test, was_free);
}

/*
 * Frees every second of many blocks, which makes a free list that is longer than
 * the largest batch: it is read in several holds of the lock, none of them
 * longer than promised, and the blocks in between are not told. The order is
 * one that no per-CPU list holds back.
 */
static void bounds_lock_hold(struct kunit *test)
{
	const unsigned int order = PAGE_ALLOC_COSTLY_ORDER + 1;
	const unsigned long nr = 6 * FREE_PAGE_HINT_MAX_BATCH;
	struct free_page_hint_walk result;
	struct page **pages;
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = order,
		.batch_len = FREE_PAGE_HINT_MAX_BATCH * 4,
	};
	unsigned long i, used_told = 0;

	if (global_zone_page_state(NR_FREE_PAGES) < (nr << order) * 3 / 2)
		kunit_skip(test, "needs %lu MiB of free memory",
			   (nr << order) * 3 / 2 >> (20 - PAGE_SHIFT));

	pages = vmalloc_array(nr, sizeof(*pages));
	KUNIT_ASSERT_NOT_NULL(test, pages);
	KUNIT_ASSERT_EQ(test, 0, kunit_add_action_or_reset(test, vfree_action,
							   pages));
	blocks_init(test, &blocks, count_free(order) + nr * 2);

	for (i = 0; i < nr; i++)
		pages[i] = alloc_pages(GFP_KERNEL | __GFP_NORETRY |
				       __GFP_NOWARN, order);
	for (i = 0; i < nr; i += 2) {
		if (pages[i])
			__free_pages(pages[i], order);
		pages[i] = NULL;
	}

	KUNIT_EXPECT_EQ(test, 0, walk(&told, &result));
	KUNIT_EXPECT_LT(test, blocks.nr, blocks.max);
	blocks_sort(&blocks);
	for (i = 1; i < nr; i += 2) {
		phys_addr_t addr;

		if (!pages[i])
			continue;
		addr = PFN_PHYS(page_to_pfn(pages[i]));
		if (bsearch(&addr, blocks.addrs, blocks.nr, sizeof(addr),
			    cmp_addr))
			used_told++;
		__free_pages(pages[i], order);
	}

	KUNIT_EXPECT_EQ(test, used_told, 0);
	/* The list was as long as this test needs, and some holds were full. */
	KUNIT_EXPECT_GT(test, result.blocks, 2 * FREE_PAGE_HINT_MAX_BATCH);
	KUNIT_EXPECT_EQ(test, told.largest, FREE_PAGE_HINT_MAX_BATCH);
	KUNIT_EXPECT_GE(test, result.holds,
			result.blocks / FREE_PAGE_HINT_MAX_BATCH);
	kunit_info(test, "%lu blocks in %lu holds", result.blocks,
		   result.holds);
}

/* Blocks of which every second is free, so that they do not merge. */
struct comb {
	struct page *pages[1024];
	unsigned int order;
	/* The block that was freed last, and the buddy that keeps it apart. */
	phys_addr_t first;
	struct page *buddy;
	unsigned long told;
};

static int merge_first(const phys_addr_t *addrs, unsigned int nr, void *private)
{
	struct comb *comb = private;

	if (addrs[0] == comb->first && comb->buddy) {
		__free_pages(comb->buddy, comb->order);
		comb->buddy = NULL;
	}

	comb->told += nr;
	return comb->told > ARRAY_SIZE(comb->pages) * 16 ? -E2BIG : 0;
}

/* Returns whether the block was the first that the walk read in its list. */
static bool walk_comb(struct kunit *test, struct comb *comb)
{
	unsigned long i, j, nr = ARRAY_SIZE(comb->pages), nr_free;
	struct page *first = NULL;
	phys_addr_t batch[7];
	struct free_page_hint_walk walk = {
		.order = PAGE_ALLOC_COSTLY_ORDER + 1,
		.batch = batch,
		.batch_len = ARRAY_SIZE(batch),
		.fn = merge_first,
		.private = comb,
	};

	memset(comb, 0, sizeof(*comb));
	comb->order = walk.order;
	for (i = 0; i < nr; i++)
		comb->pages[i] = alloc_pages(GFP_KERNEL | __GFP_NORETRY,
					     comb->order);

	/* Of a pair of buddies, one is kept and one is freed, as the last. */
	for (i = 0; i < nr && !first; i += 2) {
		for (j = 1; comb->pages[i] && j < nr && !first; j += 2) {
			if (!comb->pages[j] ||
			    page_to_pfn(comb->pages[j]) !=
			    (page_to_pfn(comb->pages[i]) ^ 1UL << comb->order))
				continue;
			first = comb->pages[i];
			comb->pages[i] = NULL;
			comb->buddy = comb->pages[j];
			comb->pages[j] = NULL;
		}
	}
	for (i = 0; i < nr; i += 2) {
		if (comb->pages[i])
			__free_pages(comb->pages[i], comb->order);
		comb->pages[i] = NULL;
	}
	if (first) {
		comb->first = PFN_PHYS(page_to_pfn(first));
		__free_pages(first, comb->order);
	}

	nr_free = count_free(comb->order);
	KUNIT_EXPECT_EQ(test, 0, free_page_hint_walk(&walk));
	/* The bound is per list, and there are few lists with that many. */
	KUNIT_EXPECT_LE(test, comb->told, nr_free * 2);

	for (i = 0; i < nr; i++)
		if (comb->pages[i])
			__free_pages(comb->pages[i], comb->order);
	if (comb->buddy)
		__free_pages(comb->buddy, comb->order);

	return first && !comb->buddy;
}

/*
 * A walk ends even if the entry that it read first leaves the list meanwhile:
 * here it merges with its buddy.
 */
static void ends_without_its_first_entry(struct kunit *test)
{
	struct comb *comb = kunit_kmalloc(test, sizeof(*comb), GFP_KERNEL);
	int try;

	KUNIT_ASSERT_NOT_NULL(test, comb);
	for (try = 0; try < TRIES; try++)
		if (walk_comb(test, comb))
			break;

	if (try == TRIES)
		kunit_skip(test, "found no block to merge in %d tries", TRIES);
}

/* The callback's result ends the walk and is the walk's. */
static void stops_when_told(struct kunit *test)
{
	struct told told = {
		.test = test,
		.order = MAX_PAGE_ORDER,
		.batch_len = 1,
	};

	if (count_free(MAX_PAGE_ORDER) < 10)
		kunit_skip(test, "needs 10 free blocks");

	for (told.stop_at = 1; told.stop_at <= 3; told.stop_at++) {
		KUNIT_EXPECT_EQ(test, -E2BIG, walk(&told, NULL));
		KUNIT_EXPECT_EQ(test, told.calls, told.stop_at);
	}
}

static void refuses_nonsense(struct kunit *test)
{
	struct told told = {
		.test = test,
		.order = MAX_PAGE_ORDER + 1,
		.batch_len = 1,
	};

	KUNIT_EXPECT_EQ(test, -EINVAL, walk(&told, NULL));
	told.order = MAX_PAGE_ORDER;
	told.batch_len = 0;
	KUNIT_EXPECT_EQ(test, -EINVAL, walk(&told, NULL));
	KUNIT_EXPECT_EQ(test, told.calls, 0);
}

/* Memory that the kernel itself cannot use is where most free blocks are. */
static void tells_movable_zones(struct kunit *test)
{
	unsigned long nr_free = 0, nr_told = 0;
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = MAX_PAGE_ORDER,
		.batch_len = 64,
	};
	struct zone *zone;

	for (zone = next_populated_zone(NULL); zone;
	     zone = next_populated_zone(zone))
		if (zone_idx(zone) == ZONE_MOVABLE)
			nr_free += zone->free_area[MAX_PAGE_ORDER].nr_free;
	if (nr_free < 100)
		kunit_skip(test, "boot with kernelcore=512M: ZONE_MOVABLE has %lu free blocks",
			   nr_free);

	blocks_init(test, &blocks, count_free(MAX_PAGE_ORDER) * 2 + 1000);
	KUNIT_ASSERT_EQ(test, 0, walk(&told, NULL));
	for (unsigned long i = 0; i < blocks.nr; i++)
		if (page_zonenum(pfn_to_page(PHYS_PFN(blocks.addrs[i]))) ==
		    ZONE_MOVABLE)
			nr_told++;

	KUNIT_EXPECT_GE(test, nr_told * 100, nr_free * 97);
}

/* Every node is walked. */
static void tells_all_nodes(struct kunit *test)
{
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = MAX_PAGE_ORDER,
		.batch_len = 64,
	};
	int node;

	if (num_online_nodes() < 2)
		kunit_skip(test, "needs two NUMA nodes");

	blocks_init(test, &blocks, count_free(MAX_PAGE_ORDER) * 2 + 1000);
	KUNIT_ASSERT_EQ(test, 0, walk(&told, NULL));
	for_each_node_state(node, N_MEMORY) {
		unsigned long nr = 0;

		for (unsigned long i = 0; i < blocks.nr; i++)
			if (pfn_to_nid(PHYS_PFN(blocks.addrs[i])) == node)
				nr++;
		KUNIT_EXPECT_GT(test, nr, 0);
	}
}

/* Addresses have more than 32 bits. */
static void tells_high_addresses(struct kunit *test)
{
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = MAX_PAGE_ORDER,
		.batch_len = 64,
	};
	unsigned long scanned = 0, nr_told = 0;

	blocks_init(test, &blocks, count_free(MAX_PAGE_ORDER) * 2 + 1000);
	scan_pages(&blocks, MAX_PAGE_ORDER);
	for (unsigned long i = 0; i < blocks.nr; i++)
		if (blocks.addrs[i] > U32_MAX)
			scanned++;
	if (scanned < 100)
		kunit_skip(test, "%lu free blocks above 4 GiB", scanned);

	KUNIT_ASSERT_EQ(test, 0, walk(&told, NULL));
	for (unsigned long i = 0; i < blocks.nr; i++)
		if (blocks.addrs[i] > U32_MAX)
			nr_told++;

	KUNIT_EXPECT_GE(test, nr_told * 100, scanned * 97);
}

static int churn_fn(void *unused)
{
	while (!kthread_should_stop()) {
		struct page *pages[16];
		int i;

		for (i = 0; i < ARRAY_SIZE(pages); i++)
			pages[i] = alloc_pages(GFP_KERNEL | __GFP_NORETRY |
					       __GFP_NOWARN,
					       MAX_PAGE_ORDER - i % 2);
		for (i = 0; i < ARRAY_SIZE(pages); i++)
			if (pages[i])
				__free_pages(pages[i], MAX_PAGE_ORDER - i % 2);
		cond_resched();
	}

	return 0;
}

/* Walks end, and tell the truth, while blocks come and go. */
static void survives_churn(struct kunit *test)
{
	unsigned long nr_free = count_free(MAX_PAGE_ORDER);
	struct task_struct *churn[2];
	struct blocks blocks;
	struct told told = {
		.test = test,
		.blocks = &blocks,
		.order = MAX_PAGE_ORDER,
		.batch_len = 7,
	};
	unsigned long end, walks = 0, most = 0, least = ULONG_MAX;
	struct page *page;
	int ret = 0;

	if (nr_free < 100)
		kunit_skip(test, "only %lu free blocks", nr_free);

	blocks_init(test, &blocks, nr_free * 8 + 1000);
	page = alloc_pages(GFP_KERNEL, MAX_PAGE_ORDER);
	KUNIT_ASSERT_NOT_NULL(test, page);
	for (int i = 0; i < ARRAY_SIZE(churn); i++)
		churn[i] = kthread_run(churn_fn, NULL, "hint-churn/%d", i);

	end = jiffies + HZ;
	while (!ret && time_before(jiffies, end)) {
		ret = walk(&told, NULL);
		KUNIT_EXPECT_EQ(test, ret, 0);
		KUNIT_EXPECT_FALSE(test, blocks_overlap(&blocks, told.order,
							page, told.order));
		most = max(most, blocks.nr);
		least = min(least, blocks.nr);
		walks++;
	}

	for (int i = 0; i < ARRAY_SIZE(churn); i++)
		if (!IS_ERR(churn[i]))
			kthread_stop(churn[i]);
	__free_pages(page, MAX_PAGE_ORDER);

	KUNIT_EXPECT_GT(test, walks, 0);
	/* Even where the first entry got lost, lists are not read for ever. */
	KUNIT_EXPECT_LE(test, most, nr_free * 4);
	/* 32 blocks can be in use, a few more have been passed by. */
	KUNIT_EXPECT_GE(test, least * 100, nr_free * 50);
	kunit_info(test, "%lu walks told %lu to %lu of %lu blocks", walks,
		   least, most, nr_free);
}

static struct kunit_case free_page_hint_cases[] = {
	KUNIT_CASE_PARAM(tells_what_a_scan_finds, walk_gen_params),
	KUNIT_CASE_PARAM(leaves_lists_alone, walk_gen_params),
	KUNIT_CASE(covers_buddyinfo),
	KUNIT_CASE(tells_a_freed_block),
	KUNIT_CASE(never_tells_used_memory),
	KUNIT_CASE(never_tells_isolated_blocks),
	KUNIT_CASE(bounds_lock_hold),
	KUNIT_CASE(ends_without_its_first_entry),
	KUNIT_CASE(stops_when_told),
	KUNIT_CASE(refuses_nonsense),
	KUNIT_CASE(tells_movable_zones),
	KUNIT_CASE(tells_all_nodes),
	KUNIT_CASE(tells_high_addresses),
	KUNIT_CASE(survives_churn),
	{}
};

static struct kunit_suite free_page_hint_suite = {
	.name = "free_page_hint",
	.test_cases = free_page_hint_cases,
};

kunit_test_suite(free_page_hint_suite);

MODULE_DESCRIPTION("KUnit tests for free page hints");
MODULE_LICENSE("GPL");
