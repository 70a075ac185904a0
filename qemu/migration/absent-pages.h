/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Absent pages: memory that the host never populated is not sent
 *
 * See docs/devel/migration/absent-pages.rst.
 */

#ifndef QEMU_MIGRATION_ABSENT_PAGES_H
#define QEMU_MIGRATION_ABSENT_PAGES_H

#include "qapi/qapi-types-migration.h"

/* ---- for migration.c ---- */

/*
 * Forget the previous migration's absent pages.  Called with the BQL when a new
 * migration is set up.
 */
void absent_pages_reset(void);

/* What query-migrate reports; to be freed by the caller.  Any thread. */
AbsentPagesInfo *absent_pages_query(void);

/* ---- for migration-hmp-cmds.c ---- */

/* Print @info for "info migrate". */
void hmp_info_absent_pages(Monitor *mon, const AbsentPagesInfo *info);

#endif
