"""The table of docs/reliability.md, made from the record of `make faults`:

python tests/support/fault_table.py docs/reliability.md     puts the results on this commit into the page"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fault_trials import Record, commit, folder

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
COMMAND = '.venv/bin/python -m pytest -m "faults or promise"'


def table(lines: list[dict[str, Any]]) -> str:
    """The Markdown table: a line per fault; every failure on record counts."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["row"], line["fault"]), []).append(line)
    rows = ["| # | fault | trials | result | minutes | command |", "|---|---|---|---|---|---|"]
    for (row, fault), group in sorted(groups.items()):
        failed = [line for line in group if not line["ok"]]
        result = f"**{len(failed)} failed**" if failed else "all passed"
        minutes = sum(line["seconds"] for line in group) / 60
        tests = {line["test"]: None for line in group}
        # several tests for one fault: their files
        places = tests if len(tests) == 1 else {test.partition("::")[0]: None for test in tests}
        command = f"`{COMMAND} {' '.join(places)}`"
        trials = len({(x["test"], x["trial"]) for x in group})
        rows.append(f"| {row} | {fault} | {trials} | {result} | {minutes:.1f} | {command} |")
    return "\n".join(rows)


def report(record: Record, name: str) -> str:
    """What the page says: how many trials, on which commit, when, on what; then the table."""
    lines = record.lines()
    if not lines:
        return f"Not run yet on commit {name}."
    days = sorted({line["when"][:10] for line in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    trials = len({(line["row"], line["fault"], line["test"], line["trial"]) for line in lines})
    failures = sum(not line["ok"] for line in lines)
    machines = "".join(f"\nMachine: {machine}.\n" for machine in record.machines())
    return f"{trials} trials on commit {name}, {when}; {failures} failures.\n{machines}\n{table(lines)}"


def write(page: Path, name: str) -> None:
    """Puts the report between the page's markers."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{report(Record(folder() / f'{name}.jsonl'), name)}\n{END}{after}")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else commit())
