/*
 * Virtio balloon free page hints: what an array says
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/host-utils.h"
#include "virtio-balloon-hint-parse.h"

VirtIOBalloonHintMsg
virtio_balloon_hint_parse_header(const VirtIOBalloonHintHeader *header,
                                 size_t len, uint32_t *id, uint64_t *block,
                                 unsigned *addrs)
{
    uint32_t size;
    size_t n;

    if (len < sizeof(*header) ||
        (len - sizeof(*header)) % sizeof(uint64_t)) {
        return VIRTIO_BALLOON_HINT_MSG_INVALID;
    }
    n = (len - sizeof(*header)) / sizeof(uint64_t);
    size = le32_to_cpu(header->size);
    *id = le32_to_cpu(header->id);

    if (!size && (!n || n == VIRTIO_BALLOON_HINT_END_WORDS)) {
        *addrs = n;
        return VIRTIO_BALLOON_HINT_MSG_END;
    }
    if (n > VIRTIO_BALLOON_HINT_MAX_ADDRS ||
        size < VIRTIO_BALLOON_HINT_MIN_BLOCK || !is_power_of_2(size)) {
        return VIRTIO_BALLOON_HINT_MSG_INVALID;
    }

    *block = size;
    *addrs = n;
    return VIRTIO_BALLOON_HINT_MSG_ARRAY;
}

unsigned virtio_balloon_hint_parse_addrs(const uint64_t *addrs, unsigned n,
                                         uint64_t block,
                                         VirtIOBalloonHintRange *ranges,
                                         unsigned *invalid)
{
    VirtIOBalloonHintRange *last = NULL;
    unsigned n_ranges = 0;
    unsigned i;

    *invalid = 0;
    for (i = 0; i < n; i++) {
        uint64_t addr = le64_to_cpu(addrs[i]);

        /* addr is aligned, so only the block at the very top could wrap */
        if (addr & (block - 1) || addr > UINT64_MAX - block) {
            (*invalid)++;
            continue;
        }

        if (last && addr == last->addr + last->len) {
            last->len += block;
        } else if (last && addr + block == last->addr) {
            last->addr = addr;
            last->len += block;
        } else {
            last = &ranges[n_ranges++];
            *last = (VirtIOBalloonHintRange) { .addr = addr, .len = block };
        }
    }
    return n_ranges;
}
