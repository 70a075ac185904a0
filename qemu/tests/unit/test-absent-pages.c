/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Absent pages: unit tests of what finds them
 *
 * With real memory of this process, against a model that has one bool per page.
 */
#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include "qemu/cutils.h"
#include "qemu/memfd.h"
#include "qapi/error.h"
#include "../../migration/absent-pages-scan.h"

/* More than are looked up in a file in one call */
#define PAGES 4096
#define RANDOM_STEPS 300

/* PAGEMAP_SCAN, which the headers may lack, of a struct pm_scan_arg */
#define PAGEMAP_SCAN_NR _IOC(_IOC_READ | _IOC_WRITE, 'f', 16, 96)

static size_t page_size;
static int pagemap;

typedef struct Kind {
    const char *name;
    AbsentPagesProof proof;
    bool shared;
} Kind;

static const Kind private = { "private", ABSENT_PAGES_MAPPING, false };
static const Kind shared_file = { "shared-file", ABSENT_PAGES_BOTH, true };
/* The page table is denied */
static const Kind file_only = { "file-only", ABSENT_PAGES_FILE, true };
static const Kind private_file = { "private-file", ABSENT_PAGES_BOTH, false };

typedef struct Memory {
    AbsentPagesMemory mem;
    bool shared;
    /* Another mapping, as another process would have it */
    uint8_t *other;
    bool absent[PAGES];
} Memory;

static uint8_t *map(int flags, int fd)
{
    uint8_t *host = mmap(NULL, PAGES * page_size, PROT_READ | PROT_WRITE,
                         flags, fd, 0);

    g_assert(host != MAP_FAILED);
    /* A huge page would be populated as a whole */
    madvise(host, PAGES * page_size, MADV_NOHUGEPAGE);
    return host;
}

static void memory_init(Memory *m, const Kind *kind)
{
    unsigned i;

    *m = (Memory) {
        .mem = { .proof = kind->proof, .fd = -1 },
        .shared = kind->shared,
    };
    if (kind->proof & ABSENT_PAGES_FILE) {
        m->mem.fd = qemu_memfd_create("test", PAGES * page_size, false, 0, 0,
                                      &error_abort);
        m->other = map(MAP_SHARED, m->mem.fd);
    }
    m->mem.host = map((m->shared ? MAP_SHARED : MAP_PRIVATE) |
                      (m->mem.fd < 0 ? MAP_ANONYMOUS : 0), m->mem.fd);
    for (i = 0; i < PAGES; i++) {
        m->absent[i] = true;
    }
}

static void memory_destroy(Memory *m)
{
    munmap(m->mem.host, PAGES * page_size);
    if (m->other) {
        munmap(m->other, PAGES * page_size);
        close(m->mem.fd);
    }
}

/* Ask for @max runs at a time, and compare with the model. */
static void check(Memory *m, int map_fd, unsigned from, unsigned to,
                  unsigned max)
{
    g_autofree AbsentPagesRun *runs = g_new(AbsentPagesRun, max);
    uint64_t start = from * page_size, end = to * page_size;
    bool found[PAGES] = {};
    unsigned i;

    while (start < end) {
        uint64_t before = start, last = start;
        int n = absent_pages_find(&m->mem, map_fd, &start, end, runs, max);
        int k;

        g_assert_cmpint(n, >=, 0);
        g_assert_cmpint(n, <=, max);
        g_assert_cmpuint(start, >, before);
        g_assert_cmpuint(start, <=, end);
        for (k = 0; k < n; k++) {
            uint64_t at = runs[k].start;

            /* In order, whole pages, apart, and in what was looked at */
            g_assert_cmpuint(at % page_size, ==, 0);
            g_assert_cmpuint(at, >=, last + (k ? page_size : 0));
            g_assert_cmpuint(runs[k].length, >, 0);
            last = at + runs[k].length;
            g_assert_cmpuint(last, <=, start);
            for (; at < last; at += page_size) {
                found[at / page_size] = true;
            }
        }
    }
    for (i = from; i < to; i++) {
        g_assert_cmpint(found[i], ==, m->absent[i]);
    }
}

static void check_all(Memory *m)
{
    check(m, pagemap, 0, PAGES, PAGES);
    check(m, pagemap, 0, PAGES, 1);
    check(m, pagemap, 3, PAGES - 5, 7);
}

static void discard(Memory *m, unsigned page, unsigned n)
{
    if (m->shared) {
        g_assert(!fallocate(m->mem.fd,
                            FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                            page * page_size, n * page_size));
    } else {
        g_assert(!madvise(m->mem.host + page * page_size, n * page_size,
                          MADV_DONTNEED));
    }
}

/*
 * Written pages are there, discarded ones are not, whatever the memory is.  But
 * a write to a private mapping leaves a page in the file, too.
 */
static void test_random(gconstpointer data)
{
    Memory m;
    unsigned step, i;

    memory_init(&m, data);
    check_all(&m);
    for (step = 0; step < RANDOM_STEPS; step++) {
        unsigned page = g_test_rand_int_range(0, PAGES);
        unsigned n = g_test_rand_int_range(1, MIN(PAGES - page, 32) + 1);
        bool write = g_test_rand_bit();

        if (!write) {
            discard(&m, page, n);
        }
        for (i = page; i < page + n; i++) {
            if (write) {
                m.mem.host[i * page_size] = 1;
            }
            m.absent[i] = !write &&
                          (m.absent[i] || m.shared || m.mem.fd < 0);
        }
        check(&m, pagemap, 0, PAGES, g_test_rand_int_range(1, PAGES));
    }
    check_all(&m);
    memory_destroy(&m);
}

/* Every second page: as many runs as there can be. */
static void test_fragmented(gconstpointer data)
{
    Memory m;
    unsigned i;

    memory_init(&m, data);
    for (i = 0; i < PAGES; i += 2) {
        m.mem.host[i * page_size] = 1;
        m.absent[i] = false;
    }
    check_all(&m);
    memory_destroy(&m);
}

/* A page of private memory that was read is the kernel's zero page: absent. */
static void test_read(void)
{
    Memory m;
    unsigned i;

    /* Before Linux 6.7, the zero page is one like any other */
    if (ioctl(pagemap, PAGEMAP_SCAN_NR, NULL) < 0 && errno == ENOTTY) {
        g_test_skip("this kernel has no PAGEMAP_SCAN");
        return;
    }
    memory_init(&m, &private);
    for (i = 0; i < PAGES; i += 3) {
        g_assert_true(buffer_is_zero(m.mem.host + i * page_size, page_size));
    }
    check_all(&m);
    memory_destroy(&m);
}

/* What another process has populated is in the file, not in our page table. */
static void test_others(gconstpointer data)
{
    Memory m;
    unsigned i;

    memory_init(&m, data);
    for (i = 100; i < PAGES - 100; i++) {
        m.other[i * page_size] = 1;
        m.absent[i] = false;
    }
    check_all(&m);
    memory_destroy(&m);
}

/* In a private mapping of a file, what we wrote is not in the file. */
static void test_private_file(void)
{
    Memory m;
    unsigned i;

    memory_init(&m, &private_file);
    for (i = 0; i < 50; i++) {
        m.other[i * page_size] = 1;
        m.mem.host[(i + 25) * page_size] = 1;
        m.absent[i] = m.absent[i + 25] = false;
    }
    check_all(&m);
    memory_destroy(&m);
}

/* The memory need not begin where the file does. */
static void test_file_offset(void)
{
    Memory m;
    unsigned i;

    memory_init(&m, &shared_file);
    m.mem.fd_offset = 10 * page_size;
    for (i = 0; i < 5; i++) {
        m.other[(30 + i) * page_size] = 1;
        m.absent[20 + i] = false;
    }
    check(&m, pagemap, 0, PAGES - 10, PAGES);
    check(&m, pagemap, 5, PAGES - 10, 1);
    memory_destroy(&m);
}

/*
 * A kernel that cannot scan is asked for each page.  Its pagemap is a file
 * here, which knows no ioctl.
 */
static void test_no_scan(void)
{
    static const uint64_t entries[] = {
        0,
        1ULL << 63,             /* present */
        1ULL << 62,             /* swapped */
        1ULL << 55,             /* nothing, in memory that is soft-dirty */
        1ULL << 63 | 1ULL << 61 /* present, of a file */
    };
    Memory m;
    int fd = qemu_memfd_create("pagemap", 0, false, 0, 0, &error_abort);
    uint64_t entry;
    unsigned i;

    memory_init(&m, &private);
    for (i = 0; i < PAGES; i++) {
        entry = entries[g_test_rand_int_range(0, ARRAY_SIZE(entries))];
        m.absent[i] = !(entry >> 62);
        g_assert_cmpint(pwrite(fd, &entry, sizeof(entry),
                               ((uintptr_t)m.mem.host / page_size + i) *
                               sizeof(entry)), ==, sizeof(entry));
    }
    check(&m, fd, 0, PAGES, PAGES);
    check(&m, fd, 0, PAGES, 1);
    check(&m, fd, 7, PAGES - 1, 13);
    close(fd);
    memory_destroy(&m);
}

/* Where the host does not tell, that is an error, and nothing is absent. */
static void test_errors(void)
{
    AbsentPagesRun run;
    uint64_t start = 0;
    Memory m;
    int fd = qemu_memfd_create("pagemap", 0, false, 0, 0, &error_abort);

    memory_init(&m, &private);
    g_assert_cmpint(absent_pages_find(&m.mem, -1, &start, page_size, &run, 1),
                    ==, -1);
    /* A pagemap that ends before the memory */
    g_assert_cmpint(absent_pages_find(&m.mem, fd, &start, page_size, &run, 1),
                    ==, -1);
    memory_destroy(&m);

    memory_init(&m, &private_file);
    close(m.mem.fd);
    m.mem.fd = -1;
    g_assert_cmpint(absent_pages_find(&m.mem, pagemap, &start, page_size,
                                      &run, 1), ==, -1);
    memory_destroy(&m);
    close(fd);
}

int main(int argc, char **argv)
{
    static const Kind *const kinds[] = {
        &private, &shared_file, &file_only, &private_file,
    };
    unsigned i;

    g_test_init(&argc, &argv, NULL);
    page_size = qemu_real_host_page_size();
    pagemap = absent_pages_open();
    if (pagemap < 0) {
        g_test_message("/proc/self/pagemap cannot be opened here");
        return g_test_run();
    }
    for (i = 0; i < ARRAY_SIZE(kinds); i++) {
        const Kind *kind = kinds[i];
        g_autofree char *random = g_strconcat("/absent-pages/random/",
                                              kind->name, NULL);
        g_autofree char *fragmented = g_strconcat("/absent-pages/fragmented/",
                                                  kind->name, NULL);
        g_autofree char *others = g_strconcat("/absent-pages/others/",
                                              kind->name, NULL);

        g_test_add_data_func(random, kind, test_random);
        g_test_add_data_func(fragmented, kind, test_fragmented);
        if (kind->proof & ABSENT_PAGES_FILE) {
            g_test_add_data_func(others, kind, test_others);
        }
    }
    g_test_add_func("/absent-pages/read", test_read);
    g_test_add_func("/absent-pages/private-file", test_private_file);
    g_test_add_func("/absent-pages/file-offset", test_file_offset);
    g_test_add_func("/absent-pages/no-scan", test_no_scan);
    g_test_add_func("/absent-pages/errors", test_errors);
    return g_test_run();
}
