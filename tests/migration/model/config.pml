/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What to build in, from -D options, and how properties are checked. */

#if defined(KVM_MANUAL) || defined(KVM_AUTO) || defined(KVM_RING)
#define KVM
#endif

#ifndef PAGES
#define PAGES 1
#endif
#ifndef VCPUS
#define VCPUS 1
#endif
#ifndef MIGRATIONS
#define MIGRATIONS 1
#endif

#ifdef SWITCHED
#define POSTCOPY
#endif

/* Runs in the engine's queue */
#define QUEUE_RUNS 2

/* No page */
#define NONE 255
/* A page that is not modelled, in the same chunk */
#define ELSEWHERE PAGES

/*
 * A property that does not hold ends the search with "assertion violated NAME".
 * The names are variables that nobody sets and that are in no state.
 */
#define CHECK(name, condition) if :: (condition) :: else -> assert(name) fi

hidden byte S1_no_lost_write;
hidden byte S3_armed_when_asked;
hidden byte S4_counter_is_popcount;
hidden byte S5_stopped_vm_unchanged;
hidden byte S6_free_page_reads_zero;
hidden byte S7_page_placed_once;
hidden byte S8_nobodys_data;
hidden byte S9_host_page_whole;
hidden byte S10_contents_equal;

/*
 * What must be possible, lest the properties hold for want of anything that
 * could break them. -DREACHED=hint_applied makes it an error to get there.
 */
#define MARK(name) assert(never_reached || name != REACHED)

hidden byte never_reached;
#define hint_applied 1
#define hint_redirtied 2
#define hint_after_merge 3
#define hint_of_earlier_request 4
#define queue_full 5
#define deadline_passed 6
#define report_complete 7
#define link_stalled 8
#define guest_hangs 9
#define hinted_page_asked_for 10
#define asked_for_twice 11
#define woken_by_the_end 12
#define link_recovered 13
#define queued_too_late 14
#define arming_cut_off 15
#define absent_applied 16
#define absent_after_merge 17
#define scan_cut_off 18
#define stopped_vm_scanned 19
#define absent_page_hinted 20
#define populated_meanwhile 21
#define given_back_meanwhile 22
#define sent_once 23
#ifndef REACHED
#define REACHED 0
#endif
