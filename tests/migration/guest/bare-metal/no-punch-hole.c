// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A library to preload: hides from QEMU that files can have holes punched into them, as some file
 * systems cannot.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	if (mode & FALLOC_FL_PUNCH_HOLE) {
		errno = EOPNOTSUPP;
		return -1;
	}
	return syscall(SYS_fallocate, fd, mode, offset, length);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	return fallocate64(fd, mode, offset, length);
}
