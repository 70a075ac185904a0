/* SPDX-License-Identifier: GPL-2.0 */
/*
 * memstamp in the kernel
 *
 * For tests, in a kernel that runs without user space. agent.c takes orders,
 * server.c does with kernel threads and the page allocator what the program
 * memstamp does with its memory, and hints.c looks at what the balloon tells
 * its device, and uses memory that is about to be hinted.
 */
#ifndef MEMSTAMP_H
#define MEMSTAMP_H

#include <linux/mm_types.h>
#include <linux/types.h>

struct scatterlist;
struct virtqueue;

/* Called for each message before it is put on its queue. */
void memstamp_queued(struct virtqueue *vq, struct scatterlist *sg,
		     unsigned int out);

int memstamp_hints_init(void);
void memstamp_print_hints(char *text, size_t size);
bool memstamp_is_hinted(struct page *page);
/* Called for each page that is written. */
void memstamp_written(struct page *page);

int memstamp_start(int argc, char **argv, char *answer, size_t size);
int memstamp_verify(int argc, char **argv, bool stop, char *answer,
		    size_t size);
int memstamp_gap(int argc, char **argv, char *answer, size_t size);
int memstamp_dirty_and_free(u64 mib, char *answer, size_t size);

/* A new report begins: what was taken in the last one is given back. */
void memstamp_give_back(void);
/* Take free blocks of which all are hinted. Returns pages that were written. */
u64 memstamp_take(unsigned int order);

#endif /* MEMSTAMP_H */
