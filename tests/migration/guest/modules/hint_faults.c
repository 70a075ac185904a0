// SPDX-License-Identifier: GPL-2.0
/*
 * Faults of the queue that free page hints go through
 *
 * For tests, in a debug kernel. A message can be refused when it is put on the
 * queue, and the device can be left without a word of the messages that it was
 * sent, so that they stay in flight for as long as a test wants. To free page
 * cache can take as long as a test wants. All is ruled by parameters, which can
 * be changed at any time.
 */
#include <linux/delay.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/ptrace.h>
#include <linux/string.h>
#include <linux/virtio.h>

static unsigned int adds;
module_param(adds, uint, 0644);
MODULE_PARM_DESC(adds, "messages that were to be put on the queue");

static unsigned int fail_from;
module_param(fail_from, uint, 0644);
MODULE_PARM_DESC(fail_from, "refuse messages from this one on (0: none)");

static unsigned int fail_to = UINT_MAX;
module_param(fail_to, uint, 0644);
MODULE_PARM_DESC(fail_to, "refuse messages up to this one");

static unsigned int error = 5;
module_param(error, uint, 0644);
MODULE_PARM_DESC(error, "how to refuse a message");

static unsigned int refused;
module_param(refused, uint, 0644);
MODULE_PARM_DESC(refused, "messages that were refused");

static bool mute;
module_param(mute, bool, 0644);
MODULE_PARM_DESC(mute, "do not tell the device of messages");

static unsigned int muted;
module_param(muted, uint, 0644);
MODULE_PARM_DESC(muted, "how often the device was not told");

static unsigned int cache_delay;
module_param(cache_delay, uint, 0644);
MODULE_PARM_DESC(cache_delay, "milliseconds that each step of freeing page cache takes longer");

static bool is_hint_queue(struct pt_regs *regs)
{
	struct virtqueue *vq = (void *)regs_get_kernel_argument(regs, 0);

	return vq->name && !strcmp(vq->name, "free_page_vq");
}

/* Goes back to the caller instead of into the function. */
static int return_at_once(struct pt_regs *regs, long result)
{
	regs_set_return_value(regs, result);
	instruction_pointer_set(regs, regs_get_kernel_stack_nth(regs, 0));
	regs->sp += sizeof(unsigned long);
	return 1;
}

static int pre_add(struct kprobe *probe, struct pt_regs *regs)
{
	if (!is_hint_queue(regs))
		return 0;

	adds++;
	if (!fail_from || adds < fail_from || adds > fail_to)
		return 0;

	refused++;
	return return_at_once(regs, -(long)error);
}

static int pre_kick(struct kprobe *probe, struct pt_regs *regs)
{
	if (!mute || !is_hint_queue(regs))
		return 0;

	muted++;
	return return_at_once(regs, true);
}

static int pre_reclaim(struct kprobe *probe, struct pt_regs *regs)
{
	mdelay(cache_delay);
	return 0;
}

/* With this one, the probe is not optimized, and can lead elsewhere. */
static void post(struct kprobe *probe, struct pt_regs *regs,
		 unsigned long flags)
{
}

static struct kprobe probe_add = {
	.symbol_name = "virtqueue_add_outbuf",
	.pre_handler = pre_add,
	.post_handler = post,
};

static struct kprobe probe_kick = {
	.symbol_name = "virtqueue_kick",
	.pre_handler = pre_kick,
	.post_handler = post,
};

static struct kprobe probe_reclaim = {
	.symbol_name = "reclaim_clean_inactive_file",
	.pre_handler = pre_reclaim,
};

static struct kprobe *probes[] = { &probe_add, &probe_kick, &probe_reclaim };

static int __init hint_faults_init(void)
{
	return register_kprobes(probes, ARRAY_SIZE(probes));
}
module_init(hint_faults_init);

static void __exit hint_faults_exit(void)
{
	unregister_kprobes(probes, ARRAY_SIZE(probes));
}
module_exit(hint_faults_exit);

MODULE_DESCRIPTION("Faults of the queue that free page hints go through");
MODULE_LICENSE("GPL");
