/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the accelerator knows about written pages, and how QEMU gets to know it. */

inline memory_global_dirty_log_start()
{
	d_step {
		for_each_page(i) {
#if defined(KVM_MANUAL)
			/* KVM_DIRTY_LOG_INITIALLY_SET: nothing is protected. */
			kdirty[i] = 1;
			prot[i] = 0;
			tlb[i] = 1;
#elif defined(M19)
			skip
#elif defined(KVM_AUTO)
			kdirty[i] = 0;
			prot[i] = 1;
			tlb[i] = 0;
#elif defined(KVM_RING)
			prot[i] = 1;
			tlb[i] = 0;
#else
			skip
#endif
		}
	}
}

/* KVM_CLEAR_DIRTY_LOG of the chunk, with what the last KVM_GET_DIRTY_LOG returned. */
inline kvm_log_clear_one_slot(flush)
{
#ifdef KVM_MANUAL
	d_step {
		!slots_lock -> slots_lock = 1;
		for_each_page(i) {
#ifdef M18
			dirty_bmap[i] = 1;
#endif
			kdirty[i] = kdirty[i] && !dirty_bmap[i];
			prot[i] = prot[i] || dirty_bmap[i];
		}
	}
	/* kvm_flush_remote_tlbs_memslot(), and the ioctl returns. */
	d_step {
		for_each_page(i) {
			tlb[i] = tlb[i] && !(dirty_bmap[i] && flush);
			dirty_bmap[i] = 0;
		}
		unlock(slots_lock);
	}
#else
	/* Only manual protection has a log_clear(). */
	skip
#endif
}

inline kvm_dirty_ring_reap()
{
	/* kvm_dirty_ring_reap_one() */
	d_step {
		!slots_lock -> slots_lock = 1;
		for_each_page(i) {
			collected[i] = kdirty[i];
			dirty_bmap[i] = dirty_bmap[i] || kdirty[i];
			kdirty[i] = 0;
		}
	}
	/* KVM_RESET_DIRTY_RINGS protects, flushes, and returns. */
	d_step {
		for_each_page(i) {
			prot[i] = prot[i] || collected[i];
		}
	}
	d_step {
		for_each_page(i) {
			tlb[i] = tlb[i] && !collected[i];
			collected[i] = 0;
		}
		unlock(slots_lock);
	}
}

/* What the accelerator knows goes to ram_list.dirty_memory. */
inline memory_global_dirty_log_sync()
{
#if defined(KVM_MANUAL)
	/* kvm_slot_get_dirty_log(): a copy, nothing is cleared or protected. */
	d_step {
		!slots_lock ->
		for_each_page(i) {
			dirty_bmap[i] = kdirty[i];
			dirty_memory[i] = dirty_memory[i] || kdirty[i];
		}
	}
#elif defined(KVM_AUTO)
	/* kvm_slot_get_dirty_log(): clears, protects, flushes, and returns. */
	d_step {
		!slots_lock -> slots_lock = 1;
		for_each_page(i) {
			dirty_bmap[i] = kdirty[i];
			kdirty[i] = 0;
			prot[i] = prot[i] || dirty_bmap[i];
		}
	}
	d_step {
		for_each_page(i) {
			tlb[i] = tlb[i] && !dirty_bmap[i];
			dirty_memory[i] = dirty_memory[i] || dirty_bmap[i];
			dirty_bmap[i] = 0;
		}
		unlock(slots_lock);
	}
#elif defined(KVM_RING)
	kvm_dirty_ring_reap();
	/* kvm_slot_sync_dirty_pages() */
	d_step {
		!slots_lock ->
		for_each_page(i) {
			dirty_memory[i] = dirty_memory[i] || dirty_bmap[i];
			dirty_bmap[i] = 0;
		}
	}
#else
	/* TCG marks pages in dirty_memory by itself. */
	skip
#endif
}

/* TCG: the next store of each vCPU goes through notdirty_write(). */
inline tlb_reset_dirty_range_all()
{
	d_step {
		for (i : 0 .. PAGES * VCPUS - 1) {
			tlb[i] = 0;
		}
	}
}

/* TCG: each vCPU has been outside of a translation block. */
inline memory_global_after_dirty_log_sync(v)
{
#ifdef TCG
	v = 0;
	do
	:: v < PAGES * VCPUS -> atomic { !storing[v] -> v++ }
	:: else -> v = 0; break
	od
#else
	skip
#endif
}

/*
 * A write from now on is in the log, or is there already: in dirty_memory, or
 * on its way there, or where nobody can clear it before it has got there.
 */
#if defined(KVM_MANUAL)
#define ARMED(p) (dirty_memory[p] || marking[p] || \
		  (kdirty[p] && !dirty_bmap[p]) || (prot[p] && !tlb[p]))
#elif defined(KVM)
#define ARMED(p) (dirty_memory[p] || marking[p] || \
		  kdirty[p] || dirty_bmap[p] || (prot[p] && !tlb[p]))
#elif VCPUS == 1
#define ARMED(p) (dirty_memory[p] || !tlb[p])
#else
#define ARMED(p) (dirty_memory[p] || (!tlb[2 * p] && !tlb[2 * p + 1]))
#endif

#ifdef OTHERS
/* Other users of the log. */
active proctype others()
{
	do
#if defined(KVM_RING)
	/* kvm_dirty_ring_reaper_thread() */
	:: kvm_dirty_ring_reap()
#elif defined(TCG)
	/* cpu_physical_memory_snapshot_and_clear_dirty(), for VGA */
	:: tlb_reset_dirty_range_all()
#else
	/* memory_region_snapshot_and_clear_dirty() for VGA, calc-dirty-rate */
	:: memory_global_dirty_log_sync()
#endif
#ifdef KVM_MANUAL
	:: kvm_log_clear_one_slot(1)
	/*
	 * kvm_set_phys_mem(): a memslot is removed and comes back, all dirty and
	 * not protected. What its log had is kept.
	 */
	:: d_step {
		!slots_lock ->
		for_each_page(i) {
			dirty_memory[i] = dirty_memory[i] || kdirty[i];
			kdirty[i] = 1;
			prot[i] = 0;
			dirty_bmap[i] = 0;
		}
	   }
#endif
	od
}
#endif
