/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Free page hints: a model for spin
 *
 * A guest tells a migration which of its memory is free, and goes on using it.
 * This is every process that has a say in whether a write gets lost then, in
 * any order of their steps. tests/migration/model/test_model.py says what to build in
 * and what must hold; by hand, in an empty directory:
 *
 *   spin -DKVM_MANUAL -DM2 -a .../free_page_hint.pml
 *   gcc -O1 -DSAFETY -DNOREDUCE -DNOCLAIM -o pan pan.c && ./pan -E -n -m2000000
 *   spin -DKVM_MANUAL -DM2 -t -k free_page_hint.pml.trail -p .../free_page_hint.pml
 *
 * The last line shows how it came to that.
 *
 * Parts. A process or inline has the name of the function that it stands for;
 * a step (a statement, an atomic, a d_step) is what nobody sees the middle of.
 *
 *   dirty_log.pml  KVM's dirty log and memory listeners, TCG's TLBs
 *   bitmap.pml     ram.c: merges, the deferred clear, the sender; and what
 *                  free-page-hint.c does under bitmap_mutex
 *   engine.pml     free-page-hint.c: what the device calls
 *   absent.pml     absent-pages.c: the scan
 *   balloon.pml    virtio-balloon-hint.c
 *   guest.pml      allocator, vCPUs, devices' DMA; the balloon driver
 *   migration.pml  round 0, the other rounds, switchover; cancel, stop, reset
 *   postcopy.pml   what follows its switch: both sides, and the link
 *
 * Variants (-D)
 *
 *   KVM_MANUAL   manual protection, initially all set: GET copies, CLEAR
 *                protects, and neither is done before there is a need
 *   KVM_AUTO     GET clears and protects
 *   KVM_RING     dirty ring
 *   TCG          VCPUS=1 or 2
 *   NO_LOG       no pages, for questions of the kind "sooner or later"
 *   PAGES=2      two pages, in one chunk of clear_bmap
 *   OTHERS       other users of the log: VGA, calc-dirty-rate, memslots that
 *                come and go; the reaper of the ring
 *   DMA          devices that write to memory and mark it dirty after that
 *   TIMER        syncs in the main loop, at any time
 *   CANCEL       cancel at any time; MIGRATIONS=2: and try again
 *   ESTIMATE     an estimate may be wanted before the migration begins
 *   STOP_ONCE    stop and go on, at any time
 *   POSTCOPY     switchover at any time after round 0
 *   PREEMPT      the return path thread sends what is asked for
 *   CUTS=n       the link is cut, and postcopy recovers, up to n times
 *   SWITCHED     postcopy alone, from any state that a switch can find
 *   HUGE         SWITCHED PAGES=2: both are in one page of the host
 *   INIT_ON_FREE the guest clears pages when it frees them, and counts on it
 *   LEFTOVERS    the destination's memory is not fresh: it holds somebody's data
 *   PERSISTENT   the destination leaves the memory of a page as it is
 *   ABSENT       the host looks for absent pages first; all contents are compared
 *   NO_ASK       ABSENT alone: no guest is asked
 *   BLOCKS       stock guest: blocks without an id, between start and stop
 *   NO_DEVICE    see below
 *   LIFE=n       1 cancel, 2 stop and go on, 4 reset, or a sum: each once, at
 *                any time; a guest that hangs; a link that stalls
 *   HOSTILE      a guest that never stops sending
 *   CHECK_ARMED  S3 too; mutants leave it out, so that they have to break S1
 *
 * Mutants: M1 to M57, each a rule left out; test_model.py has the list.
 *
 * Properties
 *
 *   S1  when the destination runs, what an owner of a page has written is there
 *   S3  when the guest is asked, every write leaves a trace that lasts
 *   S4  the counter of dirty pages is the number of bits in bmap
 *   S5  a stopped VM's memory is not written to
 *   S6  INIT_ON_FREE: what nobody has written since it was freed reads zero
 *   S7  postcopy places no page where there is one
 *   S8  when the destination runs, nothing can be read that is somebody else's
 *   S9  a page of the host arrives whole, in one piece
 *   S10 ABSENT, SWITCHED: when the destination runs, each page is equal that no
 *       guest has hinted, and no host was given back after it was sent
 *   L1  the guest that was asked is told that no more hints are wanted
 *   L2  cancel, stop and reset return, whatever the link and the guest do
 *   L3  the driver's buffers come back
 *   L4  round 0 ends, whatever the guest does
 *   L5  no vCPU of the destination waits for ever: a page comes, or the end
 *   L6  postcopy ends, at both sides
 *
 * Simplifications, and why they hide nothing
 *
 * - One page. No step of one page's log, bitmap bits or owner depends on
 *   another page, but for the deferred clear, which is done for a chunk: the
 *   sender may do it at any time, for a page that is not modelled (ELSEWHERE).
 *   PAGES=2 is there to see that this says the same.
 * - No contents. What counts is whether source and destination differ; a write
 *   makes them differ, whatever they were. That errs on the bad side.
 * - Any number of vCPUs with KVM. A store, a fault and the marking of a page
 *   have no state but the page's, so that one process makes them for all. With
 *   one TLB for all of them: more stores bypass the log than really can.
 * - KVM's fast page fault lets other vCPUs write before the page is marked.
 *   Page modification logging is the same with less delay: GET collects first.
 * - A walk finds any free page at any time, any number of times. An array has
 *   one address. There is one buffer; hint_wait_buf() and a full queue occur.
 * - NO_DEVICE: the queue of the balloon is left out, hints come from the
 *   driver's hands to the engine. What it adds is delay, which the driver's
 *   hands and the engine's queue have too. The driver rests when the round has
 *   ended: then the engine drops all. Runs without NO_DEVICE have all that.
 * - Waits are for conditions, not for signals: a lost qemu_cond_signal() would
 *   cost time, up to the deadline, which nothing here measures.
 * - Who waits with run_on_cpu() or in pause_all_vcpus() keeps the BQL here.
 * - bitmap_mutex is given back after each page: by the sender not every 50 ms, by
 *   free_page_hint_apply() not once free_page_hint_clear_runs() has used up its
 *   budget. So a run of several pages is applied in several holds here, with the
 *   epoch looked at in each of them (M12), and deadline, cancel and stop before
 *   it. Sections in which nothing is waited for are one step.
 * - Arming has one chunk. That it was cut off after some chunks is, for a page of
 *   those that were left out, that it was cut off before the page's chunk.
 * - Absent pages: what the host has for a page is one of four things, whatever
 *   kind of memory it is. A look is one step for each page, and what it saw is
 *   applied at any time later. A discard leaves the dirty log as it is: with KVM,
 *   the next write is then seen in any case. After round 0 nobody looks again.
 * - Postcopy: a request has one delay from the destination to the sender, as long
 *   as the return path and the queue together. Two threads at most miss a page
 *   before it comes. Whoever misses one before the devices are loaded is who loads
 *   them: that is at least as many waits as there can be. A cut comes after that,
 *   as the destination gives up if it comes before, and before the source's
 *   migration thread has ended: later ones fail the migration, hints or not.
 *
 * Not in the model: what proves absence for each kind of memory; huge pages before
 * the switch, and trimming; several RAMBlocks, RAMBlocks that are ignored, grow or
 * are plugged; virtio-mem; xbzrle, zero page detection, mapped-ram (they decide how a
 * page is sent, not whether); savevm; other accelerators; vhost and VFIO, which have
 * logs of their own; what makes a message valid; memory ordering weaker than the
 * locks.
 */

#include "config.pml"
#include "state.pml"
#ifndef NO_LOG
#include "dirty_log.pml"
#endif
#include "bitmap.pml"
#include "engine.pml"
#include "absent.pml"
#include "balloon.pml"
#include "guest.pml"
#include "migration.pml"

/* With weak fairness: who can go on, does. */
#ifdef LIFE
ltl L1 { [] (status == ASKED_GUEST -> <> (status != ASKED_GUEST)) }
ltl L2 { [] (control_busy -> <> !control_busy) }
ltl L3 { [] <> HAS_ALL }
ltl L4 { [] (state == ARMING -> <> (state == ENDED)) }
#endif
#ifdef SWITCHED
ltl L5 { [] (fault[0] -> <> !fault[0]) }
ltl L6 { <> (source_done && !userfault) }
#endif
