"""Errors that users see: which file or field, what was found, what to do. Each class has an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class OpdError(Exception):
    """Base of all errors that are not bugs; printed without a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(OpdError):
    """An invalid config: unknown field, value out of range, invalid combination."""

    exit_code: ClassVar[int] = 2


class InputError(OpdError):
    """A file, folder or name from the user is missing, malformed or has changed."""

    exit_code: ClassVar[int] = 2


class IdentityMismatch(OpdError):
    """A name belongs to something with another identity."""

    exit_code: ClassVar[int] = 2


class StoreError(OpdError):
    """Wrong use of the store, or a root that cannot hold a store."""


class CorruptArtifact(OpdError):
    """Bytes in the store differ from those that were written, or a rebuild did not reproduce them."""


class Evicted(OpdError):
    """The data was removed by `opd gc`; it must be rebuilt before it can be read."""


class NotEnoughSpace(OpdError):
    """The disk of the store is full, or too small for the planned work."""


class RunBusy(OpdError):
    """Another process holds the run. `holder` describes it: pid, host, command, start time."""

    exit_code: ClassVar[int] = 75

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder

    def __reduce__(self) -> tuple[type[RunBusy], tuple[str, str]]:
        return type(self), (str(self), self.holder)


RELATIVE = "a relative path in a config starts at the config's folder, one in --set at the working directory"
"""For messages about a path that does not exist."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`did you mean 'NEAREST'?` for the known name closest to `name`, or `otherwise` if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else otherwise
