/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Absent pages: which pages of some memory were never populated
 *
 * Knows about the host only: addresses, files and the page table.  All
 * positions and lengths are in bytes.
 */

#ifndef QEMU_MIGRATION_ABSENT_PAGES_SCAN_H
#define QEMU_MIGRATION_ABSENT_PAGES_SCAN_H

/* What shows that a page of some memory is absent: all of these have to */
typedef enum AbsentPagesProof {
    ABSENT_PAGES_NO_PROOF = 0,
    /* This process's page table has nothing there, or the kernel's zero page */
    ABSENT_PAGES_MAPPING = 1,
    /* The file has a hole there: in memfd and tmpfs, swapped pages are data */
    ABSENT_PAGES_FILE = 2,
    /*
     * Either may have what a reader would see.  Of a shared mapping, the file
     * alone is proof: looking at the mapping before it only saves time.
     */
    ABSENT_PAGES_BOTH = ABSENT_PAGES_MAPPING | ABSENT_PAGES_FILE,
} AbsentPagesProof;

/* Memory of one kind */
typedef struct AbsentPagesMemory {
    AbsentPagesProof proof;
    /* With ABSENT_PAGES_MAPPING: where it is mapped */
    uint8_t *host;
    /* With ABSENT_PAGES_FILE: the file, and where in it the memory begins */
    int fd;
    uint64_t fd_offset;
} AbsentPagesMemory;

typedef struct AbsentPagesRun {
    uint64_t start;
    uint64_t length;
} AbsentPagesRun;

/**
 * absent_pages_open: prepare to look at this process's page table
 *
 * Returns a file descriptor, or -1 with errno.
 */
int absent_pages_open(void);

/**
 * absent_pages_find: find absent pages
 *
 * Takes at most about 12 ns for each page that is mapped, and a microsecond for
 * each run and for each page that is in the file only; populates nothing.
 *
 * @mem: the memory
 * @pagemap: from absent_pages_open(); used with ABSENT_PAGES_MAPPING
 * @start: where to look; set to where to go on, which is @end when all of it
 *         was looked at
 * @end: the end of what to look at; like @start in whole pages
 * @runs: filled with absent runs, in order, that do not touch; a run may go on
 *        in what the next call finds
 * @max: of @runs, at least 1
 *
 * Returns the number of runs, which may be none although there is more to look
 * at, or -1 with errno if the host does not tell.
 */
int absent_pages_find(const AbsentPagesMemory *mem, int pagemap,
                      uint64_t *start, uint64_t end,
                      AbsentPagesRun *runs, unsigned max);

#endif
