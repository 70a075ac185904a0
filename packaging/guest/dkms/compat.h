/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the new files use, where a kernel has it by another name or not at all
 *
 * Included in front of every file.
 */
#ifndef _FREE_PAGE_HINT_COMPAT_H
#define _FREE_PAGE_HINT_COMPAT_H

#include <linux/minmax.h>
#include <linux/mmzone.h>
#include <linux/nodemask.h>

/* Before 6.8. Up to 6.3, and there is no line in between here, MAX_ORDER is one more. */
#ifndef MAX_PAGE_ORDER
#define MAX_PAGE_ORDER	(MAX_ORDER - 1)
#endif

/* Before 6.11, and the stable kernels that took it over. */
#ifndef MIN
#define MIN(a, b)	((a) < (b) ? (a) : (b))
#endif
#ifndef MAX
#define MAX(a, b)	((a) > (b) ? (a) : (b))
#endif

/* Never exported: a module cannot drain the per-CPU lists. */
#include <linux/gfp.h>
#define drain_all_pages(zone)	do { } while (0)

/* What it calls was never exported either. */
#undef for_each_populated_zone
#define for_each_populated_zone(zone)					\
	for (int nid = first_online_node; nid < MAX_NUMNODES;		\
	     nid = next_online_node(nid))				\
		for (zone = NODE_DATA(nid)->node_zones;			\
		     zone < NODE_DATA(nid)->node_zones + MAX_NR_ZONES;	\
		     zone++)						\
			if (populated_zone(zone))

#endif /* _FREE_PAGE_HINT_COMPAT_H */
