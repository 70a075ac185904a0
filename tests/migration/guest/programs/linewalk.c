// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * linewalk: what it takes at least to follow a list through memory that is laid out like struct
 * pages of free blocks.
 *
 *   linewalk LINES STRIDE REPEAT
 *
 * Each STRIDE bytes a pointer leads to the next; they are followed from the first to the last. Huge
 * pages map them, as they map the kernel's struct pages, and before each time the CPU is made to
 * forget its translations, which it does not have either when the kernel begins to walk. The caches may
 * have the pointers, and nothing is done but follow them: a walk of free lists cannot be faster.
 *
 * Writes "linewalk ns=NS": nanoseconds per pointer, the least of REPEAT times.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define HUGE_BYTES (2u << 20)

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	size_t lines = argc == 4 ? strtoul(argv[1], NULL, 10) : 0;
	size_t stride = argc == 4 ? strtoul(argv[2], NULL, 10) : 0;
	int repeat = argc == 4 ? atoi(argv[3]) : 0;
	uint64_t least = UINT64_MAX;
	void *line;
	size_t bytes;
	char *memory;

	if (!lines || stride < sizeof(void *) || stride % sizeof(void *) || repeat < 1) {
		fputs("usage: linewalk LINES STRIDE REPEAT\n", stderr);
		return 2;
	}
	bytes = lines * stride;
	memory = mmap(NULL, bytes + HUGE_BYTES, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fail("linewalk: mmap");
	memory += -(uintptr_t)memory % HUGE_BYTES;
	if (madvise(memory, bytes, MADV_HUGEPAGE))
		fail("linewalk: madvise");
	for (size_t i = 0; i < lines; i++)
		*(void **)(memory + i * stride) = i + 1 < lines ? memory + (i + 1) * stride : NULL;

	while (repeat--) {
		uint64_t begin, took;

		if (mprotect(memory, bytes, PROT_READ) ||
		    mprotect(memory, bytes, PROT_READ | PROT_WRITE))
			fail("linewalk: mprotect");
		begin = now();
		for (line = memory; line; line = *(void *volatile *)line)
			;
		took = now() - begin;
		if (took < least)
			least = took;
	}
	printf("linewalk ns=%.2f\n", (double)least / lines);
	return 0;
}
