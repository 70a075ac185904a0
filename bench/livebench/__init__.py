# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmarks of live migrations: a declared matrix, one JSON file per run, a report.

What is compared is in modes.py, what the guests do in workloads.py, the matrix in scenarios.py;
engine.py makes one run, plan.py all of them in turn, summary.py and report.py read what they wrote;
demo.py is scripts/demo, which makes a few of them.
"""

import sys
from pathlib import Path

# The harness that the tests use too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
