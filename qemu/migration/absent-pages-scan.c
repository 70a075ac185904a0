/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Absent pages: which pages of some memory were never populated
 *
 * mincore() is no substitute for the page table: it takes swapped pages of
 * private memory for absent ones.
 */
#include "qemu/osdep.h"
#include "absent-pages-scan.h"

#ifdef CONFIG_LINUX
#include <sys/ioctl.h>

/*
 * As in <linux/fs.h> since Linux 6.7, include/uapi/linux/fs.h; the headers that
 * we are built with may be older.
 */
#ifndef PAGEMAP_SCAN
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)

struct page_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct pm_scan_arg {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};
#endif

/* An entry of /proc/pid/pagemap, Documentation/admin-guide/mm/pagemap.rst */
#define PAGEMAP_SWAPPED (1ULL << 62)
#define PAGEMAP_PRESENT (1ULL << 63)
/* Entries read in one go: 16 KiB of them, for 8 MiB of 4 KiB pages */
#define PAGEMAP_ENTRIES 2048

/* Regions in one go: 24 KiB of stack */
#define SCAN_REGIONS 1024
/* What the page table does not have, looked up in the file in one go */
#define SCAN_GAPS 256

/* Looks at a file in one call: about half a millisecond */
#define FILE_PROBES 1024

static void add_run(AbsentPagesRun *runs, unsigned *n,
                    uint64_t start, uint64_t end)
{
    if (*n && runs[*n - 1].start + runs[*n - 1].length == start) {
        runs[*n - 1].length += end - start;
    } else {
        runs[(*n)++] = (AbsentPagesRun) { start, end - start };
    }
}

/*
 * The kernel has to say of a page that it is absent: what it says nothing about
 * is not.
 */
static bool scan_mapping(const AbsentPagesMemory *mem, int pagemap,
                         uint64_t *start, uint64_t end,
                         AbsentPagesRun *runs, unsigned *n, unsigned max)
{
    struct page_region regions[SCAN_REGIONS];
    uintptr_t host = (uintptr_t)mem->host;
    struct pm_scan_arg arg = {
        .size = sizeof(arg),
        .start = host + *start,
        .end = host + end,
        .vec = (uintptr_t)regions,
        .vec_len = MIN(max - *n, SCAN_REGIONS),
        /* Not swapped; and not present, or the zero page */
        .category_inverted = PAGE_IS_SWAPPED | PAGE_IS_PRESENT,
        .category_mask = PAGE_IS_SWAPPED,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
    };
    int found = ioctl(pagemap, PAGEMAP_SCAN, &arg);
    int i;

    if (found < 0) {
        return false;
    }
    for (i = 0; i < found; i++) {
        add_run(runs, n, regions[i].start - host, regions[i].end - host);
    }
    /* Not walk_end: Linux 6.18 leaves an earlier stop in it at times */
    *start = found < arg.vec_len ? end : regions[found - 1].end - host;
    return true;
}

/* For Linux before 6.7.  Here, the zero page is a page like any other. */
static bool read_mapping(const AbsentPagesMemory *mem, int pagemap,
                         uint64_t *start, uint64_t end,
                         AbsentPagesRun *runs, unsigned *n, unsigned max)
{
    size_t page_size = qemu_real_host_page_size();

    while (*start < end) {
        uint64_t entries[PAGEMAP_ENTRIES];
        uint64_t first = ((uintptr_t)mem->host + *start) / page_size;
        size_t want = MIN((end - *start) / page_size, PAGEMAP_ENTRIES);
        ssize_t len = pread(pagemap, entries, want * sizeof(entries[0]),
                            first * sizeof(entries[0]));
        size_t i;

        if (len < (ssize_t)sizeof(entries[0])) {
            errno = len < 0 ? errno : ENODATA;
            return false;
        }
        for (i = 0; i < len / sizeof(entries[0]); i++) {
            if (!(entries[i] & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED))) {
                add_run(runs, n, *start, *start + page_size);
            }
            *start += page_size;
            if (*n == max) {
                return true;
            }
        }
    }
    return true;
}

static bool find_in_mapping(const AbsentPagesMemory *mem, int pagemap,
                            uint64_t *start, uint64_t end,
                            AbsentPagesRun *runs, unsigned *n, unsigned max)
{
    return scan_mapping(mem, pagemap, start, end, runs, n, max) ||
           (errno == ENOTTY &&
            read_mapping(mem, pagemap, start, end, runs, n, max));
}

/*
 * Find holes of the file, with at most *@probes looks at it.  We ask for the
 * next data, page by page where there is some: SEEK_HOLE would walk through all
 * the data up to the next hole, however far that is beyond @end.
 */
static bool find_in_file(const AbsentPagesMemory *mem, unsigned *probes,
                         uint64_t *start, uint64_t end,
                         AbsentPagesRun *runs, unsigned *n, unsigned max)
{
    size_t page_size = qemu_real_host_page_size();

    while (*start < end && *n < max && *probes) {
        off_t data = lseek(mem->fd, mem->fd_offset + *start, SEEK_DATA);
        uint64_t hole_end;

        if (data < 0 && errno != ENXIO) {
            return false;
        }
        hole_end = data < 0 ? end : MIN(end, data - mem->fd_offset);
        if (hole_end > *start) {
            add_run(runs, n, *start, hole_end);
        }
        *start = MIN(end, hole_end + page_size);
        (*probes)--;
    }
    return true;
}

/* The page table is looked at first: it is quicker with what is populated. */
static bool find_in_both(const AbsentPagesMemory *mem, int pagemap,
                         unsigned *probes, uint64_t *start, uint64_t end,
                         AbsentPagesRun *runs, unsigned *n, unsigned max)
{
    AbsentPagesRun gaps[SCAN_GAPS];
    uint64_t next = *start;
    unsigned ngaps = 0, i;

    if (!find_in_mapping(mem, pagemap, &next, end, gaps, &ngaps, SCAN_GAPS)) {
        return false;
    }
    for (i = 0; i < ngaps; i++) {
        uint64_t gap_end = gaps[i].start + gaps[i].length;

        *start = gaps[i].start;
        if (!find_in_file(mem, probes, start, gap_end, runs, n, max)) {
            return false;
        }
        if (*start < gap_end) {
            return true;
        }
    }
    *start = next;
    return true;
}

int absent_pages_open(void)
{
    return qemu_open_old("/proc/self/pagemap", O_RDONLY);
}

int absent_pages_find(const AbsentPagesMemory *mem, int pagemap,
                      uint64_t *start, uint64_t end,
                      AbsentPagesRun *runs, unsigned max)
{
    unsigned n = 0, probes = FILE_PROBES;
    bool told = true;

    while (told && *start < end && n < max && probes) {
        switch (mem->proof) {
        case ABSENT_PAGES_MAPPING:
            told = find_in_mapping(mem, pagemap, start, end, runs, &n, max);
            break;
        case ABSENT_PAGES_FILE:
            told = find_in_file(mem, &probes, start, end, runs, &n, max);
            break;
        case ABSENT_PAGES_BOTH:
            told = find_in_both(mem, pagemap, &probes, start, end,
                                runs, &n, max);
            break;
        default:
            g_assert_not_reached();
        }
    }
    return told ? n : -1;
}

#else

int absent_pages_open(void)
{
    errno = ENOSYS;
    return -1;
}

int absent_pages_find(const AbsentPagesMemory *mem, int pagemap,
                      uint64_t *start, uint64_t end,
                      AbsentPagesRun *runs, unsigned max)
{
    errno = ENOSYS;
    return -1;
}

#endif
