/*
 * QTest testcases for migration: RAM that is not empty at the destination
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qemu/units.h"

#define RAM_SIZE (64 * MiB)
/* What somebody else has left in the destination's file */
#define LEFTOVER 0xff
/* What the source's guest has, and where; all else is zero */
#define CONTENTS 0x5a
#define CONTENTS_START (16 * MiB)
#define CONTENTS_SIZE (1 * MiB)

static char *tmpfs;

typedef struct Destination {
    const char *name;
    const char *opts;
    /* The mapping is private: the file is not the guest's to change */
    bool file_stays;
} Destination;

static const Destination destinations[] = {
    { .name = "punched", .opts = "share=on" },
    { .name = "zeroed", .opts = "share=on,prealloc=on" },
    { .name = "private", .opts = "share=off", .file_stays = true },
};

static uint8_t expected(uint64_t addr)
{
    return addr >= CONTENTS_START && addr < CONTENTS_START + CONTENTS_SIZE ?
           CONTENTS : 0;
}

/* Neither guest ever runs. */
static QTestState *start_guest(const char *backend, const char *opts)
{
    return qtest_initf("-accel tcg -nodefaults -S -object %s,id=ram,size=%d "
                       "-machine q35,memory-backend=ram %s",
                       backend, (int)RAM_SIZE, opts);
}

/* multifd writes no zero page that it has not written to before. */
static void test_leftovers(const void *opaque)
{
    const Destination *destination = opaque;
    g_autofree char *path = g_strdup_printf("%s/leftovers", tmpfs);
    g_autofree char *backend = g_strdup_printf(
        "memory-backend-file,mem-path=%s,%s", path, destination->opts);
    g_autofree char *socket = g_strdup_printf("%s/migsocket", tmpfs);
    g_autofree char *uri = g_strdup_printf("unix:%s", socket);
    g_autofree char *file = g_malloc(RAM_SIZE);
    QTestState *from, *to;
    uint64_t addr;
    size_t size;

    memset(file, LEFTOVER, RAM_SIZE);
    g_assert(g_file_set_contents(path, file, RAM_SIZE, NULL));
    from = start_guest("memory-backend-ram", "");
    to = start_guest(backend, "-incoming defer");
    migrate_set_capability(from, "multifd", true);
    migrate_set_capability(to, "multifd", true);
    qtest_memset(from, CONTENTS_START, CONTENTS, CONTENTS_SIZE);
    g_assert_cmphex(qtest_readb(to, CONTENTS_START), ==, LEFTOVER);

    qtest_qmp_assert_success(to, "{ 'execute': 'migrate-incoming',"
                             "  'arguments': { 'uri': %s } }", uri);
    migrate_qmp(from, to, uri, NULL, "{}");
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);

    /* The first MiB has holes, and firmware */
    for (addr = 1 * MiB; addr < RAM_SIZE; addr += 64 * KiB) {
        g_assert_cmphex(qtest_readb(to, addr), ==, expected(addr));
    }
    qtest_quit(from);
    qtest_quit(to);

    if (destination->file_stays) {
        g_autofree char *after = NULL;

        g_assert(g_file_get_contents(path, &after, &size, NULL));
        g_assert_cmpmem(file, RAM_SIZE, after, size);
    }
    unlink(path);
    unlink(socket);
}

void migration_test_add_ram_empty(MigrationTestEnv *env)
{
    tmpfs = env->tmpfs;

    if (!env->has_tcg || !env->is_x86) {
        return;
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(destinations); i++) {
        g_autofree char *path = g_strdup_printf("/migration/ram-empty/%s",
                                                destinations[i].name);

        qtest_add_data_func(path, &destinations[i], test_leftovers);
    }
}
