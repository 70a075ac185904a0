/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The migration thread and the main loop. */

/* ---- round 0 ---- */

#if defined(M8) || defined(M21) || defined(M48)
bit second_round;
#endif
#ifdef M38
bit emptied;
#define EMPTY emptied
#else
#define EMPTY 1
#endif

/* free_page_hint_refusal(). NO_ASK: no balloon, no driver, no wish for hints */
#ifdef NO_ASK
#define CAN_ASK 0
#else
#define CAN_ASK (migrating && vm_running && device_running)
#endif
#ifdef ABSENT
#define HAS_PROVIDER migrating
#else
#define HAS_PROVIDER CAN_ASK
#endif

inline free_page_hint_ask(asked)
{
	bql_lock();
	d_step {
		if
#ifdef M39
		:: CAN_ASK -> reason = 0;
#else
		:: CAN_ASK && !reason && !EXPIRED ->
#endif
			state = ASKED;
			asked = 1;
#ifdef CHECK_ARMED
			for_each_page(i) {
				CHECK(S3_armed_when_asked, epoch_moved || ARMED(i))
			}
#endif
			virtio_balloon_hint_ask();
			hint_id = cmd_id
		:: else
		fi
	}
	bql_unlock()
}

#define GO_ON (!reason && migrating && !EXPIRED)

inline free_page_hint_collect(page)
{
	do
	:: d_step { reason || !migrating } -> break
	:: d_step { EXPIRED -> MARK(deadline_passed) } -> break
	/* free_page_hint_dequeue() */
	:: atomic {
		GO_ON && nempty(queue) -> queue?page;
		bh = bh || starved;
		starved = 0
	   }
		free_page_hint_apply(page)
	:: d_step { GO_ON && empty(queue) && complete -> MARK(report_complete) } -> break
	od
}

inline free_page_hint_finish(asked)
{
	d_step {
		do
		:: nempty(queue) -> queue?c
		:: empty(queue) -> break
		od;
		state = ENDED;
		armed = 0;
#ifdef ABSENT
		for_each_page(i) {
			backing[i] = (BACKING_MATTERS -> backing[i] : HOLE)
		}
#endif
		starved = 0;
		/* Only query-migrate reads these any more. */
		complete = 0;
		reason = 0;
		expired = 0
	}
	bql_lock();
	d_step {
		if
		:: asked -> virtio_balloon_hint_done()
		:: else
		fi;
		asked = 0
	}
	bql_unlock()
}

inline free_page_hint_round(asked, page)
{
	bql_lock();
	if
	:: HAS_PROVIDER ->
		state = ARMING;
#ifdef ABSENT
		reason = !CAN_ASK;
#endif
		bql_unlock();
#ifdef M43
		armed = 1;
		note_epoch();
		absent_pages_round(page);
#endif
#ifdef M3
		free_page_hint_ask(asked);
		free_page_hint_arm(page);
#else
		free_page_hint_arm(page);
#if defined(ABSENT) && !defined(M43)
		absent_pages_round(page);
#endif
		free_page_hint_ask(asked);
#endif
#ifdef M54
		free_page_hint_defer();
#endif
		if
		:: asked -> free_page_hint_collect(page)
		:: else
		fi;
#ifndef M54
		free_page_hint_defer();
#endif
		free_page_hint_finish(asked)
	:: else -> bql_unlock()
	fi
}

/* The time that free-page-hint-wait allows passes. */
active proctype clock()
{
	do
	:: atomic { (free_page_hint_asking() || state == SCANNING) && !expired -> expired = 1 }
	od
}

/* ---- other rounds ---- */

#ifdef NO_LOG
#define NONE_IN_USE 1
#elif PAGES == 1
#define NONE_IN_USE (!marking[0] && !STORING(0) && !dma[0])
#else
#define NONE_IN_USE (!marking[0] && !STORING(0) && !dma[0] && \
		     !marking[1] && !STORING(1) && !dma[1])
#endif

/* With the BQL. Returns when vCPUs have left the accelerator and I/O is drained. */
inline vm_stop()
{
	vm_running = 0;
	NONE_IN_USE;
	virtio_balloon_hint_set_status(0)
}

/* With the BQL. */
inline vm_start()
{
	vm_running = 1;
	virtio_balloon_hint_set_status(1)
}

/* In a d_step. */
inline check_page(p)
{
	CHECK(S1_no_lost_write, !live[p] || !differs[p]);
#ifdef INIT_ON_FREE
	CHECK(S6_free_page_reads_zero, live[p] || !differs[p]);
#endif
#ifdef MAY_DIFFER
	CHECK(S10_contents_equal, !differs[p] || MAY_DIFFER(p));
#endif
	CHECK(S8_nobodys_data, !foreign[p])
}

inline check_destination()
{
	d_step {
		for_each_page(i) {
			check_page(i)
		}
		migrating = 0
	}
}

#ifdef NO_LOG
/*
 * Nothing stalls here. It can in QEMU, with the BQL, but that is so without
 * hints too. The VM goes on at the destination: with the same queue, and with
 * an engine that is idle.
 */
inline migration_completion(p, runs)
{
	bql_lock();
	if
	:: migrating ->
		runs = vm_running;
		vm_stop();
		migration_bitmap_sync(p);
		migrating = 0;
		if
		:: runs -> vm_start()
		:: else
		fi
	:: else
	fi;
	bql_unlock()
}
#else
inline migration_completion(p, unused)
{
	bql_lock();
	if
	:: migrating ->
		vm_stop();
		migration_bitmap_sync(p);
		do
		:: p < PAGES -> ram_save_host_page(p); p++
		:: else -> break
		od;
		ALL_READ;
		check_destination()
	:: else
	fi;
	bql_unlock()
}
#endif

#ifdef POSTCOPY
#include "postcopy.pml"
#endif

#ifdef ESTIMATE
bit estimating;

/* With the BQL. */
inline estimate_cancel()
{
	d_step {
		if
		:: estimating ->
			estimating = 0;
#ifdef M55
			cmd_id--;
#endif
			virtio_balloon_hint_done()
		:: else
		fi
	}
}

/*
 * Asks as a migration does, without arming. The answer is not the engine's,
 * whose state is IDLE; it may come at any time, also in a migration.
 */
active proctype calc_free_page_estimate()
{
	atomic { !migrating && !bql -> estimating = 1; virtio_balloon_hint_ask() }
}
#endif

active proctype migration_thread()
{
	byte page = NONE;
	byte done;
	byte what;
	bit asked;
	bit runs;

#ifdef SWITCHED
	any_switch(page);
	postcopy_run(page, what);
	false;
#endif
	do
	:: done < MIGRATIONS ->
		bql_lock();
#ifdef ESTIMATE
		estimate_cancel();
#endif
		d_step {
			migrating = 1;
			state = IDLE;
			page = 0
		}
#ifndef NO_LOG
		ram_init_bitmaps();
#endif
		migration_bitmap_sync(page);
		page = NONE;
		bql_unlock();
#ifndef NO_HINTS
		free_page_hint_round(asked, page);
#endif
		do
		:: migrating ->
			if
			/* ram_save_iterate() */
			:: ram_save_host_page(0)
#if PAGES > 1
			:: ram_save_host_page(1)
#endif
#ifndef NO_LOG
			:: ram_save_host_page(ELSEWHERE)
#endif
			/* multifd_ram_flush_and_sync(), migration_bitmap_sync_precopy() */
			:: ALL_READ ->
				bql_lock();
				page = 0;
				migration_bitmap_sync(page);
				page = NONE;
				bql_unlock()
#ifdef M38
			:: d_step { !emptied -> emptied = 1; ram_load_empty(); skip }
#endif
#if defined(M8) || defined(M21) || defined(M48)
			:: !second_round ->
				second_round = 1;
				free_page_hint_round(asked, page)
#endif
			:: ALL_READ && EMPTY ->
				page = 0;
				migration_completion(page, runs);
				page = NONE;
				runs = 0
#ifdef POSTCOPY
			:: ALL_READ ->
				page = 0;
				postcopy_start(page);
				postcopy_run(page, what)
			/* Other pages came, and with them a huge page for all. */
			:: mapped[0] = 1
#endif
			fi
		:: else -> break
		od;
		/* migration_cleanup() */
		bql_lock();
		d_step {
			for_each_page(i) {
				inflight[i] = 0
			}
			bql_unlock()
		}
		done++
	:: else -> break
	od
}

/* ---- the main loop ---- */

#ifdef TIMER
/*
 * Any sync but the migration thread's. This one comes only when the migration
 * thread has synced twice; the model does not count on it.
 */
active proctype cpu_throttle_dirty_sync_timer_tick()
{
	byte v;

	do
	:: atomic { vm_running && migrating && !bql -> bql = 1 }
		migration_bitmap_sync(v);
		unlock(bql)
	od
}
#endif

/* With the BQL. */
inline migration_cancel()
{
	free_page_hint_abort();
	migrating = 0
}

#ifdef CANCEL
active proctype qmp_migrate_cancel()
{
	do
	:: atomic { migrating && !bql -> bql = 1 }
		migration_cancel();
		unlock(bql)
	od
}
#endif

#ifdef STOP_ONCE
active proctype qmp_stop_and_cont()
{
	lock(bql);
	vm_stop();
	unlock(bql);
	lock(bql);
	if
	:: migrating -> vm_start()
	:: else
	fi;
	unlock(bql)
}
#endif

#ifdef LIFE
#define CANCELS 1
#define STOPS 2
#define RESETS 4

/* Those of them that LIFE says, each once, in any order, at any time. */
active proctype control()
{
	byte left = LIFE;

	do
	:: atomic { left & CANCELS -> left = left - CANCELS; control_busy = 1 }
		bql_lock_control();
		migration_cancel();
		unlock(bql);
		control_busy = 0
	:: atomic { left & STOPS -> left = left - STOPS; control_busy = 1 }
		bql_lock_control();
		vm_stop();
		unlock(bql);
		bql_lock_control();
		vm_start();
		unlock(bql);
		control_busy = 0
	:: atomic { left & RESETS -> left = left - RESETS; control_busy = 1 }
		bql_lock_control();
		virtio_balloon_hint_set_status(0);
		virtio_balloon_hint_reset();
		d_step { reboot(); skip };
		virtio_balloon_hint_set_status(1);
		unlock(bql);
		control_busy = 0
	:: !left -> break
	od
}
#endif

#ifndef NO_LOG
init
{
	atomic {
		for_each_page(i) {
#ifndef SWITCHED
			run page_users(i);
			run multifd_send_thread(i);
#endif
#ifdef POSTCOPY
#ifdef HUGE
			if
			:: !i -> run destination_page(i)
			:: else
			fi;
#else
			run destination_page(i);
#endif
#endif
		}
#ifdef POSTCOPY
		run loadvm_handle_cmd_packaged();
		run postcopy_ram_listen_thread();
#endif
#ifdef PREEMPT
		run source_return_path_thread();
#endif
#ifdef CUTS
		run link_cut();
#endif
#ifdef TCG
		for (i : 0 .. PAGES * VCPUS - 1) {
			run tcg_vcpu(i / VCPUS, i)
		}
#endif
	}
}
#endif
