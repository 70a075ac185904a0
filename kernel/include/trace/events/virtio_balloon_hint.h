/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM virtio_balloon_hint

#if !defined(_TRACE_VIRTIO_BALLOON_HINT_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_VIRTIO_BALLOON_HINT_H

#include <linux/tracepoint.h>

/* A new command id was read: the walk starts after this. */
TRACE_EVENT(virtio_balloon_hint_request,
	    TP_PROTO(u32 id),

	    TP_ARGS(id),

	    TP_STRUCT__entry(__field(u32, id)
	    ),

	    TP_fast_assign(__entry->id = id;
	    ),

	    TP_printk("id=%u", __entry->id)
);

/* An array was put on the queue. */
TRACE_EVENT(virtio_balloon_hint_array,
	    TP_PROTO(u32 id, u32 size, unsigned int nr),

	    TP_ARGS(id, size, nr),

	    TP_STRUCT__entry(__field(u32, id)
			     __field(u32, size)
			     __field(unsigned int, nr)
	    ),

	    TP_fast_assign(__entry->id = id;
			   __entry->size = size;
			   __entry->nr = nr;
	    ),

	    TP_printk("id=%u size=%u nr=%u",
		      __entry->id, __entry->size, __entry->nr)
);

/* The end message was put on the queue, or err says why the report was cut. */
TRACE_EVENT(virtio_balloon_hint_end,
	    TP_PROTO(u32 id, u64 arrays, u64 blocks, u64 ns, int err),

	    TP_ARGS(id, arrays, blocks, ns, err),

	    TP_STRUCT__entry(__field(u32, id)
			     __field(u64, arrays)
			     __field(u64, blocks)
			     __field(u64, ns)
			     __field(int, err)
	    ),

	    TP_fast_assign(__entry->id = id;
			   __entry->arrays = arrays;
			   __entry->blocks = blocks;
			   __entry->ns = ns;
			   __entry->err = err;
	    ),

	    TP_printk("id=%u arrays=%llu blocks=%llu ns=%llu err=%d",
		      __entry->id, __entry->arrays, __entry->blocks,
		      __entry->ns, __entry->err)
);

#endif /* _TRACE_VIRTIO_BALLOON_HINT_H */

#include <trace/define_trace.h>
