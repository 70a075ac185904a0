/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The guest: its allocator, all that writes to its pages, and its balloon driver. */

#ifndef NO_LOG

/* ---- pages ---- */

/* In a d_step. A new value, different from all before it. */
inline store(p)
{
	live[p] = 1;
	differs[p] = 1;
#ifdef ABSENT
	backing[p] = (BACKING_MATTERS -> PRESENT : HOLE);
	given_back[p] = 0;
#endif
	zero[p] = 0
}

/* In a d_step. */
inline store_zero(p)
{
	live[p] = 1;
	differs[p] = !dst_zero[p];
#ifdef ABSENT
	backing[p] = (BACKING_MATTERS -> PRESENT : HOLE);
	given_back[p] = 0;
#endif
	zero[p] = 1
}

#if VCPUS == 1
#define STORING(p) storing[p]
#else
#define STORING(p) (storing[2 * p] || storing[2 * p + 1])
#endif

#ifdef INIT_ON_FREE
#define CLEARED(p) zero[p]
#else
#define CLEARED(p) 1
#endif

#ifdef M10
/* The page was free at some time. */
bit was_free[PAGES];
#define IN_FREE_LIST(p) (!alloc[p] || was_free[p])
#else
#define IN_FREE_LIST(p) (!alloc[p])
#endif

/* All vCPUs and devices: nothing but the page itself says what comes next. */
proctype page_users(byte p)
{
	do
	/* get_page_from_freelist() */
	:: d_step { vm_running && !alloc[p] -> alloc[p] = 1 }
	/* free_one_page(), by an owner who lets nobody write any more */
	:: d_step {
		OWNED(p) && !dma[p] && !STORING(p) && CLEARED(p) ->
		alloc[p] = 0;
		live[p] = 0;
#ifdef M10
		was_free[p] = 1;
#endif
	   }
#ifdef ABSENT
	/* A read, by anybody */
	:: d_step { BACKING_MATTERS && backing[p] != PRESENT -> backing[p] = PRESENT }
	:: d_step { backing[p] == PRESENT -> backing[p] = SWAPPED }
	/* Free page reporting, or the balloon: nobody wants what the page holds. */
	:: d_step { vm_running && !live[p] && !dma[p] -> discard(p) }
#ifdef DMA
	/* The device may write late, and be another process. */
	:: d_step { OWNED(p) && !dma[p] -> dma[p] = 1 }
	:: d_step { dma[p] -> store(p) }
	:: d_step { BACKING_MATTERS && dma[p] && backing[p] != PRESENT ->
		store(p);
		backing[p] = OTHERS_ONLY
	   }
#endif
#endif
#ifdef DMA
	/* address_space_map(), and the device writes */
	:: d_step { OWNED(p) && !dma[p] -> dma[p] = 1; store(p) }
	/* address_space_unmap(): invalidate_and_set_dirty() */
	:: d_step { dma[p] -> dma[p] = 0; dirty_memory[p] = 1 }
#endif
#ifdef KVM
	/* A store, through a translation from a TLB or from a walk */
	:: d_step { OWNED(p) && (tlb[p] || !prot[p]) -> tlb[p] = 1; store(p) }
#ifdef INIT_ON_FREE
	:: d_step { OWNED(p) && (tlb[p] || !prot[p]) -> tlb[p] = 1; store_zero(p) }
#endif
	/* fast_page_fault(): the page is made writable, */
	:: d_step { OWNED(p) && prot[p] && !marking[p] -> prot[p] = 0; marking[p] = 1 }
	/* and then marked: mark_page_dirty_in_slot() */
	:: d_step { marking[p] -> marking[p] = 0; kdirty[p] = 1 }
#endif
	od
}

#ifdef TCG
#define STORE_NEXT 1
#define SET_DIRTY_NEXT 2

proctype tcg_vcpu(byte p; byte v)
{
	do
	/* A translation block finds that the TLB lets it store. */
	:: d_step { OWNED(p) && tlb[v] && !storing[v] -> storing[v] = STORE_NEXT }
	/* notdirty_write() sets the dirty bits, */
	:: d_step { OWNED(p) && !tlb[v] && !storing[v] ->
		dirty_memory[p] = 1;
		storing[v] = SET_DIRTY_NEXT
	   }
	/*
	 * and calls tlb_set_dirty() if they are set still. That they are, and what
	 * follows from it, is one step under the lock of the TLB; so it is in
	 * tlb_set_page_full().
	 */
	:: d_step { storing[v] == SET_DIRTY_NEXT ->
#ifdef M57
		tlb[v] = 1;
#else
		tlb[v] = dirty_memory[p];
#endif
		storing[v] = STORE_NEXT
	   }
	:: d_step { storing[v] == STORE_NEXT -> storing[v] = 0; store(p) }
#ifdef INIT_ON_FREE
	:: d_step { storing[v] == STORE_NEXT -> storing[v] = 0; store_zero(p) }
#endif
	od
}
#endif

#else
/* Without pages: there is always another free one. */
#define IN_FREE_LIST(p) 1
#endif

/* ---- the driver ---- */

#ifdef NO_DEVICE
/* Hints go to the engine at once; what comes after the round changes nothing. */
#define DRIVER_RUNS (vm_running && state != ENDED)
#define HAS_BUF free_page_hint_has_room()
#else
#define DRIVER_RUNS vm_running
#define HAS_BUF (!device_has_it[0])
#endif

/* In an atomic sequence. */
inline hint_send(b, page)
{
#ifdef NO_DEVICE
	if
	:: b == END_BUF -> free_page_hint_end(driver_id)
	:: else -> free_page_hint_submit(driver_id, page)
	fi
#else
#ifdef BLOCKS
	buf_id[b] = (b == START_BUF -> driver_id : 0);
#else
	buf_id[b] = driver_id;
#endif
	buf_page[b] = page;
	device_has_it[b] = 1;
	vq!b;
	virtqueue_kick()
#endif
}

/* The work item, report_free_page_func(), and what it calls. */
active proctype virtio_balloon_hint_report()
{
	byte page = NONE;

#ifdef LIFE
booted:
{	skip;
#endif
idle:
	atomic { DRIVER_RUNS && work -> work = 0 }
#ifdef M9
	atomic {
		DRIVER_RUNS ->
		if
		:: IN_FREE_LIST(0) -> page = 0
		:: skip
		fi
	}
#endif
	/* hint_read_id() */
	atomic {
		DRIVER_RUNS -> changed = 0;
		if
		:: CONFIG_ID >= CMD_ID_MIN && CONFIG_ID != driver_id -> driver_id = CONFIG_ID
		:: else -> page = NONE; goto wait_all
		fi
	}

#ifdef BLOCKS
	/* send_cmd_id_start() */
	atomic { DRIVER_RUNS && !device_has_it[START_BUF] -> hint_send(START_BUF, NONE) };
#endif
	/* hint_send_blocks(): free pages, as they are met, some of them twice */
	do
	/* hint_check() */
	:: atomic {
		DRIVER_RUNS && changed -> changed = 0;
#ifndef HOSTILE
		if
		:: CONFIG_ID != driver_id -> page = NONE; goto send_end
		:: else
		fi
#endif
	   }
	/* read_batch(), with the zone's lock */
	:: atomic {
		DRIVER_RUNS && !changed && page == NONE ->
		if
		:: IN_FREE_LIST(0) -> page = 0
#if PAGES > 1
		:: IN_FREE_LIST(1) -> page = 1
#endif
#ifdef M11
		:: page = ELSEWHERE
#endif
		:: break
		fi
	   }
	/* hint_wait_buf(), hint_send_array() */
	:: atomic { DRIVER_RUNS && page != NONE && HAS_BUF -> hint_send(0, page); page = NONE }
#ifdef HOSTILE
	:: atomic { DRIVER_RUNS && !device_has_it[END_BUF] -> hint_send(END_BUF, NONE) }
#endif
#ifdef LIFE
	/* It hangs, or crashes: nothing more comes. */
	:: atomic { DRIVER_RUNS -> MARK(guest_hangs); page = NONE }
		false
#endif
	od;

	/* hint_wait_end_buf() */
	atomic { DRIVER_RUNS && (changed || !device_has_it[END_BUF]) };
send_end:
	atomic {
		DRIVER_RUNS ->
		if
		:: !device_has_it[END_BUF] -> hint_send(END_BUF, NONE)
		:: else
		fi
	}

wait_all:
#ifdef M11
	/* The buffer is freed, and its new owner writes to it. */
	if
	:: d_step { device_has_it[0] -> buf_page[0] = 0 }
	:: skip
	fi;
#endif
	atomic { DRIVER_RUNS && (changed || HAS_ALL) -> goto idle }
#ifdef LIFE
} unless { atomic { rebooted -> rebooted = 0; page = NONE; goto booted } }
#endif
}

/* In a d_step. Other memory now, a new driver. */
inline reboot()
{
	for (i : 0 .. BUFS - 1) {
		device_has_it[i] = 0;
		buf_id[i] = 0;
		buf_page[i] = 0
	}
	driver_id = 0;
	work = 1;
	changed = 1;
	rebooted = 1
}
