/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What memstamp is: the contents of its pages, its options and its answers.
 *
 * Shared by the program (memstamp.c) and by the driver that does the same in a
 * kernel without user space (guest/kvm). Each page of 4 KiB carries a magic
 * number, its index, the generation of its contents, and a word made from those
 * in all that is left, so that a page that is lost (zero), old (an earlier
 * generation), swapped with another one or torn is told apart from the right
 * one.
 */
#ifndef STAMP_H
#define STAMP_H

#ifdef __KERNEL__
#include <linux/kernel.h>
#include <linux/string.h>
#include <linux/types.h>
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef unsigned long long u64;
#endif

#define STAMP_MAGIC		0x46504853544d5031ull

enum {
	STAMP_WORD_MAGIC,
	STAMP_WORD_INDEX,
	STAMP_WORD_GENERATION,
	STAMP_WORD_DATA,
	STAMP_PAGE_WORDS = 512,
};

#define STAMP_PAGE_BYTES	(STAMP_PAGE_WORDS * sizeof(u64))
#define STAMP_PAGES_PER_MIB	256

/* What --realloc takes at a time: the largest block of the buddy allocator. */
#define STAMP_CHUNK_MIB		4
#define STAMP_CHUNK_PAGES	(STAMP_CHUNK_MIB * STAMP_PAGES_PER_MIB)

/* What was done since the start. */
struct stamp_counts {
	u64 errors;
	u64 checked;
	u64 passes;
	u64 reallocs;
	char first_error[160];
};

/* The answer to "verify": pages, and the counts in their order. */
#define STAMP_ANSWER \
	"verified=%llu errors=%llu checked=%llu passes=%llu reallocs=%llu first=%s\n"

/* What "start" is given. */
struct stamp_options {
	const char *name;
	u64 mib;
	u64 realloc_mib;
	u64 take_mib;	/* in the kernel only */
	bool churn;
	bool alternate;	/* in user space only */
};

/* One step of splitmix64: cheap, and every word depends on every input bit. */
static inline u64 stamp_mix(u64 x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static inline u64 stamp_word(u64 index, u64 generation)
{
	return stamp_mix(STAMP_MAGIC +
			 stamp_mix(index + stamp_mix(generation)));
}

#ifdef __KERNEL__
/*
 * Where each instruction of the kernel is interpreted, single ones that do all
 * the work are ten times as fast as loops.
 */
static inline void stamp_fill(u64 *words, size_t count, u64 word)
{
	memset64(words, word, count);
}

static inline bool stamp_is_full(const u64 *words, size_t count, u64 word)
{
	bool same;

	asm volatile("repe scasq"
		     : "=@cce" (same), "+D" (words), "+c" (count)
		     : "a" (word)
		     : "memory");
	return same;
}
#else
static inline void stamp_fill(u64 *words, size_t count, u64 word)
{
	for (size_t i = 0; i < count; i++)
		words[i] = word;
}

static inline bool stamp_is_full(const u64 *words, size_t count, u64 word)
{
	u64 wrong = 0;

	for (size_t i = 0; i < count; i++)
		wrong |= words[i] ^ word;
	return !wrong;
}
#endif

static inline void stamp_write(u64 *page, u64 index, u64 generation)
{
	page[STAMP_WORD_MAGIC] = STAMP_MAGIC;
	page[STAMP_WORD_INDEX] = index;
	page[STAMP_WORD_GENERATION] = generation;
	stamp_fill(page + STAMP_WORD_DATA, STAMP_PAGE_WORDS - STAMP_WORD_DATA,
		   stamp_word(index, generation));
}

static inline bool stamp_is_right(const u64 *page, u64 index, u64 generation)
{
	return page[STAMP_WORD_MAGIC] == STAMP_MAGIC &&
	       page[STAMP_WORD_INDEX] == index &&
	       page[STAMP_WORD_GENERATION] == generation &&
	       stamp_is_full(page + STAMP_WORD_DATA,
			     STAMP_PAGE_WORDS - STAMP_WORD_DATA,
			     stamp_word(index, generation));
}

static inline const char *stamp_what_is_wrong(const u64 *page, u64 index,
					      u64 generation)
{
	if (stamp_is_full(page, STAMP_PAGE_WORDS, 0))
		return "lost (all zero)";
	if (page[STAMP_WORD_MAGIC] != STAMP_MAGIC)
		return "foreign";
	if (page[STAMP_WORD_INDEX] != index)
		return "swapped";
	if (page[STAMP_WORD_GENERATION] < generation)
		return "old";
	if (page[STAMP_WORD_GENERATION] > generation)
		return "newer than written";
	return "torn";
}

/* Check one page, and count it. */
static inline void stamp_check(struct stamp_counts *counts, const u64 *page,
			       u64 index, u64 generation)
{
	counts->checked++;
	if (stamp_is_right(page, index, generation))
		return;
	if (!counts->errors++)
		snprintf(counts->first_error, sizeof(counts->first_error),
			 "page %llu is %s: has index %llu generation %llu, expected generation %llu",
			 index, stamp_what_is_wrong(page, index, generation),
			 page[STAMP_WORD_INDEX], page[STAMP_WORD_GENERATION],
			 generation);
}

/* How many chunks to hold before all are given back: each time others. */
static inline u64 stamp_chunks_goal(u64 generation, u64 max)
{
	return 1 + stamp_mix(generation) % max;
}

static inline bool stamp_parse_mib(const char *text, u64 *mib)
{
	if (!*text)
		return false;
	for (*mib = 0; *text >= '0' && *text <= '9'; text++)
		*mib = *mib * 10 + *text - '0';
	return !*text;
}

/* The words after "start", "verify" or "stop". */
static inline bool stamp_parse(struct stamp_options *options, int argc,
			       char **argv)
{
	*options = (struct stamp_options){ .name = "default" };
	for (int i = 0; i < argc; i++) {
		const char *value = i + 1 < argc ? argv[i + 1] : "";
		bool right = true;

		if (!strcmp(argv[i], "--churn")) {
			options->churn = true;
			continue;
		}
		if (!strcmp(argv[i], "--alternate")) {
			options->alternate = true;
			continue;
		}
		if (!strcmp(argv[i], "--name"))
			options->name = value;
		else if (!strcmp(argv[i], "--realloc"))
			right = stamp_parse_mib(value, &options->realloc_mib);
		else if (!strcmp(argv[i], "--take"))
			right = stamp_parse_mib(value, &options->take_mib);
		else
			right = stamp_parse_mib(argv[i--], &options->mib);
		if (!right || !*options->name)
			return false;
		i++;
	}
	options->churn = options->churn || options->realloc_mib;
	return true;
}

#endif /* STAMP_H */
