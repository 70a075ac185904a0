// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * filepages: what the page cache has of a file, and a hold on it.
 *
 *   filepages resident FILE
 *   filepages hold FILE
 *   filepages lock FILE
 *   filepages fill FILE
 *
 * `resident` prints how many of the file's pages are in the page cache. `hold`
 * maps the file, reads each page, and keeps the mapping in the background until
 * the guest ends; `lock` locks it in memory besides. Both return when the pages
 * are there. `fill` writes to each page by a mapping, which is the only way where
 * the file is one of huge pages.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE_BYTES 4096ul

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void print_resident(void *map, size_t pages)
{
	unsigned char *there = malloc(pages);
	size_t resident = 0;

	if (!there || mincore(map, pages * PAGE_BYTES, there))
		die("filepages: mincore");
	for (size_t i = 0; i < pages; i++)
		resident += there[i] & 1;
	printf("resident=%zu pages=%zu\n", resident, pages);
}

static void keep(const volatile char *map, size_t pages, int lock)
{
	int ready[2];
	char byte;

	if (pipe(ready))
		die("filepages: pipe");
	switch (fork()) {
	case -1:
		die("filepages: fork");
		break;
	case 0:
		setsid();
		if (lock && mlock((void *)map, pages * PAGE_BYTES))
			die("filepages: mlock");
		for (size_t i = 0; i < pages; i++)
			(void)map[i * PAGE_BYTES];
		if (write(ready[1], "r", 1) != 1)
			die("filepages: write");
		for (;;)
			pause();
	default:
		close(ready[1]);
		if (read(ready[0], &byte, 1) != 1)
			exit(2);
	}
}

static void fill(volatile unsigned long *map, size_t pages)
{
	for (size_t i = 0; i < pages; i++)
		map[i * PAGE_BYTES / sizeof(*map)] = i * 0x9e3779b97f4a7c15ul + 1;
}

int main(int argc, char **argv)
{
	struct stat st;
	size_t pages;
	int fd, writable;
	void *map;

	if (argc != 3 || (strcmp(argv[1], "resident") && strcmp(argv[1], "hold") &&
			  strcmp(argv[1], "lock") && strcmp(argv[1], "fill"))) {
		fputs("usage: filepages resident|hold|lock|fill FILE\n", stderr);
		return 2;
	}
	writable = !strcmp(argv[1], "fill");

	fd = open(argv[2], (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st))
		die(argv[2]);
	pages = (st.st_size + PAGE_BYTES - 1) / PAGE_BYTES;
	map = mmap(NULL, pages * PAGE_BYTES,
		   PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		die("filepages: mmap");

	if (!strcmp(argv[1], "resident"))
		print_resident(map, pages);
	else if (writable)
		fill(map, pages);
	else
		keep(map, pages, !strcmp(argv[1], "lock"));
	return 0;
}
