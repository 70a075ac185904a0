// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * memstamp: memory of a guest that knows whether it survived a live migration.
 *
 *   memstamp start [--churn] [--realloc MIB] [--name NAME] MIB
 *   memstamp start --alternate [--name NAME] MIB
 *   memstamp verify [--name NAME]
 *   memstamp stop   [--name NAME]
 *
 * `start` fills MIB of anonymous memory, as stamp.h says, and goes to the
 * background once every page is written. A page that is new must be clear.
 *
 * With --churn, the server checks and rewrites all pages over and over; with
 * --realloc (which implies it) it also maps, writes, checks and unmaps up to
 * that many MiB in turn, so that free blocks of the allocator are taken back,
 * written and freed again while a migration runs.
 *
 * With --alternate, it gives back all pages that have odd numbers in the guest's
 * physical memory, and keeps the others: what is free cannot be joined to more
 * than one page. Needs /proc/self/pagemap, as root.
 *
 * The generation that a page must have follows from the number of the pass and
 * the position in it; there is no table that could be lost with the page.
 *
 * `verify` makes the server check everything that it holds and prints
 *   verified=PAGES errors=N checked=PAGES passes=N reallocs=CHUNKS first=TEXT
 * where checked, errors and reallocs (chunks taken from the allocator) count
 * since the start. It exits with 0 if there
 * were no errors.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "stamp.h"

/* Pages that are rewritten between two looks at the control socket. */
#define STEP_PAGES 256u

/* An entry of /proc/self/pagemap: the number of the page, if there is one. */
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_NUMBER ((UINT64_C(1) << 55) - 1)

struct area {
	u64 *base;
	size_t pages;
	u64 first_index;	/* index of the first page, unique in a process */
};

struct server {
	struct area main;
	bool *given_back;	/* of its pages, or NULL */
	bool churn;
	u64 pass;		/* generation of the pages before the cursor */
	size_t cursor;		/* the others have generation pass - 1 */
	struct area *chunks;	/* generation of chunk i is chunk_generation */
	size_t max_chunks;
	size_t chunks_held;
	size_t chunks_goal;
	u64 chunk_generation;
	struct stamp_counts counts;
};

static void die(const char *what)
{
	fprintf(stderr, "memstamp: %s: %s\n", what, strerror(errno));
	exit(2);
}

static void check_page(struct server *s, const struct area *area, size_t i,
		       u64 generation)
{
	stamp_check(&s->counts, area->base + i * STAMP_PAGE_WORDS,
		    area->first_index + i, generation);
}

/* A new page must read as zero. */
static void check_clear(struct server *s, const struct area *area, size_t i)
{
	/* Volatile: its first write, not a look at it, makes the page. */
	volatile u64 *page = area->base + i * STAMP_PAGE_WORDS;
	u64 found = 0;

	page[STAMP_WORD_MAGIC] = STAMP_MAGIC;
	for (size_t word = STAMP_WORD_MAGIC + 1; word < STAMP_PAGE_WORDS; word++)
		found |= page[word];
	if (found && !s->counts.errors++)
		snprintf(s->counts.first_error, sizeof(s->counts.first_error),
			 "page %llu is new and not clear",
			 area->first_index + i);
}

static void fill_area(struct server *s, const struct area *area,
		      u64 generation)
{
	for (size_t i = 0; i < area->pages; i++) {
		check_clear(s, area, i);
		stamp_write(area->base + i * STAMP_PAGE_WORDS,
			    area->first_index + i, generation);
	}
}

static void check_area(struct server *s, const struct area *area,
		       u64 generation)
{
	for (size_t i = 0; i < area->pages; i++)
		check_page(s, area, i, generation);
}

static void map_area(struct area *area, size_t pages, u64 first_index)
{
	area->base = mmap(NULL, pages * STAMP_PAGE_BYTES, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area->base == MAP_FAILED)
		die("mmap");
	area->pages = pages;
	area->first_index = first_index;
}

/* Give back the pages that have odd numbers in physical memory. */
static void give_odd_pages_back(struct server *s)
{
	const struct area *area = &s->main;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	s->given_back = calloc(area->pages, sizeof(*s->given_back));
	if (fd < 0 || !s->given_back)
		die("pagemap");
	for (size_t i = 0; i < area->pages; i++) {
		char *page = (char *)area->base + i * STAMP_PAGE_BYTES;
		u64 entry;
		off_t at = (uintptr_t)page / STAMP_PAGE_BYTES * sizeof(entry);

		if (pread(fd, &entry, sizeof(entry), at) != sizeof(entry) ||
		    !(entry & PAGEMAP_PRESENT) || !(entry & PAGEMAP_NUMBER))
			die("pagemap");
		s->given_back[i] = entry & 1;
		if (s->given_back[i] && madvise(page, STAMP_PAGE_BYTES, MADV_DONTNEED))
			die("madvise");
	}
	close(fd);
}

static void unmap_area(struct area *area)
{
	if (munmap(area->base, area->pages * STAMP_PAGE_BYTES))
		die("munmap");
}

/* Generation that page i of the main area must have now. */
static u64 main_generation(const struct server *s, size_t i)
{
	return i < s->cursor ? s->pass : s->pass - 1;
}

static void rewrite_step(struct server *s)
{
	for (size_t n = 0; n < STEP_PAGES; n++) {
		size_t i = s->cursor;

		check_page(s, &s->main, i, s->pass - 1);
		stamp_write(s->main.base + i * STAMP_PAGE_WORDS,
			    s->main.first_index + i, s->pass);
		if (++s->cursor == s->main.pages) {
			s->cursor = 0;
			s->pass++;
			break;
		}
	}
}

/*
 * Take one chunk from the allocator, or, once the goal of this cycle is
 * reached, check and give back all. Goals differ from cycle to cycle so that
 * each cycle takes other blocks from the free lists.
 */
static void realloc_step(struct server *s)
{
	struct area *chunk;

	if (s->chunks_held < s->chunks_goal) {
		chunk = &s->chunks[s->chunks_held];
		map_area(chunk, STAMP_CHUNK_PAGES,
			 s->main.pages + s->chunks_held * STAMP_CHUNK_PAGES);
		fill_area(s, chunk, s->chunk_generation);
		s->chunks_held++;
		s->counts.reallocs++;
		return;
	}

	while (s->chunks_held) {
		chunk = &s->chunks[--s->chunks_held];
		check_area(s, chunk, s->chunk_generation);
		unmap_area(chunk);
	}
	s->chunk_generation++;
	s->chunks_goal = stamp_chunks_goal(s->chunk_generation, s->max_chunks);
}

static u64 verify_all(struct server *s)
{
	u64 before = s->counts.checked;

	for (size_t i = 0; i < s->main.pages; i++)
		if (!s->given_back || !s->given_back[i])
			check_page(s, &s->main, i, main_generation(s, i));
	for (size_t i = 0; i < s->chunks_held; i++)
		check_area(s, &s->chunks[i], s->chunk_generation);
	return s->counts.checked - before;
}

static socklen_t control_address(struct sockaddr_un *addr, const char *name)
{
	int len;

	memset(addr, 0, sizeof(*addr));
	addr->sun_family = AF_UNIX;
	/* A leading zero byte: the abstract name space needs no directory. */
	len = snprintf(addr->sun_path + 1, sizeof(addr->sun_path) - 1,
		       "memstamp-%s", name);
	return offsetof(struct sockaddr_un, sun_path) + 1 + len;
}

static int control_listen(const char *name)
{
	struct sockaddr_un addr;
	socklen_t len = control_address(&addr, name);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	if (bind(fd, (struct sockaddr *)&addr, len) || listen(fd, 4))
		die("cannot listen: is a memstamp of this name running?");
	return fd;
}

/* Serve one client. Returns false when the server was told to stop. */
static bool serve(struct server *s, int listener)
{
	char request[16] = "", reply[400];
	int fd = accept(listener, NULL, NULL);
	u64 verified;
	int len;

	if (fd < 0)
		return true;
	if (recv(fd, request, sizeof(request) - 1, 0) <= 0) {
		close(fd);
		return true;
	}

	verified = verify_all(s);
	len = snprintf(reply, sizeof(reply), STAMP_ANSWER, verified,
		       s->counts.errors, s->counts.checked, s->pass - 2,
		       s->counts.reallocs,
		       s->counts.errors ? s->counts.first_error : "none");
	/* A client that went away costs nothing: SIGPIPE is ignored. */
	if (send(fd, reply, len, 0) < 0)
		perror("memstamp: send");
	close(fd);
	return strcmp(request, "stop") != 0;
}

static void run_server(struct server *s, int listener)
{
	struct pollfd poller = { .fd = listener, .events = POLLIN };

	for (;;) {
		int ready = poll(&poller, 1, s->churn ? 0 : -1);

		if (ready < 0 && errno != EINTR)
			die("poll");
		if (ready > 0 && !serve(s, listener))
			return;
		if (s->churn)
			rewrite_step(s);
		if (s->max_chunks)
			realloc_step(s);
	}
}

static int start(const struct stamp_options *options)
{
	struct server s = {
		.churn = options->churn,
		.pass = 2,
		.max_chunks = options->realloc_mib / STAMP_CHUNK_MIB,
		.chunk_generation = 1,
	};
	int listener = control_listen(options->name);
	pid_t pid;
	int ready[2];
	char byte;

	if (pipe(ready))
		die("pipe");
	pid = fork();
	if (pid < 0)
		die("fork");
	if (pid) {
		/* Return when the memory is stamped, not earlier. */
		close(ready[1]);
		if (read(ready[0], &byte, 1) == 1)
			return 0;
		fprintf(stderr, "memstamp: the server died while it stamped %llu MiB\n",
			options->mib);
		return 2;
	}

	setsid();
	signal(SIGPIPE, SIG_IGN);
	if (s.max_chunks) {
		s.chunks = calloc(s.max_chunks, sizeof(*s.chunks));
		if (!s.chunks)
			die("calloc");
		s.chunks_goal = s.max_chunks;
	}
	map_area(&s.main, options->mib * STAMP_PAGES_PER_MIB, 0);
	/* Else a huge page keeps what is given back of it. */
	if (options->alternate &&
	    madvise(s.main.base, s.main.pages * STAMP_PAGE_BYTES,
		    MADV_NOHUGEPAGE))
		die("madvise");
	fill_area(&s, &s.main, s.pass - 1);
	if (options->alternate)
		give_odd_pages_back(&s);
	if (write(ready[1], "r", 1) != 1)
		die("write");
	close(ready[0]);
	close(ready[1]);
	run_server(&s, listener);
	return 0;
}

static int ask(const char *request, const char *name)
{
	struct sockaddr_un addr;
	socklen_t len = control_address(&addr, name);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	char reply[400];
	ssize_t got;

	if (fd < 0)
		die("socket");
	if (connect(fd, (struct sockaddr *)&addr, len))
		die("cannot connect: is memstamp running?");
	if (send(fd, request, strlen(request), 0) < 0)
		die("send");
	got = recv(fd, reply, sizeof(reply) - 1, 0);
	if (got <= 0)
		die("no answer");
	reply[got] = 0;
	fputs(reply, stdout);
	return strstr(reply, " errors=0 ") ? 0 : 1;
}

static int usage(void)
{
	fputs("usage: memstamp start [--churn] [--realloc MIB] [--name NAME] MIB\n"
	      "       memstamp start --alternate [--name NAME] MIB\n"
	      "       memstamp verify|stop [--name NAME]\n", stderr);
	return 2;
}

int main(int argc, char **argv)
{
	struct stamp_options options;

	if (argc < 2 || !stamp_parse(&options, argc - 2, argv + 2) ||
	    options.take_mib)
		return usage();
	/* Churning writes to all pages. */
	if (options.alternate && options.churn)
		return usage();
	if (!strcmp(argv[1], "start") && options.mib)
		return start(&options);
	if (!strcmp(argv[1], "verify") || !strcmp(argv[1], "stop"))
		return ask(argv[1], options.name);
	return usage();
}
