/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _LINUX_FREE_PAGE_HINT_CACHE_H
#define _LINUX_FREE_PAGE_HINT_CACHE_H

#include <linux/types.h>

/**
 * struct free_page_hint_cache - page cache that is to be freed
 * @nr_pages: how much at most
 * @check: called before each step, of 1 MiB mostly, and for each list, without
 *	locks; anything but 0 ends the work and becomes its result
 * @private: for @check
 * @freed: result: pages that were freed
 * @scanned: result: pages that were looked at
 * @full: private: a folio did not fit into the rest of @nr_pages
 */
struct free_page_hint_cache {
	unsigned long nr_pages;
	int (*check)(void *private);
	void *private;

	unsigned long freed;
	unsigned long scanned;
	bool full;
};

int free_page_hint_free_cache(struct free_page_hint_cache *cache);
unsigned long free_page_hint_cache_size(void);

#endif /* _LINUX_FREE_PAGE_HINT_CACHE_H */
