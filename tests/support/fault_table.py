"""The table of docs/reliability.md, made from the record of `make faults`:

python tests/support/fault_table.py docs/reliability.md     puts the results on the present code into the page

The page says "incomplete", and what is missing, unless all tests of the full form have passed on this commit and every
promise has a trial."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fault_record import Record, commit, folder
from places import CHECKOUT

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
MARKS = "faults or promise"
COMMAND = f'.venv/bin/python -m pytest -m "{MARKS}"'
ROWS = range(1, 19)
"""The promises of docs/reliability.md."""
NAMED = 4
"""So many missing tests of one function are named; of more, the number."""


def table(lines: list[dict[str, Any]], rows: Iterable[int] = ()) -> str:
    """The Markdown table: a line per fault; every failure on record counts. Of `rows`, those without a trial are shown."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["row"], line["fault"]), []).append(line)
    found = ["| # | fault | trials | result | minutes | command |", "|---|---|---|---|---|---|"]
    empty = [(row, "") for row in rows if row not in {number for number, _ in groups}]
    for row, fault in sorted([*groups, *empty]):
        group = groups.get((row, fault), [])
        failed = [line for line in group if not line["ok"]]
        result = f"**{len(failed)} failed**" if failed else "all passed" if group else "**missing**"
        minutes = sum(line["seconds"] for line in group) / 60
        tests = {_function(line["test"]): None for line in group}
        # several tests for one fault: their files
        places = tests if len(tests) == 1 else {test.partition("::")[0]: None for test in tests}
        command = f"`{COMMAND} {' '.join(places)}`" if group else ""
        trials = len({(x["test"], x["trial"]) for x in group})
        found.append(f"| {row or '?'} | {fault} | {trials} | {result} | {minutes:.1f} | {command} |")
    return "\n".join(found)


def collect(checkout: Path = CHECKOUT) -> list[str]:
    """The ids of all tests of the full form. RuntimeError when pytest cannot collect them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", MARKS]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    tests = done.stdout.partition("\n\n")[0].splitlines()
    counted = re.search(r"^(\d+)(?:/\d+)? tests? collected", done.stdout, re.MULTILINE)
    if done.returncode or counted is None or int(counted[1]) != len(tests):
        said = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise RuntimeError(f"pytest cannot collect the tests of the full form:\n{said}")
    return tests


def missing(record: Record, tests: Iterable[str]) -> list[str]:
    """The tests that have not passed on this commit, a line per test function, with the trials that they have so far."""
    lines = record.lines()
    passed = record.ended() | {line["test"] for line in lines if line["ok"] and line["trial"] == line["test"]}
    functions: dict[str, list[str]] = {}
    for test in tests:
        functions.setdefault(_function(test), []).append(test)
    found = []
    for function, its in functions.items():
        left = [test for test in its if test not in passed]
        if not left:
            continue
        text = f"`{function}`: {len(left)} of {len(its)} tests" if len(left) > NAMED else f"`{'`, `'.join(left)}`"
        counts = []
        for (test, row, fault), trials in record.planned().items():
            if test in left:
                made = {x["trial"] for x in lines if (x["test"], x["row"], x["fault"]) == (test, row, fault)}
                counts.append(f"{len(made)} of {trials} trials of row {row}, {fault}")
        found.append(f"{text}; {'; '.join(counts)}" if counts else text)
    return found


def report(record: Record, name: str, tests: Iterable[str]) -> str:
    """What the page says: how many trials, on which commit, when, on what; what is missing; then the table."""
    record.note_deaths()
    lines = record.lines()
    if not lines:
        return f"Not run yet on commit {name}."
    days = sorted({line["when"][:10] for line in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    trials = len({(line["row"], line["fault"], line["test"], line["trial"]) for line in lines})
    failures = sum(not line["ok"] for line in lines)
    said = f"{trials} trials on commit {name}, {when}; {failures} failures."
    left = missing(record, tests)
    left += [f"row {row}: no trial" for row in ROWS if row not in {line["row"] for line in lines}]
    if left:
        said = f"**Incomplete**: so far {said} Missing, or failed and not passed since:\n\n" + "".join(
            f"- {line}\n" for line in left
        )
    machines = "".join(f"\nMachine: {machine}.\n" for machine in record.machines())
    return f"{said.rstrip()}\n{machines}\n{table(lines, ROWS)}"


def write(page: Path, name: str, tests: Iterable[str]) -> None:
    """Puts the report between the page's markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{report(Record(folder() / f'{name}.jsonl'), name, tests)}\n{END}{after}")


def _function(test: str) -> str:
    """A test's id without its parameters."""
    return test.partition("[")[0]


if __name__ == "__main__":
    write(Path(sys.argv[1]), commit(), collect())
