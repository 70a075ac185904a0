// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * dirtyfree: leave memory that is free but not zero.
 *
 *   dirtyfree MIB [PROCESSES]
 *
 * Writes MIB of anonymous memory with bytes other than zero, shared out over
 * PROCESSES (default 1) that all hold their part until each has written it, and
 * exits: the guest's free lists then hold blocks full of data that matters to
 * nobody, which is what a migration without hints has to send.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (1024ul * 1024ul)

static int fail(const char *what)
{
	perror(what);
	return 1;
}

/* Write one part, report it, and keep it until the parent closes the pipe. */
static int write_part(size_t bytes, int done, int hold)
{
	unsigned char *mem;
	char byte;

	mem = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		return fail("dirtyfree: mmap");
	memset(mem, 0xa5, bytes);
	if (write(done, "d", 1) != 1)
		return fail("dirtyfree: write");
	return read(hold, &byte, 1) ? fail("dirtyfree: read") : 0;
}

int main(int argc, char **argv)
{
	size_t mib = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
	int processes = argc > 2 ? atoi(argv[2]) : 1;
	int done[2], hold[2], status, failed = 0;
	char byte;

	if (!mib || processes < 1) {
		fputs("usage: dirtyfree MIB [PROCESSES]\n", stderr);
		return 2;
	}
	if (pipe(done) || pipe(hold))
		return fail("dirtyfree: pipe");

	for (int i = 0; i < processes; i++) {
		/* The first parts take what does not divide evenly. */
		size_t part = mib / processes + (i < (int)(mib % processes));
		pid_t pid = fork();

		if (pid < 0)
			return fail("dirtyfree: fork");
		if (!pid) {
			close(done[0]);
			close(hold[1]);
			_exit(write_part(part * MIB, done[1], hold[0]));
		}
	}

	/* A writer that dies closes its end: the reads then see the end. */
	close(done[1]);
	for (int i = 0; i < processes; i++) {
		if (read(done[0], &byte, 1) != 1)
			failed = 1;
	}
	close(hold[1]);
	while (wait(&status) > 0) {
		if (!WIFEXITED(status) || WEXITSTATUS(status))
			failed = 1;
	}
	if (failed) {
		fprintf(stderr, "dirtyfree: a writer died: is less than %zu MiB free?\n", mib);
		return 1;
	}
	printf("wrote and freed %zu MiB\n", mib);
	return 0;
}
