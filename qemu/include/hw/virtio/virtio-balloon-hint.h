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

/* Protected by the BQL */
typedef struct VirtIOBalloonHint {
    /* Constant between realize and unrealize */
    VirtQueue *vq;
    /* The queue's consumer, in the main loop */
    QEMUBH *bh;

    /* The VM runs and the driver is ready: the queue may be used */
    bool running;
    /*
     * What the config space shows, see VirtIOBalloonHintStatus.  In the
     * migration stream, as is cmd_id.
     */
    uint32_t status;
    /* The latest command id.  Migrated, so that ids never repeat. */
    uint32_t cmd_id;
    /* Blocks: the id of the report that is under way, or 0 */
    uint32_t block_id;
} VirtIOBalloonHint;

/* The values are in the migration stream. */
typedef enum VirtIOBalloonHintStatus {
    /* The guest should not report, but keep what it took for the report */
    VIRTIO_BALLOON_HINT_STOP = 0,
    /* The guest should report */
    VIRTIO_BALLOON_HINT_ASKED = 1,
    /* Only in streams of older versions: the guest has begun to report */
    VIRTIO_BALLOON_HINT_STARTED = 2,
    /* The guest should not report, and may use all of its memory */
    VIRTIO_BALLOON_HINT_DONE = 3,
} VirtIOBalloonHintStatus;

typedef struct VirtIOBalloon VirtIOBalloon;

/* All with the BQL. */
void virtio_balloon_hint_init(VirtIOBalloon *s);
void virtio_balloon_hint_realize(VirtIOBalloon *s);
void virtio_balloon_hint_unrealize(VirtIOBalloon *s);
void virtio_balloon_hint_reset(VirtIOBalloon *s);
void virtio_balloon_hint_set_status(VirtIOBalloon *s, uint8_t status);

/* The features to offer: @features without what needs another one. */
uint64_t virtio_balloon_hint_features(uint64_t features);

/* The command id to show in the config space. */
uint32_t virtio_balloon_hint_config(VirtIOBalloon *s);

#endif
