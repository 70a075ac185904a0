/*
 * What differs between the trees that free page hints are made for
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_FREE_PAGE_HINT_COMPAT_H
#define MIGRATION_FREE_PAGE_HINT_COMPAT_H

#define FREE_PAGE_HINT_TREE_HAS(header) __has_include(header)

/* 10.1 moved these */
#if FREE_PAGE_HINT_TREE_HAS("system/ramblock.h")
#include "system/address-spaces.h"
#include "system/memory.h"
#include "system/ramblock.h"
#else
#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#endif

#endif
