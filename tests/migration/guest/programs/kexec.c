// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * kexec: goes over to another kernel, as a crash-free reboot does.
 *
 *   kexec KERNEL INITRD COMMAND-LINE
 *
 * Does not stop anything that runs: whatever the devices are doing, they do it while the new kernel
 * starts. Both files must be regular ones.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	int kernel, initrd;

	if (argc != 4) {
		fputs("usage: kexec KERNEL INITRD COMMAND-LINE\n", stderr);
		return 2;
	}
	kernel = open(argv[1], O_RDONLY);
	if (kernel < 0)
		return fail(argv[1]);
	initrd = open(argv[2], O_RDONLY);
	if (initrd < 0)
		return fail(argv[2]);
	if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(argv[3]) + 1, argv[3], 0))
		return fail("kexec_file_load");
	reboot(RB_KEXEC);
	return fail("reboot");
}
