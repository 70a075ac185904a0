// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library to preload: what is given back (MADV_DONTNEED) is freed when there is need (MADV_FREE),
 * as other implementations of balloons do.
 */
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int madvise(void *addr, size_t length, int advice)
{
	if (advice == MADV_DONTNEED)
		advice = MADV_FREE;
	return syscall(SYS_madvise, addr, length, advice);
}
