// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * failnth: writes a text to a file, and lets each allocation on the way fail once.
 *
 *   failnth TEXT FILE UNDO
 *
 * In the n-th round the kernel (CONFIG_FAULT_INJECTION) fails the n-th allocation that the write
 * makes. Where the write succeeds all the same, TEXT is written to UNDO. Ends when there were fewer
 * than n allocations, with FILE written and not undone, and prints
 *   failed=N survived=N
 * that is, how often the write failed, and how often it did not in spite of a failure.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* More allocations than any write makes. */
#define LIMIT 20000

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static int open_or_die(const char *path, int flags)
{
	int fd = open(path, flags);

	if (fd < 0)
		die(path);
	return fd;
}

int main(int argc, char **argv)
{
	unsigned int n, failed = 0, survived = 0;
	int nth, file, undo;
	size_t len;

	if (argc != 4) {
		fputs("usage: failnth TEXT FILE UNDO\n", stderr);
		return 2;
	}
	len = strlen(argv[1]);
	nth = open_or_die("/proc/self/fail-nth", O_RDWR);
	file = open_or_die(argv[2], O_WRONLY);
	undo = open_or_die(argv[3], O_WRONLY);

	for (n = 1; n < LIMIT; n++) {
		char text[16];
		int size = snprintf(text, sizeof(text), "%u", n);
		ssize_t wrote, left;

		if (pwrite(nth, text, size, 0) != size)
			die("fail-nth");
		wrote = pwrite(file, argv[1], len, 0);
		/* What is left of the count: 0 once it has struck. */
		memset(text, 0, sizeof(text));
		left = pread(nth, text, sizeof(text) - 1, 0);
		if (pwrite(nth, "0", 1, 0) != 1 || left <= 0)
			die("fail-nth");

		if (atoi(text)) {
			if (wrote != (ssize_t)len) {
				fputs("the write fails without a failure\n", stderr);
				return 1;
			}
			printf("failed=%u survived=%u\n", failed, survived);
			return 0;
		}
		if (wrote != (ssize_t)len) {
			failed++;
			continue;
		}
		survived++;
		if (pwrite(undo, argv[1], len, 0) != (ssize_t)len)
			die(argv[3]);
	}
	fputs("no end of failures\n", stderr);
	return 1;
}
