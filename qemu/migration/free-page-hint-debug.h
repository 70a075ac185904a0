/*
 * Free page hints: what builds with FREE_PAGE_HINT_DEBUG check
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_MIGRATION_FREE_PAGE_HINT_DEBUG_H
#define QEMU_MIGRATION_FREE_PAGE_HINT_DEBUG_H

#include "migration/free-page-hint-compat.h"

/*
 * For tests only: --extra-cflags=-DFREE_PAGE_HINT_DEBUG=1.  It reads all RAM
 * before the guest is asked.
 */
#ifndef FREE_PAGE_HINT_DEBUG
#define FREE_PAGE_HINT_DEBUG 0
#endif

/*
 * The counter of dirty pages changes together with the bits, or the migration
 * ends too early or never: if it is traced or this is a debug build, count the
 * bits too.  Called with the BQL, so that no RAMBlock grows, and under
 * bitmap_mutex, in an RCU critical section.
 */
void free_page_hint_debug_counter(void);

/* What is absent was found, and the guest was not asked yet. */
void free_page_hint_debug_scanned(void);

/*
 * The guest has stopped, and the dirty log was merged: abort if a page that is
 * still hinted was written since free_page_hint_debug_scanned().  Called with
 * the BQL and under bitmap_mutex, in an RCU critical section.
 */
void free_page_hint_debug_stopped(void);

/*
 * Trace the pages that are hinted still, at the end of a migration.  Called in
 * an RCU critical section.
 */
void free_page_hint_debug_kept(void);

/* Free what free_page_hint_debug_scanned() has made. */
void free_page_hint_debug_cleanup(void);

#endif
