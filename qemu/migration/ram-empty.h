/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * RAM is empty before the first page of an incoming migration is loaded
 */
#ifndef QEMU_MIGRATION_RAM_EMPTY_H
#define QEMU_MIGRATION_RAM_EMPTY_H

#include "migration/free-page-hint-compat.h"

/*
 * Make all RAM that is about to be loaded read as zero.
 *
 * To be called once for each migration stream, before anything of RAM is
 * loaded. Does nothing unless QEMU waits for an incoming migration: a snapshot
 * that is loaded into a machine has all pages.
 *
 * Returns: true on success, else false setting @errp with error.
 */
bool ram_make_empty(Error **errp);

/*
 * Does an incoming migration leave @rb as it is, whatever is in it?
 *
 * Called with the BQL.
 */
bool ram_stays_as_it_is(RAMBlock *rb);

#endif
