/*
 * Virtio balloon: free page hints for live migration
 *
 * The balloon as a provider of free page hints, see
 * migration/free-page-hint-provider.h.
 * It speaks two protocols on the free page queue:
 *
 *  - arrays (VIRTIO_BALLOON_F_HINT_ARRAYS): see virtio_balloon_hint.h;
 *  - blocks (VIRTIO_BALLOON_F_FREE_PAGE_HINT alone): a device-readable element
 *    with the command id starts the report, each device-writable element is a
 *    free block, and another device-readable element ends the report.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_VIRTIO_BALLOON_HINT_H
#define HW_VIRTIO_BALLOON_HINT_H

#include "hw/virtio/virtio.h"

/*
 * What is not in the migration stream: free_page_hint_status and
 * free_page_hint_cmd_id are in VirtIOBalloon.  Protected by the BQL.
 */
typedef struct VirtIOBalloonHint {
    /* Constant between realize and unrealize */
    VirtQueue *vq;
    /* The queue's consumer, in the main loop */
    QEMUBH *bh;

    /* The VM runs and the driver is ready: the queue may be used */
    bool running;
    /* Blocks: the id of the report that is under way, or 0 */
    uint32_t block_id;
    /* Page cache that may be freed for the latest request, and how long */
    uint32_t cache_mib;
    uint32_t cache_ms;
} VirtIOBalloonHint;

typedef struct VirtIOBalloon VirtIOBalloon;

/* All with the BQL. */
void virtio_balloon_hint_realize(VirtIOBalloon *s);
void virtio_balloon_hint_unrealize(VirtIOBalloon *s);
void virtio_balloon_hint_reset(VirtIOBalloon *s);
void virtio_balloon_hint_set_status(VirtIOBalloon *s, uint8_t status);

/* The features to offer: @features without what needs another one. */
uint64_t virtio_balloon_hint_features(uint64_t features);

/* The size of the config space that hints need, or 0. */
size_t virtio_balloon_hint_config_size(VirtIOBalloon *s);

/* Fill in what is not in struct virtio_balloon_config. */
void virtio_balloon_hint_get_config(VirtIOBalloon *s, uint8_t *config_data);

/* The command id to show in the config space. */
uint32_t virtio_balloon_hint_config(VirtIOBalloon *s);

#endif
