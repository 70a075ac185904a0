/*
 * Virtio balloon: free page hints for live migration
 *
 * What the guest sends is input, not truth.  It is copied once, its size is
 * bounded, what makes no sense is counted and dropped, and the buffer goes back
 * whatever it held.  A guest that lies here loses its own data at most: the
 * engine takes only RAM that this migration sends.
 *
 * All of it runs with the BQL, the consumer of the queue in the main loop: it
 * raises interrupts and may be given descriptors in MMIO memory, and both take
 * the BQL anyway.  It never waits for the engine, which never waits for it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/iov.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/units.h"
#include "exec/target_page.h"
#include "hw/virtio/virtio.h"
#include "hw/virtio/virtio-access.h"
#include "hw/virtio/virtio-balloon.h"
#include "migration/free-page-hint-compat.h"
#include "migration/free-page-hint-provider.h"
#include "virtio-balloon-hint-parse.h"
#include "trace.h"

/*
 * Descriptors and addresses handled in one turn, so that a guest that floods
 * the queue cannot keep the event loop from others.  The last element of a turn
 * may go beyond, by the descriptors and addresses that one element can have.
 */
#define TURN_BUDGET 256

/* Runs that one element can make at most */
#define MAX_RUNS VIRTIO_BALLOON_HINT_MAX_ADDRS

QEMU_BUILD_BUG_ON(MAX_RUNS > FREE_PAGE_HINT_QUEUE_RUNS);
QEMU_BUILD_BUG_ON(VIRTQUEUE_MAX_SIZE > MAX_RUNS);

/* Collects the runs of one element */
typedef struct HintRuns {
    FreePageHintRun *runs;
    unsigned n;
    unsigned max;
} HintRuns;

static bool hint_arrays(VirtIOBalloon *s)
{
    return virtio_vdev_has_feature(VIRTIO_DEVICE(s),
                                   VIRTIO_BALLOON_F_HINT_ARRAYS);
}

static bool hint_cache(VirtIOBalloon *s)
{
    return virtio_vdev_has_feature(VIRTIO_DEVICE(s),
                                   VIRTIO_BALLOON_F_HINT_CACHE);
}

/* ---- guest-physical ranges to runs ---- */

/*
 * Append the runs for @range, which consists of blocks of @block bytes.
 * Returns the number of bytes that are not RAM, or for which there is no room.
 * There are no more lookups than blocks and runs, and each takes a fixed number
 * of steps and no reference.
 *
 * Called in an RCU critical section.
 */
static uint64_t hint_runs_add(HintRuns *r, VirtIOBalloonHintRange range,
                              uint64_t block)
{
    uint64_t invalid = 0;

    while (range.len) {
        /* Up to the end of the block */
        hwaddr len = (range.len - 1) % block + 1;
        hwaddr here = range.len, offset;
        MemoryRegion *mr;

        mr = address_space_translate(&address_space_memory, range.addr,
                                     &offset, &here, true,
                                     MEMTXATTRS_UNSPECIFIED);
        if (r->n == r->max ||
            !memory_region_is_ram(mr) || memory_region_is_rom(mr) ||
            memory_region_is_romd(mr) || memory_region_is_ram_device(mr)) {
            invalid += len;
        } else {
            uint64_t first = DIV_ROUND_UP(offset, qemu_target_page_size());
            uint64_t end;

            len = here;
            end = (offset + len) / qemu_target_page_size();
            if (first < end) {
                r->runs[r->n++] = (FreePageHintRun) {
                    .block = mr->ram_block,
                    .first = first,
                    .npages = end - first,
                };
            } else {
                /* Less than a page */
                invalid += len;
            }
        }
        range.addr += len;
        range.len -= len;
    }
    return invalid;
}

/* ---- one element of the queue ---- */

/* What the guest says that it freed is a number for statistics. */
static void hint_handle_end(VirtIOBalloon *s, VirtQueueElement *elem,
                            uint32_t id, unsigned words)
{
    struct virtio_balloon_hint_end end = {};

    if (words && !hint_cache(s)) {
        free_page_hint_invalid_message();
        return;
    }
    if (words) {
        iov_to_buf(elem->out_sg, elem->out_num, 0, &end, sizeof(end));
        trace_virtio_balloon_hint_cache(id, le64_to_cpu(end.cache_bytes),
                                        le64_to_cpu(end.cache_us));
        free_page_hint_cache(id, le64_to_cpu(end.cache_bytes),
                             le64_to_cpu(end.cache_us));
    }
    trace_virtio_balloon_hint_end(id);
    free_page_hint_end(id);
}

/* Returns the number of addresses that were looked at. */
static unsigned hint_handle_array(VirtIOBalloon *s, VirtQueueElement *elem)
{
    VirtIOBalloonHintHeader header = {};
    size_t len = iov_size(elem->out_sg, elem->out_num);
    g_autofree VirtIOBalloonHintRange *ranges = NULL;
    g_autofree uint64_t *addrs = NULL;
    g_autofree FreePageHintRun *runs = NULL;
    HintRuns r;
    uint32_t id = 0;
    uint64_t block = 0;
    unsigned n = 0, n_ranges, misaligned, i;
    uint64_t invalid;

    iov_to_buf(elem->out_sg, elem->out_num, 0, &header, sizeof(header));

    /* The device reads arrays: one that it could write is no array */
    if (elem->in_num) {
        free_page_hint_invalid_message();
        return 0;
    }

    switch (virtio_balloon_hint_parse_header(&header, len, &id, &block, &n)) {
    case VIRTIO_BALLOON_HINT_MSG_END:
        hint_handle_end(s, elem, id, n);
        return 0;
    case VIRTIO_BALLOON_HINT_MSG_ARRAY:
        trace_virtio_balloon_hint_array(id, block, n);
        break;
    default:
        trace_virtio_balloon_hint_bad_message(len);
        free_page_hint_invalid_message();
        return 0;
    }

    if (!free_page_hint_wanted(id)) {
        free_page_hint_stale(n * block);
        return 0;
    }

    addrs = g_try_new(uint64_t, n);
    ranges = g_try_new(VirtIOBalloonHintRange, n);
    runs = g_try_new(FreePageHintRun, n);
    if (n && (!addrs || !ranges || !runs)) {
        free_page_hint_abort(FREE_PAGE_HINT_REASON_NO_MEMORY);
        return 0;
    }

    iov_to_buf(elem->out_sg, elem->out_num, sizeof(header), addrs,
               n * sizeof(*addrs));
    n_ranges = virtio_balloon_hint_parse_addrs(addrs, n, block, ranges,
                                               &misaligned);
    invalid = misaligned * block;
    r = (HintRuns) { .runs = runs, .max = n };
    WITH_RCU_READ_LOCK_GUARD() {
        for (i = 0; i < n_ranges; i++) {
            invalid += hint_runs_add(&r, ranges[i], block);
        }
    }
    free_page_hint_submit(id, runs, r.n, n, invalid);
    return n;
}

static void hint_handle_command(VirtIOBalloon *s, VirtQueueElement *elem)
{
    VirtIOBalloonHint *h = &s->hint;
    uint32_t id;

    if (iov_size(elem->out_sg, elem->out_num) != sizeof(id)) {
        free_page_hint_invalid_message();
        return;
    }
    iov_to_buf(elem->out_sg, elem->out_num, 0, &id, sizeof(id));
    virtio_tswap32s(VIRTIO_DEVICE(s), &id);

    if (h->block_id) {
        /* Whatever it says: a report that has begun can only end */
        trace_virtio_balloon_hint_end(h->block_id);
        free_page_hint_end(h->block_id);
        h->block_id = 0;
    } else if (free_page_hint_wanted(id)) {
        h->block_id = id;
    } else {
        /* The stop sign of an earlier report, or a start that comes late */
        trace_virtio_balloon_hint_stale_command(id);
    }
}

static void hint_handle_blocks(VirtIOBalloon *s, VirtQueueElement *elem)
{
    g_autofree FreePageHintRun *runs = NULL;
    HintRuns r;
    uint64_t invalid = 0;
    unsigned i;

    if (!s->hint.block_id || !free_page_hint_wanted(s->hint.block_id)) {
        free_page_hint_stale(iov_size(elem->in_sg, elem->in_num));
        return;
    }

    runs = g_new(FreePageHintRun, VIRTQUEUE_MAX_SIZE);
    r = (HintRuns) { .runs = runs, .max = VIRTQUEUE_MAX_SIZE };
    WITH_RCU_READ_LOCK_GUARD() {
        for (i = 0; i < elem->in_num; i++) {
            VirtIOBalloonHintRange range = {
                .addr = elem->in_addr[i],
                .len = elem->in_sg[i].iov_len,
            };

            if (range.len) {
                invalid += hint_runs_add(&r, range, range.len);
            }
        }
    }
    free_page_hint_submit(s->hint.block_id, runs, r.n, elem->in_num, invalid);
}

/* ---- the queue ---- */

/*
 * Returns true if there may be more elements: later, if the budget is spent,
 * or when the engine calls back, if its queue is full.
 */
static bool hint_handle_elements(VirtIOBalloon *s, bool *full)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(s);
    VirtIOBalloonHint *h = &s->hint;
    unsigned work = 0;
    bool more = true;

    *full = false;
    while (work < TURN_BUDGET) {
        VirtQueueElement *elem;

        if (!free_page_hint_has_room(MAX_RUNS)) {
            *full = true;
            break;
        }
        elem = virtqueue_pop(h->vq, sizeof(VirtQueueElement));
        if (!elem) {
            more = false;
            break;
        }

        work += elem->out_num + elem->in_num;
        if (hint_arrays(s)) {
            work += hint_handle_array(s, elem);
        } else {
            if (elem->out_num) {
                hint_handle_command(s, elem);
            }
            if (elem->in_num) {
                hint_handle_blocks(s, elem);
            }
        }

        virtqueue_push(h->vq, elem, 0);
        g_free(elem);
    }
    if (work) {
        trace_virtio_balloon_hint_turn(work);
        virtio_notify(vdev, h->vq);
    }
    if (vdev->broken) {
        /* The guest cannot answer before it has reset the device */
        free_page_hint_abort(FREE_PAGE_HINT_REASON_BROKEN);
    }
    return more;
}

static void virtio_balloon_hint_bh(void *opaque)
{
    VirtIOBalloon *s = opaque;
    VirtIOBalloonHint *h = &s->hint;
    bool more, full;

    if (!h->running) {
        return;
    }

    virtio_queue_set_notification(h->vq, 0);
    more = hint_handle_elements(s, &full);
    if (!more) {
        virtio_queue_set_notification(h->vq, 1);
        more = !virtio_queue_empty(h->vq);
    }
    if (more && !full) {
        qemu_bh_schedule(h->bh);
    }
}

static void virtio_balloon_hint_handle_vq(VirtIODevice *vdev, VirtQueue *vq)
{
    qemu_bh_schedule(VIRTIO_BALLOON(vdev)->hint.bh);
}

/* ---- the provider ---- */

static FreePageHintReason virtio_balloon_hint_unavailable(void *opaque)
{
    VirtIOBalloon *s = opaque;
    VirtIODevice *vdev = VIRTIO_DEVICE(s);

    /*
     * Hints are guest-physical addresses, also behind an IOMMU.  Linux's driver
     * does not take a balloon that wants the IOMMU used: no driver is the
     * consequence, not the reason.
     */
    if (virtio_host_has_feature(vdev, VIRTIO_F_IOMMU_PLATFORM)) {
        return FREE_PAGE_HINT_REASON_UNSUPPORTED;
    }
    if (!(vdev->status & VIRTIO_CONFIG_S_DRIVER_OK) ||
        !virtio_vdev_has_feature(vdev, VIRTIO_BALLOON_F_FREE_PAGE_HINT)) {
        return FREE_PAGE_HINT_REASON_NO_DRIVER;
    }
    if (vdev->broken) {
        return FREE_PAGE_HINT_REASON_BROKEN;
    }
    if (!vdev->vm_running) {
        return FREE_PAGE_HINT_REASON_VM_STOPPED;
    }
    if (virtio_vdev_has_feature(vdev, VIRTIO_BALLOON_F_PAGE_POISON) &&
        s->poison_val) {
        return FREE_PAGE_HINT_REASON_POISON;
    }
    return FREE_PAGE_HINT_REASON__MAX;
}

static bool virtio_balloon_hint_allocates(void *opaque)
{
    return !hint_arrays(opaque);
}

static uint32_t virtio_balloon_hint_new_id(void *opaque)
{
    VirtIOBalloon *s = opaque;

    if (s->free_page_hint_cmd_id < VIRTIO_BALLOON_FREE_PAGE_HINT_CMD_ID_MIN ||
        s->free_page_hint_cmd_id == UINT32_MAX) {
        s->free_page_hint_cmd_id = VIRTIO_BALLOON_FREE_PAGE_HINT_CMD_ID_MIN;
    } else {
        s->free_page_hint_cmd_id++;
    }
    s->hint.block_id = 0;
    return s->free_page_hint_cmd_id;
}

/*
 * What the config space shows.  Only the migration stream writes it too, and an
 * older QEMU's may have FREE_PAGE_HINT_S_START in it: that is over.
 */
static void hint_publish(VirtIOBalloon *s,
                         enum virtio_balloon_free_page_hint_status status)
{
    trace_virtio_balloon_hint_status(s->free_page_hint_status, status,
                                     s->free_page_hint_cmd_id);
    s->free_page_hint_status = status;
}

static void virtio_balloon_hint_ask(void *opaque, uint64_t cache_bytes,
                                    uint32_t cache_ms)
{
    VirtIOBalloon *s = opaque;

    s->hint.cache_mib = MIN(cache_bytes / MiB, UINT32_MAX);
    s->hint.cache_ms = cache_ms;
    hint_publish(s, FREE_PAGE_HINT_S_REQUESTED);
    virtio_notify_config(VIRTIO_DEVICE(s));
}

static void virtio_balloon_hint_done(void *opaque)
{
    VirtIOBalloon *s = opaque;

    hint_publish(s, FREE_PAGE_HINT_S_DONE);
    virtio_notify_config(VIRTIO_DEVICE(s));
    /* Give back what waited for room in the engine's queue */
    qemu_bh_schedule(s->hint.bh);
}

static void virtio_balloon_hint_resume(void *opaque)
{
    VirtIOBalloon *s = opaque;

    qemu_bh_schedule(s->hint.bh);
}

static const FreePageHintProviderOps virtio_balloon_hint_ops = {
    .unavailable = virtio_balloon_hint_unavailable,
    .allocates = virtio_balloon_hint_allocates,
    .new_id = virtio_balloon_hint_new_id,
    .ask = virtio_balloon_hint_ask,
    .done = virtio_balloon_hint_done,
    .resume = virtio_balloon_hint_resume,
};

/* ---- the device ---- */

uint64_t virtio_balloon_hint_features(uint64_t features)
{
    /* The queue and the command id are that feature's */
    if (!virtio_has_feature(features, VIRTIO_BALLOON_F_FREE_PAGE_HINT)) {
        virtio_clear_feature(&features, VIRTIO_BALLOON_F_HINT_ARRAYS);
    }
    /* The budget comes with a request for arrays */
    if (!virtio_has_feature(features, VIRTIO_BALLOON_F_HINT_ARRAYS)) {
        virtio_clear_feature(&features, VIRTIO_BALLOON_F_HINT_CACHE);
    }
    return features;
}

size_t virtio_balloon_hint_config_size(VirtIOBalloon *s)
{
    uint64_t features = virtio_balloon_hint_features(s->host_features);

    return virtio_has_feature(features, VIRTIO_BALLOON_F_HINT_CACHE) ?
           sizeof(struct virtio_balloon_hint_config) : 0;
}

void virtio_balloon_hint_get_config(VirtIOBalloon *s, uint8_t *config_data)
{
    struct virtio_balloon_hint_config *config = (void *)config_data;
    bool asked = s->free_page_hint_status == FREE_PAGE_HINT_S_REQUESTED;

    if (virtio_balloon_hint_config_size(s)) {
        config->cache_mib = cpu_to_le32(asked ? s->hint.cache_mib : 0);
        config->cache_ms = cpu_to_le32(asked ? s->hint.cache_ms : 0);
    }
}

uint32_t virtio_balloon_hint_config(VirtIOBalloon *s)
{
    switch (s->free_page_hint_status) {
    case FREE_PAGE_HINT_S_REQUESTED:
        return s->free_page_hint_cmd_id;
    case FREE_PAGE_HINT_S_DONE:
        return VIRTIO_BALLOON_CMD_ID_DONE;
    default:
        return VIRTIO_BALLOON_CMD_ID_STOP;
    }
}

void virtio_balloon_hint_set_status(VirtIOBalloon *s, uint8_t status)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(s);
    bool running = vdev->vm_running && (status & VIRTIO_CONFIG_S_DRIVER_OK);

    if (!s->hint.bh) {
        return;
    }
    s->hint.running = running;
    if (running) {
        qemu_bh_schedule(s->hint.bh);
    } else {
        free_page_hint_abort(vdev->vm_running ?
                             FREE_PAGE_HINT_REASON_RESET :
                             FREE_PAGE_HINT_REASON_VM_STOPPED);
    }
}

void virtio_balloon_hint_reset(VirtIOBalloon *s)
{
    if (!s->hint.bh) {
        return;
    }
    s->hint.running = false;
    s->hint.block_id = 0;
    hint_publish(s, FREE_PAGE_HINT_S_STOP);
    free_page_hint_abort(FREE_PAGE_HINT_REASON_RESET);
}

void virtio_balloon_hint_realize(VirtIOBalloon *s)
{
    VirtIODevice *vdev = VIRTIO_DEVICE(s);

    if (s->iothread) {
        warn_report_once("virtio-balloon: 'iothread' is deprecated: free page "
                         "hints are served in the main loop");
    }
    s->hint.vq = virtio_add_queue(vdev, VIRTQUEUE_MAX_SIZE,
                                  virtio_balloon_hint_handle_vq);
    s->hint.bh = virtio_bh_new_guarded(DEVICE(s), virtio_balloon_hint_bh, s);
    free_page_hint_register(&virtio_balloon_hint_ops, s);
}

void virtio_balloon_hint_unrealize(VirtIOBalloon *s)
{
    free_page_hint_unregister(s);
    s->hint.running = false;
    qemu_bh_delete(s->hint.bh);
    s->hint.bh = NULL;
    virtio_delete_queue(s->hint.vq);
    s->hint.vq = NULL;
}
