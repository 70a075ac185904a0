/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The device: hw/virtio/virtio-balloon-hint.c. All of it runs with the BQL. */

inline virtqueue_kick()
{
	bh = bh || notification
}

/* In a d_step. virtio_notify_config() and what the driver does at once */
inline virtballoon_changed()
{
	work = 1;
	changed = 1
}

/* In a d_step. */
inline virtio_balloon_hint_ask()
{
	cmd_id++;
	block_id = 0;
	status = ASKED_GUEST;
	virtballoon_changed()
}

/* In a d_step. */
inline virtio_balloon_hint_done()
{
#ifndef M23
	status = DONE;
	virtballoon_changed();
#endif
#ifndef M26
	bh = 1;
#endif
	skip
}

inline virtio_balloon_hint_set_status(runs)
{
	device_running = runs;
	if
	:: !runs -> free_page_hint_abort()
	:: else ->
#ifndef M27
		bh = 1
#endif
	fi
}

inline virtio_balloon_hint_reset()
{
	d_step {
		device_running = 0;
		block_id = 0;
		status = STOP
	}
	free_page_hint_abort();
	/* virtio_reset() */
	d_step {
		do
		:: nempty(vq) -> vq?c
		:: empty(vq) -> break
		od;
		notification = 1
	}
}

#ifndef NO_DEVICE
active proctype virtio_balloon_hint_bh()
{
	byte b;

idle:
	atomic {
		bh && BQL_FREE_FOR_BH -> bh = 0; bql_bh_ran();
#ifndef M13
		if
		:: !device_running -> goto idle
		:: else
		fi;
#endif
		/* hint_handle_elements() */
		notification = 0;
		if
		:: !free_page_hint_has_room() -> MARK(queue_full); starved = 1; goto idle
		:: else
		fi;
		if
		:: empty(vq) -> notification = 1; goto idle
		:: nempty(vq) -> vq?b; bql = 1
		fi
	}

#if defined(BLOCKS)
	if
	/* hint_handle_command() */
	:: b == START_BUF || b == END_BUF -> atomic {
		if
		:: block_id -> free_page_hint_end(block_id); block_id = 0
		:: !block_id && free_page_hint_wanted(buf_id[b]) -> block_id = buf_id[b]
		:: else
		fi
	   }
	/* hint_handle_blocks() */
	:: else ->
		if
		:: block_id -> free_page_hint_submit(block_id, buf_page[b])
		:: else
		fi
	fi;
#elif defined(M17)
	/* The device applies hints itself. */
	if
	:: b == END_BUF
	:: else -> lock(bitmap_mutex); unlock(bitmap_mutex)
	fi;
#else
	/* hint_handle_array() */
	if
	:: b == END_BUF -> free_page_hint_end(buf_id[b])
	:: else -> free_page_hint_submit(buf_id[b], buf_page[b])
	fi;
#endif
	d_step {
		/* virtqueue_push() writes to the guest's memory. */
		CHECK(S5_stopped_vm_unchanged, device_running);
#ifdef M25
		device_has_it[b] = !free_page_hint_wanted(buf_id[b]);
#else
		device_has_it[b] = 0;
#endif
		buf_id[b] = 0;
		buf_page[b] = 0;
		b = 0;
		/* An array uses up the budget, the rest comes later. */
		bh = 1;
		unlock(bql)
	}
	goto idle
}
#endif
