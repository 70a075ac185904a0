/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Pages that the host never populated, or gave back: migration/absent-pages.c. */

#ifdef ABSENT

/* What is taken for proof that a page reads zero */
#if defined(M45)
/* QEMU's own page table has neither the page nor its place in swap. */
#define LOOKS_ABSENT(p) (backing[p] == HOLE || backing[p] == OTHERS_ONLY)
#elif defined(M46)
/* Nothing is in memory. */
#define LOOKS_ABSENT(p) (backing[p] == HOLE || backing[p] == SWAPPED)
#else
#define LOOKS_ABSENT(p) (backing[p] == HOLE)
#endif

#ifdef M44
#define SCAN_STALE 0
#else
#define SCAN_STALE epoch_moved
#endif

#ifdef M50
#define SCAN_GOES_ON migrating
#else
#define SCAN_GOES_ON (migrating && !EXPIRED)
#endif

#if defined(M47) || defined(NO_LOG)
#define MAY_SCAN migrating
#else
#define MAY_SCAN (migrating && armed)
#endif

#ifdef NO_LOG

/* Chunk by chunk; there is always another one. */
inline absent_pages_scan(page)
{
	do
	:: SCAN_GOES_ON -> with_bitmap_mutex()
	:: d_step { !SCAN_GOES_ON -> MARK(scan_cut_off) } -> break
	:: SCAN_GOES_ON -> break
	od
}

#else

/* In a d_step. ram_block_discard_range(); the log does not know. */
inline discard(p)
{
	if
	:: state == SCANNING && backing[p] != HOLE -> MARK(given_back_meanwhile)
	:: else
	fi;
	backing[p] = HOLE;
	zero[p] = 1;
	differs[p] = !dst_zero[p];
	given_back[p] = differs[p]
}

/* The loop that hints go through: free_page_hint_ram_apply() */
inline absent_pages_apply(page)
{
	d_step {
		!bitmap_mutex ->
		if
		:: SCAN_STALE -> MARK(absent_after_merge)
		:: !SCAN_STALE && MAY_SKIP(page) && bmap[page] ->
			MARK(absent_applied);
			if
			:: backing[page] != HOLE -> MARK(populated_meanwhile)
			:: else
			fi;
			bmap[page] = 0;
			hint_bmap[page] = 1;
			absent[page] = 1;
			dirty_pages--;
			free_page_hint_check()
		:: else
		fi
	}
}

/* Without the BQL or the mutex. A page can be populated, and discarded, at any time. */
inline absent_pages_scan(page)
{
	page = 0;
	do
	:: d_step { SCAN_GOES_ON && page < PAGES && LOOKS_ABSENT(page) ->
#ifdef CHECK_ARMED
		CHECK(S3_armed_when_asked, epoch_moved || ARMED(page));
#endif
		if
		:: !vm_running -> MARK(stopped_vm_scanned)
		:: else
		fi
	   }
		absent_pages_apply(page);
		page++
	:: d_step { SCAN_GOES_ON && page < PAGES && !LOOKS_ABSENT(page) -> page++ }
	:: d_step { !SCAN_GOES_ON -> MARK(scan_cut_off) } -> break
	:: page == PAGES -> break
	od;
	page = NONE
}

#endif

/* A VM may be stopped meanwhile, or all along: it can go on at any time. */
inline absent_pages_round(page)
{
	if
	:: MAY_SCAN -> state = SCANNING; absent_pages_scan(page)
	:: else
	fi
}

#endif
