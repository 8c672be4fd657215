"""Looks for a secret in everything that a run has left: every byte of every file, and what Parquet and SQLite hold inside."""

from __future__ import annotations

import base64
import json
import sqlite3
import urllib.parse
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq


def spellings(secret: str) -> set[bytes]:
    """As it is, as JSON, Python and SQL write it, quoted for a URL, in UTF-16, hexadecimal, and inside of base64 at each of
    three places."""
    raw = secret.encode()
    plain = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], secret.replace("'", "''")}
    plain |= {json.dumps(form)[1:-1] for form in plain} | {urllib.parse.quote(secret, safe="")}
    coded = {base64.b64encode(bytes(shift) + raw)[shift + 1 if shift else 0 : -4] for shift in range(3)}
    return {form.encode() for form in plain} | {secret.encode("utf-16-le"), raw.hex().encode(), *coded}


def contents(path: Path) -> Iterator[bytes]:
    """What a file holds: its bytes, and its values in plain text where it packs them."""
    data = path.read_bytes()
    yield data
    if data[:4] == b"PAR1":
        table = pq.read_table(path)
        yield str(table.schema).encode() + repr(table.to_pydict()).encode()
    if data[:15] == b"SQLite format 3":
        with closing(sqlite3.connect(path)) as connection:
            yield "\n".join(connection.iterdump()).encode(errors="surrogateescape")


def places(secrets: Iterable[str], folder: Path) -> list[str]:
    """Names of the files in which one of the secrets stands, or whose name holds it."""
    forms, found = set[bytes]().union(*map(spellings, secrets)), []
    for path in sorted(folder.rglob("*")):
        held = [str(path).encode()] + (list(contents(path)) if path.is_file() and not path.is_symlink() else [])
        if any(form in data for form in forms for data in held):
            found.append(str(path.relative_to(folder)))
    return found
