/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Absent pages: memory that the host never populated is not sent
 *
 * See docs/devel/migration/absent-pages.rst.
 */

#ifndef QEMU_MIGRATION_ABSENT_PAGES_H
#define QEMU_MIGRATION_ABSENT_PAGES_H

#include "qapi/qapi-types-migration.h"
#include "migration/free-page-hint-provider.h"

/* ---- for migration.c ---- */

/*
 * Forget the previous migration's absent pages.  Called with the BQL when a new
 * migration is set up.
 */
void absent_pages_reset(void);

/* What query-migrate reports; to be freed by the caller.  Any thread. */
AbsentPagesInfo *absent_pages_query(void);

/* ---- a look, within a migration or not ---- */

/* Runs that are found in one go, at most */
#define ABSENT_PAGES_LOOK_RUNS 1024

/* All was looked at */
#define ABSENT_PAGES_LOOK_OVER (-1)
/* The host does not tell */
#define ABSENT_PAGES_LOOK_DENIED (-2)

typedef struct AbsentPagesLook AbsentPagesLook;

/*
 * Prepare to look at all RAM that a migration would send.  Called with the BQL.
 *
 * Returns NULL if there is nothing to look at, with the reason; else @reason is
 * FREE_PAGE_HINT_REASON__MAX.
 */
AbsentPagesLook *absent_pages_look(FreePageHintReason *reason);

/*
 * Find some absent pages, with some milliseconds of work at most; populates
 * nothing.  Any thread that knows RCU, without locks.
 *
 * Returns how many of @runs were filled, 0 if none were found so far, or
 * ABSENT_PAGES_LOOK_*.
 */
int absent_pages_look_next(AbsentPagesLook *look, FreePageHintRun *runs);

void absent_pages_look_end(AbsentPagesLook *look);

/* ---- for migration-hmp-cmds.c ---- */

/* Print @info for "info migrate". */
void hmp_info_absent_pages(Monitor *mon, const AbsentPagesInfo *info);

#endif
