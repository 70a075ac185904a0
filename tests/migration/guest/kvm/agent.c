// SPDX-License-Identifier: GPL-2.0
/*
 * memstamp in the kernel: the agent
 *
 * Reads orders from the second serial port, a line each: a word of the caller's
 * choice, and then what a shell would be told. Answers with what the program
 * would print, and a line with the caller's word and the exit status.
 */
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/init.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/kernel.h>
#include <linux/kthread.h>
#include <linux/sched.h>
#include <linux/serial_reg.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "memstamp.h"
#include "stamp.h"

#define AGENT_PORT	0x2f8
#define ANSWER_BYTES	512

static bool agent_has(u8 status)
{
	return inb(AGENT_PORT + UART_LSR) & status;
}

static void agent_print(const char *text)
{
	for (; *text; text++) {
		while (!agent_has(UART_LSR_THRE))
			schedule_timeout_idle(1);
		outb(*text, AGENT_PORT + UART_TX);
	}
}

/* Reads a line, without its end; what does not fit is dropped. */
static void agent_read_line(char *line, size_t size)
{
	size_t len = 0;
	char c;

	for (;;) {
		/* Nobody waits for an interrupt of this port: look each tick. */
		while (!agent_has(UART_LSR_DR))
			schedule_timeout_idle(1);
		c = inb(AGENT_PORT + UART_RX);
		if (c == '\n')
			break;
		if (len < size - 1)
			line[len++] = c;
	}
	line[len] = 0;
}

static int agent_memstamp(int argc, char **argv, char *answer)
{
	if (!strcmp(argv[0], "start"))
		return memstamp_start(argc - 1, argv + 1, answer, ANSWER_BYTES);
	if (!strcmp(argv[0], "verify"))
		return memstamp_verify(argc - 1, argv + 1, false, answer,
				       ANSWER_BYTES);
	if (!strcmp(argv[0], "stop"))
		return memstamp_verify(argc - 1, argv + 1, true, answer,
				       ANSWER_BYTES);
	if (!strcmp(argv[0], "gap"))
		return memstamp_gap(argc - 1, argv + 1, answer, ANSWER_BYTES);
	if (!strcmp(argv[0], "hints")) {
		memstamp_print_hints(answer, ANSWER_BYTES);
		return 0;
	}

	return -EINVAL;
}

static int agent_do(int argc, char **argv, char *answer)
{
	u64 mib;

	if (argc >= 2 && !strcmp(argv[0], "memstamp"))
		return agent_memstamp(argc - 1, argv + 1, answer);
	/* How many processes there would be does not matter. */
	if (argc >= 2 && !strcmp(argv[0], "dirtyfree") &&
	    stamp_parse_mib(argv[1], &mib))
		return memstamp_dirty_and_free(mib, answer, ANSWER_BYTES);

	return -EINVAL;
}

static void agent_obey(char *line, char *answer)
{
	int argc, ret;
	char **argv;
	char end[64];

	argv = argv_split(GFP_KERNEL, line, &argc);
	if (!argv)
		return;

	if (argc) {
		*answer = 0;
		ret = agent_do(argc - 1, argv + 1, answer);
		if (ret < 0)
			snprintf(answer, ANSWER_BYTES, "memstamp: error %d\n",
				 ret);
		agent_print(answer);
		snprintf(end, sizeof(end), "\n%s %d\n", argv[0],
			 ret < 0 ? 2 : ret);
		agent_print(end);
	}
	argv_free(argv);
}

static int agent_run(void *unused)
{
	static char line[256], answer[ANSWER_BYTES];

	outb(UART_FCR_ENABLE_FIFO, AGENT_PORT + UART_FCR);
	agent_print("READY\n");
	while (!kthread_should_stop()) {
		agent_read_line(line, sizeof(line));
		agent_obey(line, answer);
	}

	return 0;
}

static int __init memstamp_init(void)
{
	struct task_struct *task;
	int err;

	if (!request_region(AGENT_PORT, 8, "memstamp"))
		return -EBUSY;
	err = memstamp_hints_init();
	if (err)
		return err;

	task = kthread_run(agent_run, NULL, "memstamp");
	return PTR_ERR_OR_ZERO(task);
}
late_initcall(memstamp_init);
