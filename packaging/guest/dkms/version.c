// SPDX-License-Identifier: GPL-2.0
/*
 * The version of virtio_balloon, which has none in the kernel: DKMS does not
 * replace a module by one of the same version, and users see which they have.
 */
#include <linux/module.h>

MODULE_VERSION("#VERSION#");
