# SPDX-License-Identifier: GPL-2.0-or-later
"""Live migrations of real guests: the harness of the demo, the tests and the benchmarks.

A few lines are a whole migration::

    mode = MODES["array"]
    spec = GuestSpec(mem_mib=1024).for_mode(mode)
    with Guest(spec, "source") as source, Guest(spec, "destination", incoming=True) as destination:
        source.wait_ready()
        result = migrate(source, destination, migration_for_mode(mode))
        print(result.total_ms, result.hints)
"""
