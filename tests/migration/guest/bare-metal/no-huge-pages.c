// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library to preload: QEMU gets no transparent huge pages, as on a host without them or one that
 * has none left. There is no option for that.
 */
#include <stdio.h>
#include <sys/prctl.h>

__attribute__((constructor)) static void no_huge_pages(void)
{
	if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))
		perror("no-huge-pages");
}
