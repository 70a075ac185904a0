/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Free page hints: the event that reports what came of round 0
 *
 * query-migrate has the same figures as long as QEMU runs, which after a
 * migration is not for long.
 */

#include "qemu/osdep.h"
#include "qapi/qapi-events-migration.h"
#include "qapi/qapi-types-migration.h"
#include "absent-pages.h"
#include "free-page-event.h"
#include "free-page-hint.h"
#include "options.h"

void free_page_event(void)
{
    g_autoptr(FreePageHintInfo) hints = free_page_hint_query();
    g_autoptr(AbsentPagesInfo) absent = absent_pages_query();

    if (migrate_events()) {
        qapi_event_send_migration_free_pages(hints, absent);
    }
}
