// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * allocloop: takes memory from the allocator and gives it back, and reports how long that takes.
 *
 *   allocloop SECONDS HOLD_MIB [INTERVAL_MS]
 *
 * Maps and touches small areas until it holds HOLD_MIB, unmaps them all and begins again. So it
 * needs pages that it did not have a moment ago, as a program that starts or grows does. An
 * operation is one area mapped and touched: a system call and 16 page faults; giving memory back is
 * not counted.
 *
 * Each INTERVAL_MS (100 if not given) it writes
 *   alloc ms=MS ops=N p50=NS p99=NS max=NS
 * with the milliseconds since the start by the guest's own clock, and how long operations took. At
 * the end it writes "alloc done ops=N".
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE_BYTES 4096u
#define AREA_PAGES 16u
#define AREA_BYTES (AREA_PAGES * PAGE_BYTES)
#define INTERVAL_MS 100u
/* Later operations of an interval are counted but not looked at. */
#define MAX_SAMPLES 100000u

static uint64_t samples[MAX_SAMPLES];

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * UINT64_C(1000000000) + ts.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void report(uint64_t since_start, size_t ops)
{
	size_t n = ops < MAX_SAMPLES ? ops : MAX_SAMPLES;

	qsort(samples, n, sizeof(*samples), compare);
	printf("alloc ms=%llu ops=%zu p50=%llu p99=%llu max=%llu\n",
	       (unsigned long long)(since_start / 1000000), ops,
	       (unsigned long long)samples[n / 2],
	       (unsigned long long)samples[n * 99 / 100],
	       (unsigned long long)samples[n - 1]);
	fflush(stdout);
}

static char *take_area(void)
{
	char *area = mmap(NULL, AREA_BYTES, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (area == MAP_FAILED) {
		perror("allocloop: mmap");
		exit(1);
	}
	/* Neighbouring areas are merged: without this, into huge pages. */
	madvise(area, AREA_BYTES, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < AREA_PAGES; i++)
		*(volatile char *)(area + i * PAGE_BYTES) = 1;
	return area;
}

int main(int argc, char **argv)
{
	bool counted = argc == 3 || argc == 4;
	unsigned long seconds = counted ? strtoul(argv[1], NULL, 10) : 0;
	size_t max_held = counted ? strtoul(argv[2], NULL, 10) * 16 : 0;
	uint64_t interval_ns = argc == 4 ? strtoul(argv[3], NULL, 10) : INTERVAL_MS;
	size_t held = 0, ops = 0, all_ops = 0;
	uint64_t start, interval;
	char **areas;

	if (!seconds || !max_held || !interval_ns) {
		fputs("usage: allocloop SECONDS HOLD_MIB [INTERVAL_MS]\n", stderr);
		return 2;
	}
	interval_ns *= 1000000;
	areas = calloc(max_held, sizeof(*areas));
	if (!areas) {
		perror("allocloop: calloc");
		return 1;
	}

	start = interval = now();
	while (interval - start < seconds * UINT64_C(1000000000)) {
		uint64_t before = now(), after;

		areas[held++] = take_area();
		after = now();
		if (ops < MAX_SAMPLES)
			samples[ops] = after - before;
		ops++;
		if (held == max_held)
			while (held)
				munmap(areas[--held], AREA_BYTES);
		if (after - interval >= interval_ns) {
			report(after - start, ops);
			all_ops += ops;
			ops = 0;
			interval = after;
		}
	}
	printf("alloc done ops=%zu\n", all_ops);
	return 0;
}
