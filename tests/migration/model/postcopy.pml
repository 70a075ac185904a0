/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Postcopy: the source after the switch, the link, and the destination, whose
 * userfaultfd tells it of each page that a vCPU misses.
 */

#ifdef PREEMPT
#define QUEUED(p) queued[p]
#else
/* The way to the source and the wait in its queue are the same delay. */
#define QUEUED(p) request[p]
#endif

/* HUGE: both pages are one page of the host, placed when the second has come. */
#ifdef HUGE
#define HOST_PAGE(p) 0 .. PAGES - 1
#define ALL_HINTED(p) (hint_bmap[0] && hint_bmap[1])
#ifdef M42
#define ANY_RECEIVED(p) 0
#else
#define ANY_RECEIVED(p) (received[0] || received[1])
#endif
#define HAS_COME(p) (on_link[0] && on_link[1])
#define MAY_START_AT_1 (!bmap[0])
#define PSS_OVERLAP(p) (host_page_sending != NONE)
#else
#define HOST_PAGE(p) p .. p
#define ALL_HINTED(p) hint_bmap[p]
#define ANY_RECEIVED(p) received[p]
#define HAS_COME(p) on_link[p]
#define MAY_START_AT_1 1
#define PSS_OVERLAP(p) (host_page_sending == p)
#endif

/* ---- the source: under bitmap_mutex ---- */

/* In a d_step. The destination has asked for the host page. */
inline free_page_hint_request(p)
{
#ifdef M41
	for (i : p .. p) {
#else
	for (i : HOST_PAGE(p)) {
#endif
		if
		:: hint_bmap[i] && !bmap[i] ->
			MARK(hinted_page_asked_for);
			bmap[i] = 1;
			dirty_pages++
		:: !hint_bmap[i] && !bmap[i] -> MARK(asked_for_twice)
		:: else
		fi
	}
}

/* In a d_step. */
inline migration_bitmap_clear_dirty(p, what)
{
	what = (bmap[p] -> PAGE : NOTHING);
	dirty_pages = dirty_pages - bmap[p];
	bmap[p] = 0;
	free_page_hint_check()
}

/*
 * In a d_step. A hinted page is not looked at: it goes as a zero page. UFFDIO_COPY
 * fails where there is a page: two are one too many.
 */
inline ram_save_target_page(p, what, channel)
{
	/* free_page_hint_is_zero(), which asks no more once it was sent */
	if
	:: what && hint_bmap[p] ->
		what = ZERO_PAGE;
#ifndef M30
		hint_bmap[p] = 0
#endif
	:: else
	fi;
	if
	:: what && connected ->
		CHECK(S7_page_placed_once, !on_link[p]);
#ifdef HUGE
		/* "Non-same host page" */
		CHECK(S9_host_page_whole, !p || (on_link[0] && (on_link[0] > ZERO_PAGE) == channel / 2));
#endif
		on_link[p] = what + channel
	:: else
	fi;
	what = NOTHING
}

/* In a d_step. The answer is a message for each RAMBlock, "received". */
inline ram_dirty_bitmap_reload()
{
	for_each_page(i) {
		bmap[i] = !received[i];
		/* free_page_hint_recover() */
#if defined(M32)
		bmap[i] = bmap[i] && !was_hinted[i];
#elif defined(M33)
		bmap[i] = bmap[i] && !hinted_at_switch[i];
#elif defined(M40)
		bmap[i] = bmap[i] && !hint_bmap[i];
#elif !defined(M34)
		/* What of the host page was not received although some was, is hinted. */
		bmap[i] = bmap[i] && !ALL_HINTED(i) && !ANY_RECEIVED(i);
#endif
	}
}

/* In a d_step. */
inline ram_state_resume_prepare()
{
	dirty_pages = 0;
	for_each_page(i) {
		dirty_pages = dirty_pages + bmap[i]
	}
}

/* ---- the source: its threads ---- */

inline ram_postcopy_send_discard_bitmap(p)
{
	migration_bitmap_sync(p);
	p = 0;
	/* postcopy_each_ram_send_discard(): not what is hinted */
	d_step {
		for_each_page(i) {
			if
			:: bmap[i] ->
				mapped[i] = 0;
				received[i] = 0;
				foreign[i] = 0;
				dst_zero[i] = 1;
				differs[i] = !zero[i]
			:: else
			fi;
#ifdef M33
			hinted_at_switch[i] = hint_bmap[i];
#endif
			/* Nobody looks at these any more. */
			kdirty[i] = 0;
			prot[i] = 0;
			dirty_bmap[i] = 0;
			alloc[i] = 0
		}
		for (i : 0 .. PAGES * VCPUS - 1) {
			tlb[i] = 0;
		}
		clear_bmap = 0;
		epoch_moved = 0
	}
}

inline ram_save_host_page_postcopy(p, what)
{
	d_step { !bitmap_mutex -> host_page_sending = p; migration_bitmap_clear_dirty(p, what) };
	/* With preempt the mutex is given back before it is sent. */
	d_step { ram_save_target_page(p, what, MAIN_CHANNEL); skip };
#ifdef HUGE
	d_step { !bitmap_mutex -> migration_bitmap_clear_dirty(1, what) };
	d_step {
		ram_save_target_page(1, what, MAIN_CHANNEL);
		CHECK(S9_host_page_whole, !on_link[0] || on_link[1])
	};
#endif
	/* pss_host_page_finish() */
	host_page_sending = NONE
}

/* postcopy_pause(), as soon as it is noticed: migrate_recover, postcopy_do_resume() */
inline postcopy_pause()
{
	/* close_return_path_on_source() */
	rp_page == NONE;
	MARK(link_recovered);
	d_step { ram_dirty_bitmap_reload(); skip };
	d_step { ram_state_resume_prepare(); free_page_hint_check() };
	d_step {
		connected = 1;
		/* migrate_send_rp_resume_ack(): it recovers only what is loaded. */
		load_known = 1;
		/* migrate_send_rp_req_pages_pending() */
		for_each_page(i) {
			request[i] = request[i] || requested[i]
		}
	}
}

#if PAGES == 1
#define ANY_HINTED hint_bmap[0]
#define ANY_QUEUED queued[0]
#define NONE_REQUESTED (!requested[0])
#define NO_FAULT (!fault[0])
#define MAIN_CHANNEL_READ (on_link[0] != PAGE && on_link[0] != ZERO_PAGE)
#else
#define ANY_HINTED (hint_bmap[0] || hint_bmap[1])
#define ANY_QUEUED (queued[0] || queued[1])
#define NONE_REQUESTED (!requested[0] && !requested[1])
#define NO_FAULT (!fault[0] && !fault[1])
#define MAIN_CHANNEL_READ (on_link[0] != PAGE && on_link[0] != ZERO_PAGE && \
			   on_link[1] != PAGE && on_link[1] != ZERO_PAGE)
#endif

/*
 * While the destination loads its devices it does not end, and it may wait for
 * a page: somebody has to be there to send it.
 */
#if defined(PREEMPT) || defined(M35)
#define MAY_END 1
#else
#define MAY_END (load_known || !ANY_HINTED)
#endif

/* What is left is sent in any order: asked for, or not. */
inline postcopy_run(p, what)
{
	do
	:: !connected -> postcopy_pause()
	/* get_queued_page() */
	:: d_step {
		connected && QUEUED(0) -> QUEUED(0) = 0; p = 0;
#ifndef M14
		free_page_hint_request(0);
#endif
		skip
	   }
		ram_save_host_page_postcopy(p, what)
#if PAGES > 1
	:: d_step {
		connected && QUEUED(1) -> QUEUED(1) = 0; p = 1;
#ifndef M14
		free_page_hint_request(1);
#endif
		skip
	   }
		ram_save_host_page_postcopy(p, what)
	/* HUGE: it looks from the start of the host page. */
	:: connected && bmap[1] && MAY_START_AT_1 -> ram_save_host_page_postcopy(1, what)
#endif
	:: connected && bmap[0] -> ram_save_host_page_postcopy(0, what)
	/* migration_completion_postcopy() */
	:: d_step { connected && ALL_SENT && !ANY_QUEUED && MAY_END -> source_done = 1 } -> break
	od;
	p = NONE;
	/* close_return_path_on_source(): the destination says that it is done. */
	!userfault;
	migrating = 0
}

inline postcopy_start(p)
{
	bql_lock();
	vm_stop();
	ram_postcopy_send_discard_bitmap(p);
	bql_unlock();
	d_step { postcopy = 1; userfault = 1; connected = 1 };
	/* MIGRATION_STATUS_DEVICE, until here */
	postcopy_active = 1
}

#ifdef M52
#define REMEMBERED 0
#else
#define REMEMBERED 1
#endif

/* Any state that a switch can find */
inline any_switch(p)
{
#ifdef HUGE
	/* postcopy_chunk_hostpages_pass(): what is dirty, is wholly dirty. */
	if
	:: d_step { live[0] = 1; live[1] = 1; mapped[0] = 1; received[0] = 1; received[1] = 1 }
	:: d_step { live[0] = 1; differs[0] = 1; bmap[0] = 1; bmap[1] = 1; dirty_pages = 2 }
		if
		:: d_step { live[1] = 1; differs[1] = 1 }
		:: d_step { zero[1] = 1; hint_bmap[1] = 1 }
		fi
	:: d_step { live[1] = 1; differs[1] = 1; zero[0] = 1; hint_bmap[0] = 1;
		bmap[0] = 1; bmap[1] = 1; dirty_pages = 2 }
	/* A part of it was dirtied, and sent before the switch. */
	:: d_step { live[0] = 1; received[0] = 1; zero[1] = 1; hint_bmap[1] = 1; mapped[0] = 1 }
	:: d_step { live[1] = 1; received[1] = 1; zero[0] = 1; hint_bmap[0] = 1; mapped[0] = 1 }
	:: d_step { zero[0] = 1; zero[1] = 1; hint_bmap[0] = 1; hint_bmap[1] = 1 }
		if
		:: mapped[0] = 1
		:: skip
		fi
	fi;
	p = PAGES;
#else
	p = 0;
#endif
	do
	:: p < PAGES ->
		if
		/* sent */
		:: d_step { live[p] = 1; mapped[p] = 1; received[p] = 1 }
		/* dirty */
		:: d_step { live[p] = 1; differs[p] = 1; bmap[p] = 1; dirty_pages++ }
		/* hinted, and there by a huge page, or not */
		:: d_step { zero[p] = 1; hint_bmap[p] = REMEMBERED }
		:: d_step { zero[p] = 1; hint_bmap[p] = REMEMBERED; mapped[p] = 1 }
		fi;
#ifdef M33
		hinted_at_switch[p] = hint_bmap[p];
#endif
		p++
	:: else -> break
	od;
	migrating = 1;
	d_step { postcopy = 1; userfault = 1; connected = 1 };
	postcopy_active = 1
}

#ifdef PREEMPT
/* With the bitmap's mutex all along. */
inline ram_save_host_page_urgent(p, what)
{
	d_step {
		!bitmap_mutex ->
#ifdef M31
		free_page_hint_request(p);
#endif
		if
		:: !PSS_OVERLAP(p) ->
#if !defined(M29) && !defined(M31)
			free_page_hint_request(p);
#endif
			for (target : HOST_PAGE(p)) {
				migration_bitmap_clear_dirty(target, what);
				what = (preempt_joined -> NOTHING : what);
				ram_save_target_page(target, what, PREEMPT_CHANNEL)
			}
#ifdef HUGE
			CHECK(S9_host_page_whole, !on_link[0] || on_link[1])
#endif
		:: else
		fi
	}
}

/* ram_save_queue_pages() */
proctype source_return_path_thread()
{
	byte what;
	bit urgent;

	do
	:: atomic {
		if
		:: connected && request[0] -> request[0] = 0; rp_page = 0
#if PAGES > 1
		:: connected && request[1] -> request[1] = 0; rp_page = 1
#endif
		fi;
		/* postcopy_preempt_active() */
		urgent = postcopy_active
	   }
		if
		:: urgent -> ram_save_host_page_urgent(rp_page, what)
		:: else ->
			queued[rp_page] = 1;
#ifndef M36
			/* The migration thread may have looked for the last time. */
			if
			:: postcopy_active -> MARK(queued_too_late); ram_save_host_page_urgent(rp_page, what)
			:: else
			fi
#endif
		fi;
		atomic { urgent = 0; rp_page = NONE }
	od
}
#endif

/* ---- the link ---- */

#ifdef CUTS
proctype link_cut()
{
	byte left = CUTS;

	do
	/* Before its devices are loaded the destination gives up. */
	:: atomic {
		left && loaded && connected && !source_done ->
		left--;
		connected = 0;
		d_step {
			for_each_page(i) {
				on_link[i] = NOTHING
			}
			skip
		};
		if
		/* On their way */
		:: d_step {
			for_each_page(i) {
				request[i] = 0
			}
			skip
		   }
#ifndef PREEMPT
		/* Queued */
		:: skip
#endif
		fi
	   }
	od
}
#endif

/* ---- the destination ---- */

#define READABLE(p) (postcopy && (mapped[p] || !userfault))

/* vCPUs, and what loads the state of the devices. Two of them at most miss a page. */
proctype destination_page(byte p)
{
	byte asked;

	do
	:: d_step { userfault && !mapped[p] && !fault[p] -> fault[p] = 1 }
	/* postcopy_ram_fault_thread(): migrate_send_rp_req_pages() */
	:: d_step { userfault && fault[p] && !mapped[p] && asked < 2 ->
		asked++;
		requested[p] = 1;
		request[p] = request[p] || connected
	   }
	/* postcopy_place_page(), which wakes them */
	:: d_step { HAS_COME(p) && userfault ->
		CHECK(S7_page_placed_once, !mapped[p]);
		for (i : HOST_PAGE(p)) {
			if
			:: on_link[i] == ZERO_PAGE || on_link[i] == ZERO_PAGE + PREEMPT_CHANNEL ->
				transfer_zero(i)
			:: else -> transfer(i)
			fi;
			on_link[i] = NOTHING
		}
		requested[p] = 0
	   }
	:: d_step { READABLE(p) ->
		if
		:: fault[p] && !mapped[p] -> MARK(woken_by_the_end)
		:: else
		fi;
		for (i : HOST_PAGE(p)) {
			check_page(i)
		}
		fault[p] = 0
	   }
	od
}

/* The main thread: whoever waits for a page before it is done is itself. */
proctype loadvm_handle_cmd_packaged()
{
	d_step { postcopy && NO_FAULT -> loaded = 1 };
	/* The answer to ping 3 */
	d_step { load_known = load_known || connected }
}

proctype postcopy_ram_listen_thread()
{
	/* The end of the stream, and main_thread_load_event */
	source_done && MAIN_CHANNEL_READ && loaded;
	/* postcopy_ram_incoming_cleanup() */
#ifdef PREEMPT
	d_step {
		NONE_REQUESTED -> preempt_joined = 1;
		for_each_page(i) {
			on_link[i] = NOTHING
		}
	};
#endif
	/* UFFDIO_UNREGISTER wakes whoever waits: zeroes from here on. */
	d_step {
		userfault = 0;
		for_each_page(i) {
			check_page(i)
		}
	}
}
