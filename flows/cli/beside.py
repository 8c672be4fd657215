"""What `opd compare A B ...` shows beside the paired differences: where the configs differ, the figures of every round, and
where the greedy answers part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from flows.cli.options import grid
from flows.cli.questions import print_answer
from flows.run.compare import Compared, config_differences
from flows.run.figures import MAIN
from flows.run.shown import with_error
from storage.query.catalog import Catalog
from storage.query.figures import completed
from storage.query.questions import question
from storage.runs import Run
from storage.store import Store

SHOWN = 3
"""Prompts of which it is shown where the answers part."""
_ALL = 1_000_000


def parted(root: Path, line: Compared) -> pa.Table:
    """Rows of the question `where-they-part` for two evaluated rounds."""
    one, other = Run.open(root, line.one.run), Run.open(root, line.other.run)
    given = {"round": str(line.one.round.round), "other_round": str(line.other.round.round), "other": other.name}
    sql = question("where-they-part").sql(one.state, given | {"limit": str(_ALL)}, {other.name: other.state})
    return Catalog(Store(root), *({one.name: one, other.name: other}.values())).query(sql)


def as_json(root: Path, line: Compared) -> dict[str, Any]:
    """`config`: the differing fields; `parted`: the prompts whose greedy answers differ, and where."""
    names = list(dict.fromkeys((line.one.run, line.other.run)))
    return {"config": config_differences(root, names), "parted": parted(root, line).to_pylist()}


def print_beside(root: Path, lines: Sequence[Compared], out: Console) -> None:
    """The three parts; the first two where the runs are different ones."""
    names = list(dict.fromkeys([lines[0].other.run, *(line.one.run for line in lines)]))
    if names[1:]:
        _print_config(config_differences(root, names), names, out)
        _print_figures(root, names, out)
    for line in lines:
        _print_parted(line, parted(root, line), out)


def _print_config(rows: list[dict[str, Any]], names: Sequence[str], out: Console) -> None:
    if not rows:
        return out.print("the configs are equal")
    table = grid("config", *names)
    for row in rows:
        table.add_row(*(Text("" if row[name] is None else str(row[name])) for name in ("field", *names)))
    out.print(table)


def _print_figures(root: Path, names: Sequence[str], out: Console) -> None:
    """One row per round and run, so that any number of runs fits."""
    states = {name: completed(Store(root), Run.open(root, name).state) for name in names}
    table = grid("round", "run", *(figure.heading for figure in MAIN))
    for number in sorted({round.round for state in states.values() for round in state.rounds}):
        for name, state in states.items():
            for round in state.rounds:
                if round.round == number:
                    cells = (with_error(round.metrics, figure.metric, figure.form) for figure in MAIN)
                    table.add_row(str(number), name, *cells)
        table.add_section()
    out.print(table)


def _print_parted(line: Compared, rows: pa.Table, out: Console) -> None:
    if line.figures.get("accuracy_greedy") is None:
        return None  # no greedy answers, or none to the same prompts
    if not rows.num_rows:
        return out.print(f"the greedy answers of {line.one} and {line.other} are equal")
    middle = pc.quantile(rows["position"], interpolation="lower")[0].as_py()
    out.print(
        f"\ngreedy answers of {line.one} and {line.other} differ on {rows.num_rows:,} of {_prompts(line)} prompts,"
        f" half of them by token {middle}; the last to part:"
    )
    shown = ["prompt_id", "position", "token", "other_token", "answer", "other_answer"]
    print_answer(rows.sort_by([("position", "descending")]).slice(0, SHOWN).select(shown), out)


def _prompts(line: Compared) -> str:
    found = line.figures.get("accuracy_greedy")
    return f"{found.prompts:,}" if found is not None else "the shared"
