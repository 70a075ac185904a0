/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Free page hints in arrays: what virtio_balloon.c calls
 *
 * All functions do nothing when given no hint, which is how a device looks that
 * does not offer VIRTIO_BALLOON_F_HINT_ARRAYS.
 */
#ifndef _DRIVERS_VIRTIO_VIRTIO_BALLOON_HINT_H
#define _DRIVERS_VIRTIO_VIRTIO_BALLOON_HINT_H

#include <linux/types.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/wait.h>
#include <uapi/linux/virtio_balloon_hint.h>

struct virtio_balloon_hint;

#ifdef CONFIG_VIRTIO_BALLOON_HINT

void virtio_balloon_hint_validate(struct virtio_device *vdev);
int virtio_balloon_hint_create(struct virtio_device *vdev,
			       wait_queue_head_t *returned,
			       struct virtio_balloon_hint **hint);
void virtio_balloon_hint_destroy(struct virtio_balloon_hint *hint);
void virtio_balloon_hint_changed(struct virtio_balloon_hint *hint);
void virtio_balloon_hint_report(struct virtio_balloon_hint *hint,
				struct virtqueue *vq);
void virtio_balloon_hint_stop(struct virtio_balloon_hint *hint);
void virtio_balloon_hint_reset(struct virtio_balloon_hint *hint,
			       struct virtqueue *vq);

#else /* CONFIG_VIRTIO_BALLOON_HINT */

static inline void virtio_balloon_hint_validate(struct virtio_device *vdev)
{
	__virtio_clear_bit(vdev, VIRTIO_BALLOON_F_HINT_ARRAYS);
}

static inline int
virtio_balloon_hint_create(struct virtio_device *vdev,
			   wait_queue_head_t *returned,
			   struct virtio_balloon_hint **hint)
{
	return 0;
}

static inline void virtio_balloon_hint_destroy(struct virtio_balloon_hint *hint)
{
}

static inline void virtio_balloon_hint_changed(struct virtio_balloon_hint *hint)
{
}

static inline void virtio_balloon_hint_report(struct virtio_balloon_hint *hint,
					      struct virtqueue *vq)
{
}

static inline void virtio_balloon_hint_stop(struct virtio_balloon_hint *hint)
{
}

static inline void virtio_balloon_hint_reset(struct virtio_balloon_hint *hint,
					     struct virtqueue *vq)
{
}

#endif /* CONFIG_VIRTIO_BALLOON_HINT */

#endif /* _DRIVERS_VIRTIO_VIRTIO_BALLOON_HINT_H */
