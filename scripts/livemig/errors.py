# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong; every message is one that a user can act on."""


class LivemigError(Exception):
    """Base of all errors that are shown without a traceback."""


class MissingArtifact(LivemigError):
    """A binary or an image has not been built."""


class BadSetting(LivemigError):
    """An environment variable has a value that cannot be used."""


class NotEnoughMemory(LivemigError):
    """The host has less memory than the guests will need."""


class GuestError(LivemigError):
    """A guest did not boot, a command in it failed, or its QEMU died."""


class MigrationError(LivemigError):
    """A migration did not end the way it was meant to."""


class NotPossibleHere(LivemigError):
    """This machine, or this user, cannot do what is asked for. Nothing went wrong."""
