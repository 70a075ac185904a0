# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests under KVM, also where the processor's kernel mode is interpreted.

A hypervisor without hardware for it lets user code run by itself, and interprets what a kernel
does: slowly, and not all of it. The kernel of "scripts/build-kernel kvm" gets along with that. It
has no user space, as system calls do not work there; a driver of ours does what tests want.
"""

from livemig.spec import GuestSpec

# Without registers and instructions that are not interpreted; and without what KVM writes to the
# guest's memory when it loads the vCPUs at the destination, be it for the kernel or the firmware.
CPU = (
    "max,-arch-capabilities,-cx16,"
    "-kvmclock,-kvmclock-stable-bit,-kvm-steal-time,-kvm-asyncpf,-kvm-asyncpf-int,-kvm-pv-eoi"
)
NOT_INTERPRETED = (
    "cx16,smap,popcnt,fsgsbase,pcid,invpcid,rdpid,rdtscp,umip,clflushopt,clwb,"
    "avx,avx2,rdseed,rdrand,erms,fsrm"
)
CMDLINE = (
    # CPUID shows the host's, whatever -cpu says.
    f"clearcpuid={NOT_INTERPRETED}",
    "noxsave",
    "random.trust_cpu=off",
    "tsc=nowatchdog",
    # Calibrating takes seconds, and nothing here needs exact delays.
    "lpj=10000000",
    # A test of itself that takes half a minute.
    "initcall_blacklist=blake2s_mod_init",
    # Process 1 waits for days before it looks for a root file system.
    "rootdelay=1000000",
)


def spec(mem_mib: int = 512, vcpus: int = 1, **changes: object) -> GuestSpec:
    """A guest for KVM."""
    return GuestSpec(
        mem_mib=mem_mib,
        vcpus=vcpus,
        # The firmware's table of processors, which does without ACPI, has one for each socket.
        machine=f"q35,smp.sockets={vcpus}",
        accel="kvm",
        cpu=CPU,
        kernel="kvm",
        user_space=False,
        cmdline=CMDLINE,
    ).but(**changes)
