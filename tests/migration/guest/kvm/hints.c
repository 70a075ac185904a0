// SPDX-License-Identifier: GPL-2.0
/*
 * memstamp in the kernel: what is hinted
 *
 * Looks at each message of the balloon's queue for free page hints, arrays or
 * blocks, before the device can know of it. At this moment, after it was found
 * free and before the host hears of that, memory is taken from the allocator
 * and written: what is hinted is in use then, and the host must keep the write.
 *
 * Remembers what was hinted, to know which of it is written again.
 */
#include <linux/atomic.h>
#include <linux/bitmap.h>
#include <linux/log2.h>
#include <linux/memblock.h>
#include <linux/mm.h>
#include <linux/pfn.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#ifdef CONFIG_VIRTIO_BALLOON_HINT
#include <linux/virtio_balloon_hint.h>
#endif

#include "memstamp.h"

/* One bit per page: hinted in the report that began last, not written since. */
static unsigned long *hinted;
/* The id of that report. Belongs to the balloon's worker. */
static u32 report_id;

/* What happened since the boot, in reports and in pages. */
static u64 reports;
static u64 pages_hinted;
/* Written after they were found free and before the device was told. */
static u64 pages_taken;
/* Written after that, by any server. */
static atomic64_t pages_rewritten;

int memstamp_hints_init(void)
{
	unsigned long *bits = kvcalloc(BITS_TO_LONGS(max_pfn), sizeof(*bits),
				       GFP_KERNEL);

	if (!bits)
		return -ENOMEM;

	WRITE_ONCE(hinted, bits);
	return 0;
}

void memstamp_print_hints(char *text, size_t size)
{
	snprintf(text, size,
		 "reports=%llu hinted=%llu taken=%llu rewritten=%llu\n",
		 reports, pages_hinted, pages_taken,
		 (u64)atomic64_read(&pages_rewritten));
}

bool memstamp_is_hinted(struct page *page)
{
	return test_bit(page_to_pfn(page), hinted);
}

void memstamp_written(struct page *page)
{
	unsigned long pfn = page_to_pfn(page);

	if (test_bit(pfn, hinted) && test_and_clear_bit(pfn, hinted))
		atomic64_inc(&pages_rewritten);
}

static void new_report(u32 id)
{
	if (id == report_id || id == VIRTIO_BALLOON_CMD_ID_STOP ||
	    id == VIRTIO_BALLOON_CMD_ID_DONE)
		return;

	report_id = id;
	reports++;
	memstamp_give_back();
	bitmap_zero(hinted, max_pfn);
}

static void add_block(phys_addr_t addr, size_t bytes)
{
	/* Not atomic: blocks that are hinted are whole words. */
	bitmap_set(hinted, PFN_DOWN(addr), PFN_DOWN(bytes));
	pages_hinted += PFN_DOWN(bytes);
}

#ifdef CONFIG_VIRTIO_BALLOON_HINT
/* What is taken was rewritten too early for that counter. */
static void take(unsigned int order)
{
	u64 pages = memstamp_take(order);

	pages_taken += pages;
	atomic64_sub(pages, &pages_rewritten);
}

static void look_at_array(const struct virtio_balloon_hint_header *header,
			  size_t len)
{
	size_t i, nr = (len - sizeof(*header)) / sizeof(__le64);
	const __le64 *addrs = (const void *)(header + 1);
	u32 size = le32_to_cpu(header->size);

	new_report(le32_to_cpu(header->id));
	for (i = 0; i < nr; i++)
		add_block(le64_to_cpu(addrs[i]), size);
	if (nr)
		take(ilog2(size) - PAGE_SHIFT);
}
#else
/* A stock driver has none. */
static void look_at_array(const void *message, size_t len)
{
}
#endif

void memstamp_queued(struct virtqueue *vq, struct scatterlist *sg,
		     unsigned int out)
{
	if (!READ_ONCE(hinted) || !vq->name || strcmp(vq->name, "free_page_vq"))
		return;

	if (!out)
		add_block(sg_phys(sg), sg->length);
	else if (sg->length == sizeof(__le32))
		new_report(le32_to_cpup(sg_virt(sg)));
	else
		look_at_array(sg_virt(sg), sg->length);
}
