/*
 * Free page hints: unit tests of the pure parts
 *
 * What a guest's array says (hw/virtio/virtio-balloon-hint-parse.c) and what a
 * hint does to the bitmaps (migration/free-page-hint-bitmap.c), the latter
 * against a model that has one byte per page.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/bswap.h"
#include "../../hw/virtio/virtio-balloon-hint-parse.h"
#include "../../migration/free-page-hint-bitmap.h"

#define ID 0x80000001
#define BLOCK (4 * 1024 * 1024)
#define HEADER sizeof(struct virtio_balloon_hint_header)

/* Pages in the bitmaps under test: not a multiple of any word size */
#define PAGES 1003
#define RANDOM_STEPS 20000

static VirtIOBalloonHintMsg parse(uint32_t size, size_t len, unsigned *addrs)
{
    struct virtio_balloon_hint_header header = {
        .id = cpu_to_le32(ID),
        .size = cpu_to_le32(size),
    };
    VirtIOBalloonHintMsg msg;
    uint64_t block = 0;
    uint32_t id = 0;

    *addrs = 0;
    msg = virtio_balloon_hint_parse_header(&header, len, &id, &block, addrs);
    if (msg != VIRTIO_BALLOON_HINT_MSG_INVALID) {
        g_assert_cmphex(id, ==, ID);
    }
    if (msg == VIRTIO_BALLOON_HINT_MSG_ARRAY) {
        g_assert_cmphex(block, ==, size);
    }
    return msg;
}

/* A header and whole addresses are an array. */
static void test_header_array(void)
{
    unsigned n;

    g_assert_cmpint(parse(BLOCK, HEADER + 8, &n), ==,
                    VIRTIO_BALLOON_HINT_MSG_ARRAY);
    g_assert_cmpuint(n, ==, 1);
    g_assert_cmpint(parse(4096, HEADER + 8 * VIRTIO_BALLOON_HINT_MAX_ADDRS, &n),
                    ==, VIRTIO_BALLOON_HINT_MSG_ARRAY);
    g_assert_cmpuint(n, ==, VIRTIO_BALLOON_HINT_MAX_ADDRS);
    g_assert_cmpint(parse(1u << 31, HEADER, &n), ==,
                    VIRTIO_BALLOON_HINT_MSG_ARRAY);
    g_assert_cmpuint(n, ==, 0);
}

/* Size 0 ends a report, with two words more or none; else it is nothing. */
static void test_header_end(void)
{
    unsigned n;

    g_assert_cmpint(parse(0, HEADER, &n), ==, VIRTIO_BALLOON_HINT_MSG_END);
    g_assert_cmpuint(n, ==, 0);
    g_assert_cmpint(parse(0, sizeof(struct virtio_balloon_hint_end), &n), ==,
                    VIRTIO_BALLOON_HINT_MSG_END);
    g_assert_cmpuint(n, ==, 2);
    g_assert_cmpint(parse(0, HEADER + 8, &n), ==,
                    VIRTIO_BALLOON_HINT_MSG_INVALID);
    g_assert_cmpint(parse(0, HEADER + 24, &n), ==,
                    VIRTIO_BALLOON_HINT_MSG_INVALID);
}

/* A wrong length or block size is no message. */
static void test_header_invalid(void)
{
    static const uint32_t sizes[] = { 1, 2048, 4095, 4097, 6144, UINT32_MAX };
    static const size_t lens[] = {
        0, 1, 4, HEADER - 1, HEADER + 1, HEADER + 7, HEADER + 12,
        HEADER + 8 * (VIRTIO_BALLOON_HINT_MAX_ADDRS + 1), SIZE_MAX,
    };
    unsigned n;
    int i;

    for (i = 0; i < ARRAY_SIZE(sizes); i++) {
        g_assert_cmpint(parse(sizes[i], HEADER + 8, &n), ==,
                        VIRTIO_BALLOON_HINT_MSG_INVALID);
    }
    for (i = 0; i < ARRAY_SIZE(lens); i++) {
        g_assert_cmpint(parse(BLOCK, lens[i], &n), ==,
                        VIRTIO_BALLOON_HINT_MSG_INVALID);
    }
}

static unsigned parse_addrs(const uint64_t *cpu_addrs, unsigned n,
                            uint64_t block, VirtIOBalloonHintRange *ranges,
                            unsigned *invalid)
{
    g_autofree uint64_t *addrs = g_new(uint64_t, n);
    unsigned i;

    for (i = 0; i < n; i++) {
        addrs[i] = cpu_to_le64(cpu_addrs[i]);
    }
    return virtio_balloon_hint_parse_addrs(addrs, n, block, ranges, invalid);
}

/* Neighbours become one range, upwards and downwards; others do not. */
static void test_addrs_merge(void)
{
    static const uint64_t addrs[] = {
        4ull * BLOCK, 5ull * BLOCK, 6ull * BLOCK,       /* up */
        20ull * BLOCK, 19ull * BLOCK, 18ull * BLOCK,    /* down */
        18ull * BLOCK,                                  /* again */
        0x1000000000ull,                                /* 64 GiB */
    };
    VirtIOBalloonHintRange ranges[ARRAY_SIZE(addrs)];
    unsigned invalid;

    g_assert_cmpuint(parse_addrs(addrs, ARRAY_SIZE(addrs), BLOCK, ranges,
                                 &invalid), ==, 4);
    g_assert_cmpuint(invalid, ==, 0);
    g_assert_cmphex(ranges[0].addr, ==, 4ull * BLOCK);
    g_assert_cmphex(ranges[0].len, ==, 3ull * BLOCK);
    g_assert_cmphex(ranges[1].addr, ==, 18ull * BLOCK);
    g_assert_cmphex(ranges[1].len, ==, 3ull * BLOCK);
    g_assert_cmphex(ranges[2].addr, ==, 18ull * BLOCK);
    g_assert_cmphex(ranges[2].len, ==, 1ull * BLOCK);
    g_assert_cmphex(ranges[3].addr, ==, 0x1000000000ull);
    g_assert_cmphex(ranges[3].len, ==, 1ull * BLOCK);
}

/* Misaligned addresses, and blocks that reach beyond 2^64, are left out. */
static void test_addrs_invalid(void)
{
    static const uint64_t addrs[] = {
        1, BLOCK - 1, BLOCK + 4096, BLOCK / 2, UINT64_MAX,
        -(uint64_t)BLOCK, 7ull * BLOCK,
    };
    VirtIOBalloonHintRange ranges[ARRAY_SIZE(addrs)];
    unsigned invalid;

    g_assert_cmpuint(parse_addrs(addrs, ARRAY_SIZE(addrs), BLOCK, ranges,
                                 &invalid), ==, 1);
    g_assert_cmpuint(invalid, ==, 6);
    g_assert_cmphex(ranges[0].addr, ==, 7ull * BLOCK);
}

/* Ranges cover the valid blocks and nothing else, whatever the order. */
static void test_addrs_random(void)
{
    enum { N = 512, SPACE = 256 };
    int round;

    for (round = 0; round < 200; round++) {
        VirtIOBalloonHintRange ranges[N];
        uint64_t addrs[N];
        bool want[SPACE] = {}, got[SPACE] = {};
        unsigned n_ranges, invalid, bad = 0, i;
        uint64_t a;

        for (i = 0; i < N; i++) {
            /* Long runs up and down, jumps, and some that are misaligned */
            unsigned b = g_test_rand_int_range(0, 4) && i ?
                         (addrs[i - 1] / BLOCK + g_test_rand_int_range(-1, 2)) :
                         g_test_rand_int_range(0, SPACE);

            b %= SPACE;
            addrs[i] = (uint64_t)b * BLOCK;
            if (g_test_rand_int_range(0, 16) == 0) {
                addrs[i] += 4096;
                bad++;
            } else {
                want[b] = true;
            }
        }
        n_ranges = parse_addrs(addrs, N, BLOCK, ranges, &invalid);
        g_assert_cmpuint(invalid, ==, bad);
        for (i = 0; i < n_ranges; i++) {
            for (a = ranges[i].addr; a < ranges[i].addr + ranges[i].len;
                 a += BLOCK) {
                g_assert_cmpuint(a / BLOCK, <, SPACE);
                got[a / BLOCK] = true;
            }
        }
        g_assert_cmpmem(want, sizeof(want), got, sizeof(got));
    }
}

static FreePageHintMap map_new(uint64_t npages, uint64_t host_ratio)
{
    return (FreePageHintMap) {
        .bmap = bitmap_new(npages),
        .hinted = bitmap_new(npages),
        .groups = bitmap_new(free_page_hint_groups(npages)),
        .npages = npages,
        .host_ratio = host_ratio,
    };
}

static void map_free(FreePageHintMap *map)
{
    g_free(map->bmap);
    g_free(map->hinted);
    g_free(map->groups);
}

/* Clear one run, whatever budget that takes. */
static FreePageHintTally clear_run(const FreePageHintMap *map, uint64_t first,
                                   uint64_t npages)
{
    FreePageHintRun run = { .first = first, .npages = npages };
    FreePageHintTally tally = {};
    uint64_t budget = UINT64_MAX;

    g_assert_cmpuint(free_page_hint_clear_runs(map, &run, 1, &budget, &tally),
                     ==, 1);
    g_assert_cmpuint(run.npages, ==, 0);
    return tally;
}

static bool clears(uint64_t first, uint64_t npages, uint64_t ratio,
                   uint64_t want_first, uint64_t want_npages)
{
    FreePageHintMap map = map_new(4096, ratio);
    FreePageHintTally tally;
    bool good;

    bitmap_set(map.bmap, 0, 4096);
    tally = clear_run(&map, first, npages);
    good = tally.hinted == want_npages && tally.cleared == want_npages &&
           tally.hinted + tally.too_small + tally.invalid == npages &&
           bitmap_count_one(map.hinted, 4096) == want_npages &&
           bitmap_count_one(map.bmap, 4096) == 4096 - want_npages &&
           find_next_zero_bit(map.hinted, 4096, want_first) >=
           want_first + want_npages;
    map_free(&map);
    return good;
}

/* Only whole host pages within the block are taken of a run. */
static void test_trim(void)
{
    g_assert_true(clears(0, 4096, 1, 0, 4096));
    g_assert_true(clears(5, 7, 1, 5, 7));
    g_assert_true(clears(4095, 1, 1, 4095, 1));
    g_assert_true(clears(1, 1600, 512, 512, 1024));
    g_assert_true(clears(512, 1023, 512, 512, 512));

    g_assert_true(clears(0, 0, 1, 0, 0));
    g_assert_true(clears(4096, 1, 1, 0, 0));
    g_assert_true(clears(4095, 2, 1, 0, 0));
    g_assert_true(clears(0, 4097, 1, 0, 0));
    g_assert_true(clears(UINT64_MAX, 2, 1, 0, 0));
    g_assert_true(clears(1, UINT64_MAX, 1, 0, 0));
    g_assert_true(clears(1, 511, 512, 0, 0));
    g_assert_true(clears(1, 1022, 512, 0, 0));
}

/* What is smaller than a host page is counted apart from what is no RAM. */
static void test_too_small(void)
{
    FreePageHintMap map = map_new(4096, 512);
    FreePageHintTally tally = clear_run(&map, 1, 1600);

    g_assert_cmpuint(tally.too_small, ==, 1600 - 1024);
    g_assert_cmpuint(tally.invalid, ==, 0);
    tally = clear_run(&map, 4000, 100);
    g_assert_cmpuint(tally.too_small, ==, 0);
    g_assert_cmpuint(tally.invalid, ==, 100);
    map_free(&map);
}

/*
 * However long the runs are, a call does no more than the budget and less than
 * a host page; done in pieces, the outcome is the same as in one go.
 */
static void test_budget(void)
{
    enum { N = 64, NPAGES = 1 << 20 };
    int round;

    for (round = 0; round < 100; round++) {
        uint64_t ratio = 1ULL << g_test_rand_int_range(0, 12);
        FreePageHintMap whole = map_new(NPAGES, ratio);
        FreePageHintMap pieces = map_new(NPAGES, ratio);
        FreePageHintTally want = {}, got = {};
        FreePageHintRun runs[N];
        unsigned done = 0, i;

        bitmap_set(whole.bmap, 0, NPAGES);
        bitmap_set(pieces.bmap, 0, NPAGES);
        for (i = 0; i < N; i++) {
            FreePageHintTally t;

            runs[i] = (FreePageHintRun) {
                .first = g_test_rand_int_range(0, NPAGES + NPAGES / 8),
                .npages = g_test_rand_int_range(0, NPAGES / 4),
            };
            t = clear_run(&whole, runs[i].first, runs[i].npages);
            want.hinted += t.hinted;
            want.cleared += t.cleared;
            want.too_small += t.too_small;
            want.invalid += t.invalid;
        }
        while (done < N) {
            uint64_t most = g_test_rand_int_range(1, 50000), budget = most;
            uint64_t before = got.hinted;

            done += free_page_hint_clear_runs(&pieces, runs + done, N - done,
                                              &budget, &got);
            g_assert_cmpuint(got.hinted - before, <, most + ratio);
            g_assert_true(!budget || done == N);
        }
        g_assert_cmpmem(&want, sizeof(want), &got, sizeof(got));
        g_assert_true(bitmap_equal(whole.bmap, pieces.bmap, NPAGES));
        g_assert_true(bitmap_equal(whole.hinted, pieces.hinted, NPAGES));
        g_assert_true(bitmap_equal(whole.groups, pieces.groups,
                                   free_page_hint_groups(NPAGES)));
        map_free(&whole);
        map_free(&pieces);
    }
}

/* Runs of another block are left for a call with its bitmaps. */
static void test_stops_at_another_block(void)
{
    FreePageHintMap map = map_new(4096, 1);
    FreePageHintRun runs[] = {
        { .block = (RAMBlock *)&map, .first = 0, .npages = 10 },
        { .block = (RAMBlock *)&map, .first = 20, .npages = 10 },
        { .block = NULL, .first = 40, .npages = 10 },
    };
    FreePageHintTally tally = {};
    uint64_t budget = UINT64_MAX;

    g_assert_cmpuint(free_page_hint_clear_runs(&map, runs, 3, &budget, &tally),
                     ==, 2);
    g_assert_cmpuint(tally.hinted, ==, 20);
    map_free(&map);
}

typedef struct Model {
    bool dirty[PAGES];
    bool hinted[PAGES];
} Model;

static void assert_model(const Model *m, const FreePageHintMap *map)
{
    int i;

    for (i = 0; i < PAGES; i++) {
        g_assert_cmpint(test_bit(i, map->bmap), ==, m->dirty[i]);
        g_assert_cmpint(test_bit(i, map->hinted), ==, m->hinted[i]);
        /* Or it would never be forgotten */
        g_assert_true(!m->hinted[i] ||
                      test_bit(i / FREE_PAGE_HINT_GROUP_PAGES, map->groups));
    }
}

static bool model_hinted(const Model *m, int first, int n)
{
    int i;

    for (i = first; i < first + n; i++) {
        if (!m->hinted[i]) {
            return false;
        }
    }
    return true;
}

/*
 * Clearing, forgetting, marking and clearing again do what they say to every
 * page, and the numbers they return keep a counter equal to the population of
 * the bitmap.
 */
static void bitmaps_random(uint64_t ratio)
{
    FreePageHintMap map = map_new(PAGES, ratio);
    g_autofree Model *m = g_new0(Model, 1);
    uint64_t counter = PAGES;
    int step, i, k;

    bitmap_set(map.bmap, 0, PAGES);
    memset(m->dirty, true, sizeof(m->dirty));

    for (step = 0; step < RANDOM_STEPS; step++) {
        int first = g_test_rand_int_range(0, PAGES);
        int n = g_test_rand_int_range(0, PAGES - first + 1);
        uint64_t want = 0;

        switch (g_test_rand_int_range(0, 8)) {
        case 0:
            /* The guest writes: a merge of the dirty log */
            for (i = first; i < first + n; i++) {
                counter += !m->dirty[i];
                m->dirty[i] = true;
                set_bit(i, map.bmap);
            }
            for (i = 0; i < PAGES; i++) {
                want += m->dirty[i] && m->hinted[i];
                m->hinted[i] &= !m->dirty[i];
            }
            g_assert_cmpuint(free_page_hint_forget_dirty(&map), ==, want);
            break;
        case 1:
            /* A request in postcopy */
            i = QEMU_ALIGN_DOWN(first, ratio);
            if (i + ratio <= PAGES && model_hinted(m, i, ratio)) {
                for (k = i; k < i + ratio; k++) {
                    want += !m->dirty[k];
                    m->dirty[k] = true;
                }
            }
            g_assert_cmpuint(free_page_hint_mark_host_page(&map, first), ==,
                             want);
            counter += want;
            break;
        case 2:
            /* Recovery of postcopy */
            for (i = 0; i < PAGES; i += ratio) {
                int end = MIN(i + ratio, PAGES);
                bool any_hinted = false, all_hinted = i + ratio <= PAGES;
                bool any_clean = false;

                for (k = i; k < end; k++) {
                    any_hinted |= m->hinted[k];
                    all_hinted &= m->hinted[k];
                    any_clean |= !m->dirty[k];
                }
                for (k = i; k < end && any_hinted; k++) {
                    if (all_hinted || any_clean) {
                        want += m->dirty[k];
                        m->dirty[k] = false;
                    }
                }
            }
            g_assert_cmpuint(free_page_hint_clear_hinted(&map), ==, want);
            counter -= want;
            break;
        default:
            first = QEMU_ALIGN_DOWN(first, ratio);
            n = MIN(QEMU_ALIGN_DOWN(PAGES - first, ratio), 192);
            for (i = first; i < first + n; i++) {
                want += m->dirty[i];
                m->hinted[i] |= m->dirty[i];
                m->dirty[i] = false;
            }
            g_assert_cmpuint(clear_run(&map, first, n).cleared, ==, want);
            counter -= want;
            break;
        }
        g_assert_cmpuint(bitmap_count_one(map.bmap, PAGES), ==, counter);
        if (step % 64 == 0) {
            assert_model(m, &map);
        }
    }
    assert_model(m, &map);
    map_free(&map);
}

static void test_bitmaps_random(void)
{
    bitmaps_random(1);
    bitmaps_random(64);
}

/* A page that was clean when it was hinted is not made dirty by a request. */
static void test_clean_page_stays_clean(void)
{
    FreePageHintMap map = map_new(PAGES, 1);
    uint64_t page, marked = 0;

    bitmap_set(map.bmap, 100, 10);
    g_assert_cmpuint(clear_run(&map, 90, 30).cleared, ==, 10);
    g_assert_cmpuint(clear_run(&map, 90, 30).cleared, ==, 0);
    for (page = 0; page < PAGES; page++) {
        marked += free_page_hint_mark_host_page(&map, page);
    }
    g_assert_cmpuint(marked, ==, 10);
    g_assert_cmpuint(bitmap_count_one(map.bmap, PAGES), ==, 10);
    g_assert_cmpuint(find_next_bit(map.bmap, PAGES, 0), ==, 100);
    map_free(&map);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/free-page-hint/header/array", test_header_array);
    g_test_add_func("/free-page-hint/header/end", test_header_end);
    g_test_add_func("/free-page-hint/header/invalid", test_header_invalid);
    g_test_add_func("/free-page-hint/addrs/merge", test_addrs_merge);
    g_test_add_func("/free-page-hint/addrs/invalid", test_addrs_invalid);
    g_test_add_func("/free-page-hint/addrs/random", test_addrs_random);
    g_test_add_func("/free-page-hint/runs/trim", test_trim);
    g_test_add_func("/free-page-hint/runs/too-small", test_too_small);
    g_test_add_func("/free-page-hint/runs/budget", test_budget);
    g_test_add_func("/free-page-hint/runs/another-block",
                    test_stops_at_another_block);
    g_test_add_func("/free-page-hint/bitmaps/random", test_bitmaps_random);
    g_test_add_func("/free-page-hint/bitmaps/clean-stays-clean",
                    test_clean_page_stays_clean);
    return g_test_run();
}
