/* SPDX-License-Identifier: GPL-2.0 */
/* What differs between the trees that free page hints are made for. */
#ifndef _MM_FREE_PAGE_HINT_COMPAT_H
#define _MM_FREE_PAGE_HINT_COMPAT_H

#include <linux/gfp.h>
#include <linux/kconfig.h>
#include <linux/page-isolation.h>

#if __has_include("page_alloc.h")
/* Linux 7.3: drain_all_pages() is in here, and isolation has modes. */
#include "page_alloc.h"
#define ISOLATION_HAS_MODES
#endif

/* Only the tests isolate pages. A build out of tree has none. */
#if IS_ENABLED(CONFIG_FREE_PAGE_HINT_KUNIT_TEST)
#ifdef ISOLATION_HAS_MODES
static inline int isolate_range(unsigned long start, unsigned long end, int mt)
{
	return start_isolate_page_range(start, end, PB_ISOLATE_MODE_OTHER);
}

static inline void undo_isolate_range(unsigned long start, unsigned long end,
				      int mt)
{
	undo_isolate_page_range(start, end);
}
#else
static inline int isolate_range(unsigned long start, unsigned long end, int mt)
{
	return start_isolate_page_range(start, end, mt, 0, GFP_KERNEL);
}

static inline void undo_isolate_range(unsigned long start, unsigned long end,
				      int mt)
{
	undo_isolate_page_range(start, end, mt);
}
#endif
#endif

#endif /* _MM_FREE_PAGE_HINT_COMPAT_H */
