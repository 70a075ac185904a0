# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migrations of real guests: the library that the demo, the tests and the benchmarks stand on.

A few lines are a whole migration::

    mode = MODES["array"]
    spec = mode.spec(GuestSpec(mem_mib=1024))
    with Guest(spec, "source") as source, Guest(spec, "destination", incoming=True) as destination:
        source.wait_ready()
        result = migrate(source, destination, migration_for_mode(mode))
        print(result.total_ms, result.hints)

What is where:

- what to run: `spec` (guests, migrations), `modes` (what is compared), `paths` (what was built),
  `host` (this machine), `disk`, `stockguest` (Debian's own kernels), `kvm` (Linux under KVM)
- a guest: `guest` (a QEMU and its monitor), `serial` (console and agent), `workload` (what it does)
- a migration: `migration` (start, wait, result), `estimate` (before one), `memory` (compare RAM)
- without Linux: `machine` (the bare-metal guest), `balloon` (a balloon for it to drive)
- commands: `commands` (each in a module of its name), with `cli`, `options`, `control`, `errors`

For tests, and with pytest:

- `lab` (the guests of a test), `checks` (what many tests assert), `oracle` (no write is lost)
- `faults` (arrays in flight, in the debug kernel)
- `metal` (the bare-metal guest in a migration), `resident` (a guest that stays, under KVM)
- `absence` (what is absent of a guest), `leftovers` (another guest's data at the destination)
- `domains` (two libvirt hosts and a guest), `fake_libvirt` (one that is made up)
- `debian_root` (to install packages in), `hosts_in_root` (libvirt hosts there)
- `model_search` (spin and the model)
"""
