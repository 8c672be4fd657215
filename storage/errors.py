"""Errors that users see. Each says which file or field, what was found, and what to do; each has an exit code."""

from __future__ import annotations

from typing import ClassVar


class OpdError(Exception):
    """Base of every error that is the user's or the machine's, not a bug: printed without a traceback."""

    exit_code: ClassVar[int] = 1


class ConfigError(OpdError):
    """A configuration that cannot be run: unknown key, value out of range, combination that makes no sense."""

    exit_code: ClassVar[int] = 2


class InputError(OpdError):
    """A file, folder or name given by the user is missing, malformed or has changed."""

    exit_code: ClassVar[int] = 2


class IdentityMismatch(OpdError):
    """A name is taken by something with another identity."""

    exit_code: ClassVar[int] = 2


class StoreError(OpdError):
    """The store was used wrongly, or its root cannot hold a store."""


class CorruptArtifact(OpdError):
    """Bytes in the store are not the ones that were written, or a rebuild did not reproduce them."""


class Evicted(OpdError):
    """The data was removed by `opd gc`, on purpose; it must be made again before it can be read."""


class NotEnoughSpace(OpdError):
    """The disk under the store is full, or too small for what is planned."""


class RunBusy(OpdError):
    """Another process holds the run. `holder` says which: pid, host, command, since when."""

    exit_code: ClassVar[int] = 75

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder

    def __reduce__(self) -> tuple[type[RunBusy], tuple[str, str]]:
        return type(self), (str(self), self.holder)
