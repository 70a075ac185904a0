/*
 * How long the host takes for an array of hints
 *
 * The path of a message as it is in QEMU: copy, parse, join blocks to ranges, clear bits and count
 * them, a hold of the lock at a time.  Only the lookup of guest memory is left out: here RAM is one
 * block that begins at address 0.  Beside it stand lower bounds, which do not look at what they move:
 * the words of both bitmaps in one go, and block by block in the guest's order, which is what the
 * memory's latency allows.  And, to compare with, one bit operation for each page.
 *
 *   hint-apply BLOCKS REPEAT
 *
 * Writes one JSON object: nanoseconds per block of 4 MiB, the least of REPEAT times.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "hw/virtio/virtio-balloon-hint-parse.h"
#include "migration/free-page-hint-bitmap.h"

#define PAGE_BITS 12
#define BLOCK (4ULL << 20)
#define BLOCK_PAGES (BLOCK >> PAGE_BITS)
/* As many as the guest's driver puts into an array */
#define ARRAY_ADDRS 16383
/* As in migration/free-page-hint.c and free-page-hint-ram.c */
#define APPLY_BATCH 1024
#define HOLD_PAGES (4 * MiB)

typedef struct Message {
    VirtIOBalloonHintHeader header;
    uint64_t addrs[ARRAY_ADDRS];
} QEMU_PACKED Message;

static Message message;
static uint64_t addrs[ARRAY_ADDRS];
static VirtIOBalloonHintRange ranges[ARRAY_ADDRS];
static unsigned long *bmap, *hinted, *groups;
static uint64_t blocks, pages;
/* The order in which the guest tells its blocks */
static uint64_t *order;

static int64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

static void all_dirty(void)
{
    bitmap_set(bmap, 0, pages);
    bitmap_clear(hinted, 0, pages);
}

static uint64_t apply_message(unsigned n)
{
    const FreePageHintMap map = {
        .bmap = bmap,
        .hinted = hinted,
        .groups = groups,
        .npages = pages,
        .host_ratio = 1,
    };
    FreePageHintTally tally = {};
    FreePageHintRun runs[APPLY_BATCH];
    uint64_t block, next = 0;
    unsigned count, n_ranges, invalid;
    uint32_t id;
    VirtIOBalloonHintMsg kind;

    kind = virtio_balloon_hint_parse_header(&message.header,
                                            sizeof(message.header) +
                                            n * sizeof(uint64_t),
                                            &id, &block, &count);
    assert(kind == VIRTIO_BALLOON_HINT_MSG_ARRAY && count == n);
    memcpy(addrs, message.addrs, n * sizeof(uint64_t));
    n_ranges = virtio_balloon_hint_parse_addrs(addrs, n, block, ranges,
                                               &invalid);
    assert(!invalid);
    while (next < n_ranges) {
        unsigned n = MIN(n_ranges - next, APPLY_BATCH), done = 0, i;

        for (i = 0; i < n; i++, next++) {
            runs[i] = (FreePageHintRun) {
                .first = ranges[next].addr >> PAGE_BITS,
                .npages = ranges[next].len >> PAGE_BITS,
            };
        }
        while (done < n) {
            uint64_t budget = HOLD_PAGES;

            done += free_page_hint_clear_runs(&map, runs + done, n - done,
                                              &budget, &tally);
        }
    }
    return tally.cleared;
}

static uint64_t apply_all(void)
{
    uint64_t cleared = 0, next = 0;

    message.header.id = cpu_to_le32(2);
    message.header.size = cpu_to_le32(BLOCK);
    while (next < blocks) {
        unsigned n = MIN(blocks - next, ARRAY_ADDRS), i;

        for (i = 0; i < n; i++) {
            message.addrs[i] = cpu_to_le64(order[next + i] * BLOCK);
        }
        next += n;
        cleared += apply_message(n);
    }
    return cleared;
}

/* The words that have to be read and written, without looking at them */
static uint64_t move_bitmaps(void)
{
    memmove(hinted, bmap, pages / BITS_PER_BYTE);
    memset(bmap, 0, pages / BITS_PER_BYTE);
    return pages;
}

/* The same in the guest's order: what the caches miss, everybody waits for */
static uint64_t move_blocks(void)
{
    const unsigned bytes = BLOCK_PAGES / BITS_PER_BYTE;
    uint64_t i;

    for (i = 0; i < blocks; i++) {
        unsigned long *from = bmap + order[i] * (bytes / sizeof(long));

        memcpy(hinted + order[i] * (bytes / sizeof(long)), from, bytes);
        memset(from, 0, bytes);
    }
    return pages;
}

static uint64_t bit_per_page(void)
{
    uint64_t cleared = 0, page;

    for (page = 0; page < pages; page++) {
        if (test_and_clear_bit(page, bmap)) {
            set_bit(page, hinted);
            cleared++;
        }
    }
    return cleared;
}

static double least(uint64_t (*work)(void), int repeat)
{
    int64_t best = INT64_MAX;

    while (repeat--) {
        int64_t start;

        all_dirty();
        start = now_ns();
        if (work() != pages) {
            abort();
        }
        best = MIN(best, now_ns() - start);
    }
    return (double)best / blocks;
}

static void shuffle(void)
{
    uint64_t i;

    for (i = blocks - 1; i > 0; i--) {
        uint64_t j = g_random_int() % (i + 1), block = order[i];

        order[i] = order[j];
        order[j] = block;
    }
}

int main(int argc, char **argv)
{
    int repeat = argc == 3 ? atoi(argv[2]) : 0;
    uint64_t i;
    double sorted, shuffled;

    blocks = argc == 3 ? strtoull(argv[1], NULL, 10) : 0;
    if (!blocks || repeat < 1) {
        fputs("usage: hint-apply BLOCKS REPEAT\n", stderr);
        return 2;
    }
    pages = blocks * BLOCK_PAGES;
    bmap = bitmap_new(pages);
    hinted = bitmap_new(pages);
    groups = bitmap_new(free_page_hint_groups(pages));
    order = g_new(uint64_t, blocks);
    for (i = 0; i < blocks; i++) {
        order[i] = i;
    }
    g_random_set_seed(1);

    sorted = least(apply_all, repeat);
    shuffle();
    shuffled = least(apply_all, repeat);
    printf("{\"blocks\": %" PRIu64 ", \"sorted_ns\": %.2f, "
           "\"shuffled_ns\": %.2f, \"memory_ns\": %.2f, "
           "\"shuffled_memory_ns\": %.2f, \"bits_ns\": %.2f}\n",
           blocks, sorted, shuffled, least(move_bitmaps, repeat),
           least(move_blocks, repeat), least(bit_per_page, repeat));
    return 0;
}
