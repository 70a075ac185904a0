/*
 * Virtio balloon free page hints: what an array says
 *
 * Pure functions on a private copy of the guest's message.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_VIRTIO_BALLOON_HINT_PARSE_H
#define HW_VIRTIO_BALLOON_HINT_PARSE_H

#include "standard-headers/linux/virtio_balloon_hint.h"

/* Smallest block that a guest may hint: the balloon's own page size */
#define VIRTIO_BALLOON_HINT_MIN_BLOCK 4096

typedef struct virtio_balloon_hint_header VirtIOBalloonHintHeader;

/* What an end may say besides, in words of 64 bits */
#define VIRTIO_BALLOON_HINT_END_WORDS \
    ((sizeof(struct virtio_balloon_hint_end) - \
      sizeof(VirtIOBalloonHintHeader)) / sizeof(uint64_t))

/* Guest-physical memory, in bytes.  addr + len does not wrap. */
typedef struct VirtIOBalloonHintRange {
    uint64_t addr;
    uint64_t len;
} VirtIOBalloonHintRange;

typedef enum VirtIOBalloonHintMsg {
    /* Not a message: wrong length, or a block size that is none */
    VIRTIO_BALLOON_HINT_MSG_INVALID,
    /* Addresses of blocks */
    VIRTIO_BALLOON_HINT_MSG_ARRAY,
    /* The end of the report */
    VIRTIO_BALLOON_HINT_MSG_END,
} VirtIOBalloonHintMsg;

/**
 * virtio_balloon_hint_parse_header: tell what a message is
 *
 * @header: as the guest wrote it, little endian
 * @len: bytes in the message, header included
 * @id: set to the request that the message answers, unless it is invalid
 * @block: set to the bytes in a block, if it is an array
 * @addrs: set to the number of addresses, if it is an array, which may be 0; or
 *         to that of the words that follow, if it is an end: 0 or
 *         VIRTIO_BALLOON_HINT_END_WORDS
 */
VirtIOBalloonHintMsg
virtio_balloon_hint_parse_header(const VirtIOBalloonHintHeader *header,
                                 size_t len, uint32_t *id, uint64_t *block,
                                 unsigned *addrs);

/**
 * virtio_balloon_hint_parse_addrs: turn addresses into ranges
 *
 * Blocks that follow each other in the array and in memory, in either
 * direction, become one range.  Misaligned addresses and blocks that reach
 * beyond 2^64 are left out and counted.
 *
 * @addrs: as the guest wrote them, little endian
 * @n: number of addresses
 * @block: bytes in a block, from virtio_balloon_hint_parse_header()
 * @ranges: room for @n ranges
 * @invalid: set to the number of addresses left out
 *
 * Returns the number of ranges.
 */
unsigned virtio_balloon_hint_parse_addrs(const uint64_t *addrs, unsigned n,
                                         uint64_t block,
                                         VirtIOBalloonHintRange *ranges,
                                         unsigned *invalid);

#endif
