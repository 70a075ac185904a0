/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * RAM is empty before the first page of an incoming migration is loaded
 *
 * Pages that the source does not send, because nobody wants their contents or
 * because they are zero, show what the destination's RAM held before. That must
 * be nothing: least of all what another guest left in a shared file.
 * See docs/devel/migration/ram-empty.rst.
 */
#include "qemu/osdep.h"
#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/madvise.h"
#include "qemu/units.h"
#include "migration/free-page-hint-compat.h"
#include "qapi/error.h"
#include "block/aio.h"
#include "system/hostmem.h"
#include "system/runstate.h"
#include "system/system.h"
#include "migration.h"
#include "options.h"
#include "ram.h"
#include "ram-empty.h"
#include "trace.h"

/*
 * The monitor is served after each step. Where all is data, one takes 10 ms of
 * CPU time to punch, 100 ms in a private mapping (4 GiB of 4 KiB pages: 0.62
 * and 6.5 s).
 */
#define STEP_BYTES (64 * MiB)

/* How the data that is found in a block is removed. */
typedef enum {
    /* The file gets a hole, and its memory is free again. */
    RAM_EMPTY_PUNCH,
    /* Zeroes are written over what is not zero, nothing is unmapped. */
    RAM_EMPTY_ZERO,
    /* It cannot be: it has to be zero. */
    RAM_EMPTY_CHECK,
} RAMEmptyHow;

static const char *const how_names[] = { "punched", "zeroed", "checked" };

/* Returns NULL for what QEMU has made for itself. */
static HostMemoryBackend *block_backend(RAMBlock *rb)
{
    return (HostMemoryBackend *)object_dynamic_cast(memory_region_owner(rb->mr),
                                                    TYPE_MEMORY_BACKEND);
}

/*
 * Memory that is to remain populated: it was reserved, locked, or pinned for a
 * device.
 */
static bool must_stay_populated(RAMBlock *rb)
{
    HostMemoryBackend *backend = block_backend(rb);

    return ram_block_discard_is_disabled() || should_mlock(mlock_state) ||
           (backend && backend->prealloc) ||
           /* A hole punched into hugetlbfs loses its reservation. */
           (rb->page_size != qemu_real_host_page_size() &&
            !(rb->flags & RAM_NORESERVE));
}

/* Called for each object; is it a device that gives @backend to others, too? */
static int gives_to_others(Object *obj, void *backend)
{
    return (object_dynamic_cast(obj, "nvdimm") ||
            object_dynamic_cast(obj, "virtio-pmem") ||
            object_dynamic_cast(obj, "acpi-erst") ||
            object_dynamic_cast(obj, "ivshmem-plain")) &&
           object_property_get_link(obj, "memdev", NULL) == backend;
}

/*
 * Persistent memory and memory that guests share have contents that are not the
 * guest's alone: somebody may use them at this moment, even the source. So may
 * whoever has passed us the file of memory that is no backend's. (With
 * aux-ram-share=on, QEMU's own memory has a file, too: a new one.)
 */
static bool others_contents(RAMBlock *rb)
{
    HostMemoryBackend *backend = block_backend(rb);

    /* What is read-only can only be refused, whosever it is */
    return rb->fd >= 0 && !(rb->flags & RAM_READONLY) &&
           (backend ?
            object_child_foreach_recursive(object_get_root(), gives_to_others,
                                           backend) : !rb->new_file);
}

bool ram_stays_as_it_is(RAMBlock *rb)
{
    /* What is not ours to manage, or has no contents that we could see. */
    if (!rb->host || rb->guest_memfd >= 0 || (rb->flags & RAM_PREALLOC) ||
        others_contents(rb)) {
        return true;
    }
    /*
     * The source ignores its blocks that are shared. Here they may be private
     * mappings of the same file (docs/system/vm-templating.rst), which are not
     * ignored, but not loaded either.
     */
    return migrate_ignore_shared() && qemu_ram_is_named_file(rb);
}

/*
 * Find the first page of a block's file with data at or after @start; offsets
 * are in the block. Nobody is asked where that data ends: tmpfs would walk
 * through all of it, again at each step.
 */
static bool find_data(RAMBlock *rb, uint64_t *start, uint64_t end)
{
#ifdef SEEK_DATA
    if (*start < end) {
        off_t data = lseek(rb->fd, rb->fd_offset + *start, SEEK_DATA);

        if (data < 0 && errno == ENXIO) {
            return false;
        }
        /* Else it is a device (some return 0), or does not tell */
        if (data > 0 && (uint64_t)data > rb->fd_offset + *start) {
            *start = QEMU_ALIGN_DOWN(data - rb->fd_offset, rb->page_size);
        }
    }
#endif
    return *start < end;
}

/* Returns: the bytes that are not zero, in whole pages. */
static uint64_t count_data(uint8_t *host, uint64_t length, bool make_zero)
{
    uint64_t page_size = qemu_real_host_page_size();
    uint64_t count = 0;

    for (uint8_t *page = host; page < host + length; page += page_size) {
        if (buffer_is_zero(page, page_size)) {
            continue;
        }
        if (make_zero) {
            memset(page, 0, page_size);
        }
        count += page_size;
    }
    return count;
}

/* Returns: as count_data(), without a look at the holes of a block's file. */
static uint64_t count_file_data(RAMBlock *rb, uint64_t start, uint64_t end,
                                bool make_zero)
{
    uint64_t count = 0;

    while (find_data(rb, &start, end)) {
        uint64_t length = MIN(rb->page_size, end - start);

        count += count_data(rb->host + start, length, make_zero);
        start += length;
    }
    return count;
}

static bool punch(RAMBlock *rb, uint64_t start, uint64_t length)
{
#ifdef CONFIG_FALLOCATE_PUNCH_HOLE
    return !fallocate(rb->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      rb->fd_offset + start, length);
#else
    return false;
#endif
}

/* Private memory reads as zero again, or as its file. */
static bool forget(void *host, uint64_t length)
{
#ifdef CONFIG_LINUX
    return !qemu_madvise(host, length, QEMU_MADV_DONTNEED);
#else
    /* Only advice */
    return false;
#endif
}

static void serve_others(void)
{
    if (qemu_in_coroutine()) {
        aio_co_schedule(qemu_get_current_aio_context(), qemu_coroutine_self());
        qemu_coroutine_yield();
    }
}

static RAMEmptyHow choose(RAMBlock *rb)
{
    if (rb->flags & RAM_READONLY) {
        return RAM_EMPTY_CHECK;
    }
    /* A private mapping is a promise not to change the file. */
    if (!qemu_ram_is_shared(rb) || must_stay_populated(rb)) {
        return RAM_EMPTY_ZERO;
    }
    return RAM_EMPTY_PUNCH;
}

/* hugetlbfs says that all of a file is data, but knows if nothing is. */
static bool is_empty_hugetlbfs(RAMBlock *rb)
{
#ifdef CONFIG_LINUX
    struct stat st;

    return rb->page_size != qemu_real_host_page_size() &&
           fstat(rb->fd, &st) == 0 && !st.st_blocks;
#else
    return false;
#endif
}

/* Remove the data of the file that is a block's memory. */
static int empty_file(RAMBlock *rb, uint64_t length, Error **errp)
{
    RAMEmptyHow how = choose(rb);
    uint64_t bytes = 0, start = 0;
    bool any = false;

    if (is_empty_hugetlbfs(rb)) {
        return 0;
    }
    while (find_data(rb, &start, length)) {
        uint64_t step = MIN(length - start, MAX(STEP_BYTES, rb->page_size));

        any = true;

        if (how == RAM_EMPTY_PUNCH) {
            if (!punch(rb, start, step)) {
                how = RAM_EMPTY_ZERO;
                continue;
            }
            bytes += step;
        } else {
            bytes += count_file_data(rb, start, start + step,
                                     how == RAM_EMPTY_ZERO);
        }
        if (bytes && how == RAM_EMPTY_CHECK) {
            error_setg(errp, "RAM block '%s' has contents and is read-only, so"
                       " that it cannot be emptied: give it an empty file, or"
                       " keep the contents with x-ignore-shared", rb->idstr);
            return -1;
        }
        start += step;
        serve_others();
    }
    if (any) {
        trace_ram_make_empty(rb->idstr, how_names[how], bytes);
    }
    return 0;
}

static int empty_block(RAMBlock *rb, Error **errp)
{
    uint64_t length = qemu_ram_get_used_length(rb);
    bool is_new = !qemu_ram_is_named_file(rb) || rb->new_file;

    if (ram_stays_as_it_is(rb)) {
        return 0;
    }
    if (is_new && must_stay_populated(rb)) {
        /*
         * Only this QEMU can have written to it: ROMs, and tables that it made.
         * While they wait for a migration, most machines leave a backend alone,
         * see rom_reset(); to look at all of it would take long.
         */
        if (!block_backend(rb)) {
            count_data(rb->host, length, true);
        }
        return 0;
    }
    if (!qemu_ram_is_shared(rb) && !must_stay_populated(rb)) {
        /* What this QEMU wrote: ROMs, and tables that it made. */
        if (!forget(rb->host, length) && !block_backend(rb)) {
            count_data(rb->host, length, true);
        }
    }
    if (rb->fd < 0 || (is_new && !qemu_ram_is_shared(rb))) {
        return 0;
    }
    return empty_file(rb, length, errp);
}

static int collect_block(RAMBlock *rb, void *blocks)
{
    memory_region_ref(rb->mr);
    g_ptr_array_add(blocks, rb);
    return 0;
}

bool ram_make_empty(Error **errp)
{
    g_autoptr(GPtrArray) blocks = g_ptr_array_new();
    int ret = 0;
    unsigned i;

    if (!runstate_check(RUN_STATE_INMIGRATE)) {
        return true;
    }
    /* Others, who may wait for RCU, are served in between: not under RCU */
    foreach_not_ignored_block(collect_block, blocks);
    for (i = 0; i < blocks->len; i++) {
        RAMBlock *rb = g_ptr_array_index(blocks, i);

        ret = ret ?: empty_block(rb, errp);
        memory_region_unref(rb->mr);
    }
    return !ret;
}
