/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What is done to bmap and its kin, under bitmap_mutex. */

#ifdef NO_LOG

/* Without pages, what is left of it is that it takes the mutex. */
inline with_bitmap_mutex()
{
	lock(bitmap_mutex);
	unlock(bitmap_mutex)
}

inline migration_bitmap_sync(v) { with_bitmap_mutex() }
inline free_page_hint_arm(v) { with_bitmap_mutex() }
inline free_page_hint_defer() { with_bitmap_mutex() }
inline free_page_hint_apply(page) { with_bitmap_mutex() }

/* The link can stall here, for good; a cancel shuts the socket down. */
inline ram_save_host_page(p)
{
	lock(bitmap_mutex);
	if
	:: MARK(link_stalled); !migrating
	:: skip
	fi;
	unlock(bitmap_mutex)
}

#else

/* In a d_step. */
inline free_page_hint_check()
{
	c = 0;
	for_each_page(i) {
		c = c + bmap[i]
	}
	CHECK(S4_counter_is_popcount, dirty_pages == c)
}

/* Persistent memory is page 0's, if any: the destination leaves that as it is. */
#ifdef PERSISTENT
#define IS_EMPTIED(p) ((p) != 0)
#else
#define IS_EMPTIED(p) 1
#endif
/* ram_stays_as_it_is(): of such memory, all is sent */
#ifdef M56
#define MAY_SKIP(p) 1
#else
#define MAY_SKIP(p) IS_EMPTIED(p)
#endif

/* In a d_step. The destination makes its RAM empty. */
inline ram_load_empty()
{
	for_each_page(i) {
		if
		:: IS_EMPTIED(i) ->
			foreign[i] = 0;
			dst_zero[i] = 1;
			differs[i] = !zero[i]
		:: else
		fi
	}
}

/* ram_list_init_bitmaps(), and ram_load_setup() at the destination */
inline ram_init_bitmaps()
{
	d_step {
		for_each_page(i) {
			bmap[i] = 1;
			hint_bmap[i] = 0;
#ifdef ABSENT
			told[i] = 0;
			absent[i] = 0;
			given_back[i] = 0;
#endif
			mapped[i] = 0;
			received[i] = 0
		}
#if !defined(M37) && !defined(M38)
		ram_load_empty();
#endif
		clear_bmap = 0;
		dirty_pages = PAGES
	}
	memory_global_dirty_log_start()
}

/* ---- merges ---- */

/*
 * In a d_step. What is hinted matters to postcopy alone: without it the merge in
 * the downtime is left as it is, and hint_bmap may be out of date from there on.
 */
#ifdef POSTCOPY
#define FORGET 1
#else
#define FORGET vm_running
#endif

inline free_page_hint_synced()
{
	epoch_moved = 1;
	for_each_page(i) {
		if
		:: FORGET && hint_bmap[i] && bmap[i] ->
			MARK(hint_redirtied);
#if defined(M49)
			hint_bmap[i] = !told[i]
#elif !defined(M15A)
			hint_bmap[i] = 0
#endif
		:: else
		fi;
#ifdef ABSENT
		told[i] = told[i] && !bmap[i];
		absent[i] = absent[i] && !bmap[i]
#endif
	}
}

/* With the BQL. */
inline migration_bitmap_sync(v)
{
	memory_global_dirty_log_sync();
	/* ramblock_sync_dirty_bitmap(): cpu_physical_memory_sync_dirty_bitmap() */
	d_step {
		!bitmap_mutex -> bitmap_mutex = 1;
		for_each_page(i) {
#ifdef M20
			v = v || (dirty_memory[i] && !bmap[i]);
#else
			v = v || dirty_memory[i];
#endif
			dirty_pages = dirty_pages + (dirty_memory[i] && !bmap[i]);
			bmap[i] = bmap[i] || dirty_memory[i];
			dirty_memory[i] = 0;
		}
		clear_bmap = 1;
#ifdef TCG
	}
	/* cpu_physical_memory_dirty_bits_cleared() */
	if
	:: v -> tlb_reset_dirty_range_all()
	:: else
	fi;
	d_step {
#endif
		v = 0;
		free_page_hint_synced();
		free_page_hint_check();
		unlock(bitmap_mutex)
	}
	memory_global_after_dirty_log_sync(v)
}

/* migration_clear_memory_region_dirty_bitmap(). Under bitmap_mutex. */
inline ram_clear_dirty_log(flush)
{
	if
	:: clear_bmap ->
		clear_bmap = 0;
		kvm_log_clear_one_slot(flush)
	:: else
	fi
}

/* ---- hints ---- */

#ifdef M4
#define FLUSH 0
#else
#define FLUSH 1
#endif

#if defined(M1) || defined(M2)
#define ARM 0
#elif defined(M8)
#define ARM !second_round
#else
#define ARM 1
#endif

/* A scan wants it too, also of a VM that stands still. */
#ifdef ABSENT
#define MAY_ARM migrating
#define MAY_CUT_OFF (reason || !migrating)
#else
#define MAY_ARM !reason
#define MAY_CUT_OFF else
#endif

/* hint.armed_epoch = hint.epoch */
inline note_epoch()
{
	d_step { !bitmap_mutex -> epoch_moved = 0 }
}

inline free_page_hint_arm(v)
{
#ifndef M28
	note_epoch();
#endif
	/* Stop and cancel are looked at before each chunk. */
	if
	:: ARM && MAY_ARM ->
		lock(bitmap_mutex);
		ram_clear_dirty_log(FLUSH);
		unlock(bitmap_mutex);
		armed = 1
	:: MAY_CUT_OFF -> MARK(arming_cut_off)
	fi;
#if defined(TCG) && !defined(M2)
	bql_lock();
	tlb_reset_dirty_range_all();
	memory_global_after_dirty_log_sync(v);
	bql_unlock();
#endif
#ifdef M28
	note_epoch();
#endif
	v = NONE
}

/*
 * Puts the deferred clear off again, for pages that are to be sent: whatever is
 * written to them until then is sent once. Others stay armed.
 */
#if defined(M53)
#define DEFERRED(p) 1
#else
#define DEFERRED(p) bmap[p]
#endif

inline free_page_hint_defer()
{
#ifdef KVM_MANUAL
	lock(bitmap_mutex);
	/* memory_region_defer_clear_dirty_bitmap() */
	d_step {
		!slots_lock ->
		for_each_page(i) {
			if
			:: DEFERRED(i) && kdirty[i] && !dirty_bmap[i] -> MARK(sent_once)
			:: else
			fi;
			dirty_bmap[i] = dirty_bmap[i] || DEFERRED(i)
		}
	}
	d_step { clear_bmap = 1; unlock(bitmap_mutex) }
#else
	skip
#endif
}

#if defined(M5)
#define STALE 0
#elif defined(M6)
bit stale;
#define STALE stale
#elif defined(M12)
bit checked;
#define STALE (epoch_moved && !checked)
#else
#define STALE epoch_moved
#endif
#ifdef M51
#define COUNTED_TWICE 1
#else
#define COUNTED_TWICE 0
#endif
#ifdef M16
short counter;
#endif

inline free_page_hint_apply(page)
{
#ifdef M1
	lock(bitmap_mutex);
	ram_clear_dirty_log(1);
	unlock(bitmap_mutex);
#endif
#ifdef M6
	stale = epoch_moved;
#endif
	d_step {
		!bitmap_mutex ->
		c = 0;
		if
		:: STALE -> MARK(hint_after_merge)
		:: else ->
			if
			/* free_page_hint_clear_runs() */
			:: page < PAGES && MAY_SKIP(page) && bmap[page] ->
				MARK(hint_applied);
#ifdef ABSENT
				told[page] = 1;
#endif
				bmap[page] = 0;
				hint_bmap[page] = 1;
#ifdef M32
				was_hinted[page] = 1;
#endif
#ifdef M7
				dirty_memory[page] = 0;
#endif
				c = 1
#ifdef ABSENT
			/* Hinted, but not skipped because of that */
			:: page < PAGES && !bmap[page] && hint_bmap[page] ->
				MARK(absent_page_hinted);
				c = COUNTED_TWICE
#endif
			:: else
			fi
		fi;
#ifdef M12
		checked = 1;
#endif
#ifdef M16
		page = c
	}
	/* ram_dirty_pages_add() without the mutex: a read, then a write. */
	counter = dirty_pages;
	d_step {
		dirty_pages = counter - page;
		counter = 0;
#else
		dirty_pages = dirty_pages - c;
		free_page_hint_check();
#endif
		page = NONE
	}
}

/* ---- the sender ---- */

/* In a d_step. The page is read, and the destination has it. */
inline transfer(p)
{
	differs[p] = 0;
	dst_zero[p] = zero[p];
	foreign[p] = 0;
	mapped[p] = 1;
#ifdef ABSENT
	given_back[p] = 0;
#endif
	received[p] = 1
}

/* In a d_step. A zero page is not read. */
inline transfer_zero(p)
{
	differs[p] = !zero[p];
	dst_zero[p] = 1;
	foreign[p] = 0;
	mapped[p] = 1;
#ifdef ABSENT
	given_back[p] = 0;
#endif
	received[p] = 1
}

/* multifd_queue_page() ... multifd_nocomp_send_prepare() */
proctype multifd_send_thread(byte p)
{
	do
	:: d_step { inflight[p] -> inflight[p] = 0; transfer(p) }
	od
}

/* Any page: nothing happens if it is clean, except to the dirty log. */
inline ram_save_host_page(p)
{
	/* migration_bitmap_clear_dirty() */
	lock(bitmap_mutex);
	ram_clear_dirty_log(1);
	d_step {
		if
		:: p < PAGES && bmap[p] ->
			bmap[p] = 0;
			dirty_pages--;
#ifdef M15B
			if
			:: hint_bmap[p] -> transfer_zero(p)
			:: else -> inflight[p] = 1
			fi
#else
			inflight[p] = 1
#endif
		:: else
		fi;
		free_page_hint_check();
		unlock(bitmap_mutex)
	}
}

#endif
