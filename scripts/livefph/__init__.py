# SPDX-License-Identifier: GPL-2.0-or-later
"""What scripts/fph does, in modules that need nothing else of this project."""
