"""Parts: what is finished of a shard that is not. A worker that dies takes only its unfinished work with it.

One file beside the shards, a line per finished item: 16 hex digits of the SHA-256 of its JSON, then the JSON. Nobody but
who makes the shard reads it, and a line that was torn or changed does not count. It is not fsynced: what a power cut
takes of it is made again. It goes when its shard is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.disk.files import explain_full_disk

PARTS = ".parts"
_DIGITS = 16


class Parts:
    """The finished items of one shard, by name. Made by `ShardWriter.parts`; one process at a time adds to them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Every item that is whole, as plain JSON; of two with one name the first."""
        found: dict[str, Any] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return found
        for line in lines:
            digest, _, text = line.partition(b" ")
            if _digest(text) == digest:
                name, item = json.loads(text)
                found.setdefault(name, item)
        return found

    def add(self, items: Mapping[str, Any]) -> None:
        """Appends items in one write. NotEnoughSpace when the disk is full."""
        lines = [json.dumps([name, item], allow_nan=False).encode() for name, item in items.items()]
        # it begins with a line's end: the last line may have been torn
        data = b"\n" + b"\n".join(_digest(line) + b" " + line for line in lines) + b"\n"
        with explain_full_disk(self.path), open(self.path, "ab", buffering=0) as file:
            file.write(data)

    def remove(self) -> None:
        """The shard is there: its parts are not needed any more."""
        self.path.unlink(missing_ok=True)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGITS].encode()
