// SPDX-License-Identifier: GPL-2.0
/*
 * Virtio balloon: free page hints in arrays
 *
 * Answers a request for free page hints with the addresses of the guest's free
 * blocks. The protocol is in uapi/linux/virtio_balloon_hint.h; this is the
 * driver's side of it. Finding the blocks is free_page_hint.c's work, the
 * device and its queue are virtio_balloon.c's.
 *
 * No page is taken out of the allocator. All memory that is needed is a few
 * buffers, whatever the guest's size: one is filled while the device reads the
 * others.
 */
#include <linux/atomic.h>
#include <linux/bitops.h>
#include <linux/debugfs.h>
#include <linux/device.h>
#include <linux/err.h>
#include <linux/free_page_hint.h>
#include <linux/gfp.h>
#include <linux/init.h>
#include <linux/jiffies.h>
#include <linux/log2.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/notifier.h>
#include <linux/overflow.h>
#include <linux/ratelimit.h>
#include <linux/scatterlist.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/suspend.h>
#include <linux/timekeeping.h>
#include <linux/virtio_balloon.h>

#include "virtio_balloon_hint.h"

#define CREATE_TRACE_POINTS
#include <trace/events/virtio_balloon_hint.h>

/* Two buffers would keep both sides busy; four ride out a late wakeup. */
#define HINT_BUFS		4
#define HINT_BUF_BYTES		SZ_128K
/* Entries per hold of a zone's lock: 73 us, at the 286 ns of each under TCG. */
#define HINT_BATCH		256
/* In a second: an estimate and a migration right after it get theirs. */
#define HINT_DRAINS		4

/* A message with addresses. */
struct hint_array {
	struct virtio_balloon_hint_header hdr;
	__le64 addrs[];
};

static_assert((HINT_BUF_BYTES - sizeof(struct hint_array)) / sizeof(__le64) <=
	      VIRTIO_BALLOON_HINT_MAX_ADDRS);
static_assert(HINT_BATCH <= FREE_PAGE_HINT_MAX_BATCH);
/* The size of a block goes into 32 bits. */
static_assert(PAGE_SHIFT + MAX_PAGE_ORDER < 32);

/* A buffer for messages. Not to be changed or freed while the device has it. */
struct hint_buf {
	void *data;
	unsigned int order;
	bool device_has_it;
};

/* Why the worker must not go on waiting, or must look at the id again. */
enum {
	HINT_CHANGED,		/* the device's config changed */
	HINT_STOPPED,		/* the driver is being removed */
	HINT_SUSPENDING,	/* the system is about to sleep */
};

/* What debugfs shows: what no tracepoint says. Written by the worker only. */
struct hint_stats {
	u64 reports;
	u64 aborted;
	u64 refused;
	u64 no_memory;
};

struct virtio_balloon_hint {
	struct virtio_device *vdev;
	/* Woken when the device has returned buffers, and with @flags. */
	wait_queue_head_t *returned;
	unsigned long flags;
	struct notifier_block pm_nb;
	struct dentry *debugfs;

	/*
	 * The rest belongs to the worker, which runs one at a time, and to
	 * virtio_balloon_hint_reset(), which runs when the worker cannot.
	 */
	struct virtqueue *vq;
	/* The request that was answered last. */
	u32 id;
	struct hint_buf bufs[HINT_BUFS];
	struct virtio_balloon_hint_header end;
	struct hint_buf end_buf;
	/* The buffer that is being filled: blocks of 2^order pages. */
	struct hint_buf *fill;
	unsigned int fill_nr;
	unsigned int order;
	phys_addr_t batch[HINT_BATCH];
	/* What was sent in this answer. */
	u64 arrays;
	u64 blocks;
	/* How often the per-CPU lists are drained */
	struct ratelimit_state drains;

	struct hint_stats stats;
};

static struct dentry *hint_debugfs;

/*
 * Blocks of 64 KiB, whatever the size of a page. After an hour of compiling, a
 * guest of 640 MiB had 89 % of its free memory in 119 blocks of 2 MiB and more,
 * and 93 % in 275 of 64 KiB and more; there are 4329 free blocks in all. With
 * pages of 64 KiB this is order 0, and everything.
 */
static unsigned int hint_order =
	MIN(MAX_PAGE_ORDER, MAX(const_ilog2(SZ_64K) - PAGE_SHIFT, 0));

static int hint_order_set(const char *val, const struct kernel_param *kp)
{
	return param_set_uint_minmax(val, kp, 0, MAX_PAGE_ORDER);
}

static const struct kernel_param_ops hint_order_ops = {
	.set = hint_order_set,
	.get = param_get_uint,
};

module_param_cb(hint_order, &hint_order_ops, &hint_order, 0644);
MODULE_PARM_DESC(hint_order,
		 "Smallest order of the free blocks that are reported to the host (default: blocks of 64 KiB)");

static u32 hint_read_id(struct virtio_balloon_hint *hint)
{
	u32 id;

	clear_bit(HINT_CHANGED, &hint->flags);
	/* Before the read: a change after it sets the bit again. */
	smp_mb__after_atomic();

	/* Legacy balloon config space is LE, unlike all other devices. */
	virtio_cread_le(hint->vdev, struct virtio_balloon_config,
			free_page_hint_cmd_id, &id);
	return id;
}

/* Returns 0 while the request that is being answered is the current one. */
static int hint_check(struct virtio_balloon_hint *hint)
{
	if (likely(!READ_ONCE(hint->flags)))
		return 0;
	if (test_bit(HINT_STOPPED, &hint->flags) ||
	    test_bit(HINT_SUSPENDING, &hint->flags))
		return -ESHUTDOWN;

	return hint_read_id(hint) == hint->id ? 0 : -ECANCELED;
}

/* Takes back the buffers that the device has read. */
static void hint_reap(struct virtio_balloon_hint *hint)
{
	struct hint_buf *buf;
	unsigned int len;

	while ((buf = virtqueue_get_buf(hint->vq, &len)))
		buf->device_has_it = false;
}

static bool hint_has_all(struct virtio_balloon_hint *hint)
{
	unsigned int i;

	hint_reap(hint);
	for (i = 0; i < HINT_BUFS; i++)
		if (hint->bufs[i].device_has_it)
			return false;

	return !hint->end_buf.device_has_it;
}

static void hint_free_bufs(struct virtio_balloon_hint *hint)
{
	unsigned int i;

	for (i = 0; i < HINT_BUFS; i++) {
		struct hint_buf *buf = &hint->bufs[i];

		if (!buf->data || WARN_ON_ONCE(buf->device_has_it))
			continue;
		free_pages((unsigned long)buf->data, buf->order);
		buf->data = NULL;
	}
}

/*
 * Gets the buffers of a report, a smaller one and no more where there are no
 * larger ones. Memory that is hard to get is not worth it, not even to wake
 * kswapd or kcompactd, and the host does not wait for long: no hint is a correct
 * hint. Some buffers can still be there, with the device, from a report that was
 * ended.
 */
static bool hint_alloc_bufs(struct virtio_balloon_hint *hint)
{
	/* One descriptor is for the end message. */
	unsigned int i, want = min(virtqueue_get_vring_size(hint->vq) - 1,
				   HINT_BUFS);
	bool any = false, scarce = false;

	for (i = 0; i < want && !scarce; i++) {
		struct hint_buf *buf = &hint->bufs[i];
		int order = get_order(HINT_BUF_BYTES);

		while (!buf->data && order >= 0) {
			gfp_t gfp = order ? 0 : GFP_KERNEL | __GFP_NORETRY;

			buf->data = (void *)__get_free_pages(gfp | __GFP_NOWARN,
							     order);
			buf->order = order--;
		}
		if (buf->data)
			any = true;
		scarce = buf->order < get_order(HINT_BUF_BYTES);
	}

	return any;
}

static struct hint_buf *hint_find_buf(struct virtio_balloon_hint *hint)
{
	unsigned int i;

	hint_reap(hint);
	for (i = 0; i < HINT_BUFS; i++)
		if (hint->bufs[i].data && !hint->bufs[i].device_has_it)
			return &hint->bufs[i];

	return NULL;
}

/*
 * Waits until the device has returned a buffer. The host may take its time, so
 * this waits without a limit, but not when the request is no longer current.
 * TASK_IDLE, so that a slow host is no hung task.
 */
static int hint_wait_buf(struct virtio_balloon_hint *hint)
{
	int ret;

	do {
		wait_event_idle(*hint->returned,
				(hint->fill = hint_find_buf(hint)) ||
				READ_ONCE(hint->flags));
		ret = hint_check(hint);
	} while (!ret && !hint->fill);

	hint->fill_nr = 0;
	return ret;
}

static bool hint_has_end_buf(struct virtio_balloon_hint *hint)
{
	hint_reap(hint);
	return !hint->end_buf.device_has_it;
}

/* The end message of an earlier report can still be with the device. */
static int hint_wait_end_buf(struct virtio_balloon_hint *hint)
{
	int ret = 0;

	while (!ret && !hint_has_end_buf(hint)) {
		wait_event_idle(*hint->returned,
				hint_has_end_buf(hint) ||
				READ_ONCE(hint->flags));
		ret = hint_check(hint);
	}

	return ret;
}

/* One descriptor, which the device only reads. Nothing is allocated. */
static int hint_send(struct virtio_balloon_hint *hint, struct hint_buf *buf,
		     size_t len)
{
	struct scatterlist sg;
	int err;

	sg_init_one(&sg, buf->data, len);
	err = virtqueue_add_outbuf(hint->vq, &sg, 1, buf, GFP_KERNEL);
	if (err)
		return err;

	buf->device_has_it = true;
	virtqueue_kick(hint->vq);
	return 0;
}

static unsigned int hint_capacity(const struct hint_buf *buf)
{
	size_t bytes = min(PAGE_SIZE << buf->order, HINT_BUF_BYTES);

	return (bytes - sizeof(struct hint_array)) / sizeof(__le64);
}

/* Sends what was filled in so far, if anything. */
static int hint_send_array(struct virtio_balloon_hint *hint)
{
	struct hint_buf *buf = hint->fill;
	unsigned int nr = hint->fill_nr;
	u32 size = PAGE_SIZE << hint->order;
	struct hint_array *array;
	int err;

	if (!buf || !nr)
		return 0;

	array = buf->data;
	array->hdr.id = cpu_to_le32(hint->id);
	array->hdr.size = cpu_to_le32(size);
	err = hint_send(hint, buf, struct_size(array, addrs, nr));
	if (err)
		return err;

	hint->fill = NULL;
	hint->arrays++;
	hint->blocks += nr;
	trace_virtio_balloon_hint_array(hint->id, size, nr);
	return 0;
}

/* Called by the walk, with blocks of hint->order. */
static int hint_add_blocks(const phys_addr_t *addrs, unsigned int nr,
			   void *private)
{
	struct virtio_balloon_hint *hint = private;
	int ret = hint_check(hint);

	while (!ret && nr) {
		struct hint_array *array;
		unsigned int room;

		if (!hint->fill) {
			ret = hint_wait_buf(hint);
			continue;
		}

		array = hint->fill->data;
		room = hint_capacity(hint->fill) - hint->fill_nr;
		for (; nr && room; nr--, room--)
			array->addrs[hint->fill_nr++] = cpu_to_le64(*addrs++);
		if (!room)
			ret = hint_send_array(hint);
	}

	return ret;
}

/*
 * A host may ask over and over without migrating. To drain each time would take
 * every CPU's lists away from it again and again, for little: what was freed
 * since the last time.
 */
static void hint_drain(struct virtio_balloon_hint *hint)
{
	if (__ratelimit(&hint->drains))
		free_page_hint_drain();
}

/*
 * Free blocks of all orders from hint_order up. A block is in the lists of its
 * own order only, so each order is walked, and gets arrays with its own size:
 * one address for a free block, however large.
 */
static int hint_send_blocks(struct virtio_balloon_hint *hint)
{
	struct free_page_hint_walk walk = {
		.batch = hint->batch,
		.batch_len = ARRAY_SIZE(hint->batch),
		.fn = hint_add_blocks,
		.private = hint,
	};
	int order, smallest = READ_ONCE(hint_order);
	int ret = 0;

	if (!hint_alloc_bufs(hint)) {
		hint->stats.no_memory++;
		return 0;
	}
	hint->fill = NULL;
	hint_drain(hint);
	for (order = MAX_PAGE_ORDER; !ret && order >= smallest; order--) {
		hint->order = order;
		walk.order = order;
		ret = free_page_hint_walk(&walk);
		if (!ret)
			ret = hint_send_array(hint);
	}

	return ret;
}

static int hint_send_end(struct virtio_balloon_hint *hint)
{
	hint->end.id = cpu_to_le32(hint->id);
	hint->end.size = 0;
	return hint_send(hint, &hint->end_buf, sizeof(hint->end));
}

/* Answers the request hint->id. Returns 0 if the answer is complete. */
static int hint_answer(struct virtio_balloon_hint *hint)
{
	struct hint_stats *stats = &hint->stats;
	u64 start = ktime_get_ns();
	int err = 0;

	hint->arrays = 0;
	hint->blocks = 0;
	trace_virtio_balloon_hint_request(hint->id);

	/*
	 * The allocator checks the pattern in free pages, which would not
	 * arrive. init_on_free's zeroes do: unsent pages are zero.
	 */
	if (page_poisoning_enabled_static())
		stats->refused++;
	else
		err = hint_send_blocks(hint);

	if (!err)
		err = hint_wait_end_buf(hint);
	if (!err)
		err = hint_send_end(hint);
	else if (hint_has_end_buf(hint))
		/* Nobody asks again for a report that sleep, say, cut short. */
		hint_send_end(hint);

	if (err)
		stats->aborted++;
	else
		stats->reports++;
	trace_virtio_balloon_hint_end(hint->id, hint->arrays, hint->blocks,
				      ktime_get_ns() - start, err);
	return err;
}

/**
 * virtio_balloon_hint_report - answer the device's request, if there is one
 * @hint: what virtio_balloon_hint_create() made, or NULL
 * @vq: the free page queue, or NULL if there is none, after a failed resume
 *
 * To be called from a work item that is queued after each
 * virtio_balloon_hint_changed(). Returns when the device has returned all
 * buffers, or before that if there is something else to do, in which case the
 * next call or virtio_balloon_hint_reset() frees them.
 */
void virtio_balloon_hint_report(struct virtio_balloon_hint *hint,
				struct virtqueue *vq)
{
	u32 id;
	int err = 0;

	if (!hint || !vq)
		return;

	/* The id comes first, the walk later: else a hint could be too old. */
	id = hint_read_id(hint);
	hint->vq = vq;
	if (id != VIRTIO_BALLOON_CMD_ID_STOP &&
	    id != VIRTIO_BALLOON_CMD_ID_DONE && id != hint->id) {
		hint->id = id;
		err = hint_answer(hint);
	}

	if (!err)
		wait_event_idle(*hint->returned,
				hint_has_all(hint) || READ_ONCE(hint->flags));
	if (hint_has_all(hint))
		hint_free_bufs(hint);
}
EXPORT_SYMBOL_GPL(virtio_balloon_hint_report);

static void hint_interrupt(struct virtio_balloon_hint *hint, int why)
{
	set_bit(why, &hint->flags);
	wake_up(hint->returned);
}

/**
 * virtio_balloon_hint_changed - the device's config has changed
 * @hint: what virtio_balloon_hint_create() made, or NULL
 *
 * Ends the report that is under way if it is no longer wanted. May be called
 * in interrupt context.
 */
void virtio_balloon_hint_changed(struct virtio_balloon_hint *hint)
{
	if (hint)
		hint_interrupt(hint, HINT_CHANGED);
}
EXPORT_SYMBOL_GPL(virtio_balloon_hint_changed);

/**
 * virtio_balloon_hint_stop - end the report that is under way, for good
 * @hint: what virtio_balloon_hint_create() made, or NULL
 *
 * After this, the work item ends even if the device does not return buffers.
 */
void virtio_balloon_hint_stop(struct virtio_balloon_hint *hint)
{
	if (hint)
		hint_interrupt(hint, HINT_STOPPED);
}
EXPORT_SYMBOL_GPL(virtio_balloon_hint_stop);

/**
 * virtio_balloon_hint_reset - take all buffers back from a device that was reset
 * @hint: what virtio_balloon_hint_create() made, or NULL
 * @vq: the free page queue, before it is deleted, or NULL if that was done
 *
 * The work item must not be running.
 */
void virtio_balloon_hint_reset(struct virtio_balloon_hint *hint,
			       struct virtqueue *vq)
{
	struct hint_buf *buf;

	if (!hint || !vq)
		return;

	while ((buf = virtqueue_detach_unused_buf(vq)))
		buf->device_has_it = false;
	hint_free_bufs(hint);

	/* A device that was reset can ask again with the same id. */
	hint->id = VIRTIO_BALLOON_CMD_ID_STOP;
	/* After a sleep, work can begin before the notifier is called. */
	clear_bit(HINT_SUSPENDING, &hint->flags);
}
EXPORT_SYMBOL_GPL(virtio_balloon_hint_reset);

/*
 * The work item is on a freezable queue, which cannot freeze while the work
 * waits for the device.
 */
static int hint_pm_notify(struct notifier_block *nb, unsigned long action,
			  void *unused)
{
	struct virtio_balloon_hint *hint =
		container_of(nb, struct virtio_balloon_hint, pm_nb);

	switch (action) {
	case PM_HIBERNATION_PREPARE:
	case PM_SUSPEND_PREPARE:
	case PM_RESTORE_PREPARE:
		hint_interrupt(hint, HINT_SUSPENDING);
		break;
	case PM_POST_HIBERNATION:
	case PM_POST_SUSPEND:
	case PM_POST_RESTORE:
		clear_bit(HINT_SUSPENDING, &hint->flags);
		break;
	}

	return NOTIFY_DONE;
}

static void hint_create_debugfs(struct virtio_balloon_hint *hint)
{
	struct hint_stats *stats = &hint->stats;
	struct dentry *dir = debugfs_create_dir(dev_name(&hint->vdev->dev),
						hint_debugfs);

	hint->debugfs = dir;
	debugfs_create_u64("reports", 0444, dir, &stats->reports);
	debugfs_create_u64("aborted", 0444, dir, &stats->aborted);
	debugfs_create_u64("refused", 0444, dir, &stats->refused);
	debugfs_create_u64("no_memory", 0444, dir, &stats->no_memory);
}

/**
 * virtio_balloon_hint_validate - refuse the feature where it cannot work
 * @vdev: the balloon device, while features are negotiated
 */
void virtio_balloon_hint_validate(struct virtio_device *vdev)
{
	/* The queue and the command id are that feature's. */
	if (!virtio_has_feature(vdev, VIRTIO_BALLOON_F_FREE_PAGE_HINT))
		__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_HINT_ARRAYS);
}
EXPORT_SYMBOL_GPL(virtio_balloon_hint_validate);

/**
 * virtio_balloon_hint_create - get ready to answer requests
 * @vdev: the balloon device, before it is ready
 * @returned: woken by the free page queue's callback
 * @hint: where to put the result: NULL if the feature was not negotiated
 *
 * Return: 0 or a negative error.
 */
int virtio_balloon_hint_create(struct virtio_device *vdev,
			       wait_queue_head_t *returned,
			       struct virtio_balloon_hint **hint)
{
	struct virtio_balloon_hint *new;
	int err;

	*hint = NULL;
	if (!virtio_has_feature(vdev, VIRTIO_BALLOON_F_HINT_ARRAYS))
		return 0;

	new = kzalloc(sizeof(*new), GFP_KERNEL);
	if (!new)
		return -ENOMEM;

	new->vdev = vdev;
	new->returned = returned;
	new->id = VIRTIO_BALLOON_CMD_ID_STOP;
	ratelimit_state_init(&new->drains, HZ, HINT_DRAINS);
	/* Nobody has to read about the others. */
	ratelimit_set_flags(&new->drains, RATELIMIT_MSG_ON_RELEASE);
	new->end_buf.data = &new->end;

	new->pm_nb.notifier_call = hint_pm_notify;
	err = register_pm_notifier(&new->pm_nb);
	if (err) {
		kfree(new);
		return err;
	}

	hint_create_debugfs(new);
	*hint = new;
	return 0;
}
EXPORT_SYMBOL_GPL(virtio_balloon_hint_create);

/**
 * virtio_balloon_hint_destroy - undo virtio_balloon_hint_create()
 * @hint: what it made, or NULL
 *
 * The device must not have buffers any more: see virtio_balloon_hint_reset().
 */
void virtio_balloon_hint_destroy(struct virtio_balloon_hint *hint)
{
	if (!hint)
		return;

	unregister_pm_notifier(&hint->pm_nb);
	debugfs_remove_recursive(hint->debugfs);
	kfree(hint);
}
EXPORT_SYMBOL_GPL(virtio_balloon_hint_destroy);

static int __init hint_init(void)
{
	hint_debugfs = debugfs_create_dir("virtio_balloon_hint", NULL);
	return 0;
}

/* Before the balloon's first probe, where both are built in. */
subsys_initcall(hint_init);

static void __exit hint_exit(void)
{
	debugfs_remove_recursive(hint_debugfs);
}
module_exit(hint_exit);

MODULE_DESCRIPTION("Virtio balloon: free page hints in arrays");
MODULE_LICENSE("GPL");
