/*
 * Fuzz what the device makes of a message, with libFuzzer
 *
 * The input is a message of the guest, as it lies in memory.  It goes the way
 * that it goes in QEMU: parse, turn addresses into runs of pages, trim to whole
 * host pages, clear bits.  Each step is compared with a slow and simple one.
 * Only the lookup of guest memory is left out: here RAM begins at address 0 and
 * its size comes from the message.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "qemu/host-utils.h"
#include "hw/virtio/virtio-balloon-hint-parse.h"
#include "migration/free-page-hint-bitmap.h"

#define PAGE_BITS 12
/* Enough for two runs in a word, and more words than one */
#define MAX_PAGES 512

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What bmap and hinted must be, a byte for each page */
static uint8_t dirty[MAX_PAGES], hinted[MAX_PAGES];
static unsigned long bmap[BITS_TO_LONGS(MAX_PAGES)];
static unsigned long hint_bmap[BITS_TO_LONGS(MAX_PAGES)];
static unsigned long groups[BITS_TO_LONGS(MAX_PAGES)];

static void check_bitmaps(uint64_t pages)
{
    uint64_t i;

    for (i = 0; i < pages; i++) {
        assert(dirty[i] == test_bit(i, bmap));
        assert(hinted[i] == test_bit(i, hint_bmap));
    }
}

static void apply(uint64_t addr, uint64_t len, uint64_t pages, uint64_t ratio)
{
    const FreePageHintMap map = {
        .bmap = bmap,
        .hinted = hint_bmap,
        .groups = groups,
        .npages = pages,
        .host_ratio = ratio,
    };
    FreePageHintRun run = {
        .first = addr >> PAGE_BITS,
        .npages = len >> PAGE_BITS,
    };
    FreePageHintTally tally = {};
    uint64_t first = run.first, npages = run.npages;
    uint64_t used = 0, cleared = 0;
    uint64_t i;

    /* Whole host pages of a run that lies in the block */
    for (i = first; first <= pages && npages <= pages - first &&
         i < first + npages; i++) {
        uint64_t start = ROUND_DOWN(i, ratio);

        if (start < first || start + ratio > first + npages) {
            continue;
        }
        used++;
        cleared += dirty[i];
        hinted[i] |= dirty[i];
        dirty[i] = 0;
    }
    /* In pieces, some smaller than a host page */
    while (run.npages) {
        uint64_t budget = 1 + addr % 97;

        free_page_hint_clear_runs(&map, &run, 1, &budget, &tally);
    }
    assert(tally.hinted == used && tally.cleared == cleared);
    assert(tally.hinted + tally.too_small + tally.invalid == npages);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    VirtIOBalloonHintHeader header = {};
    g_autofree VirtIOBalloonHintRange *ranges = NULL;
    g_autofree uint64_t *addrs = NULL;
    uint64_t block = 0, sum = 0, pages, ratio;
    uint32_t id = 0;
    unsigned n = 0, n_ranges, invalid, wrong = 0, i;
    VirtIOBalloonHintMsg msg;

    if (size) {
        memcpy(&header, data, MIN(size, sizeof(header)));
    }
    msg = virtio_balloon_hint_parse_header(&header, size, &id, &block, &n);
    /* An end of 8 bytes, or of 24: nothing else is one, and both are */
    assert((msg == VIRTIO_BALLOON_HINT_MSG_END) ==
           (!header.size && (size == 8 || size == 24)));
    if (msg == VIRTIO_BALLOON_HINT_MSG_END) {
        assert(size == sizeof(header) + n * sizeof(uint64_t));
    }
    if (msg != VIRTIO_BALLOON_HINT_MSG_ARRAY) {
        return 0;
    }
    assert(size == sizeof(header) + n * sizeof(uint64_t));
    assert(is_power_of_2(block) && block >= 4096 && block <= UINT32_MAX);
    assert(n <= VIRTIO_BALLOON_HINT_MAX_ADDRS);

    addrs = g_new(uint64_t, n);
    ranges = g_new(VirtIOBalloonHintRange, n);
    if (n) {
        memcpy(addrs, data + sizeof(header), n * sizeof(uint64_t));
    }
    n_ranges = virtio_balloon_hint_parse_addrs(addrs, n, block, ranges,
                                               &invalid);

    for (i = 0; i < n; i++) {
        uint64_t addr = le64_to_cpu(addrs[i]);

        wrong += addr % block || addr > UINT64_MAX - block;
    }
    assert(invalid == wrong && n_ranges <= n - invalid);

    /* The id is the guest's too: take the size of RAM and of a page from it */
    pages = 1 + id % MAX_PAGES;
    ratio = 1ULL << (id >> 16) % 10;
    for (i = 0; i < MAX_PAGES; i++) {
        dirty[i] = (id >> i % 32) & 1;
        hinted[i] = 0;
        dirty[i] ? set_bit(i, bmap) : clear_bit(i, bmap);
        clear_bit(i, hint_bmap);
    }
    for (i = 0; i < n_ranges; i++) {
        assert(ranges[i].len && ranges[i].len % block == 0);
        assert(ranges[i].addr % block == 0);
        assert(ranges[i].addr + ranges[i].len > ranges[i].addr);
        sum += ranges[i].len / block;
        apply(ranges[i].addr, ranges[i].len, pages, ratio);
    }
    assert(sum == n - invalid);
    check_bitmaps(MAX_PAGES);
    return 0;
}
