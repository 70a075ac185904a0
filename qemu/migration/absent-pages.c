/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Absent pages: memory that the host never populated is not sent
 *
 * Most of what a guest never touched, or gave back, has no page behind it on
 * the host.  It reads as zero, and so does the destination's.  Looking for such
 * pages costs next to nothing where there are many; reading them to find that
 * they are zero populates them or takes a page fault for each.
 *
 * We look after the dirty log was armed, in round 0: see free-page-hint.h.  A
 * page that is populated after that was written after that, and is in the log,
 * or it was only read, and is still zero.
 */
#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/module.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "exec/target_page.h"
#include "hw/boards.h"
#include "migration/free-page-hint-compat.h"
#include "migration/misc.h"
#include "monitor/monitor.h"
#include "system/hostmem.h"
#include "absent-pages.h"
#include "absent-pages-scan.h"
#include "free-page-hint.h"
#include "free-page-hint-ram.h"
#include "migration.h"
#include "options.h"
#include "ram-empty.h"
#include "ram.h"
#include "trace.h"

#ifdef CONFIG_LINUX
#include <sys/vfs.h>
#include <linux/magic.h>
#endif

/*
 * Looked at in one hold of RCU, or a page if that is larger: populated in 4 KiB
 * pages, that takes a millisecond
 */
#define CHUNK_BYTES (256 * MiB)

#define REASON_NONE FREE_PAGE_HINT_REASON__MAX

static struct {
    QemuMutex lock;
    /* Protected by the lock. */
    AbsentPagesInfo stats;

    /* Migration thread only: that of a round. */
    AbsentPagesLook *look;
} absent;

typedef struct AbsentPagesBlock {
    RAMBlock *rb;
    AbsentPagesMemory mem;
} AbsentPagesBlock;

struct AbsentPagesLook {
    /* See absent_pages_open(), or -1. */
    int pagemap;
    /* Those in which there is something to find. */
    GArray *blocks;
    /* How far it has come: in which of them, and where in that. */
    unsigned at;
    uint64_t start;
};

static const char *const proof_names[] = {
    [ABSENT_PAGES_NO_PROOF] = "nothing",
    [ABSENT_PAGES_MAPPING] = "mapping",
    [ABSENT_PAGES_FILE] = "file",
    [ABSENT_PAGES_BOTH] = "mapping and file",
};

/* ---- what is proof ---- */

/* How does the file of a block show that a page is absent? */
static AbsentPagesProof file_proof(RAMBlock *rb)
{
#ifdef CONFIG_LINUX
    bool shared = qemu_ram_is_shared(rb);
    struct statfs fs;
    struct stat st;

    if (fstatfs(rb->fd, &fs) < 0 || fstat(rb->fd, &st) < 0) {
        return ABSENT_PAGES_NO_PROOF;
    }
    switch ((unsigned long)fs.f_type) {
    case TMPFS_MAGIC:
        return ABSENT_PAGES_BOTH;
    case HUGETLBFS_MAGIC:
        /* It says that all of a file is data, but knows if nothing is */
        return shared || st.st_blocks ? ABSENT_PAGES_NO_PROOF :
                                        ABSENT_PAGES_MAPPING;
    default:
        /* On a disk, or a device: holes need not be zero to a mapping */
        return ABSENT_PAGES_NO_PROOF;
    }
#else
    return ABSENT_PAGES_NO_PROOF;
#endif
}

/*
 * Of memory that others fill at the destination (another version's tables may
 * be longer than ours) or that they use, zero pages have to be sent.  That
 * leaves memory backends, and what an incoming migration empties.
 *
 * Called with the BQL.
 */
static AbsentPagesProof block_proof(RAMBlock *rb)
{
    Object *owner = memory_region_owner(rb->mr);

    if (!owner || !object_dynamic_cast(owner, TYPE_MEMORY_BACKEND) ||
        (rb->flags & (RAM_PMEM | RAM_READONLY | RAM_READONLY_FD)) ||
        ram_stays_as_it_is(rb)) {
        return ABSENT_PAGES_NO_PROOF;
    }
    if (rb->fd >= 0) {
        return file_proof(rb);
    }
    /* What is shared and has no file may have been populated by others */
    return qemu_ram_is_shared(rb) ? ABSENT_PAGES_NO_PROOF :
                                    ABSENT_PAGES_MAPPING;
}

/* ---- a look ---- */

void absent_pages_look_end(AbsentPagesLook *look)
{
    g_array_unref(look->blocks);
    if (look->pagemap >= 0) {
        close(look->pagemap);
    }
    g_free(look);
}

AbsentPagesLook *absent_pages_look(FreePageHintReason *reason)
{
    AbsentPagesLook *look;
    bool denied = false;
    RAMBlock *rb;

    /*
     * x-ignore-shared: the destination's RAM may be a template, not empty.
     * While postcopy comes in, what is absent may be yet to come.
     */
    if (!free_page_hint_supported() || migrate_ignore_shared() ||
        current_machine->cgs || migration_in_incoming_postcopy()) {
        *reason = FREE_PAGE_HINT_REASON_UNSUPPORTED;
        return NULL;
    }

    RCU_READ_LOCK_GUARD();

    look = g_new0(AbsentPagesLook, 1);
    look->pagemap = absent_pages_open();
    look->blocks = g_array_new(false, false, sizeof(AbsentPagesBlock));
    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        AbsentPagesBlock block = {
            .rb = rb,
            .mem = {
                .proof = rb->used_length ? block_proof(rb) : 0,
                .host = rb->host,
                .fd = rb->fd,
                .fd_offset = rb->fd_offset,
            },
        };

        if (look->pagemap < 0 && qemu_ram_is_shared(rb)) {
            block.mem.proof &= ~ABSENT_PAGES_MAPPING;
        }
        trace_absent_pages_block(rb->idstr, proof_names[block.mem.proof]);
        if ((block.mem.proof & ABSENT_PAGES_MAPPING) && look->pagemap < 0) {
            denied = true;
        } else if (block.mem.proof) {
            g_array_append_val(look->blocks, block);
        }
    }
    if (look->blocks->len) {
        *reason = REASON_NONE;
        return look;
    }
    absent_pages_look_end(look);
    *reason = denied ? FREE_PAGE_HINT_REASON_DENIED :
                       FREE_PAGE_HINT_REASON_NO_PROOF;
    return NULL;
}

/* Called in an RCU critical section. */
static bool block_listed(RAMBlock *block)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH_NOT_IGNORED(rb) {
        if (rb == block) {
            return true;
        }
    }
    return false;
}

/*
 * Find some absent runs of a block from *@start on, which stays as it is if
 * there is nothing more to look at.  See absent_pages_look_next().
 */
static int find_runs(const AbsentPagesBlock *block, int pagemap,
                     uint64_t *start, FreePageHintRun *runs)
{
    g_autofree AbsentPagesRun *found = g_new(AbsentPagesRun,
                                             ABSENT_PAGES_LOOK_RUNS);
    unsigned bits = qemu_target_page_bits();
    RAMBlock *rb = block->rb;
    uint64_t end;
    int i, n;

    RCU_READ_LOCK_GUARD();

    if (!block_listed(rb) || *start >= rb->used_length) {
        return 0;
    }
    end = MIN(rb->used_length, *start + MAX(CHUNK_BYTES, rb->page_size));
    n = absent_pages_find(&block->mem, pagemap, start, end,
                          found, ABSENT_PAGES_LOOK_RUNS);
    if (n < 0) {
        trace_absent_pages_denied(rb->idstr, errno);
        return ABSENT_PAGES_LOOK_DENIED;
    }
    for (i = 0; i < n; i++) {
        uint64_t first = DIV_ROUND_UP(found[i].start, 1ULL << bits);
        uint64_t last = (found[i].start + found[i].length) >> bits;

        runs[i] = (FreePageHintRun) {
            .block = rb,
            .first = first,
            .npages = first < last ? last - first : 0,
        };
        trace_absent_pages_run(rb->idstr, first, runs[i].npages);
    }
    return n;
}

int absent_pages_look_next(AbsentPagesLook *look, FreePageHintRun *runs)
{
    for (; look->at < look->blocks->len; look->at++, look->start = 0) {
        AbsentPagesBlock *block =
            &g_array_index(look->blocks, AbsentPagesBlock, look->at);
        uint64_t before = look->start;
        int n = find_runs(block, look->pagemap, &look->start, runs);

        if (n < 0 || look->start > before) {
            return n;
        }
    }
    return ABSENT_PAGES_LOOK_OVER;
}

/* ---- the round: see FreePageHintScanOps ---- */

static FreePageHintReason absent_pages_unavailable(void)
{
    FreePageHintReason reason;

    if (!migrate_skip_absent_pages()) {
        return FREE_PAGE_HINT_REASON_DISABLED;
    }
    if (!migrate_free_page_hint_wait()) {
        return FREE_PAGE_HINT_REASON_NO_WAIT;
    }
    absent.look = absent_pages_look(&reason);
    return reason;
}

static void absent_pages_end(void)
{
    g_clear_pointer(&absent.look, absent_pages_look_end);
}

static void skip_runs(FreePageHintRun *runs, unsigned n)
{
    uint64_t cleared = 0;
    unsigned done = 0;

    while (done < n) {
        FreePageHintTally tally = {};

        done += free_page_hint_ram_apply(&runs[done], n - done, &tally);
        cleared += tally.cleared;
    }
    WITH_QEMU_LOCK_GUARD(&absent.lock) {
        absent.stats.absent_bytes += cleared << qemu_target_page_bits();
    }
}

static FreePageHintReason absent_pages_scan(void)
{
    g_autofree FreePageHintRun *runs = g_new(FreePageHintRun,
                                             ABSENT_PAGES_LOOK_RUNS);
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    FreePageHintReason reason;
    int n = 0;

    while ((reason = free_page_hint_scan_over()) == REASON_NONE &&
           (n = absent_pages_look_next(absent.look, runs)) >= 0) {
        skip_runs(runs, n);
    }
    WITH_QEMU_LOCK_GUARD(&absent.lock) {
        absent.stats.scan_time =
            (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - start) / SCALE_US;
        trace_absent_pages_scan(absent.stats.absent_bytes,
                                absent.stats.scan_time);
    }
    return n == ABSENT_PAGES_LOOK_DENIED ? FREE_PAGE_HINT_REASON_DENIED :
                                           reason;
}

static bool absent_pages_populated(RAMBlock *rb, uint64_t first,
                                   uint64_t npages)
{
    unsigned bits = qemu_target_page_bits();
    uint64_t start = first << bits, length = npages << bits;
    unsigned i;

    for (i = 0; i < absent.look->blocks->len; i++) {
        AbsentPagesBlock *block =
            &g_array_index(absent.look->blocks, AbsentPagesBlock, i);
        AbsentPagesRun run = {};

        if (block->rb == rb) {
            uint64_t next = start;

            return absent_pages_find(&block->mem, absent.look->pagemap, &next,
                                     start + length, &run, 1) >= 0 &&
                   run.length < length;
        }
    }
    return false;
}

static const FreePageHintScanOps absent_pages_ops = {
    .unavailable = absent_pages_unavailable,
    .scan = absent_pages_scan,
    .populated = absent_pages_populated,
    .end = absent_pages_end,
};

static void absent_pages_register(void)
{
    qemu_mutex_init(&absent.lock);
    free_page_hint_register_scan(&absent_pages_ops);
}

migration_init(absent_pages_register);

/* ---- from other threads ---- */

void absent_pages_reset(void)
{
    QEMU_LOCK_GUARD(&absent.lock);
    absent.stats = (AbsentPagesInfo) {};
}

AbsentPagesInfo *absent_pages_query(void)
{
    AbsentPagesInfo *info = g_new(AbsentPagesInfo, 1);

    WITH_QEMU_LOCK_GUARD(&absent.lock) {
        *info = absent.stats;
    }
    info->reason = free_page_hint_scan_reason();
    info->has_reason = info->reason != REASON_NONE;
    return info;
}

void hmp_info_absent_pages(Monitor *mon, const AbsentPagesInfo *info)
{
    /* Whoever switched it off knows */
    if (info->has_reason && info->reason == FREE_PAGE_HINT_REASON_DISABLED) {
        return;
    }
    monitor_printf(mon, "absent pages skipped: %" PRIu64 " kbytes, found in %"
                   PRIu64 " us%s%s%s\n", info->absent_bytes >> 10,
                   info->scan_time, info->has_reason ? " (" : "",
                   info->has_reason ? FreePageHintReason_str(info->reason) : "",
                   info->has_reason ? ")" : "");
}
