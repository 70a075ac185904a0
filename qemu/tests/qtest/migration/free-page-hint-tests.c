/*
 * QTest testcases for migration: free page hints and absent pages
 *
 * What needs no driver in the guest.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "libqtest.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"
#include "qobject/qlist.h"
#include "qemu/units.h"

/*
 * The guest writes to the 99 MiB after its first one, and firmware to little
 * more.  It has 128 MiB at least, 150 on most machines.
 */
#define GUEST_WRITES (99 * MiB)
#define GUEST_ABSENT (16 * MiB)

/* However slow the machine is; what is over before is not waited for */
#define PATIENT_MS 60000

#define BALLOON "-device virtio-balloon,id=balloon0,free-page-hint=on"

static char *tmpfs;

/* ---- options ---- */

static bool get_capability(QTestState *who, const char *name)
{
    QDict *rsp = qtest_qmp(who, "{ 'execute': 'query-migrate-capabilities' }");
    QListEntry *entry;
    int found = -1;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
        QDict *cap = qobject_to(QDict, qlist_entry_obj(entry));

        if (g_str_equal(qdict_get_str(cap, "capability"), name)) {
            found = qdict_get_bool(cap, "state");
        }
    }
    qobject_unref(rsp);
    g_assert_cmpint(found, >=, 0);
    return found;
}

static void check_parameter(QTestState *who, const char *name, int64_t value)
{
    QDict *rsp = qtest_qmp_assert_success_ref(
        who, "{ 'execute': 'query-migrate-parameters' }");

    g_assert_cmpint(qdict_get_int(rsp, name), ==, value);
    qobject_unref(rsp);
}

static void test_options(void)
{
    static const char *const capabilities[] = { "free-page-hint",
                                                "skip-absent-pages" };
    QTestState *who = qtest_init("-machine none");
    QDict *rsp;
    unsigned i;

    for (i = 0; i < G_N_ELEMENTS(capabilities); i++) {
        g_assert_true(get_capability(who, capabilities[i]));
        migrate_set_capability(who, capabilities[i], false);
        g_assert_false(get_capability(who, capabilities[i]));
    }

    check_parameter(who, "free-page-hint-wait", 500);
    check_parameter(who, "free-page-hint-cache", 0);
    migrate_set_parameter_int(who, "free-page-hint-wait", 0);
    migrate_set_parameter_int(who, "free-page-hint-wait", 60000);
    migrate_set_parameter_int(who, "free-page-hint-cache", 5 * GiB);

    rsp = qtest_qmp_assert_failure_ref(
        who, "{ 'execute': 'migrate-set-parameters',"
        "  'arguments': { 'free-page-hint-wait': 60001 } }");
    qobject_unref(rsp);
    check_parameter(who, "free-page-hint-wait", 60000);

    qtest_quit(who);
}

static bool get_property(QTestState *who, const char *name)
{
    QDict *rsp = qtest_qmp(who, "{ 'execute': 'qom-get', 'arguments': {"
                           "  'path': '/machine/peripheral/balloon0',"
                           "  'property': %s } }", name);
    bool value = qdict_get_bool(rsp, "return");

    qobject_unref(rsp);
    return value;
}

/* A machine type is a promise: a QEMU that knows no arrays has it too. */
static void test_arrays_off(void)
{
    static const char *const opts[] = {
        BALLOON,
        /* Deprecated, and still accepted */
        "-object iothread,id=io0 " BALLOON ",iothread=io0",
    };
    unsigned i;

    for (i = 0; i < G_N_ELEMENTS(opts); i++) {
        MigrateStart args = { .opts_source = opts[i], .hide_stderr = true };
        QTestState *from, *to;

        if (migrate_start(&from, &to, "defer", &args)) {
            return;
        }
        g_assert_true(get_property(from, "free-page-hint"));
        g_assert_false(get_property(from, "free-page-hint-arrays"));
        g_assert_false(get_property(from, "free-page-hint-cache"));
        migrate_end(from, to, false);
    }
}

/* ---- why the guest is not asked ---- */

#ifdef CONFIG_LINUX
/* Returns NULL if there is no reason */
static const char *reason_of(const QDict *info, const char *member)
{
    return qdict_get_try_str(qdict_get_qdict(info, member), "reason");
}

/* In some containers, /proc/self/pagemap cannot be read */
static bool absent_denied(const QDict *info)
{
    return g_strcmp0(reason_of(info, "absent-pages"), "denied") == 0;
}

typedef struct Refusal {
    const char *reason;
    const char *opts;
    /* Hints are switched off, or not waited for */
    bool disabled;
    bool no_wait;
    bool stopped;
} Refusal;

static void test_refusal(const void *opaque)
{
    const Refusal *refusal = opaque;
    MigrateStart args = { .opts_source = refusal->opts };
    QTestState *from, *to;
    QDict *event, *data, *info, *hints;

    if (migrate_start(&from, &to, "defer", &args)) {
        return;
    }
    if (refusal->disabled) {
        migrate_set_capability(from, "free-page-hint", false);
    }
    migrate_set_parameter_int(from, "free-page-hint-wait",
                              refusal->no_wait ? 0 : PATIENT_MS);
    wait_for_serial("src_serial");
    if (refusal->stopped) {
        qtest_qmp_assert_success(from, "{ 'execute': 'stop' }");
    }

    migrate_ensure_converge(from);
    migrate_qmp(from, to, "exec:cat > /dev/null", NULL, "{}");
    event = qtest_qmp_eventwait_ref(from, "MIGRATION_FREE_PAGES");
    wait_for_migration_complete(from);

    data = qdict_get_qdict(event, "data");
    info = migrate_query(from);
    hints = qdict_get_qdict(info, "free-page-hint");
    g_assert_cmpstr(reason_of(data, "free-page-hint"), ==, refusal->reason);
    g_assert_cmpstr(reason_of(info, "free-page-hint"), ==, refusal->reason);
    g_assert_false(qdict_get_bool(hints, "complete"));
    g_assert_cmpint(qdict_get_int(hints, "messages"), ==, 0);
    g_assert_cmpint(qdict_get_int(hints, "skipped-bytes"), ==, 0);
    /* Both share the time to wait, and nothing else */
    if (refusal->no_wait) {
        g_assert_cmpstr(reason_of(info, "absent-pages"), ==, "no-wait");
    } else if (!absent_denied(info)) {
        g_assert_cmpstr(reason_of(info, "absent-pages"), ==, NULL);
    }

    qobject_unref(info);
    qobject_unref(event);
    migrate_end(from, to, false);
}

static const Refusal refusals[] = {
    { .reason = "disabled", .opts = BALLOON, .disabled = true },
    { .reason = "no-wait", .opts = BALLOON, .no_wait = true },
    { .reason = "vm-stopped", .opts = BALLOON, .stopped = true },
    { .reason = "no-device" },
    { .reason = "no-driver", .opts = BALLOON },
};

/* ---- an estimate ---- */

static void test_estimate(void)
{
    MigrateStart args = { .opts_source = BALLOON };
    QTestState *from, *to;
    QDict *info, *estimate;

    if (migrate_start(&from, &to, "defer", &args)) {
        return;
    }
    migrate_set_parameter_int(from, "free-page-hint-wait", PATIENT_MS);
    wait_for_serial("src_serial");
    qtest_qmp_assert_success(
        from, "{ 'execute': 'calc-free-page-estimate',"
        "  'arguments': { 'bandwidth': 1000000, 'cache': 1048576 } }");
    while (true) {
        info = qtest_qmp_assert_success_ref(
            from, "{ 'execute': 'query-free-page-estimate' }");
        if (g_str_equal(qdict_get_str(info, "status"), "measured")) {
            break;
        }
        qobject_unref(info);
        usleep(1000);
    }

    estimate = qdict_get_qdict(info, "estimate");
    g_assert_cmpstr(qdict_get_str(estimate, "reason"), ==, "no-driver");
    g_assert_cmpint(qdict_get_int(estimate, "free-bytes"), ==, 0);
    g_assert_false(qdict_haskey(estimate, "cache-bytes"));
    if (g_strcmp0(qdict_get_try_str(estimate, "absent-reason"), "denied")) {
        g_assert_cmpint(qdict_get_int(estimate, "absent-bytes"), >=,
                        GUEST_ABSENT);
    }
    g_assert_cmpint(qdict_get_int(estimate, "remaining-bytes"), >=,
                    GUEST_WRITES);
    g_assert_cmpint(qdict_get_int(estimate, "remaining-bytes"), ==,
                    qdict_get_int(estimate, "total-bytes") -
                    qdict_get_int(estimate, "absent-bytes"));
    g_assert_cmpint(qdict_get_int(estimate, "round-time"), ==,
                    qdict_get_int(estimate, "remaining-bytes") / 1000);

    qobject_unref(info);
    migrate_end(from, to, false);
}

/* ---- absent pages ---- */

/* Have the guest write to all that it writes to, before it is stopped. */
static void *hook_start_absent(QTestState *from, QTestState *to)
{
    migrate_set_parameter_int(from, "free-page-hint-wait", PATIENT_MS);
    wait_for_serial("src_serial");
    return NULL;
}

static void *hook_start_absent_off(QTestState *from, QTestState *to)
{
    migrate_set_capability(from, "skip-absent-pages", false);
    return hook_start_absent(from, to);
}

static void hook_end_absent(QTestState *from, QTestState *to, void *opaque)
{
    QDict *info = migrate_query(from);
    QDict *absent = qdict_get_qdict(info, "absent-pages");
    int64_t total = qdict_get_int(qdict_get_qdict(info, "ram"), "total");
    int64_t bytes = qdict_get_int(absent, "absent-bytes");

    if (absent_denied(info)) {
        g_test_skip("/proc/self/pagemap cannot be read");
    } else {
        g_assert_cmpstr(reason_of(info, "absent-pages"), ==, NULL);
        g_assert_cmpint(bytes, >=, GUEST_ABSENT);
        g_assert_cmpint(bytes, <=, total - GUEST_WRITES);
    }
    qobject_unref(info);
}

static void hook_end_absent_off(QTestState *from, QTestState *to, void *opaque)
{
    QDict *info = migrate_query(from);
    QDict *absent = qdict_get_qdict(info, "absent-pages");

    g_assert_cmpstr(reason_of(info, "absent-pages"), ==, "disabled");
    g_assert_cmpint(qdict_get_int(absent, "absent-bytes"), ==, 0);
    qobject_unref(info);
}

static void test_absent_common(const char *opts, bool off)
{
    g_autofree char *uri = g_strdup_printf("unix:%s/migsocket", tmpfs);
    MigrateCommon args = {
        .start = {
            .opts_source = opts,
            .opts_target = opts,
        },
        .listen_uri = uri,
        .connect_uri = uri,
        .start_hook = off ? hook_start_absent_off : hook_start_absent,
        .end_hook = off ? hook_end_absent_off : hook_end_absent,
    };

    test_precopy_common(&args);
}

static void test_absent(void)
{
    test_absent_common(NULL, false);
}

static void test_absent_off(void)
{
    test_absent_common(NULL, true);
}

static void test_absent_shared(void)
{
    test_absent_common("-object memory-backend-memfd,id=shared,size=150M,"
                       "share=on -machine memory-backend=shared", false);
}

static void test_absent_postcopy(void)
{
    MigrateCommon args = {
        .start_hook = hook_start_absent,
        .end_hook = hook_end_absent,
    };

    test_postcopy_common(&args);
}

#endif

static void migration_test_add_free_page_hint_smoke(MigrationTestEnv *env)
{
    migration_test_add("/migration/free-page-hint/options", test_options);
    migration_test_add("/migration/free-page-hint/arrays-off",
                       test_arrays_off);
#ifdef CONFIG_LINUX
    migration_test_add("/migration/absent-pages/private", test_absent);
#endif
}

void migration_test_add_free_page_hint(MigrationTestEnv *env)
{
    tmpfs = env->tmpfs;

    migration_test_add_free_page_hint_smoke(env);

    if (!env->full_set) {
        return;
    }

#ifdef CONFIG_LINUX
    for (unsigned i = 0; i < G_N_ELEMENTS(refusals); i++) {
        g_autofree char *path = g_strdup_printf(
            "/migration/free-page-hint/refused/%s", refusals[i].reason);

        qtest_add_data_func(path, &refusals[i], test_refusal);
    }
    migration_test_add("/migration/free-page-hint/estimate", test_estimate);
    migration_test_add("/migration/absent-pages/off", test_absent_off);
    if (env->is_x86) {
        migration_test_add("/migration/absent-pages/shared",
                           test_absent_shared);
    }
    if (env->has_uffd) {
        migration_test_add("/migration/absent-pages/postcopy",
                           test_absent_postcopy);
    }
#endif
}
