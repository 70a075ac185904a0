// SPDX-License-Identifier: GPL-2.0
/*
 * KUnit tests for free page hints, included by free_page_hint.c
 *
 * Most walk over a zone of their own, whose free lists nobody else changes: what
 * they expect is exact. Its entries are pages that the test has allocated.
 */
#include <kunit/test.h>
#include <linux/bitmap.h>
#include <linux/irqflags.h>
#include <linux/lockdep.h>
#include <linux/math.h>
#include <linux/nodemask.h>
#include <linux/spinlock.h>

#define ORDER		3
/* Two full batches and more. */
#define NR_PAGES	(2 * FREE_PAGE_HINT_MAX_BATCH + 52)

struct hint_test {
	struct free_page_hint_walk walk;
	struct zone *zone;
	struct page *pages[NR_PAGES];
	unsigned int nr_pages;
	/* What was reported, in that order. */
	phys_addr_t addrs[NR_PAGES * 2];
	unsigned int nr;
	unsigned int calls;
	/* Called with each batch; its result ends the walk. */
	int (*meanwhile)(struct kunit *test);
};

static int hint_test_fn(const phys_addr_t *addrs, unsigned int nr, void *private)
{
	struct kunit *test = private;
	struct hint_test *t = test->priv;

	KUNIT_EXPECT_FALSE(test, irqs_disabled());
	lockdep_assert_not_held(&t->zone->lock);
	KUNIT_EXPECT_GT(test, nr, 0);
	KUNIT_EXPECT_LE(test, nr, t->walk.batch_len);
	KUNIT_EXPECT_LE(test, nr, FREE_PAGE_HINT_MAX_BATCH);
	t->calls++;

	for (unsigned int i = 0; i < nr; i++) {
		KUNIT_ASSERT_LT(test, t->nr, ARRAY_SIZE(t->addrs));
		t->addrs[t->nr++] = addrs[i];
	}

	return t->meanwhile ? t->meanwhile(test) : 0;
}

static void set_batch(struct kunit *test, unsigned int len)
{
	struct hint_test *t = test->priv;

	t->walk.batch_len = len;
	/* No longer than that, so that KASAN sees a walk that writes past it. */
	t->walk.batch = kunit_kmalloc_array(test, len, sizeof(*t->walk.batch),
					    GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, t->walk.batch);
}

static int hint_test_init(struct kunit *test)
{
	struct hint_test *t = kunit_kzalloc(test, sizeof(*t), GFP_KERNEL);
	struct zone *zone = kunit_kzalloc(test, sizeof(*zone), GFP_KERNEL);

	if (!t || !zone)
		return -ENOMEM;

	test->priv = t;
	t->zone = zone;
	t->walk.order = ORDER;
	t->walk.fn = hint_test_fn;
	t->walk.private = test;
	zone->zone_pgdat = NODE_DATA(first_online_node);
	spin_lock_init(&zone->lock);
	for (int order = 0; order < NR_PAGE_ORDERS; order++)
		for (int mt = 0; mt < MIGRATE_TYPES; mt++)
			INIT_LIST_HEAD(&zone->free_area[order].free_list[mt]);

	return 0;
}

static void hint_test_exit(struct kunit *test)
{
	struct hint_test *t = test->priv;

	while (t && t->nr_pages)
		__free_page(t->pages[--t->nr_pages]);
}

/* Appends new pages to a free list. */
static void add_blocks(struct kunit *test, unsigned int order, unsigned int mt,
		       unsigned int nr)
{
	struct hint_test *t = test->priv;
	struct free_area *area = &t->zone->free_area[order];

	while (nr--) {
		struct page *page = alloc_page(GFP_KERNEL);

		KUNIT_ASSERT_NOT_NULL(test, page);
		t->pages[t->nr_pages++] = page;
		list_add_tail(&page->buddy_list, &area->free_list[mt]);
		area->nr_free++;
	}
}

static void expect_list(struct kunit *test, unsigned int mt, unsigned int first,
			unsigned int nr)
{
	struct hint_test *t = test->priv;
	struct page *page;
	unsigned int i = first;

	list_for_each_entry(page, &t->zone->free_area[ORDER].free_list[mt],
			    buddy_list) {
		KUNIT_ASSERT_LT(test, i, first + nr);
		KUNIT_ASSERT_PTR_EQ(test, page, t->pages[i++]);
	}
	KUNIT_EXPECT_EQ(test, i, first + nr);
}

static const unsigned int batch_lens[] = {
	1, 7, 52, FREE_PAGE_HINT_MAX_BATCH, FREE_PAGE_HINT_MAX_BATCH * 4,
};

static void batch_len_desc(const unsigned int *len, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "batches of %u", *len);
}

KUNIT_ARRAY_PARAM(batch_lens, batch_lens, batch_len_desc);

/*
 * Reports each block of its order once and no other, with no lock held, in
 * batches of the promised length, and leaves the lists in their order.
 */
static void reports_each_block_once(struct kunit *test)
{
	const unsigned int len = *(const unsigned int *)test->param_value;
	const unsigned int max = min(len, FREE_PAGE_HINT_MAX_BATCH);
	const unsigned int few = 7, many = NR_PAGES - few - 2;
	struct hint_test *t = test->priv;
	unsigned int holds = DIV_ROUND_UP(few, max) + DIV_ROUND_UP(many, max);

	set_batch(test, len);
	add_blocks(test, ORDER, MIGRATE_UNMOVABLE, few);
	add_blocks(test, ORDER, MIGRATE_MOVABLE, many);
	add_blocks(test, ORDER - 1, 0, 1);
	add_blocks(test, ORDER + 1, 0, 1);

	KUNIT_EXPECT_EQ(test, 0, walk_zone(&t->walk, t->zone));
	KUNIT_ASSERT_EQ(test, t->nr, few + many);
	for (unsigned int i = 0; i < t->nr; i++)
		KUNIT_ASSERT_EQ(test, t->addrs[i],
				PFN_PHYS(page_to_pfn(t->pages[i])));
	KUNIT_EXPECT_EQ(test, t->calls, holds);
	KUNIT_EXPECT_EQ(test, t->walk.holds, holds);
	KUNIT_EXPECT_EQ(test, t->walk.blocks, few + many);
	expect_list(test, MIGRATE_UNMOVABLE, 0, few);
	expect_list(test, MIGRATE_MOVABLE, few, many);
}

/* Blocks that are on their way out, to be offlined, say. */
static void never_reports_isolated_blocks(struct kunit *test)
{
#ifdef CONFIG_MEMORY_ISOLATION
	struct hint_test *t = test->priv;

	set_batch(test, 7);
	add_blocks(test, ORDER, MIGRATE_ISOLATE, 10);
	KUNIT_EXPECT_EQ(test, 0, walk_zone(&t->walk, t->zone));
	KUNIT_EXPECT_EQ(test, t->nr, 0);
#else
	kunit_skip(test, "there is no CONFIG_MEMORY_ISOLATION");
#endif
}

static int stop_in_third_call(struct kunit *test)
{
	struct hint_test *t = test->priv;

	return t->calls == 3 ? -E2BIG : 0;
}

/* What the function returns ends the walk, and is its result. */
static void ends_when_asked_to(struct kunit *test)
{
	struct hint_test *t = test->priv;

	set_batch(test, 7);
	add_blocks(test, ORDER, 0, 100);
	t->meanwhile = stop_in_third_call;
	KUNIT_EXPECT_EQ(test, -E2BIG, walk_zone(&t->walk, t->zone));
	KUNIT_EXPECT_EQ(test, t->calls, 3);
	KUNIT_EXPECT_EQ(test, t->nr, 21);
}

/* More is freed than was read. */
static int gain(struct kunit *test)
{
	add_blocks(test, ORDER, 0, 8);
	return 0;
}

/* Reads no more than there was, whatever comes meanwhile. */
static void ends_while_blocks_are_freed(struct kunit *test)
{
	struct hint_test *t = test->priv;

	set_batch(test, 7);
	add_blocks(test, ORDER, 0, 100);
	t->meanwhile = gain;
	KUNIT_EXPECT_EQ(test, 0, walk_zone(&t->walk, t->zone));
	KUNIT_EXPECT_EQ(test, t->nr, 100);
}

static int lose_first(struct kunit *test)
{
	struct hint_test *t = test->priv;

	if (t->calls == 1)
		list_del_init(&t->pages[0]->buddy_list);
	return 0;
}

/* The entry that was read first leaves: it merges with its buddy, say. */
static void ends_without_its_first_entry(struct kunit *test)
{
	struct hint_test *t = test->priv;

	set_batch(test, 7);
	add_blocks(test, ORDER, 0, 100);
	t->meanwhile = lose_first;
	KUNIT_EXPECT_EQ(test, 0, walk_zone(&t->walk, t->zone));
	KUNIT_ASSERT_EQ(test, t->nr, 100);
	for (unsigned int i = 0; i < t->nr; i++)
		KUNIT_EXPECT_EQ(test, t->addrs[i],
				PFN_PHYS(page_to_pfn(t->pages[i])));
}

static int lose_all(struct kunit *test)
{
	struct hint_test *t = test->priv;

	for (unsigned int i = 0; t->calls == 2 && i < t->nr_pages; i++)
		list_del_init(&t->pages[i]->buddy_list);
	return 0;
}

static void ends_when_all_is_taken(struct kunit *test)
{
	struct hint_test *t = test->priv;

	set_batch(test, 7);
	add_blocks(test, ORDER, 0, 100);
	t->meanwhile = lose_all;
	KUNIT_EXPECT_EQ(test, 0, walk_zone(&t->walk, t->zone));
	KUNIT_EXPECT_EQ(test, t->nr, 14);
}

static void refuses_nonsense(struct kunit *test)
{
	struct hint_test *t = test->priv;

	KUNIT_EXPECT_EQ(test, -EINVAL, free_page_hint_walk(&t->walk));
	set_batch(test, 1);
	t->walk.order = MAX_PAGE_ORDER + 1;
	KUNIT_EXPECT_EQ(test, -EINVAL, free_page_hint_walk(&t->walk));
	KUNIT_EXPECT_EQ(test, t->calls, 0);
}

/* From here on, the walk is over the memory of the running system. */

struct used {
	struct kunit *test;
	unsigned int order;
	struct page *pages[3];
	DECLARE_BITMAP(seen, MAX_NUMNODES * MAX_NR_ZONES);
};

static const unsigned int used_orders[] = { MAX_PAGE_ORDER, 3, 0 };

static bool overlaps(phys_addr_t addr, unsigned int order, struct page *page,
		     unsigned int page_order)
{
	phys_addr_t start = PFN_PHYS(page_to_pfn(page));

	return addr < start + ((phys_addr_t)PAGE_SIZE << page_order) &&
	       start < addr + ((phys_addr_t)PAGE_SIZE << order);
}

static unsigned int zone_bit(struct zone *zone)
{
	return zone_to_nid(zone) * MAX_NR_ZONES + zone_idx(zone);
}

static void free_used(struct used *used)
{
	for (int i = 0; i < ARRAY_SIZE(used->pages); i++)
		if (used->pages[i])
			__free_pages(used->pages[i], used_orders[i]);
}

static int used_fn(const phys_addr_t *addrs, unsigned int nr, void *private)
{
	struct used *used = private;
	phys_addr_t mask = ((phys_addr_t)PAGE_SIZE << used->order) - 1;

	for (unsigned int i = 0; i < nr; i++) {
		struct page *page = pfn_to_online_page(PHYS_PFN(addrs[i]));

		KUNIT_ASSERT_EQ(used->test, addrs[i] & mask, 0);
		KUNIT_ASSERT_NOT_NULL(used->test, page);
		set_bit(zone_bit(page_zone(page)), used->seen);
		for (int j = 0; j < ARRAY_SIZE(used->pages); j++)
			KUNIT_ASSERT_FALSE(used->test,
					   overlaps(addrs[i], used->order,
						    used->pages[j],
						    used_orders[j]));
	}

	return 0;
}

/*
 * No block of any order overlaps memory that is in use; and all zones are
 * walked: those of other nodes, that the kernel cannot allocate from, and with
 * addresses of more than 32 bits.
 */
static void never_reports_used_memory(struct kunit *test)
{
	struct used *used = kunit_kzalloc(test, sizeof(*used), GFP_KERNEL);
	struct hint_test *t = test->priv;
	struct zone *zone;

	KUNIT_ASSERT_NOT_NULL(test, used);
	used->test = test;
	set_batch(test, 64);
	t->walk.fn = used_fn;
	t->walk.private = used;
	for (int i = 0; i < ARRAY_SIZE(used->pages); i++)
		used->pages[i] = alloc_pages(GFP_KERNEL | __GFP_NOWARN,
					     used_orders[i]);
	/* The largest has 512 MiB where pages have 64 KiB. */
	if (!used->pages[0] || !used->pages[1] || !used->pages[2]) {
		free_used(used);
		kunit_skip(test, "no free block of order %d", MAX_PAGE_ORDER);
	}

	for (t->walk.order = 0; t->walk.order < NR_PAGE_ORDERS;
	     t->walk.order++) {
		used->order = t->walk.order;
		KUNIT_EXPECT_EQ(test, 0, free_page_hint_walk(&t->walk));
	}

	/* So much is not all taken or split within a moment. */
	for_each_populated_zone(zone)
		if (zone->free_area[MAX_PAGE_ORDER].nr_free >= 32)
			KUNIT_EXPECT_TRUE_MSG(test,
					      test_bit(zone_bit(zone), used->seen),
					      "node %d, zone %s",
					      zone_to_nid(zone), zone->name);
	free_used(used);
}

static struct kunit_case free_page_hint_cases[] = {
	KUNIT_CASE_PARAM(reports_each_block_once, batch_lens_gen_params),
	KUNIT_CASE(never_reports_isolated_blocks),
	KUNIT_CASE(ends_when_asked_to),
	KUNIT_CASE(ends_while_blocks_are_freed),
	KUNIT_CASE(ends_without_its_first_entry),
	KUNIT_CASE(ends_when_all_is_taken),
	KUNIT_CASE(refuses_nonsense),
	KUNIT_CASE(never_reports_used_memory),
	{}
};

static struct kunit_suite free_page_hint_suite = {
	.name = "free_page_hint",
	.init = hint_test_init,
	.exit = hint_test_exit,
	.test_cases = free_page_hint_cases,
};

kunit_test_suite(free_page_hint_suite);
