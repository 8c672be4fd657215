"""Temporary names say whose they are, and those of dead processes go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from storage.files import TEMPORARY, remove_leftovers, temporary_name


def test_what_a_dead_process_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    mine = tmp_path / temporary_name("mine")
    mine.mkdir()
    code = "import storage.files; print(storage.files.temporary_name())"
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / left).write_text("half")
    other = tmp_path / f"{TEMPORARY}00000000-1.1-0123456789ab"
    other.write_text("of another machine")
    assert remove_leftovers(tmp_path, places=("",)) == [tmp_path / left]
    assert mine.exists() and other.exists()
    assert remove_leftovers(tmp_path, places=("",), mine=True) == [mine] and other.exists()


def test_an_id_that_another_process_has_by_now_protects_nothing(tmp_path: Path) -> None:
    machine, _, rest = temporary_name().removeprefix(TEMPORARY).split("-")[:3]
    old = tmp_path / f"{TEMPORARY}{machine}-{os.getpid()}.1-{rest}"
    old.write_text("of a process that had our id")
    unknown = tmp_path / f"{TEMPORARY}{machine}-{os.getpid()}.0-{rest}"
    unknown.write_text("where the kernel told no start")
    assert remove_leftovers(tmp_path, places=("",)) == [old]
    assert unknown.exists()
