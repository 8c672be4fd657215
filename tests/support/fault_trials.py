"""Trials of the fault tests: how many, which are done already, and the table of docs/reliability.md made from them.

A test runs its trials through `Trials`. In the short form (`make test`) they simply run. In the full form (`make faults`)
each result is appended to `<OPD_FAULTS_DIR>/<commit>.jsonl` as soon as it is there; a trial that passed on this commit is
not run again, so that a run can be stopped and continued. A failed one is tried again, but its failure stays on record.

    python tests/support/fault_trials.py docs/reliability.md     puts the table of this commit's results into the page"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
FULL_SECONDS = 12 * 3600
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def both_forms(short: int, full: int) -> pytest.MarkDecorator:
    """Parametrises `count`: the number of trials in `make test` and in `make faults`."""
    marks = (pytest.mark.faults, pytest.mark.timeout(FULL_SECONDS))
    return pytest.mark.parametrize(
        "count", [pytest.param(short, id="short"), pytest.param(full, id="full", marks=marks)]
    )


def commit() -> str:
    """The commit, and for a changed tree a digest of the changes."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("diff", "HEAD", "--", "storage", "tasks", "flows", "tests")
    return head + (f"-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()


def folder() -> Path:
    return Path(os.environ.get("OPD_FAULTS_DIR") or CHECKOUT / ".faults").absolute()


class Trials:
    """Runs trials of one test. `record` is the file of results; None in the short form."""

    def __init__(self, record: Path | None, test: str) -> None:
        self.record, self.test = record, test
        self._lock = threading.Lock()

    def __call__(
        self, row: int, fault: str, names: Iterable[str], attempt: Callable[[str], object], parallel: int = 1
    ) -> None:
        """Runs `attempt(name)` for every trial that has not passed yet; AssertionError at the end if any failed.

        `row` is that of the table of promises, `fault` what is done to the system, in words."""
        done = {line["trial"] for line in self._lines() if line["row"] == row and line["fault"] == fault and line["ok"]}
        failures: list[str] = []

        def one(name: str) -> None:
            started = time.monotonic()
            try:
                attempt(name)
                problem = None
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                failures.append(f"{name}: {problem}")
                if self.record is None:
                    raise
            self._note(row, fault, name, problem, time.monotonic() - started)

        with ThreadPoolExecutor(parallel) as pool:
            running = [pool.submit(one, name) for name in names if name not in done]
            try:
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        assert not failures, f"{len(failures)} trials failed:\n" + "\n".join(failures[:20])

    def _note(self, row: int, fault: str, name: str, problem: str | None, seconds: float) -> None:
        if self.record is None:
            return
        line = {"row": row, "fault": fault, "trial": name, "ok": problem is None, "problem": problem}
        line |= {"seconds": round(seconds, 3), "test": self.test.partition("[")[0], "when": time.strftime("%FT%T%z")}
        with self._lock, self.record.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self) -> list[dict]:
        return read(self.record) if self.record is not None else []


def read(path: Path) -> list[dict]:
    """The results so far; a line that was torn when its writer was killed does not count."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def table(lines: list[dict]) -> str:
    """The Markdown table: a line per fault; every failure on record counts."""
    groups: dict[tuple[int, str], list[dict]] = {}
    for line in lines:
        groups.setdefault((line["row"], line["fault"]), []).append(line)
    rows = ["| # | fault | trials | result | minutes | command |", "|---|---|---|---|---|---|"]
    for (row, fault), group in sorted(groups.items()):
        failed = [line for line in group if not line["ok"]]
        result = f"**{len(failed)} failed**" if failed else "all passed"
        minutes = sum(line["seconds"] for line in group) / 60
        command = f"`pytest -m faults {group[0]['test']}`"
        rows.append(f"| {row} | {fault} | {len({x['trial'] for x in group})} | {result} | {minutes:.1f} | {command} |")
    return "\n".join(rows)


def write(page: Path, name: str) -> None:
    """Puts the table between the page's markers."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = read(folder() / f"{name}.jsonl")
    total = f"{len(lines)} trials on commit {name}, {sum(not line['ok'] for line in lines)} failures."
    page.write_text(f"{before}{BEGIN}\n{total}\n\n{table(lines)}\n{END}{after}")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else commit())
