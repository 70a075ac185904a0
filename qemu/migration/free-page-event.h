/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Free page hints: the event that reports what came of round 0
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_EVENT_H
#define QEMU_MIGRATION_FREE_PAGE_EVENT_H

/* Round 0 has ended, or there was none.  Migration thread, without locks. */
void free_page_event(void);

#endif
