// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest without a will of its own: it runs in place of a BIOS and does what it is told on its
 * serial port, one command a line, numbers in hexadecimal. Everything that a test wants of it (PCI,
 * virtio, queues, lies) is in scripts/livemig/balloon.py, made of these:
 *
 *   r8|r16|r32 ADDR [COUNT]      read memory
 *   w8|w16|w32 ADDR VALUE...     write memory
 *   i8|i16|i32 PORT              read a port
 *   o8|o16|o32 PORT VALUE        write a port
 *   fill ADDR WORDS VALUE        write the same word everywhere
 *   stamp ADDR PAGES SEED        fill each page with SEED plus the page's address
 *   check ADDR PAGES SEED        print the number of pages that are not stamped so, and the first
 *   series ADDR COUNT FIRST STEP write 64-bit words: FIRST, FIRST + STEP, ...
 *   chain TABLE COUNT ADDR LENGTH FLAGS
 *                                write descriptors, all for one buffer, each the next one of another
 *   ring HEAD COUNT AVAIL SIZE PORT QUEUE
 *                                put HEAD on an available ring and kick, COUNT times
 *   flood HEAD AVAIL USED SIZE PORT QUEUE [ADDR A B]
 *                                put HEAD on the ring as fast as it comes back, and write A and B
 *                                to memory in turn meanwhile; until a character comes; print how
 *                                often
 *   clock                        print the time stamp counter, in units of 1024
 *   dirty ADDR PAGES TICKS       write to one of so many pages (a power of two) every so many units
 *                                of the time stamp counter, to all of them before one comes again;
 *                                until a character comes; print how often, and the longest time in
 *                                which the guest did not get on, in units of 1024
 *
 * Each answer is a line: values and "ok", or "bad". READY is printed at the start.
 */
#include <stdbool.h>
#include <stdint.h>

#define COM1 0x3f8
#define COM_FIFO (COM1 + 2)
#define COM_LINE_STATUS (COM1 + 5)
#define DATA_READY 0x01
#define CAN_SEND 0x20

#define PAGE 4096u
#define PAGE_WORDS (PAGE / 4)

/* Words of a command, after its name. */
#define MAX_WORDS 192

#define POLL_PAUSES 200
#define FLOOD_LOOPS 1000
#define CLOCK_SHIFT 10

static inline void out8(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out16(uint16_t port, uint16_t value)
{
	asm volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void out32(uint16_t port, uint32_t value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint16_t in16(uint16_t port)
{
	uint16_t value;

	asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline uint32_t in32(uint16_t port)
{
	uint32_t value;

	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline void fill(uint64_t addr, uint64_t words, uint32_t value)
{
	asm volatile("rep stosl" : "+D"(addr), "+c"(words) : "a"(value) : "memory");
}

static inline bool filled(uint64_t addr, uint64_t words, uint32_t value)
{
	bool equal;

	asm volatile("cmp %%eax, %%eax\n\trepe scasl"
		     : "+D"(addr), "+c"(words), "=@ccz"(equal)
		     : "a"(value)
		     : "memory");
	return equal;
}

/* Serial port */

static bool pressed(void)
{
	return in8(COM_LINE_STATUS) & DATA_READY;
}

/* Waits in its own time: whoever looks at a port all the time keeps QEMU from its work. */
static char get(void)
{
	unsigned int i;

	while (!pressed())
		for (i = 0; i < POLL_PAUSES; i++)
			asm volatile("pause");
	return in8(COM1);
}

static void put(char c)
{
	while (!(in8(COM_LINE_STATUS) & CAN_SEND))
		;
	out8(COM1, c);
}

static void print(const char *text)
{
	while (*text)
		put(*text++);
}

static void print_value(uint32_t value)
{
	int shift = 28;

	put(' ');
	while (shift && !(value >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put("0123456789abcdef"[value >> shift & 15]);
}

/* Commands */

struct command {
	char name[8];
	unsigned int n;
	uint32_t v[MAX_WORDS];
};

static bool is(const struct command *c, const char *name, unsigned int least)
{
	unsigned int i;

	for (i = 0; c->name[i] == name[i]; i++)
		if (!name[i])
			return c->n >= least;
	return false;
}

/* Read a command; anything but lower case, digits and blanks ends it like a newline. */
static void read_command(struct command *c)
{
	unsigned int length = 0;
	bool in_word = false;
	char ch;

	c->n = 0;
	while ((ch = get()) > ' ')
		if (length < sizeof(c->name) - 1)
			c->name[length++] = ch;
	c->name[length] = '\0';

	for (; ch == ' ' || (ch >= '0' && ch <= '9') || (ch >= 'a' && ch <= 'f'); ch = get()) {
		if (ch == ' ') {
			in_word = false;
			continue;
		}
		if (!in_word && c->n < MAX_WORDS)
			c->v[c->n++] = 0;
		in_word = true;
		c->v[c->n - 1] = c->v[c->n - 1] << 4 | (ch <= '9' ? ch - '0' : ch - 'a' + 10);
	}
}

static void read_memory(uint32_t addr, uint32_t count, unsigned int bytes)
{
	for (; count; count--, addr += bytes)
		print_value(bytes == 1 ? *(volatile uint8_t *)(uintptr_t)addr :
			    bytes == 2 ? *(volatile uint16_t *)(uintptr_t)addr :
					 *(volatile uint32_t *)(uintptr_t)addr);
}

static void write_memory(uint32_t addr, const uint32_t *value, uint32_t count, unsigned int bytes)
{
	for (; count; count--, addr += bytes, value++) {
		if (bytes == 1)
			*(volatile uint8_t *)(uintptr_t)addr = *value;
		else if (bytes == 2)
			*(volatile uint16_t *)(uintptr_t)addr = *value;
		else
			*(volatile uint32_t *)(uintptr_t)addr = *value;
	}
}

static void check(uint32_t addr, uint32_t pages, uint32_t seed)
{
	uint32_t bad = 0, first = 0;

	for (; pages; pages--, addr += PAGE) {
		if (filled(addr, PAGE_WORDS, seed + addr))
			continue;
		if (!bad++)
			first = addr;
	}
	print_value(bad);
	print_value(first);
}

static void series(uint32_t addr, uint32_t count, uint32_t first, uint32_t step)
{
	volatile uint64_t *word = (volatile uint64_t *)(uintptr_t)addr;
	uint32_t i;

	for (i = 0; i < count; i++)
		word[i] = first + (uint64_t)step * i;
}

#define DESCRIPTOR_NEXT 1

static void chain(uint32_t table, uint32_t count, uint32_t addr, uint32_t length, uint16_t flags)
{
	struct {
		uint64_t addr;
		uint32_t length;
		uint16_t flags;
		uint16_t next;
	} volatile *descriptor = (volatile void *)(uintptr_t)table;
	uint32_t i;

	for (i = 0; i < count; i++) {
		bool last = i == count - 1;

		descriptor[i].addr = addr;
		descriptor[i].length = length;
		descriptor[i].flags = flags | (last ? 0 : DESCRIPTOR_NEXT);
		descriptor[i].next = last ? 0 : i + 1;
	}
}

/* An available ring has flags and index before its slots, a used ring too. */
static void add(uint32_t avail, uint32_t size, uint16_t head)
{
	volatile uint16_t *ring = (volatile uint16_t *)(uintptr_t)avail;

	ring[2 + ring[1] % size] = head;
	ring[1]++;
}

static void flood(const uint32_t *v, bool change)
{
	volatile uint16_t *available = (volatile uint16_t *)(uintptr_t)v[1] + 1;
	volatile uint16_t *used = (volatile uint16_t *)(uintptr_t)v[2] + 1;
	volatile uint32_t *word = (volatile uint32_t *)(uintptr_t)v[6];
	uint32_t times = 0;
	unsigned int i;

	while (!pressed()) {
		/* Not always at a port, where QEMU would make it wait. */
		for (i = 0; i < FLOOD_LOOPS; i++) {
			if (change)
				*word = v[7 + i % 2];
			if (*available == *used) {
				add(v[1], v[3], v[0]);
				out16(v[4], v[5]);
				times++;
			}
		}
	}
	get();
	print_value(times);
}

static inline uint64_t clock(void)
{
	uint32_t low, high;

	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	return (uint64_t)high << 32 | low;
}

static void dirty(uint32_t addr, uint32_t pages, uint32_t ticks)
{
	uint64_t now = clock(), next = now, last, longest = 0;
	uint32_t times = 0, page = 0;
	unsigned int i;

	do {
		/* The look at the port is no part of what is measured. */
		last = clock();
		for (i = 0; i < FLOOD_LOOPS; i++) {
			now = clock();
			if (now - last > longest)
				longest = now - last;
			last = now;
			if (now < next)
				continue;
			*(volatile uint32_t *)(uintptr_t)(addr + page * PAGE) = ++times;
			/* A generator of full period: Numerical Recipes, "quick and dirty". */
			page = (page * 1664525u + 1013904223u) & (pages - 1);
			next += ticks;
		}
	} while (!pressed());
	get();
	print_value(times);
	print_value(longest >> CLOCK_SHIFT);
}

static bool run(const struct command *c)
{
	const uint32_t *v = c->v;
	unsigned int i;

	if (is(c, "r8", 1) || is(c, "r16", 1) || is(c, "r32", 1)) {
		read_memory(v[0], c->n > 1 ? v[1] : 1, is(c, "r8", 1) ? 1 : is(c, "r16", 1) ? 2 : 4);
	} else if (is(c, "w8", 2) || is(c, "w16", 2) || is(c, "w32", 2)) {
		write_memory(v[0], v + 1, c->n - 1, is(c, "w8", 1) ? 1 : is(c, "w16", 1) ? 2 : 4);
	} else if (is(c, "i8", 1)) {
		print_value(in8(v[0]));
	} else if (is(c, "i16", 1)) {
		print_value(in16(v[0]));
	} else if (is(c, "i32", 1)) {
		print_value(in32(v[0]));
	} else if (is(c, "o8", 2)) {
		out8(v[0], v[1]);
	} else if (is(c, "o16", 2)) {
		out16(v[0], v[1]);
	} else if (is(c, "o32", 2)) {
		out32(v[0], v[1]);
	} else if (is(c, "fill", 3)) {
		fill(v[0], v[1], v[2]);
	} else if (is(c, "stamp", 3)) {
		for (i = 0; i < v[1]; i++)
			fill(v[0] + i * PAGE, PAGE_WORDS, v[2] + v[0] + i * PAGE);
	} else if (is(c, "check", 3)) {
		check(v[0], v[1], v[2]);
	} else if (is(c, "series", 4)) {
		series(v[0], v[1], v[2], v[3]);
	} else if (is(c, "chain", 5)) {
		chain(v[0], v[1], v[2], v[3], v[4]);
	} else if (is(c, "ring", 6)) {
		for (i = 0; i < v[1]; i++) {
			add(v[2], v[3], v[0]);
			out16(v[4], v[5]);
		}
	} else if (is(c, "flood", 6)) {
		flood(v, c->n >= 9);
	} else if (is(c, "clock", 0)) {
		print_value(clock() >> CLOCK_SHIFT);
	} else if (is(c, "dirty", 3)) {
		dirty(v[0], v[1], v[2]);
	} else {
		return false;
	}
	return true;
}

void bare_metal(void);

void bare_metal(void)
{
	struct command command;

	/* On, and empty. */
	out8(COM_FIFO, 0x07);
	print("READY\n");
	for (;;) {
		read_command(&command);
		print(run(&command) ? " ok\n" : " bad\n");
	}
}
