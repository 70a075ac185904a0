/*
 * virtio-balloon free page hints fuzzing target
 *
 * Each input is a guest that answers a migration.  The migration is real: it
 * runs in its thread, has armed the dirty log and waits for hints when the
 * input takes over.  The input is a list of operations, each a byte and its
 * operands: messages that are nearly right, raw descriptors, writes to the
 * rings and registers, resets, and what the operator may do meanwhile.
 *
 * The vCPU is halted, the target is the guest.  After each input the migration
 * must end, leave nothing behind, and the device must answer again.  What
 * FREE_PAGE_HINT_DEBUG adds is checked, too: the counter of dirty pages, and
 * that no write is lost to a page that is still hinted when the guest stops.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#ifdef QEMU_SANITIZE_ADDRESS
#include <sanitizer/lsan_interface.h>
#else
#define __lsan_disable()
#define __lsan_enable()
#endif
#include "qemu/bswap.h"
#include "qemu/host-utils.h"
#include "qemu/main-loop.h"
#include "qemu/memfd.h"
#include "qemu/rcu.h"
#include "block/aio.h"
#include "hw/virtio/virtio-balloon.h"
#include "qapi/qapi-commands-migration.h"
#include "qapi/qapi-commands-misc.h"
#include "system/cpus.h"
#include "system/runstate.h"
#include "system/system.h"
#include "migration/free-page-hint.h"
#include "migration/migration.h"
#include "migration/ram.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_pci.h"
#include "tests/qtest/libqos/pci-pc.h"
#include "tests/qtest/libqos/virtio-pci.h"
#include "tests/qtest/libqtest.h"
#include "fuzz.h"

#define RAM_SIZE (4 * MiB)
/* Two that touch: a block may reach from one into the other */
#define DIMM_ADDR (4 * GiB)
#define DIMM_SIZE (2 * MiB)
#define DIMM_END (DIMM_ADDR + 2 * DIMM_SIZE)
#define SLOT 4

/* Guest memory: a ring for each queue, then what messages are made in */
#define RING_ADDR(queue) (0x10000 + (queue) * 0x10000)
#define RING_SIZE 0x10000
#define RING_AVAIL 0x4000
#define RING_USED 0x5000
#define DATA_ADDR 0x200000
#define DATA_SIZE 0x80000

#define HINT_QUEUE 3
#define N_QUEUES 5
#define QUEUE_SIZE 1024

#define MAX_OPS 64
#define MAX_MIGRATIONS 3
#define MAX_SYSTEM_RESETS 1
/* Longer than anything that QEMU waits for, but for a guest's answer */
#define PATIENCE_US (20 * G_USEC_PER_SEC)

typedef struct Input {
    const uint8_t *data;
    size_t size;
} Input;

typedef struct Queue {
    uint16_t next;
    uint16_t avail;
} Queue;

typedef struct Buffer {
    uint64_t addr;
    uint32_t len;
    bool write;
} Buffer;

static QTestState *qts;
static QPCIBus *bus;
static QVirtioPCIDevice *dev;
static VirtIOBalloon *balloon;
static Queue queues[N_QUEUES];
static uint64_t data_next;
static char *uri;
static char *firmware;
static unsigned migrations, system_resets;

/* How many inputs, or migrations, got there; see print_reached() */
static struct {
    unsigned inputs, migrations, asked, applied, redirtied, invalid, stale;
    unsigned starved, reported, cached, completed;
    unsigned reasons[FREE_PAGE_HINT_REASON__MAX];
} reached;

static void print_reached(void)
{
    unsigned i;

    fprintf(stderr, "reached: inputs %u migrations %u asked %u applied %u "
            "redirtied %u invalid %u stale %u starved %u reported %u "
            "cached %u completed %u", reached.inputs, reached.migrations,
            reached.asked, reached.applied, reached.redirtied, reached.invalid,
            reached.stale, reached.starved, reached.reported, reached.cached,
            reached.completed);
    for (i = 0; i < FREE_PAGE_HINT_REASON__MAX; i++) {
        if (reached.reasons[i]) {
            fprintf(stderr, " %s %u", FreePageHintReason_str(i),
                    reached.reasons[i]);
        }
    }
    fprintf(stderr, "\n");
}

/* ---- the input ---- */

/* A little-endian number of @bytes bytes; zeroes follow the input's end */
static uint64_t take(Input *in, unsigned bytes)
{
    uint64_t value = 0;
    unsigned i;

    for (i = 0; i < bytes && in->size; i++) {
        value |= (uint64_t)*in->data++ << (8 * i);
        in->size--;
    }
    return value;
}

static uint64_t take_addr(Input *in)
{
    switch (take(in, 1) % 16) {
    case 0 ... 4:
        return take(in, 2) * 4 * KiB % RAM_SIZE;
    case 5:
        return take(in, 4) % RAM_SIZE;
    case 6:
        /* Around the end of RAM */
        return RAM_SIZE + (int8_t)take(in, 1) * 512;
    case 7:
        return RING_ADDR(HINT_QUEUE) + take(in, 2);
    case 8:
        return DATA_ADDR + take(in, 3) % DATA_SIZE;
    case 9:
        /* VGA's hole and ROM */
        return 0xa0000 + take(in, 2) * 8;
    case 10:
        return DIMM_ADDR + take(in, 2) * 4 * KiB % (2 * DIMM_SIZE);
    case 11:
        /* Around the end of the DIMMs */
        return DIMM_END + (int8_t)take(in, 1) * 512;
    case 12:
        /* The device itself */
        return dev->bar.addr + take(in, 2);
    case 13:
        /* IOAPIC, and what surrounds it */
        return 0xfec00000 + (int16_t)take(in, 2);
    case 14:
        return -take(in, 3);
    default:
        return take(in, 8);
    }
}

/* Memory that the target writes to: no registers */
static uint64_t take_ram_addr(Input *in)
{
    uint64_t addr = take_addr(in);

    return addr >= DIMM_ADDR && addr < DIMM_END ? addr : addr % RAM_SIZE;
}

static uint32_t current_id(void)
{
    return qpci_io_readl(dev->pdev, dev->bar, dev->device_cfg_offset +
                         offsetof(struct virtio_balloon_config,
                                  free_page_hint_cmd_id));
}

static uint32_t take_id(Input *in)
{
    switch (take(in, 1) % 16) {
    case 0:
        return VIRTIO_BALLOON_CMD_ID_STOP;
    case 1:
        return VIRTIO_BALLOON_CMD_ID_DONE;
    case 2:
        return current_id() - 1;
    case 3:
        return current_id() + 1;
    case 4:
        return take(in, 4);
    default:
        return current_id();
    }
}

static uint32_t take_block_size(Input *in)
{
    static const uint32_t sizes[] = {
        4 * KiB, 4 * KiB, 4 * KiB, 8 * KiB, 8 * KiB, 64 * KiB, 2 * MiB,
        4 * MiB, 8 * MiB, 0, 1, 2 * KiB, 4097, 12 * KiB, 1u << 31, UINT32_MAX,
    };
    uint8_t kind = take(in, 1);

    return kind < 240 ? sizes[kind % ARRAY_SIZE(sizes)] : take(in, 4);
}

/* ---- the guest's side of the device ---- */

static uint64_t common_offset(unsigned offset)
{
    return dev->common_cfg_offset + offset;
}

static void common_write(unsigned offset, unsigned size, uint32_t value)
{
    switch (size) {
    case 1:
        qpci_io_writeb(dev->pdev, dev->bar, common_offset(offset), value);
        break;
    case 2:
        qpci_io_writew(dev->pdev, dev->bar, common_offset(offset), value);
        break;
    default:
        qpci_io_writel(dev->pdev, dev->bar, common_offset(offset), value);
    }
}

#define COMMON_WRITE(field, value) \
    common_write(offsetof(struct virtio_pci_common_cfg, field), \
                 sizeof_field(struct virtio_pci_common_cfg, field), value)

static void set_ring(uint64_t desc, uint64_t avail, uint64_t used)
{
    COMMON_WRITE(queue_desc_lo, desc);
    COMMON_WRITE(queue_desc_hi, desc >> 32);
    COMMON_WRITE(queue_avail_lo, avail);
    COMMON_WRITE(queue_avail_hi, avail >> 32);
    COMMON_WRITE(queue_used_lo, used);
    COMMON_WRITE(queue_used_hi, used >> 32);
}

static void set_up_pci(void)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(SLOT, 0) };

    if (dev) {
        qvirtio_pci_destructor(&dev->obj);
        g_free(dev);
        qpci_free_pc(bus);
    }
    bus = qpci_new_pc(qts, NULL);
    dev = virtio_pci_new(bus, &addr);
    g_assert(dev);
    qvirtio_pci_device_enable(dev);
}

/* Reset the device and do what a driver does first. */
static void set_up_device(uint8_t options)
{
    uint32_t low = 1u << VIRTIO_BALLOON_F_STATS_VQ |
                   1u << VIRTIO_BALLOON_F_FREE_PAGE_HINT |
                   1u << VIRTIO_BALLOON_F_REPORTING;
    uint32_t high = 1u << (VIRTIO_F_VERSION_1 - 32);
    static const uint8_t zeroes[RING_AVAIL];
    unsigned i;

    low |= options & 1 ? 0 : 1u << VIRTIO_BALLOON_F_HINT_ARRAYS;
    low |= options & 2 ? 1u << VIRTIO_RING_F_EVENT_IDX : 0;
    low |= options & 4 ? 0 : 1u << VIRTIO_RING_F_INDIRECT_DESC;
    low |= options & 8 ? 1u << VIRTIO_BALLOON_F_PAGE_POISON : 0;
    low &= options & 16 ? ~(1u << VIRTIO_BALLOON_F_FREE_PAGE_HINT) : ~0u;
    low |= options & 64 ? 1u << VIRTIO_BALLOON_F_HINT_CACHE : 0;
    high |= options & 32 ? 1u << (VIRTIO_F_RING_RESET - 32) : 0;

    COMMON_WRITE(device_status, 0);
    COMMON_WRITE(device_status, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    COMMON_WRITE(device_status, VIRTIO_CONFIG_S_ACKNOWLEDGE |
                 VIRTIO_CONFIG_S_DRIVER);
    COMMON_WRITE(guest_feature_select, 0);
    COMMON_WRITE(guest_feature, low);
    COMMON_WRITE(guest_feature_select, 1);
    COMMON_WRITE(guest_feature, high);
    COMMON_WRITE(device_status, VIRTIO_CONFIG_S_ACKNOWLEDGE |
                 VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK);
    for (i = 0; i < N_QUEUES; i++) {
        uint64_t ring = RING_ADDR(i);
        /* What an earlier input put there must not matter */
        unsigned len = i == HINT_QUEUE ? RING_AVAIL : 256;

        qtest_memwrite(qts, ring, zeroes, len);
        qtest_memwrite(qts, ring + RING_AVAIL, zeroes, 256);
        qtest_memwrite(qts, ring + RING_USED, zeroes, 256);
        COMMON_WRITE(queue_select, i);
        set_ring(ring, ring + RING_AVAIL, ring + RING_USED);
        COMMON_WRITE(queue_enable, 1);
        queues[i] = (Queue) {};
    }
    COMMON_WRITE(device_status, VIRTIO_CONFIG_S_ACKNOWLEDGE |
                 VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK |
                 VIRTIO_CONFIG_S_DRIVER_OK);
}

static void kick(unsigned queue)
{
    qpci_io_writew(dev->pdev, dev->bar, dev->notify_cfg_offset +
                   queue * dev->notify_off_multiplier, queue);
}

static void write_desc(unsigned queue, uint16_t i, uint64_t addr, uint32_t len,
                       uint16_t flags, uint16_t next)
{
    uint8_t desc[sizeof(struct vring_desc)];

    stq_le_p(desc, addr);
    stl_le_p(desc + 8, len);
    stw_le_p(desc + 12, flags);
    stw_le_p(desc + 14, next);
    qtest_memwrite(qts, RING_ADDR(queue) + i % QUEUE_SIZE * sizeof(desc),
                   desc, sizeof(desc));
}

static void make_available(unsigned queue, uint16_t head)
{
    Queue *q = &queues[queue];
    uint64_t ring = RING_ADDR(queue) + RING_AVAIL;

    qtest_writew(qts, ring + 4 + q->avail % QUEUE_SIZE * 2, head);
    q->avail++;
    qtest_writew(qts, ring + 2, q->avail);
}

/* Returns the head of a new chain, which is not available yet. */
static uint16_t add_chain(unsigned queue, const Buffer *buffers, unsigned n)
{
    Queue *q = &queues[queue];
    uint16_t head = q->next;
    unsigned i;

    for (i = 0; i < n; i++) {
        uint16_t flags = (buffers[i].write ? VRING_DESC_F_WRITE : 0) |
                         (i < n - 1 ? VRING_DESC_F_NEXT : 0);

        write_desc(queue, q->next, buffers[i].addr, buffers[i].len, flags,
                   (q->next + 1) % QUEUE_SIZE);
        q->next = (q->next + 1) % QUEUE_SIZE;
    }
    return head;
}

static uint64_t put_data(const void *data, uint32_t len)
{
    uint64_t addr = data_next;

    if (len > DATA_ADDR + DATA_SIZE - addr) {
        addr = DATA_ADDR;
    }
    data_next = ROUND_UP(addr + len, 8);
    qtest_memwrite(qts, addr, data, len);
    return addr;
}

/* ---- time ---- */

static void let_others_run(void)
{
    bql_unlock();
    g_usleep(50);
    bql_lock();
}

static void wait_for(bool (*condition)(void), const char *what)
{
    int64_t start = g_get_monotonic_time();

    while (!condition()) {
        main_loop_wait(true);
        let_others_run();
        if (g_get_monotonic_time() - start > PATIENCE_US) {
            fprintf(stderr, "in vain waited: %s\n", what);
            abort();
        }
    }
}

/* ---- the migration ---- */

static bool migration_gone(void)
{
    /* The file is closed last, in the main loop */
    return !migration_is_running() && !migrate_get_current()->to_dst_file;
}

static bool asked_or_refused(void)
{
    g_autofree FreePageHintInfo *info = free_page_hint_query();

    return info->has_reason || info->state > FREE_PAGE_HINT_STATE_ARMING ||
           !migration_is_running();
}

static void start_migration(void)
{
    g_autofree FreePageHintInfo *info = NULL;
    Error *err = NULL;

    if (!migration_gone() || migrations == MAX_MIGRATIONS) {
        return;
    }
    /* file_start_outgoing_migration() does not free the file's name */
    __lsan_disable();
    qmp_migrate(uri, false, NULL, false, false, false, false, &err);
    __lsan_enable();
    if (err) {
        /* The guest is stopped for good: an earlier one has completed */
        error_free(err);
        return;
    }
    migrations++;
    reached.migrations++;
    wait_for(asked_or_refused, "a round asks, or tells why not");
    info = free_page_hint_query();
    reached.asked += info->state > FREE_PAGE_HINT_STATE_ARMING &&
                     !info->has_reason;
}

static void check_nothing_left(void)
{
    g_autofree FreePageHintInfo *info = free_page_hint_query();
    RAMBlock *rb;

    assert(info->state == FREE_PAGE_HINT_STATE_IDLE ||
           info->state == FREE_PAGE_HINT_STATE_ENDED);
    assert(info->skipped_bytes <= info->hinted_bytes);
    assert(info->redirtied_bytes <= info->skipped_bytes);
    /* There is always room if there is no queue */
    assert(free_page_hint_has_room(FREE_PAGE_HINT_QUEUE_RUNS + 1));
    assert(!free_page_hint_wanted(current_id()));
    assert(current_id() <= VIRTIO_BALLOON_CMD_ID_DONE);
    WITH_RCU_READ_LOCK_GUARD() {
        RAMBLOCK_FOREACH_MIGRATABLE(rb) {
            assert(!rb->hint);
        }
    }

    reached.applied += info->hinted_bytes > 0;
    reached.redirtied += info->redirtied_bytes > 0;
    reached.invalid += info->invalid_bytes || info->invalid_messages;
    reached.stale += info->stale_bytes > 0;
    reached.reported += info->complete;
    reached.cached += info->cache_freed_bytes || info->cache_time;
    if (info->has_reason) {
        reached.reasons[info->reason]++;
    }
}

static void end_migration(bool cancel)
{
    if (!migrations) {
        return;
    }
    /* What was kicked is for this migration: event, bottom half, apply */
    main_loop_wait(true);
    main_loop_wait(true);
    let_others_run();
    if (!migration_gone()) {
        if (cancel) {
            qmp_migrate_cancel(&error_abort);
        } else {
            free_page_hint_end(current_id());
        }
        wait_for(migration_gone, "the migration ends");
    }
    reached.completed += migrate_get_current()->state ==
                         MIGRATION_STATUS_COMPLETED;
    check_nothing_left();
}

/* ---- operations ---- */

/* A message in the protocol of arrays: header, addresses, in one chain */
static void op_array(Input *in)
{
    static const unsigned counts[] = {
        0, 1, 2, 3, 4, 8, 17, 64, 255, 512, 1000, 2048,
        VIRTIO_BALLOON_HINT_MAX_ADDRS - 1, VIRTIO_BALLOON_HINT_MAX_ADDRS,
        VIRTIO_BALLOON_HINT_MAX_ADDRS + 1, 40000,
    };
    uint8_t how = take(in, 1);
    uint32_t id = take_id(in);
    uint32_t size = take_block_size(in);
    unsigned n = counts[take(in, 1) % ARRAY_SIZE(counts)];
    uint64_t addr = take_addr(in);
    uint64_t step = 0;
    uint32_t len = sizeof(uint64_t) * (n + 1);
    g_autofree uint8_t *message = g_malloc(len);
    Buffer buffers[3];
    uint16_t head;
    unsigned i;

    switch (how % 8) {
    case 0 ... 1:
        step = size;
        break;
    case 2:
        step = -(uint64_t)size;
        break;
    case 3:
        step = 2 * (uint64_t)size;
        break;
    case 4:
        step = (int16_t)take(in, 2);
        break;
    case 5:
        step = take(in, 8);
        break;
    }
    if (how % 8 < 4 && is_power_of_2(size)) {
        addr &= -(uint64_t)size;
    }
    stl_le_p(message, id);
    stl_le_p(message + 4, size);
    for (i = 0; i < n; i++) {
        stq_le_p(message + sizeof(uint64_t) * (i + 1), addr);
        /* Stay in RAM if the first one was, as a guest's hints do */
        addr = how & 128 || addr >= RAM_SIZE ? addr + step :
               (addr + step) % RAM_SIZE;
    }

    buffers[0] = (Buffer) { .addr = put_data(message, len), .len = len };
    i = 1;
    if (how & 8) {
        /* Too short or too long, by some bytes */
        buffers[0].len += (int8_t)take(in, 1);
    }
    if (how & 16) {
        /* In two parts */
        uint32_t first = take(in, 2) % (len + 1);

        buffers[1] = (Buffer) {
            .addr = buffers[0].addr + first,
            .len = buffers[0].len - first,
        };
        buffers[0].len = first;
        i++;
    }
    if (how & 32) {
        buffers[i++] = (Buffer) {
            .addr = take_addr(in),
            .len = take(in, 2),
            .write = true,
        };
    }
    head = add_chain(HINT_QUEUE, buffers, i);
    make_available(HINT_QUEUE, head);
    if (how & 64) {
        kick(HINT_QUEUE);
    }
}

/* Blocks, as the older protocol tells them */
static void op_blocks(Input *in)
{
    uint8_t how = take(in, 1);
    unsigned n = how % 4 + 1, i;
    Buffer buffers[4];
    uint16_t head;

    for (i = 0; i < n; i++) {
        buffers[i] = (Buffer) {
            .addr = take_addr(in),
            .len = how & 8 ? take(in, 4) : take_block_size(in),
            .write = true,
        };
    }
    head = add_chain(HINT_QUEUE, buffers, n);
    make_available(HINT_QUEUE, head);
    kick(HINT_QUEUE);
}

/* What begins and ends a report in the older protocol */
static void op_command(Input *in)
{
    uint8_t how = take(in, 1);
    uint8_t id[8] = {};
    Buffer buffers[2] = {};
    unsigned n = 1;
    uint16_t head;

    stl_le_p(id, take_id(in));
    buffers[0].addr = put_data(id, sizeof(id));
    buffers[0].len = how & 1 ? take(in, 1) : 4;
    if (how & 2) {
        buffers[n++] = (Buffer) {
            .addr = take_addr(in),
            .len = take_block_size(in),
            .write = true,
        };
    }
    head = add_chain(HINT_QUEUE, buffers, n);
    make_available(HINT_QUEUE, head);
    kick(HINT_QUEUE);
}

static void op_end(Input *in)
{
    uint8_t message[sizeof(struct virtio_balloon_hint_header)] = {};
    Buffer buffer = { .len = sizeof(message) };
    uint16_t head;

    stl_le_p(message, take_id(in));
    buffer.addr = put_data(message, sizeof(message));
    head = add_chain(HINT_QUEUE, &buffer, 1);
    make_available(HINT_QUEUE, head);
    kick(HINT_QUEUE);
}

/* Any descriptor, of any queue: loops, tables of descriptors, what it says */
static void op_desc(Input *in)
{
    unsigned queue = take(in, 1) % 8;
    uint16_t i, flags, next;
    uint64_t addr;
    uint32_t len;

    queue = queue < N_QUEUES ? queue : HINT_QUEUE;
    i = take(in, 1);
    flags = take(in, 1);
    next = take(in, 1);
    addr = take_addr(in);
    len = flags & 128 ? take(in, 4) : take(in, 1) * 8;
    write_desc(queue, i, addr, len, flags & ~128, next);
    if (flags & 64) {
        make_available(queue, i);
    }
}

static void op_available(Input *in)
{
    unsigned queue = take(in, 1) % 8;
    uint16_t head = take(in, 1);

    queue = queue < N_QUEUES ? queue : HINT_QUEUE;
    make_available(queue, head == 255 ? take(in, 2) : head);
}

/* How many elements the device took, modulo 2^16 */
static uint16_t elements_taken(void)
{
    return virtio_queue_get_last_avail_idx(VIRTIO_DEVICE(balloon), HINT_QUEUE);
}

static uint16_t flood_seen;

/* The device took more from the queue, or need not any more */
static bool flood_goes_on(void)
{
    return elements_taken() != flood_seen ||
           virtio_queue_empty(balloon->hint.vq) ||
           VIRTIO_DEVICE(balloon)->broken || !balloon->hint.running;
}

/*
 * Full arrays, more than the engine queues, while the migration thread cannot
 * apply any.  Nothing that happens here waits for that thread.
 */
static void op_flood(Input *in)
{
    unsigned n = 2 + take(in, 1) % 4;
    uint32_t len = sizeof(uint64_t) * (VIRTIO_BALLOON_HINT_MAX_ADDRS + 1);
    g_autofree uint8_t *message = g_malloc(len);
    Buffer buffer = { .len = len };
    bool starved;
    uint16_t head;
    unsigned i;

    stl_le_p(message, current_id());
    stl_le_p(message + 4, 4 * KiB);
    for (i = 0; i < VIRTIO_BALLOON_HINT_MAX_ADDRS; i++) {
        /* No two of them make one run */
        stq_le_p(message + sizeof(uint64_t) * (i + 1), i * 8 * KiB % RAM_SIZE);
    }
    buffer.addr = put_data(message, len);
    head = add_chain(HINT_QUEUE, &buffer, 1);
    while (n--) {
        make_available(HINT_QUEUE, head);
    }
    if (!free_page_hint_wanted(current_id())) {
        kick(HINT_QUEUE);
        return;
    }
    /* The round can only end with the BQL, so that the lock stays there */
    ram_bitmap_lock();
    qemu_bh_schedule(balloon->hint.bh);
    for (n = 0; n < 8; n++) {
        aio_bh_poll(qemu_get_aio_context());
    }
    starved = !free_page_hint_has_room(VIRTIO_BALLOON_HINT_MAX_ADDRS);
    flood_seen = elements_taken();
    ram_bitmap_unlock();
    if (starved) {
        reached.starved++;
        wait_for(flood_goes_on, "the device goes on when there is room");
    }
}

static void op_memory(Input *in)
{
    uint64_t addr = take_ram_addr(in);
    uint8_t len = take(in, 1) % 32 + 1;
    uint8_t data[32];
    unsigned i;

    for (i = 0; i < len; i++) {
        data[i] = take(in, 1);
    }
    qtest_memwrite(qts, addr, data, len);
}

/* The guest uses pages that it may have called free */
static void op_use(Input *in)
{
    uint64_t addr = take_ram_addr(in) & ~(uint64_t)(4 * KiB - 1);
    uint8_t pages = take(in, 1) % 64;
    uint8_t value = take(in, 1);

    /* But not those with the rings */
    addr = addr < DATA_ADDR ? addr + DATA_ADDR : addr;
    while (pages--) {
        qtest_writeb(qts, addr, value);
        addr += 4 * KiB;
    }
}

static void op_kick(Input *in)
{
    uint8_t queue = take(in, 1) % 16;

    kick(queue < N_QUEUES ? queue : HINT_QUEUE);
}

static void op_run(Input *in)
{
    unsigned n = take(in, 1) % 8 + 1;
    VirtIODevice *vdev = VIRTIO_DEVICE(balloon);
    bool stopped = !vdev->vm_running;
    uint16_t taken = elements_taken();

    while (n--) {
        main_loop_wait(true);
    }
    /* Memory of a stopped guest does not change */
    assert(!stopped || vdev->vm_running || elements_taken() == taken);
}

static void op_let_others_run(Input *in)
{
    let_others_run();
}

static void op_register(Input *in)
{
    uint8_t offset = take(in, 1) % 0x40;
    unsigned size = 1 << take(in, 1) % 3;

    common_write(offset, size, take(in, size));
}

static void op_read(Input *in)
{
    uint64_t offset = take(in, 2) % (16 * KiB);

    switch (take(in, 1) % 4) {
    case 0:
        qpci_io_readb(dev->pdev, dev->bar, offset);
        break;
    case 1:
        qpci_io_readw(dev->pdev, dev->bar, offset);
        break;
    case 2:
        qpci_io_readl(dev->pdev, dev->bar, offset);
        break;
    default:
        qpci_io_readq(dev->pdev, dev->bar, offset);
    }
}

static void op_config(Input *in)
{
    uint8_t offset = take(in, 1) %
                     sizeof(struct virtio_balloon_hint_config);

    qpci_io_writel(dev->pdev, dev->bar, dev->device_cfg_offset + offset,
                   take(in, 4));
}

static void op_ring(Input *in)
{
    uint8_t queue = take(in, 1) % 8;
    uint64_t desc, avail, used;

    queue = queue < N_QUEUES ? queue : HINT_QUEUE;
    desc = take_addr(in);
    avail = take_addr(in);
    used = take_addr(in);
    COMMON_WRITE(queue_select, queue);
    set_ring(desc, avail, used);
    COMMON_WRITE(queue_enable, 1);
}

static void op_set_up(Input *in)
{
    set_up_device(take(in, 1));
}

static void op_system_reset(Input *in)
{
    if (system_resets++ >= MAX_SYSTEM_RESETS) {
        return;
    }
    /*
     * The end of such a migration can resume the vCPUs while we wait for them
     * to pause, and then we would wait for ever.
     */
    if (migrate_get_current()->state == MIGRATION_STATUS_CANCELLING) {
        return;
    }
    pause_all_vcpus();
    qemu_system_reset(SHUTDOWN_CAUSE_GUEST_RESET);
    if (runstate_is_running()) {
        resume_all_vcpus();
    }
    set_up_pci();
    set_up_device(0);
}

static void op_stop(Input *in)
{
    qmp_stop(&error_abort);
}

static void op_cont(Input *in)
{
    /* It says no while a migration completes */
    qmp_cont(NULL);
}

static void op_cancel(Input *in)
{
    qmp_migrate_cancel(&error_abort);
}

static void op_migrate(Input *in)
{
    start_migration();
}

static void (*const ops[])(Input *in) = {
    op_array, op_array, op_array, op_array, op_array, op_array,
    op_blocks, op_blocks, op_command, op_command, op_end,
    op_desc, op_desc, op_available, op_flood, op_memory, op_use, op_kick,
    op_run, op_run, op_let_others_run, op_register, op_read, op_config,
    op_ring, op_set_up, op_system_reset, op_stop, op_cont, op_cancel,
    op_migrate,
};

/* ---- the target ---- */

static bool element_used(void)
{
    return qtest_readw(qts, RING_ADDR(HINT_QUEUE) + RING_USED + 2);
}

/* Whatever was done to it, the device serves a driver that starts anew. */
static void check_alive(void)
{
    Input in = {};

    if (!runstate_is_running()) {
        qmp_cont(&error_abort);
    }
    set_up_device(0);
    op_end(&in);
    wait_for(element_used, "the device uses an element");
}

static void hint_fuzz(QTestState *s, const unsigned char *data, size_t size)
{
    Input in = { .data = data, .size = size };
    uint8_t options = take(&in, 1);
    bool cancel = take(&in, 1) & 1;
    unsigned n;

    reached.inputs++;
    migrations = 0;
    system_resets = 0;
    data_next = DATA_ADDR;
    set_up_device(options);
    start_migration();
    for (n = 0; n < MAX_OPS && in.size; n++) {
        ops[take(&in, 1) % ARRAY_SIZE(ops)](&in);
    }
    end_migration(cancel);
    check_alive();
}

static void hint_pre_fuzz(QTestState *s)
{
    int fd = qemu_memfd_create("migration", 0, false, 0, 0, &error_abort);

    uri = g_strdup_printf("file:/proc/self/fd/%d", fd);
    qts = s;
    unlink(firmware);
    set_up_pci();
    balloon = VIRTIO_BALLOON(object_resolve_path_type("", TYPE_VIRTIO_BALLOON,
                                                      NULL));
    atexit(print_reached);
}

static GString *hint_cmdline(FuzzTarget *t)
{
    GString *cmd_line = g_string_new(TARGET_NAME);
    g_autofree char *hlt = g_malloc(64 * KiB);
    int fd = g_file_open_tmp("hint-fuzz.XXXXXX", &firmware, NULL);

    /* All of it HLT instructions, and interrupts are disabled after reset */
    memset(hlt, 0xf4, 64 * KiB);
    g_assert(fd >= 0);
    g_assert(write(fd, hlt, 64 * KiB) == 64 * KiB);
    close(fd);

    /* Not qtest: there is no round where nothing is known of the dirty log */
    g_string_append_printf(cmd_line,
        " -accel tcg -machine pc,hpet=off,usb=off,vmport=off,suppress-vmdesc=on"
        " -nodefaults -display none -bios %s -m %d,slots=2,maxmem=8G"
        " -object memory-backend-ram,id=mem0,size=%d"
        " -object memory-backend-ram,id=mem1,size=%d"
        " -device pc-dimm,memdev=mem0,addr=%" PRIu64
        " -device pc-dimm,memdev=mem1,addr=%" PRIu64
        " -device virtio-balloon-pci,addr=%d,disable-legacy=on,"
        "free-page-hint=on,free-page-hint-arrays=on,free-page-hint-cache=on,"
        "free-page-reporting=on"
        " -global migration.free-page-hint-wait=60000"
        " -global migration.free-page-hint-cache=1048576"
        /* It is the guest that is tried, at once and alone */
        " -global migration.skip-absent-pages=off"
        " -global migration.x-max-bandwidth=0", firmware,
        (int)(RAM_SIZE / MiB), (int)DIMM_SIZE, (int)DIMM_SIZE,
        (uint64_t)DIMM_ADDR, (uint64_t)(DIMM_ADDR + DIMM_SIZE), SLOT);
    return cmd_line;
}

static void register_hint_fuzz_target(void)
{
    fuzz_add_target(&(FuzzTarget){
        .name = "virtio-balloon-hint-fuzz",
        .description = "Fuzz the virtio-balloon free page hints, while a "
                       "migration waits for them",
        .get_init_cmdline = hint_cmdline,
        .pre_fuzz = hint_pre_fuzz,
        .fuzz = hint_fuzz,
    });
}

fuzz_target_init(register_hint_fuzz_target);
