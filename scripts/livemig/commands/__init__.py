# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands, each in a module of its name: scripts/guest, scripts/migrate."""
