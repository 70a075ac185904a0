// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library to preload: a KVM that takes its time to clear a part of its dirty log, as it does where
 * the guest has written to most of a large memory.
 */
#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* 64 MiB */
#define LARGE_PAGES 16384

int ioctl(int fd, unsigned long request, ...)
{
	/* Many times what a test needs to notice that it began. */
	struct timespec pause = { .tv_sec = 1 };
	const struct kvm_clear_dirty_log *clear;
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	/* Not of video memory, which is cleared all the time. */
	clear = arg;
	if (request == KVM_CLEAR_DIRTY_LOG && clear->num_pages >= LARGE_PAGES)
		nanosleep(&pause, NULL);
	return syscall(SYS_ioctl, fd, request, arg);
}
