// SPDX-License-Identifier: GPL-2.0
/*
 * memstamp in the kernel: memory that knows whether it survived
 *
 * A server owns blocks of the page allocator and does with them what the
 * program memstamp does, see there and stamp.h: stamp, verify, rewrite, take
 * from the allocator and give back. Blocks are of all orders, from the largest
 * to single pages, from all zones. A page that is new need not be clear here.
 */
#include <linux/cleanup.h>
#include <linux/err.h>
#include <linux/gfp.h>
#include <linux/kthread.h>
#include <linux/ktime.h>
#include <linux/list.h>
#include <linux/log2.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "memstamp.h"
#include "stamp.h"

/* Pages that are rewritten before somebody else may have the server. */
#define STEP_PAGES	16

/* Some pages. Their indices are unique in a server. */
struct area {
	/* By page->lru; page->private is a block's order. */
	struct list_head blocks;
	u64 pages;
	u64 first_index;
};

struct server {
	struct list_head node;
	char name[32];
	/* NULL unless it churns. */
	struct task_struct *task;

	/* Protects what follows. */
	struct mutex lock;
	struct stamp_counts counts;
	struct area main;
	/* Pages before the cursor have generation pass, others pass - 1. */
	u64 pass;
	u64 cursor;
	struct page *cursor_block;
	unsigned int cursor_page;
	/* When it last began a step, and the longest time between two. */
	ktime_t stepped;
	s64 gap_us;
	/* Pages that were rewritten. */
	u64 rewritten;
	/* Memory that is taken from the allocator and given back. */
	struct area *chunks;
	u64 max_chunks;
	u64 chunks_held;
	u64 chunks_goal;
	u64 chunk_generation;
	bool giving_back;
	/* Memory that was about to be hinted in the last report. */
	struct area taken;
	u64 take_pages;
	u64 taken_generation;
};

/* Servers come and go on the agent's order, and the balloon looks at all. */
static LIST_HEAD(servers);
static DEFINE_MUTEX(servers_lock);

static void write_page(struct page *page, u64 index, u64 generation)
{
	stamp_write(page_address(page), index, generation);
	memstamp_written(page);
	cond_resched();
}

static void check_page(struct server *s, struct page *page, u64 index,
		       u64 generation)
{
	stamp_check(&s->counts, page_address(page), index, generation);
	cond_resched();
}

/* Areas */

static void area_init(struct area *area, u64 first_index)
{
	INIT_LIST_HEAD(&area->blocks);
	area->pages = 0;
	area->first_index = first_index;
}

static void area_add(struct area *area, struct page *block, unsigned int order)
{
	set_page_private(block, order);
	list_add_tail(&block->lru, &area->blocks);
	area->pages += 1ULL << order;
}

static void area_free(struct area *area)
{
	struct page *block, *next;

	list_for_each_entry_safe(block, next, &area->blocks, lru) {
		list_del(&block->lru);
		__free_pages(block, page_private(block));
	}
	area->pages = 0;
}

/* Memory for user space, movable or not, in turn: it is not moved in use. */
static struct page *alloc_block(unsigned int order, bool movable)
{
	gfp_t gfp = movable ? GFP_HIGHUSER_MOVABLE : GFP_HIGHUSER;

	return alloc_pages(gfp | __GFP_NORETRY | __GFP_NOWARN, order);
}

/* Blocks of all orders in turn, as large as there are. */
static int area_alloc(struct area *area, u64 pages, unsigned int turn)
{
	while (area->pages < pages) {
		int order = min_t(int, ilog2(pages - area->pages),
				  MAX_PAGE_ORDER - turn % NR_PAGE_ORDERS);
		struct page *block = NULL;

		for (; order >= 0 && !block; order--) {
			block = alloc_block(order, turn & 1);
			if (block)
				area_add(area, block, order);
		}
		if (!block) {
			area_free(area);
			return -ENOMEM;
		}
		turn++;
	}

	return 0;
}

static void area_write(struct area *area, u64 generation)
{
	u64 index = area->first_index;
	struct page *block;
	unsigned long i;

	list_for_each_entry(block, &area->blocks, lru)
		for (i = 0; i < 1UL << page_private(block); i++)
			write_page(block + i, index++, generation);
}

static void area_check(struct server *s, struct area *area, u64 generation)
{
	u64 index = area->first_index;
	struct page *block;
	unsigned long i;

	list_for_each_entry(block, &area->blocks, lru)
		for (i = 0; i < 1UL << page_private(block); i++)
			check_page(s, block + i, index++, generation);
}

/* Churn */

static void cursor_to_start(struct server *s)
{
	s->cursor = 0;
	s->cursor_block = list_first_entry(&s->main.blocks, struct page, lru);
	s->cursor_page = 0;
}

static void rewrite_step(struct server *s)
{
	ktime_t now = ktime_get();
	unsigned int i;

	s->gap_us = max(s->gap_us, ktime_us_delta(now, s->stepped));
	s->stepped = now;
	for (i = 0; i < STEP_PAGES; i++) {
		struct page *page = s->cursor_block + s->cursor_page;

		check_page(s, page, s->cursor, s->pass - 1);
		write_page(page, s->cursor, s->pass);
		s->rewritten++;
		if (++s->cursor == s->main.pages) {
			cursor_to_start(s);
			s->pass++;
			s->counts.passes++;
			break;
		}
		if (++s->cursor_page == 1U << page_private(s->cursor_block)) {
			s->cursor_block = list_next_entry(s->cursor_block, lru);
			s->cursor_page = 0;
		}
	}
}

static bool take_chunk(struct server *s)
{
	struct area *chunk = &s->chunks[s->chunks_held];

	area_init(chunk,
		  s->main.pages + s->chunks_held * STAMP_CHUNK_PAGES);
	if (area_alloc(chunk, STAMP_CHUNK_PAGES,
		       s->chunks_held + s->chunk_generation))
		return false;

	area_write(chunk, s->chunk_generation);
	s->chunks_held++;
	s->counts.reallocs++;
	return true;
}

/* As in the program, in smaller steps: up to a goal, then down to nothing. */
static void realloc_step(struct server *s)
{
	struct area *chunk;

	if (s->chunks_held == s->chunks_goal)
		s->giving_back = true;
	/* Or there is no more. */
	if (!s->giving_back && take_chunk(s))
		return;

	s->giving_back = true;
	if (s->chunks_held) {
		chunk = &s->chunks[--s->chunks_held];
		area_check(s, chunk, s->chunk_generation);
		area_free(chunk);
	}
	if (!s->chunks_held) {
		s->giving_back = false;
		s->chunk_generation++;
		s->chunks_goal = stamp_chunks_goal(s->chunk_generation,
						   s->max_chunks);
	}
}

static int churn(void *private)
{
	struct server *s = private;

	while (!kthread_should_stop()) {
		mutex_lock(&s->lock);
		rewrite_step(s);
		if (s->max_chunks)
			realloc_step(s);
		mutex_unlock(&s->lock);
		/* Others may wait for the lock. */
		schedule_timeout_idle(1);
	}

	return 0;
}

/* What is about to be hinted */

void memstamp_give_back(void)
{
	struct server *s;

	guard(mutex)(&servers_lock);
	list_for_each_entry(s, &servers, node) {
		guard(mutex)(&s->lock);
		area_check(s, &s->taken, s->taken_generation);
		area_free(&s->taken);
		s->taken_generation++;
	}
}

/* Blocks of other kinds come with those that are wanted, and go back. */
static u64 take_for(struct server *s, unsigned int order)
{
	gfp_t gfp = (GFP_HIGHUSER_MOVABLE & ~__GFP_DIRECT_RECLAIM) |
		    __GFP_NOWARN;
	u64 before = s->taken.pages;
	u64 index = s->taken.first_index + before;
	struct area others;
	struct page *block;
	unsigned long i;

	area_init(&others, 0);
	while (s->taken.pages < s->take_pages &&
	       others.pages < 16 * s->take_pages) {
		block = alloc_pages(gfp, order);
		if (!block)
			break;
		if (!memstamp_is_hinted(block)) {
			area_add(&others, block, order);
			continue;
		}
		area_add(&s->taken, block, order);
		for (i = 0; i < 1UL << order; i++)
			write_page(block + i, index++, s->taken_generation);
	}
	area_free(&others);

	return s->taken.pages - before;
}

u64 memstamp_take(unsigned int order)
{
	struct server *s;
	u64 pages = 0;

	guard(mutex)(&servers_lock);
	list_for_each_entry(s, &servers, node) {
		guard(mutex)(&s->lock);
		pages += take_for(s, order);
	}

	return pages;
}

/* Orders */

static struct server *find_server(const char *name)
{
	struct server *s;

	list_for_each_entry(s, &servers, node)
		if (!strcmp(s->name, name))
			return s;

	return NULL;
}

static void free_server(struct server *s)
{
	while (s->chunks_held)
		area_free(&s->chunks[--s->chunks_held]);
	area_free(&s->taken);
	area_free(&s->main);
	kfree(s->chunks);
	kfree(s);
}

static struct server *new_server(const struct stamp_options *options)
{
	struct server *s = kzalloc(sizeof(*s), GFP_KERNEL);

	if (!s)
		return NULL;

	strscpy(s->name, options->name);
	mutex_init(&s->lock);
	area_init(&s->main, 0);
	s->pass = 2;
	s->chunk_generation = 1;
	s->max_chunks = options->realloc_mib / STAMP_CHUNK_MIB;
	s->chunks_goal = s->max_chunks;
	s->take_pages = options->take_mib * STAMP_PAGES_PER_MIB;
	s->taken_generation = 1;
	s->chunks = kcalloc(s->max_chunks, sizeof(*s->chunks), GFP_KERNEL);
	area_init(&s->taken, (options->mib + options->realloc_mib) *
			     STAMP_PAGES_PER_MIB);
	if (!s->chunks ||
	    area_alloc(&s->main, options->mib * STAMP_PAGES_PER_MIB, 0)) {
		free_server(s);
		return NULL;
	}

	area_write(&s->main, s->pass - 1);
	cursor_to_start(s);
	s->stepped = ktime_get();
	return s;
}

int memstamp_start(int argc, char **argv, char *answer, size_t size)
{
	struct stamp_options options;
	struct server *s;

	if (!stamp_parse(&options, argc, argv) || !options.mib)
		return -EINVAL;
	if (find_server(options.name))
		return -EEXIST;

	s = new_server(&options);
	if (!s)
		return -ENOMEM;

	if (options.churn)
		s->task = kthread_run(churn, s, "churn");
	if (IS_ERR(s->task)) {
		int err = PTR_ERR(s->task);

		free_server(s);
		return err;
	}

	guard(mutex)(&servers_lock);
	list_add(&s->node, &servers);
	return 0;
}

static u64 verify(struct server *s)
{
	u64 before = s->counts.checked;
	u64 done = s->cursor;
	struct page *block;
	u64 index = 0;
	unsigned long i;

	list_for_each_entry(block, &s->main.blocks, lru)
		for (i = 0; i < 1UL << page_private(block); i++, index++)
			check_page(s, block + i, index,
				   index < done ? s->pass : s->pass - 1);
	for (i = 0; i < s->chunks_held; i++)
		area_check(s, &s->chunks[i], s->chunk_generation);
	area_check(s, &s->taken, s->taken_generation);

	return s->counts.checked - before;
}

static void answer_verify(struct server *s, char *answer, size_t size)
{
	struct stamp_counts *counts = &s->counts;
	u64 verified;

	guard(mutex)(&s->lock);
	verified = verify(s);
	snprintf(answer, size, STAMP_ANSWER, verified, counts->errors,
		 counts->checked, counts->passes, counts->reallocs,
		 counts->errors ? counts->first_error : "none");
}

/* Returns the exit status, as the program does. */
int memstamp_verify(int argc, char **argv, bool stop, char *answer, size_t size)
{
	struct stamp_options options;
	struct server *s;
	int status;

	if (!stamp_parse(&options, argc, argv))
		return -EINVAL;
	s = find_server(options.name);
	if (!s)
		return -ENOENT;

	answer_verify(s, answer, size);
	status = !!s->counts.errors;
	if (stop) {
		scoped_guard(mutex, &servers_lock)
			list_del(&s->node);
		if (s->task)
			kthread_stop(s->task);
		free_server(s);
	}

	return status;
}

/*
 * How a server that churns got on since it was last asked: the longest time
 * between two steps, in microseconds, and the pages that it rewrote.
 */
int memstamp_gap(int argc, char **argv, char *answer, size_t size)
{
	struct stamp_options options;
	struct server *s;

	if (!stamp_parse(&options, argc, argv))
		return -EINVAL;
	s = find_server(options.name);
	if (!s || !s->task)
		return -ENOENT;

	guard(mutex)(&s->lock);
	snprintf(answer, size, "gap=%lld written=%llu\n", s->gap_us,
		 s->rewritten);
	s->gap_us = 0;
	s->rewritten = 0;
	return 0;
}

/* One word makes a page one that must be sent, if it were not free. */
int memstamp_dirty_and_free(u64 mib, char *answer, size_t size)
{
	struct page *block;
	struct area area;
	unsigned long i;
	int err;

	area_init(&area, 0);
	err = area_alloc(&area, mib * STAMP_PAGES_PER_MIB, 0);
	if (err)
		return err;

	list_for_each_entry(block, &area.blocks, lru)
		for (i = 0; i < 1UL << page_private(block); i++) {
			*(u64 *)page_address(block + i) = STAMP_MAGIC;
			memstamp_written(block + i);
			cond_resched();
		}
	area_free(&area);
	snprintf(answer, size, "wrote and freed %llu MiB\n", mib);
	return 0;
}
