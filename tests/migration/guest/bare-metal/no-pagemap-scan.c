// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library to preload: the kernel has no PAGEMAP_SCAN, as before Linux 6.7.
 */
#include <errno.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The type and the number; what is between them is the size. */
#define PAGEMAP_SCAN (('f' << 8) | 16)

int ioctl(int fd, unsigned long request, ...)
{
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	if ((request & 0xffff) == PAGEMAP_SCAN) {
		errno = ENOTTY;
		return -1;
	}
	return syscall(SYS_ioctl, fd, request, arg);
}
