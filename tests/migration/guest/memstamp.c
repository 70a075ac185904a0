// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * memstamp: memory of a guest that knows whether it survived a live migration.
 *
 *   memstamp start [--churn] [--realloc MIB] [--name NAME] MIB
 *   memstamp start --alternate [--name NAME] MIB
 *   memstamp verify [--name NAME]
 *   memstamp stop   [--name NAME]
 *
 * `start` fills MIB of anonymous memory and goes to the background once every
 * page is written. Each 4 KiB page carries a magic number, its index, the
 * generation of its contents and words made from those, so that a page that
 * is lost (zero), old (an earlier generation), swapped with another one or
 * torn is told apart from the right one. A page that is new must be clear.
 *
 * With --churn, the server checks and rewrites all pages over and over; with
 * --realloc (which implies it) it also maps, writes, checks and unmaps up to that many MiB in
 * turn, so that free blocks of the allocator are taken back, written and freed
 * again while a migration runs.
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
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / sizeof(uint64_t))
#define MIB (1024u * 1024u)
#define PAGES_PER_MIB (MIB / PAGE_BYTES)
#define MAGIC UINT64_C(0x46504853544d5031)

/* What --realloc maps at a time: the largest block of the buddy allocator. */
#define CHUNK_MIB 4u
#define CHUNK_PAGES (CHUNK_MIB * PAGES_PER_MIB)

/* Pages that are rewritten between two looks at the control socket. */
#define STEP_PAGES 256u

/* An entry of /proc/self/pagemap: the number of the page, if there is one. */
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_NUMBER ((UINT64_C(1) << 55) - 1)

enum { WORD_MAGIC, WORD_INDEX, WORD_GENERATION, WORD_DATA };

struct area {
	uint64_t *base;
	size_t pages;
	uint64_t first_index;	/* index of the first page, unique in a process */
};

struct server {
	struct area main;
	bool *given_back;	/* of its pages, or NULL */
	bool churn;
	uint64_t pass;		/* generation of the pages before the cursor */
	size_t cursor;		/* the others have generation pass - 1 */
	struct area *chunks;	/* generation of chunk i is chunk_generation */
	size_t max_chunks;
	size_t chunks_held;
	size_t chunks_goal;
	uint64_t chunk_generation;
	uint64_t reallocs;
	uint64_t checked;
	uint64_t errors;
	char first_error[160];
};

static void die(const char *what)
{
	fprintf(stderr, "memstamp: %s: %s\n", what, strerror(errno));
	exit(2);
}

/* One step of splitmix64: cheap, and every word depends on every input bit. */
static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= UINT64_C(0xbf58476d1ce4e5b9);
	x ^= x >> 27;
	x *= UINT64_C(0x94d049bb133111eb);
	return x ^ (x >> 31);
}

static uint64_t page_seed(uint64_t index, uint64_t generation)
{
	return mix(MAGIC + mix(index + mix(generation)));
}

static void write_page(uint64_t *page, uint64_t index, uint64_t generation)
{
	uint64_t word = page_seed(index, generation);

	page[WORD_MAGIC] = MAGIC;
	page[WORD_INDEX] = index;
	page[WORD_GENERATION] = generation;
	for (size_t i = WORD_DATA; i < PAGE_WORDS; i++) {
		word += UINT64_C(0x9e3779b97f4a7c15);
		page[i] = word ^ (word >> 32);
	}
}

static bool page_is_right(const uint64_t *page, uint64_t index,
			  uint64_t generation)
{
	uint64_t word = page_seed(index, generation);
	uint64_t wrong = 0;

	wrong |= page[WORD_MAGIC] ^ MAGIC;
	wrong |= page[WORD_INDEX] ^ index;
	wrong |= page[WORD_GENERATION] ^ generation;
	for (size_t i = WORD_DATA; i < PAGE_WORDS; i++) {
		word += UINT64_C(0x9e3779b97f4a7c15);
		wrong |= page[i] ^ word ^ (word >> 32);
	}
	return !wrong;
}

static const char *describe_wrong_page(const uint64_t *page, uint64_t index,
				       uint64_t generation)
{
	bool zero = true;

	for (size_t i = 0; i < PAGE_WORDS; i++)
		zero = zero && !page[i];
	if (zero)
		return "lost (all zero)";
	if (page[WORD_MAGIC] != MAGIC)
		return "foreign";
	if (page[WORD_INDEX] != index)
		return "swapped";
	if (page[WORD_GENERATION] < generation)
		return "old";
	if (page[WORD_GENERATION] > generation)
		return "newer than written";
	return "torn";
}

static void check_page(struct server *s, const struct area *area, size_t i,
		       uint64_t generation)
{
	const uint64_t *page = area->base + i * PAGE_WORDS;
	uint64_t index = area->first_index + i;

	s->checked++;
	if (page_is_right(page, index, generation))
		return;
	if (!s->errors++)
		snprintf(s->first_error, sizeof(s->first_error),
			 "page %llu is %s: has index %llu generation %llu, expected generation %llu",
			 (unsigned long long)index,
			 describe_wrong_page(page, index, generation),
			 (unsigned long long)page[WORD_INDEX],
			 (unsigned long long)page[WORD_GENERATION],
			 (unsigned long long)generation);
}

/* A new page must read as zero. */
static void check_clear(struct server *s, const struct area *area, size_t i)
{
	/* Volatile: its first write, not a look at it, makes the page. */
	volatile uint64_t *page = area->base + i * PAGE_WORDS;
	uint64_t found = 0;

	page[WORD_MAGIC] = MAGIC;
	for (size_t word = WORD_MAGIC + 1; word < PAGE_WORDS; word++)
		found |= page[word];
	if (found && !s->errors++)
		snprintf(s->first_error, sizeof(s->first_error),
			 "page %llu is new and not clear",
			 (unsigned long long)(area->first_index + i));
}

static void fill_area(struct server *s, const struct area *area,
		      uint64_t generation)
{
	for (size_t i = 0; i < area->pages; i++) {
		check_clear(s, area, i);
		write_page(area->base + i * PAGE_WORDS, area->first_index + i,
			   generation);
	}
}

static void check_area(struct server *s, const struct area *area,
		       uint64_t generation)
{
	for (size_t i = 0; i < area->pages; i++)
		check_page(s, area, i, generation);
}

static void map_area(struct area *area, size_t pages, uint64_t first_index)
{
	area->base = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE,
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
		char *page = (char *)area->base + i * PAGE_BYTES;
		uint64_t entry;
		off_t at = (uintptr_t)page / PAGE_BYTES * sizeof(entry);

		if (pread(fd, &entry, sizeof(entry), at) != sizeof(entry) ||
		    !(entry & PAGEMAP_PRESENT) || !(entry & PAGEMAP_NUMBER))
			die("pagemap");
		s->given_back[i] = entry & 1;
		if (s->given_back[i] && madvise(page, PAGE_BYTES, MADV_DONTNEED))
			die("madvise");
	}
	close(fd);
}

static void unmap_area(struct area *area)
{
	if (munmap(area->base, area->pages * PAGE_BYTES))
		die("munmap");
}

/* Generation that page i of the main area must have now. */
static uint64_t main_generation(const struct server *s, size_t i)
{
	return i < s->cursor ? s->pass : s->pass - 1;
}

static void rewrite_step(struct server *s)
{
	for (size_t n = 0; n < STEP_PAGES; n++) {
		size_t i = s->cursor;

		check_page(s, &s->main, i, s->pass - 1);
		write_page(s->main.base + i * PAGE_WORDS,
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
		map_area(chunk, CHUNK_PAGES,
			 s->main.pages + s->chunks_held * CHUNK_PAGES);
		fill_area(s, chunk, s->chunk_generation);
		s->chunks_held++;
		s->reallocs++;
		return;
	}

	while (s->chunks_held) {
		chunk = &s->chunks[--s->chunks_held];
		check_area(s, chunk, s->chunk_generation);
		unmap_area(chunk);
	}
	s->chunk_generation++;
	s->chunks_goal = 1 + mix(s->chunk_generation) % s->max_chunks;
}

static size_t verify_all(struct server *s)
{
	uint64_t before = s->checked;

	for (size_t i = 0; i < s->main.pages; i++)
		if (!s->given_back || !s->given_back[i])
			check_page(s, &s->main, i, main_generation(s, i));
	for (size_t i = 0; i < s->chunks_held; i++)
		check_area(s, &s->chunks[i], s->chunk_generation);
	return s->checked - before;
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
	size_t verified;
	int len;

	if (fd < 0)
		return true;
	if (recv(fd, request, sizeof(request) - 1, 0) <= 0) {
		close(fd);
		return true;
	}

	verified = verify_all(s);
	len = snprintf(reply, sizeof(reply),
		       "verified=%zu errors=%llu checked=%llu passes=%llu reallocs=%llu first=%s\n",
		       verified, (unsigned long long)s->errors,
		       (unsigned long long)s->checked,
		       (unsigned long long)s->pass - 2,
		       (unsigned long long)s->reallocs,
		       s->errors ? s->first_error : "none");
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

static int start(size_t mib, bool churn, bool alternate, size_t realloc_mib,
		 const char *name)
{
	struct server s = {
		.churn = churn || realloc_mib,
		.pass = 2,
		.max_chunks = realloc_mib / CHUNK_MIB,
		.chunk_generation = 1,
	};
	int listener = control_listen(name);
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
		fprintf(stderr, "memstamp: the server died while it stamped %zu MiB\n",
			mib);
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
	map_area(&s.main, mib * PAGES_PER_MIB, 0);
	/* Else a huge page keeps what is given back of it. */
	if (alternate && madvise(s.main.base, mib * MIB, MADV_NOHUGEPAGE))
		die("madvise");
	fill_area(&s, &s.main, s.pass - 1);
	if (alternate)
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

static size_t parse_mib(const char *text)
{
	char *end;
	unsigned long mib = strtoul(text, &end, 10);

	if (*text < '0' || *text > '9' || *end) {
		fprintf(stderr, "memstamp: not a number of MiB: %s\n", text);
		exit(2);
	}
	return mib;
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
	const char *name = "default";
	size_t mib = 0, realloc_mib = 0;
	bool churn = false, alternate = false;

	if (argc < 2)
		return usage();
	for (int i = 2; i < argc; i++) {
		if (!strcmp(argv[i], "--churn"))
			churn = true;
		else if (!strcmp(argv[i], "--alternate"))
			alternate = true;
		else if (!strcmp(argv[i], "--realloc") && i + 1 < argc)
			realloc_mib = parse_mib(argv[++i]);
		else if (!strcmp(argv[i], "--name") && i + 1 < argc)
			name = argv[++i];
		else
			mib = parse_mib(argv[i]);
	}

	/* Churning writes to all pages. */
	if (alternate && (churn || realloc_mib))
		return usage();
	if (!strcmp(argv[1], "start") && mib)
		return start(mib, churn, alternate, realloc_mib, name);
	if (!strcmp(argv[1], "verify") || !strcmp(argv[1], "stop"))
		return ask(argv[1], name);
	return usage();
}
