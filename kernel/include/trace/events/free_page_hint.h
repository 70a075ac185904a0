/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM free_page_hint

#if !defined(_TRACE_FREE_PAGE_HINT_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_FREE_PAGE_HINT_H

#include <linux/tracepoint.h>

/* One hold of a zone's lock: what was read, and for how long it was held. */
TRACE_EVENT(free_page_hint_batch,
	    TP_PROTO(int node, int zone, unsigned int order, unsigned int mt,
		     unsigned int nr, u64 hold_ns),

	    TP_ARGS(node, zone, order, mt, nr, hold_ns),

	    TP_STRUCT__entry(__field(int, node)
			     __field(int, zone)
			     __field(unsigned int, order)
			     __field(unsigned int, mt)
			     __field(unsigned int, nr)
			     __field(u64, hold_ns)
	    ),

	    TP_fast_assign(__entry->node = node;
			   __entry->zone = zone;
			   __entry->order = order;
			   __entry->mt = mt;
			   __entry->nr = nr;
			   __entry->hold_ns = hold_ns;
	    ),

	    TP_printk("node=%d zone=%d order=%u migratetype=%u nr=%u hold_ns=%llu",
		      __entry->node, __entry->zone, __entry->order, __entry->mt,
		      __entry->nr, __entry->hold_ns)
);

#endif /* _TRACE_FREE_PAGE_HINT_H */

#include <trace/define_trace.h>
