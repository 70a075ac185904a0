/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Virtio balloon: free page hints in arrays
 *
 * Tells a live migration which pages of the guest are free, so that it need
 * not send them. The host asks once per migration, before it sends the first
 * page; the guest answers with the addresses of its free blocks, many to a
 * message, and keeps on using its memory.
 *
 * Request: a new value in free_page_hint_cmd_id of struct
 * virtio_balloon_config. 0 (STOP) and 1 (DONE) request nothing and end a
 * report; any other value names a request. The guest reads the value before it
 * looks for free memory, and puts it into every message of its answer.
 *
 * Answer: on the free page virtqueue, one message per element. All buffers are
 * device-readable. A message is a struct virtio_balloon_hint_header and zero or
 * more __le64 guest-physical addresses. Messages with one id are a report. Its
 * last message has size 0; it may be missing if STOP, DONE or a new id ended the
 * report. Blocks of different sizes go into different messages.
 *
 * A hint says: at some time after the guest read the id, nobody needed the
 * contents of this block. The guest may have taken the block back since; the
 * host must see to it that what was written after it published the id is not
 * lost. What was not written since must be as it was, or zero: a guest can rely
 * on free memory being zero. Blocks may be missing, and may be reported twice.
 *
 * The guest must not change or free a buffer before the device used it, and
 * the host must not trust one: it drops messages with another id than the
 * current, messages that break a rule below, and addresses that are misaligned
 * or no RAM.
 *
 * Everything is little endian, in legacy devices too.
 */
#ifndef _LINUX_VIRTIO_BALLOON_HINT_H
#define _LINUX_VIRTIO_BALLOON_HINT_H

#include <linux/types.h>
#include <linux/virtio_balloon.h>

/*
 * Feature: hints come in arrays. Depends on VIRTIO_BALLOON_F_FREE_PAGE_HINT,
 * which is the same queue and the same config field, but a message per block.
 * Not registered with the virtio specification.
 */
#define VIRTIO_BALLOON_F_HINT_ARRAYS	23

struct virtio_balloon_hint_header {
	/* The command id that this message answers. */
	__le32 id;
	/*
	 * Bytes per block: a power of two, at least 4096. All addresses are
	 * multiples of it. 0: the report ends here, no addresses follow.
	 */
	__le32 size;
};

/*
 * Feature: a request comes with a budget of page cache, which the guest may free
 * before it looks for free memory. Depends on VIRTIO_BALLOON_F_HINT_ARRAYS. Not
 * registered with the virtio specification.
 */
#define VIRTIO_BALLOON_F_HINT_CACHE	22

/* The config space, with VIRTIO_BALLOON_F_HINT_CACHE. */
struct virtio_balloon_hint_config {
	struct virtio_balloon_config base;
	/*
	 * MiB of page cache that may be freed for the request in
	 * base.free_page_hint_cmd_id, and milliseconds that it may take. With
	 * 0 ms, nothing is to be freed, and the answer says how much could be.
	 * Valid only with a request.
	 */
	__le32 cache_mib;
	__le32 cache_ms;
};

/* The last message of a report, with VIRTIO_BALLOON_F_HINT_CACHE. */
struct virtio_balloon_hint_end {
	struct virtio_balloon_hint_header header;
	/*
	 * Bytes of page cache that were freed, and microseconds that it took.
	 * If cache_ms was 0, bytes that could be freed at most, and 0.
	 */
	__le64 cache_bytes;
	__le64 cache_us;
};

/* Addresses in one message. */
#define VIRTIO_BALLOON_HINT_MAX_ADDRS	16384

#endif /* _LINUX_VIRTIO_BALLOON_HINT_H */
