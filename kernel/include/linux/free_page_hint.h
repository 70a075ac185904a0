/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _LINUX_FREE_PAGE_HINT_H
#define _LINUX_FREE_PAGE_HINT_H

#include <linux/types.h>

/* Most free list entries read in one hold of a zone's lock. */
#define FREE_PAGE_HINT_MAX_BATCH	1024

/**
 * typedef free_page_hint_fn - takes blocks that were free a moment ago
 * @addrs: physical addresses of the blocks, each aligned to the block's size
 * @nr: number of addresses, at least one
 * @private: the walk's private pointer
 *
 * Called without locks, and may sleep. The blocks can be in use again already.
 *
 * Return: 0 to go on; anything else ends the walk and becomes its result.
 */
typedef int (*free_page_hint_fn)(const phys_addr_t *addrs, unsigned int nr,
				 void *private);

/**
 * struct free_page_hint_walk - one walk over the free lists of one order
 * @order: order of the free list entries that are wanted, exactly
 * @batch_len: entries that @batch has room for; no more are read in one hold of
 *	a zone's lock, and never more than FREE_PAGE_HINT_MAX_BATCH
 * @batch: the caller's memory, used for handing addresses to @fn
 * @fn: takes the blocks
 * @private: for @fn
 * @blocks: result: blocks that were given to @fn
 * @holds: result: how often a zone's lock was taken
 */
struct free_page_hint_walk {
	unsigned int order;
	unsigned int batch_len;
	phys_addr_t *batch;
	free_page_hint_fn fn;
	void *private;

	unsigned long blocks;
	unsigned long holds;
};

void free_page_hint_drain(void);
int free_page_hint_walk(struct free_page_hint_walk *walk);

#endif /* _LINUX_FREE_PAGE_HINT_H */
