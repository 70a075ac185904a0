/*
 * QTest testcases for migration: writes that the dirty log must not miss
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"

/* The guest writes to PAGES pages from START on */
#define START 0x10000
#define PAGE_SIZE 0x1000
#define PAGES 16

/* Takes a second to be sent at the bandwidth of these tests */
#define FILLED 0x100000
#define FILLED_SIZE (3 * 1024 * 1024)

static char *tmpfs;

/*
 * A guest in place of the firmware, in real mode: it counts in the first word
 * of each page of a segment, round and round.  There are so few pages that all
 * of its TLB entries stay where they are.
 */
static const uint8_t firmware_start[] = {
    0xfa,                       /* cli */
    0xb8, 0x00, 0x10,           /* mov $0x1000,%ax */
    0x8e, 0xd8,                 /* mov %ax,%ds */
    0x31, 0xdb,                 /* xor %bx,%bx */
    0xff, 0x07,                 /* 1: incw (%bx) */
    0x80, 0xc7, 0x10,           /* add $0x10,%bh */
    0xeb, 0xf9,                 /* jmp 1b */
};
static const uint8_t firmware_reset[] = {
    0xea, 0x00, 0x00, 0x00, 0xf0, /* ljmp $0xf000,$0 */
};
#define FIRMWARE_SIZE (64 * 1024)
#define FIRMWARE_RESET 0xfff0

static char *firmware_create(void)
{
    char *path = g_strdup_printf("%s/firmware", tmpfs);
    g_autofree char *image = g_malloc0(FIRMWARE_SIZE);

    memcpy(image, firmware_start, sizeof(firmware_start));
    memcpy(image + FIRMWARE_RESET, firmware_reset, sizeof(firmware_reset));
    g_assert(g_file_set_contents(path, image, FIRMWARE_SIZE, NULL));
    return path;
}

/*
 * Of two RAMBlocks, one is the guest's RAM.  In the second one, addresses in
 * ram_addr_t are not those in the block.
 */
static QTestState *start_guest(const char *firmware, const char *ram,
                               const char *opts)
{
    return qtest_initf("-accel tcg -nodefaults -bios %s "
                       "-object memory-backend-ram,id=first,size=64M "
                       "-object memory-backend-ram,id=second,size=64M "
                       "-machine q35,memory-backend=%s %s",
                       firmware, ram, opts);
}

static void test_few_pages(const char *ram)
{
    g_autofree char *firmware = firmware_create();
    g_autofree char *socket = g_strdup_printf("%s/migsocket", tmpfs);
    g_autofree char *uri = g_strdup_printf("unix:%s", socket);
    g_autofree char *incoming = g_strdup_printf("-S -incoming %s", uri);
    QTestState *from = start_guest(firmware, ram, "");
    QTestState *to = start_guest(firmware, ram, incoming);
    QTestMigrationState state = {};
    unsigned i;

    qtest_qmp_set_event_callback(from, migrate_watch_for_events, &state);
    while (!qtest_readw(from, START + (PAGES - 1) * PAGE_SIZE)) {
        usleep(1000);
    }

    /*
     * The guest never stops to write, so that this does not converge, and ends
     * here by itself only if writes were missed.  Without something to send, it
     * is over before QEMU knows how fast it is.
     */
    qtest_memset(from, FILLED, 0x5a, FILLED_SIZE);
    migrate_ensure_non_converge(from);
    migrate_qmp(from, to, uri, NULL, "{}");
    wait_for_migration_pass(from, &state);
    wait_for_migration_pass(from, &state);
    migrate_ensure_converge(from);
    wait_for_migration_complete(from);
    wait_for_migration_complete(to);

    /* Neither runs now */
    for (i = 0; i < PAGES; i++) {
        g_assert_cmphex(qtest_readw(to, START + i * PAGE_SIZE), ==,
                        qtest_readw(from, START + i * PAGE_SIZE));
    }

    qtest_quit(from);
    qtest_quit(to);
    unlink(firmware);
    unlink(socket);
}

static void test_first_block(void)
{
    test_few_pages("first");
}

static void test_second_block(void)
{
    test_few_pages("second");
}

void migration_test_add_dirty_log(MigrationTestEnv *env)
{
    tmpfs = env->tmpfs;

    /* KVM has no TLB that has to be reset */
    if (env->has_tcg && env->is_x86) {
        migration_test_add("/migration/dirty-log/tcg/first-block",
                           test_first_block);
        migration_test_add("/migration/dirty-log/tcg/second-block",
                           test_second_block);
    }
}
