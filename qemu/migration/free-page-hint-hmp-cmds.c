/*
 * Free page hints: what "info migrate" shows
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "monitor/monitor.h"
#include "free-page-hint.h"

void hmp_info_free_page_hint(Monitor *mon, const FreePageHintInfo *info)
{
    /* Most guests have nothing to do with hints */
    if (info->has_reason &&
        (info->reason == FREE_PAGE_HINT_REASON_NO_DEVICE ||
         info->reason == FREE_PAGE_HINT_REASON_DISABLED)) {
        return;
    }
    monitor_printf(mon, "free page hints: %s%s%s%s\n",
                   FreePageHintState_str(info->state),
                   info->has_reason ? " (" : "",
                   info->has_reason ? FreePageHintReason_str(info->reason) : "",
                   info->has_reason ? ")" : "");
    if (info->state == FREE_PAGE_HINT_STATE_IDLE) {
        return;
    }
    monitor_printf(mon, "free page hints reported: %" PRIu64 " blocks in %"
                   PRIu64 " messages, %s\n", info->blocks, info->messages,
                   info->complete ? "complete" : "incomplete");
    monitor_printf(mon, "free pages hinted: %" PRIu64 " kbytes\n",
                   info->hinted_bytes >> 10);
    monitor_printf(mon, "free pages skipped: %" PRIu64 " kbytes\n",
                   info->skipped_bytes >> 10);
    monitor_printf(mon, "free pages dirtied again: %" PRIu64 " kbytes\n",
                   info->redirtied_bytes >> 10);
    monitor_printf(mon, "free pages requested in postcopy: %" PRIu64
                   " kbytes\n", info->requested_bytes >> 10);
    monitor_printf(mon, "free page hints dropped: %" PRIu64 " kbytes stale, %"
                   PRIu64 " kbytes too small, %" PRIu64 " kbytes invalid, %"
                   PRIu64 " invalid messages\n", info->stale_bytes >> 10,
                   info->too_small_bytes >> 10, info->invalid_bytes >> 10,
                   info->invalid_messages);
    if (info->cache_freed_bytes) {
        monitor_printf(mon, "page cache freed by the guest: %" PRIu64
                       " kbytes in %" PRIu64 " us\n",
                       info->cache_freed_bytes >> 10, info->cache_time);
    }
    monitor_printf(mon, "free page hint times: arm %" PRIu64 " us (%" PRIu64
                   " kbytes), first %" PRIu64 " us, end %" PRIu64 " us\n",
                   info->arm_time, info->armed_bytes >> 10,
                   info->ask_to_first, info->ask_to_end);
}
