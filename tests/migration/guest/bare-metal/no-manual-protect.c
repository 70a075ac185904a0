// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library to preload: hides from QEMU that KVM can leave the clearing of its dirty log to the
 * user (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), as old kernels do. There is no option for that.
 */
#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

int ioctl(int fd, unsigned long request, ...)
{
	va_list args;
	void *arg;

	va_start(args, request);
	arg = va_arg(args, void *);
	va_end(args);
	if (request == KVM_CHECK_EXTENSION &&
	    (long)arg == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
		return 0;
	return syscall(SYS_ioctl, fd, request, arg);
}
