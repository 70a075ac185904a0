# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest: one QEMU process with its monitor, console and agent."""

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from livemig import paths
from livemig.errors import GuestError
from livemig.serial import Agent, DriverAgent, Port
from livemig.spec import GuestSpec, dashed

# The packages `qemu.machine` and `qemu.qmp` are in QEMU's source.
QEMU_PYTHON = paths.cache_dir() / "src" / "qemu" / "python"
sys.path.insert(0, str(paths.require(QEMU_PYTHON, "scripts/fetch qemu")))
# pylint: disable=wrong-import-position,import-error
from qemu.machine import QEMUMachine  # noqa: E402
from qemu.machine.machine import QEMUMachineError  # noqa: E402
from qemu.qmp import QMPError  # noqa: E402

# It logs what it raises too.
logging.getLogger("qemu").setLevel(logging.CRITICAL)

Event = Dict[str, Any]

BOOT_SECONDS = 120
# No command takes as long, but for one that waits for what will not happen.
MONITOR_SECONDS = 300
# Builds of QEMU that have absent pages.
PATCHED = ("ours", "checked", "debug", "arm64")
# How long to wait for an event before looking whether the QEMU is still alive.
LIVENESS_SECONDS = 0.5

# What a healthy guest kernel never says.
KERNEL_TROUBLE = re.compile(
    r"^.*(?:\bBUG: |\bBUG:$|WARNING: |Oops|general protection fault|Kernel panic|"
    r"blocked for more than \d+ seconds|soft lockup|rcu_.*detected|"
    r"list_(?:add|del) corruption|Bad page state).*$",
    re.MULTILINE,
)

# QEMU 10.0, patched or not, has a race that ends it now and then while a guest with several vCPUs
# sets up its PCI devices under TCG: iotlb_to_section() takes a section's index from a vCPU's TLB,
# which is flushed a moment later than the memory map changes. Not our concern: boot again, once.
BOOT_RACE = re.compile(r"\b(msix_\w+_mmio_\w+|iotlb_to_section)\b.*: Assertion")

# Ends with us, however we end, and does not take the terminal's Ctrl-C: we end it in order then.
WRAPPER = ("setsid", "setpriv", "--pdeathsig", "KILL", "--")


class Guest:
    """A QEMU process. A context manager: the process is gone when the block ends.

    An incoming guest waits for a migration; `running=False` leaves it stopped after that.
    `listener` is called, in another thread, with what the guest writes to its console.
    Logs go to the directory `logs`: NAME.log (QEMU's own output), NAME-console.log and, if the
    guest is traced, NAME-trace.log.
    """

    # pylint: disable=too-many-instance-attributes

    def __init__(
        self,
        spec: GuestSpec,
        name: str,
        *,
        logs: Optional[Path] = None,
        incoming: bool = False,
        running: bool = True,
        listener: Optional[Callable[[str], None]] = None,
    ):
        self.spec = spec
        self.name = name
        self.logs = logs or paths.OUT / "logs"
        # What the guest wrote to its console, and QEMU's trace events.
        self.console_log = self.logs / f"{name}-console.log"
        self.trace_log = self.logs / f"{name}-trace.log"
        self._listener = listener
        # What is to be released when the QEMU has ended.
        self.belongings = contextlib.ExitStack()
        self._incoming = incoming
        self._running = running
        self._machine: Optional[QEMUMachine] = None
        self._relaunched = False
        # All that wait_event() has seen.
        self.events: List[Event] = []
        self._connect_ports()

    def _connect_ports(self) -> None:
        self.console = Port(f"console of {self.name}", self._listener)
        self._agent_port = Port(f"agent of {self.name}")
        self.agent = (Agent if self.spec.user_space else DriverAgent)(self._agent_port)

    # Life

    def __enter__(self) -> "Guest":
        self.launch()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def launch(self) -> None:
        """Start the QEMU and connect to its monitor."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # QEMU appends to these.
        for old in (self.console_log, self.trace_log):
            old.unlink(missing_ok=True)
        self._machine = QEMUMachine(
            str(paths.qemu_binary(self.spec.qemu)),
            args=self.arguments(),
            wrapper=self._wrapper(),
            name=self.name,
            log_dir=str(self.logs),
        )
        try:
            self._machine.launch()
        except QEMUMachineError as err:
            self.close()
            raise GuestError(f"{self.name}: QEMU does not start: {self.qemu_output()}") from err
        # pylint: disable-next=protected-access
        self._machine._qmp.settimeout(MONITOR_SECONDS)
        self.console.connected()
        self._agent_port.connected()

    def close(self) -> None:
        """End the QEMU."""
        if self._machine:
            # It may be gone already, and its monitor with it.
            with contextlib.suppress(QMPError, QEMUMachineError, EOFError, OSError):
                self._machine.shutdown(hard=True)
            self._machine = None
            self.console.close()
            self._agent_port.close()
        self.belongings.close()

    def arguments(self) -> List[str]:
        """QEMU's arguments without those of the monitor."""
        spec = self.spec
        args = ["-nodefaults", "-no-user-config", "-no-reboot"]
        args += ["-machine", spec.machine, "-accel", spec.accel, "-cpu", spec.cpu]
        args += ["-smp", str(spec.vcpus), "-m", f"{spec.mem_mib}M", *self._memory()]
        args += self._software()
        log = f"logfile={self.console_log}"
        args += ["-chardev", f"socket,id=console,fd={self.console.qemu_fd},{log}"]
        args += ["-chardev", f"socket,id=agent,fd={self._agent_port.qemu_fd}"]
        args += ["-serial", "chardev:console", "-serial", "chardev:agent"]
        if spec.balloon is not None:
            if "iothread=hints" in spec.balloon:
                args += ["-object", "iothread,id=hints"]
            args += ["-device", f"virtio-balloon-pci,id=balloon,{spec.balloon}"]
        if spec.trace:
            args += ["-D", str(self.trace_log)]
            for events in spec.trace.split():
                args += ["-trace", events]
        if spec.skip_absent is not None and spec.qemu.split("-")[0] in PATCHED:
            setting = "on" if spec.skip_absent else "off"
            args += ["-global", f"migration.skip-absent-pages={setting}"]
        if self._incoming:
            args += ["-incoming", "defer"]
        if not self._running:
            args += ["-S"]
        return args + list(spec.args)

    def _wrapper(self) -> Tuple[str, ...]:
        """What QEMU is started with."""
        spec = self.spec
        preload = ("env", f"LD_PRELOAD={spec.preload}") if spec.preload else ()
        return (*WRAPPER, *spec.wrapper, *preload)

    def _software(self) -> List[str]:
        """QEMU's arguments for what runs in the guest."""
        spec = self.spec
        if spec.software is not None:
            return list(spec.software)
        if spec.firmware:
            return ["-bios", str(spec.firmware)]
        root = "root=/dev/vda rw init=/sbin/guest-init" if spec.disk else ""
        # On a busy host, too few ticks come in the moment for which the kernel counts them.
        platform = ["console=ttyS0", "no_timer_check"]
        if paths.is_arm64(spec.kernel):
            platform = ["console=ttyAMA0"]
        # And a vCPU can stand still for longer than the 21 seconds after which RCU complains.
        cmdline = [*platform, "panic=-1", "rcupdate.rcu_cpu_stall_timeout=120", root, *spec.cmdline]
        args = ["-kernel", str(paths.kernel_image(spec.kernel))]
        args += ["-append", " ".join(word for word in cmdline if word)]
        if spec.disk:
            args += ["-drive", f"file={spec.disk},format=raw,if=none,id=root,cache=writeback"]
            args += ["-device", "virtio-blk-pci,drive=root"]
        elif spec.user_space:
            args += ["-initrd", str(self._initrd())]
        return args

    def _initrd(self) -> Path:
        """The initramfs, and behind it the modules of a kernel that has some."""
        modules = paths.kernel_image(self.spec.kernel).with_name("modules.cpio.gz")
        if not modules.exists():
            return paths.initramfs(self.spec.kernel)
        # A file without a name, as long as the guest lives: QEMU reads it when it starts and when
        # the guest is reset.
        file = self.belongings.enter_context(os.fdopen(os.memfd_create("initrd"), "wb"))
        file.write(paths.initramfs().read_bytes() + modules.read_bytes())
        file.flush()
        return Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")

    def _memory(self) -> List[str]:
        """QEMU's arguments for the guest's memory."""
        spec = self.spec
        args = ["-machine", "memory-backend=pc.ram"] if spec.nodes == 1 else []
        mib = spec.mem_mib // spec.nodes
        for node in range(spec.nodes):
            part = "pc.ram" if spec.nodes == 1 else f"pc.ram{node}"
            size = f"id={part},size={mib}M"
            if spec.mem_file:
                where = f"mem-path={spec.mem_file},offset={node * mib}M"
                args += ["-object", f"memory-backend-file,{size},{where},share=on"]
            else:
                # Not reserved: a guest may be larger than the host, only what it uses counts.
                backend = spec.mem_backend
                said = ",reserve=" in backend or ",prealloc=on" in backend
                args += ["-object", f"{backend},{size}{'' if said else ',reserve=off'}"]
            if spec.nodes > 1:
                args += ["-numa", f"node,nodeid={node},memdev={part}"]
        return args

    def wait_ready(self, timeout: float = BOOT_SECONDS) -> None:
        """Wait until the guest has booted and its agent answers."""
        try:
            self.agent.wait_ready(timeout)
        except GuestError as err:
            if BOOT_RACE.search(self.qemu_output()) and not self._relaunched:
                self._relaunch()
                self.wait_ready(timeout)
                return
            raise GuestError(
                f"{self.name}: the guest did not boot: {err}{self.qemu_output()}\n"
                f"--- what its agent wrote: {self._agent_port.text()!r}\n"
                f"--- the end of its console ({self.console_log}):\n{self.console.tail()}"
            ) from err

    def _relaunch(self) -> None:
        warnings.warn(f"{self.name}: booted again: {self.qemu_output().strip()}", RuntimeWarning)
        self._relaunched = True
        self.close()
        self._connect_ports()
        self.launch()

    # Logs

    def qemu_output(self) -> str:
        """What QEMU itself wrote, on lines of its own, or nothing."""
        log = self.logs / f"{self.name}.log"
        text = log.read_text(errors="replace").strip() if log.exists() else ""
        return f"\n--- the output of QEMU ({log}):\n{text}" if text else ""

    def kernel_trouble(self) -> List[str]:
        """The lines of the console in which the guest's kernel complains."""
        return [match.group(0) for match in KERNEL_TROUBLE.finditer(self.console.text())]

    # Monitor

    @property
    def machine(self) -> QEMUMachine:
        """The QEMU process."""
        if not self._machine:
            raise GuestError(f"{self.name}: QEMU is not running")
        return self._machine

    @property
    def pid(self) -> Optional[int]:
        """The process id of a running QEMU."""
        return self._machine.get_pid() if self._machine else None

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command, return its result; underscores in names stand for dashes."""
        return self.qmp_dict(command, dashed(arguments))

    def qmp_dict(self, command: str, arguments: Dict[str, Any]) -> Any:
        """Run a QMP command with the arguments of a dictionary, return its result."""
        try:
            return self.machine.cmd(command, arguments)
        except asyncio.TimeoutError as err:
            raise GuestError(
                f"{self.name}: {command}: no answer within {MONITOR_SECONDS} s"
            ) from err
        except QMPError as err:
            if self.machine.is_running():
                raise GuestError(f"{self.name}: {command}: {err}") from err
            raise self._dead(command) from err

    def qmp_oob(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command that does not wait for the guest, nor for other commands."""
        # pylint: disable-next=protected-access
        reply = self.machine._qmp.cmd_obj({"exec-oob": command, "arguments": dashed(arguments)})
        if "error" in reply:
            raise GuestError(f"{self.name}: {command}: {reply['error']['desc']}")
        return reply["return"]

    def hmp(self, command: str) -> str:
        """Run a command of the human monitor, return what it prints."""
        return str(self.qmp("human-monitor-command", command_line=command))

    def _dead(self, waiting_for: str) -> GuestError:
        status = self.machine.exitcode()
        return GuestError(
            f"{self.name}: QEMU ended with status {status} during {waiting_for}{self.qemu_output()}"
        )

    def wait_event(self, match: Callable[[Event], bool], what: str, timeout: float) -> Event:
        """Wait for the next event that matches. It, and those before it, are in `events` then."""
        deadline = time.monotonic() + timeout
        while True:
            left = min(LIVENESS_SECONDS, deadline - time.monotonic())
            try:
                event: Event = self.machine.get_qmp_event(wait=max(left, 0.001))
                self.events.append(event)
                if match(event):
                    return event
            except asyncio.TimeoutError:
                if not self.machine.is_running():
                    raise self._dead(what) from None
            if time.monotonic() > deadline:
                raise GuestError(f"{self.name}: no {what} within {timeout:.0f} s")
