"""The logs of workers: where an attempt begins in one, and reading their ends. What a worker's Python code writes is redacted as
it is written; what its libraries and their processes write is not, and is redacted here, by whole lines."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from storage.disk.redact import redact

TAIL_BYTES = 64 * 1024
"""Of a log, the part that `last_lines` reads."""
CUT = "(the rest is not a whole line)"
"""Instead of an end without a line end: half a secret would not be recognised."""
_ATTEMPT = re.compile(rb"^--- \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} .*\n?", re.MULTILINE)
"""What `attempt_begins` writes."""


@dataclass(frozen=True)
class Lines:
    """Whole lines of a log. `end`: the offset in bytes behind them; `cut`: whether something without a line end follows."""

    data: bytes
    end: int
    cut: bool

    @property
    def text(self) -> str:
        """Without secrets: these are removed from the whole, because one may have several lines."""
        return redact(self.data.decode(errors="replace"))


def attempt_begins(log: Path, what: str) -> None:
    """Writes to a log the line that begins an attempt: a worker's start, or a job of a worker. `what`: the end of the line."""
    with log.open("a+b") as out:
        size = out.seek(0, os.SEEK_END)
        out.seek(max(size - 1, 0))
        gap = b"" if out.read() in (b"", b"\n") else b"\n"  # a worker that is killed can leave half a line
        out.write(gap + f"{time.strftime('--- %Y-%m-%dT%H:%M:%S%z')} {what}\n".encode())


def whole_lines(log: Path, since: int = 0, most: int | None = None) -> Lines:
    """The lines behind an offset; of more than `most` bytes the last ones. A log that is shorter than `since` has none."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = min(since, size)
        shortened = most is not None and size - begin > most
        if most is not None and shortened:
            begin = size - most
        file.seek(begin)
        data = file.read(size - begin)
    stop = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1  # progress bars end their lines with a carriage return
    if not stop:
        return Lines(b"", min(since, size), bool(data))
    first = min((at + 1 for end in (b"\n", b"\r") if (at := data.find(end)) >= 0), default=0) if shortened else 0
    return Lines(data[first:stop], begin + stop, stop < len(data))


def last_lines(log: Path, count: int = 12) -> str:
    """The last lines of a log that belong to its last attempt, under a line with its path."""
    try:
        found = whole_lines(log, most=TAIL_BYTES)
    except OSError:
        found = Lines(b"", 0, False)
    own = Lines(_ATTEMPT.split(found.data)[-1], found.end, found.cut)
    tail = [line.rstrip() for line in own.text.splitlines()[-count:]] + [CUT] * own.cut
    return "\n  ".join([f"last lines of {log}:", *tail]) if tail else f"this attempt wrote nothing to {log}"
