/* SPDX-License-Identifier: GPL-2.0-or-later */
/* All that the processes share, by the name that it has in the code. */

/* Loop variables and results of d_steps, of no use outside. */
hidden byte i;
hidden byte target;
hidden byte c;

#define for_each_page(p) for (p : 0 .. PAGES - 1)

#define lock(l) atomic { !l -> l = 1 }
#define unlock(l) l = 0

/*
 * The BQL goes to whoever waits for it, sooner or later: the migration thread
 * and the main loop's bottom half take turns, and neither keeps it from a command
 * or a reset. Only properties of the kind "sooner or later" depend on that.
 */
#ifdef LIFE
bit bql_control;
bit bql_migration;
bit bql_turn_of_bh;
#define bql_lock_control() bql_control = 1; atomic { !bql -> bql = 1; bql_control = 0 }
#define bql_lock() bql_migration = 1; atomic { \
	!bql && !bql_control && !(bh && bql_turn_of_bh) -> bql = 1; bql_migration = 0 }
#define bql_unlock() bql_turn_of_bh = 1; unlock(bql)
#define BQL_FREE_FOR_BH (!bql && !bql_control && !(bql_migration && !bql_turn_of_bh))
#define bql_bh_ran() bql_turn_of_bh = 0
#else
#define bql_lock() lock(bql)
#define bql_unlock() unlock(bql)
#define BQL_FREE_FOR_BH (!bql)
#define bql_bh_ran() skip
#endif

/* ---- the guest's pages ---- */

/* The VM runs, here or (once a migration has ended) at the destination. */
#ifdef SWITCHED
bit vm_running;
#else
bit vm_running = 1;
#endif
/* The page is out of the guest's allocator. */
bit alloc[PAGES];
/* Its owner has written to it, and wants to find that again. */
bit live[PAGES];
/* If the destination ran now, it would read something else there. */
#if defined(ABSENT) && defined(LEFTOVERS)
bit differs[PAGES] = 1;
#else
bit differs[PAGES];
#endif
/* A device has written to the page, and is about to mark it dirty. */
bit dma[PAGES];
/* INIT_ON_FREE, ABSENT: the page is all zeroes, here; at the destination. */
#if defined(INIT_ON_FREE) || defined(ABSENT)
bit zero[PAGES] = 1;
#else
bit zero[PAGES];
#endif
#ifdef LEFTOVERS
bit dst_zero[PAGES];
#else
bit dst_zero[PAGES] = 1;
#endif
/* LEFTOVERS: the destination's memory holds what is somebody else's. */
#ifdef LEFTOVERS
bit foreign[PAGES] = 1;
#else
bit foreign[PAGES];
#endif

#define OWNED(p) (vm_running && alloc[p])

#ifdef ABSENT
/*
 * What the host has for the page: nothing; memory, or its zeroes; a place in swap;
 * memory that only another process has in its page table.
 */
#define HOLE 0
#define PRESENT 1
#define SWAPPED 2
#define OTHERS_ONLY 3
byte backing[PAGES];
/* Nobody looks at it after round 0. */
#if MIGRATIONS == 1 && !defined(M48)
#define BACKING_MATTERS (state != ENDED)
#else
#define BACKING_MATTERS 1
#endif
/* The guest gave it back, and the destination still has what it held. */
bit given_back[PAGES];
/* A hint, or a scan, has taken it out, and no merge has brought it back. */
bit told[PAGES];
bit absent[PAGES];
#define MAY_DIFFER(p) (told[p] || (given_back[p] && !absent[p]))
#elif defined(SWITCHED)
/* All that is hinted is absent there. */
#define MAY_DIFFER(p) 0
#endif

/* ---- the dirty log ---- */

/* KVM: the kernel's dirty bitmap; with the ring, an entry in a ring. */
bit kdirty[PAGES];
/* KVM: write-protected (or its D bit is clear). */
bit prot[PAGES];
/* KVM: a vCPU has made the page writable, and is about to mark it dirty. */
bit marking[PAGES];
/* KVM: KVMSlot.dirty_bmap, which is what the last GET returned. */
bit dirty_bmap[PAGES];
/* KVM_RING: entries that were collected, and are being reset. */
bit collected[PAGES];
/* KVM: some TLB lets vCPUs write; TCG: a vCPU's TLB entry bypasses the log. */
bit tlb[PAGES * VCPUS];
/* TCG: where the vCPU is between its look at the TLB and its store. */
byte storing[PAGES * VCPUS];
/* ram_list.dirty_memory[DIRTY_MEMORY_MIGRATION] */
bit dirty_memory[PAGES];

/* ---- the migration, in ram.c and migration.c ---- */

bit bql;
bit bitmap_mutex;
bit slots_lock;

/* MIGRATION_STATUS_ACTIVE. A cancelled migration is not. */
bit migrating;
/* RAMBlock->bmap, RAMBlock->hint_bmap, and the one bit of ->clear_bmap */
bit bmap[PAGES];
bit hint_bmap[PAGES];
bit clear_bmap;
/* ram_state.migration_dirty_pages */
short dirty_pages;
/* In the queue of a multifd thread, which has not read the page yet. */
bit inflight[PAGES];

#if PAGES == 1
#define ALL_READ (!inflight[0])
#define ALL_SENT (!bmap[0])
#else
#define ALL_READ (!inflight[0] && !inflight[1])
#define ALL_SENT (!bmap[0] && !bmap[1])
#endif

/* ---- postcopy ---- */

/* The destination may run; the source's state is POSTCOPY_ACTIVE; it has sent all. */
bit postcopy;
bit postcopy_active;
bit source_done;
/* rs->src_page_requests; what the return path thread has in its hands */
bit queued[PAGES];
byte rp_page = NONE;

/* The host page that the migration thread is in the middle of */
byte host_page_sending = NONE;

/* The link: whether there is one; requests on it; pages on it, and by what channel. */
bit connected;
bit request[PAGES];
byte on_link[PAGES];
#define NOTHING 0
#define PAGE 1
#define ZERO_PAGE 2
#define MAIN_CHANNEL 0
#define PREEMPT_CHANNEL 2

/* The destination has something there; and it has got that from the source. */
bit mapped[PAGES];
bit received[PAGES];
/* userfaultfd is registered; a vCPU waits for the page; mis->page_requested */
bit userfault;
bit fault[PAGES];
bit requested[PAGES];
/* The thread of the preempt channel is gone. */
bit preempt_joined;
/* The state of the devices is loaded, and the source knows it. */
bit loaded;
bit load_known;
#ifdef M32
bit was_hinted[PAGES];
#endif
#ifdef M33
bit hinted_at_switch[PAGES];
#endif

/* ---- the engine, migration/free-page-hint.c ---- */

mtype = { IDLE, ARMING, SCANNING, ASKED, REPORTING, ENDED };

/* hint.state, .id, .complete, .starved, .queue; .reason != REASON_NONE */
mtype state = IDLE;
byte hint_id;
bit complete;
bit starved;
chan queue = [QUEUE_RUNS] of { byte };
bit reason;
/* Arming was not cut off. */
bit armed;
/* hint.epoch != hint.armed_epoch */
bit epoch_moved;
/* free-page-hint-wait has passed */
bit expired;

/* ---- the device, hw/virtio/virtio-balloon-hint.c ---- */

#define STOP 0
#define DONE 1
#define CMD_ID_MIN 2

/* hint.status: STOP, DONE or ASKED_GUEST; hint.cmd_id */
#define ASKED_GUEST 2
byte status = STOP;
byte cmd_id = CMD_ID_MIN - 1;
/* hint.running */
bit device_running = 1;
/* hint.bh is scheduled; virtio_queue_set_notification() */
bit bh;
bit notification = 1;
/* hint.block_id */
byte block_id;

/* virtio_balloon_hint_config(): free_page_hint_cmd_id in the config space */
#define CONFIG_ID (status == ASKED_GUEST -> cmd_id : status)

/* ---- the driver, drivers/virtio/virtio_balloon_hint.c ---- */

/* Its config interrupt came: the work item is queued, HINT_CHANGED is set. */
bit work = 1;
bit changed;
/* hint->id: the request that was answered last */
byte driver_id;

/*
 * hint->bufs[], of one address each, and hint->end_buf. BLOCKS: what stock Linux
 * sends: a start command, blocks without an id, a stop command.
 */
#define END_BUF 1
#ifdef BLOCKS
#define START_BUF 2
#define BUFS 3
#define HAS_ALL (!device_has_it[0] && !device_has_it[END_BUF] && !device_has_it[START_BUF])
#else
#define BUFS 2
#define HAS_ALL (!device_has_it[0] && !device_has_it[END_BUF])
#endif
byte buf_id[BUFS];
byte buf_page[BUFS];
bit device_has_it[BUFS];
/* Those that the device has not popped */
chan vq = [BUFS] of { byte };

/* ---- LIFE: what happens to a migration ---- */

/* A cancel, a stop or a reset is under way. */
bit control_busy;
/* The guest was reset. */
bit rebooted;
