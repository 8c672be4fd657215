"""A store from Python and notebooks: `lab = opdflow.open("opd-store")`. Nothing is written.

    lab.runs                                    the runs of the store
    lab.sql("SELECT ... FROM tokens")           SQL over the views that `opd query` lists
    demo = lab.run("demo")
    demo.rounds                                 figures per round
    demo.tokens(round=3)                        one row per completion token
    demo.ask("worst-tokens", round=3, limit=5)  a question of `opd query --list`

Every answer is a `Result`: an Arrow table, with `.pandas()` and `.polars()`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.disk.files import scheme
from storage.errors import InputError
from storage.query.catalog import Catalog
from storage.query.questions import question, questions
from storage.runs import Run, RunState, settled
from storage.store import Store

MAX_ROWS = 20_000_000
"""Rows of an answer, beside its size of 1 GiB."""


class Result:
    """The answer to a query. `arrow` is the table; libraries that read Arrow (polars, DuckDB, pandas) take the result itself."""

    def __init__(self, arrow: pa.Table) -> None:
        self.arrow = arrow

    def pandas(self) -> Any:
        """A pandas DataFrame. ImportError, with what to install, where pandas is not there."""
        _library("pandas")
        return self.arrow.to_pandas()

    def polars(self) -> Any:
        """A polars DataFrame. ImportError, with what to install, where polars is not there."""
        return _library("polars").from_arrow(self.arrow)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per row."""
        return list(self.arrow.to_pylist(maps_as_pydicts="lossy"))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows())

    def __len__(self) -> int:
        return int(self.arrow.num_rows)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.arrow.__arrow_c_stream__(requested_schema)

    def __repr__(self) -> str:
        from rich.console import Console

        from flows.cli.questions import print_answer

        out = Console(width=120, color_system=None, highlight=False)
        with out.capture() as shown:
            print_answer(self.arrow, out)
        return shown.get()

    def _repr_html_(self) -> str:
        from html import escape

        names = "".join(f"<th>{escape(name)}</th>" for name in self.arrow.column_names)
        lines = "".join(
            "<tr>" + "".join(f"<td>{escape(_shown(value))}</td>" for value in row.values()) + "</tr>"
            for row in Result(self.arrow.slice(0, 50))
        )
        more = len(self) - 50
        return f"<table><tr>{names}</tr>{lines}</table>" + (f"<p>{more:,} more rows</p>" if more > 0 else "")


class LabRun:
    """One run. Its state is read anew by every call, so that a run that is going on can be watched."""

    def __init__(self, lab: Lab, name: str) -> None:
        Run.open(lab.root, name)
        self.lab, self.name = lab, name

    @property
    def config(self) -> dict[str, Any]:
        """The experiment as it was resolved."""
        return Run.open(self.lab.root, self.name).experiment

    @property
    def status(self) -> str:
        """new, running, stopped, failed or finished: as `opd status --json` has it."""
        return _state(Run.open(self.lab.root, self.name)).status

    @property
    def rounds(self) -> Result:
        """Figures per round, with standard errors."""
        return self.sql("SELECT * EXCLUDE (run, stages) FROM rounds ORDER BY round")

    def tokens(self, round: int | None = None) -> Result:
        """One row per completion token of a round, or of all."""
        return self._of("tokens", round)

    def rollouts(self, round: int | None = None) -> Result:
        """One row per sample of a round, or of all."""
        return self._of("rollouts", round)

    def evaluations(self, round: int | None = None) -> Result:
        """One row per held-out sample of a round, or of all."""
        return self._of("evaluations", round)

    def steps(self, round: int | None = None) -> Result:
        """One row per optimizer step of a round, or of all."""
        return self._of("training_steps", round)

    def ask(self, name: str, **parameters: object) -> Result:
        """A named question. InputError for an unknown question or parameter."""
        run, given = Run.open(self.lab.root, self.name), {key: str(value) for key, value in parameters.items()}
        asked = question(name)
        others = {given["other"]: Run.open(self.lab.root, given["other"])} if "other" in given else {}
        sql = asked.sql(run.state, given, {other: of.state for other, of in others.items()})
        return self.lab._query(sql, run, *(of for of in others.values() if of.name != run.name))

    def sql(self, sql: str, **limits: Any) -> Result:
        """SQL over this run alone."""
        return self.lab._query(sql, Run.open(self.lab.root, self.name), **limits)

    def __repr__(self) -> str:
        state = _state(Run.open(self.lab.root, self.name))
        last = state.last_trained
        return f"<run {self.name}: {state.status}{'' if last is None else f', round {last.round}'}>"

    def _of(self, view: str, round: int | None) -> Result:
        if round is not None:
            known = [known.round for known in Run.open(self.lab.root, self.name).state.rounds]
            if round not in known:
                raise InputError(
                    f"round={round}: run {self.name!r} has the rounds {', '.join(map(str, sorted(known))) or 'none'}"
                )
        where = "" if round is None else f" WHERE round = {int(round)}"
        return self.sql(f"SELECT * EXCLUDE (run) FROM {view}{where}")


class Lab:
    """A store. Read only."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def runs(self) -> Result:
        """Name, status, last finished round and last change of every run, the last changed first; as `opd ls`."""
        states = sorted((_state(run) for run in Run.list(self.root)), key=lambda state: state.updated, reverse=True)
        rows = [{"run": s.name, "status": s.status, "rounds": s.rounds_done, "updated": s.updated} for s in states]
        types = [("run", pa.string()), ("status", pa.string()), ("rounds", pa.int64()), ("updated", pa.string())]
        return Result(pa.Table.from_pylist(rows, pa.schema(types)))

    @property
    def questions(self) -> Result:
        """The named questions."""
        return Result(
            pa.table({name: [getattr(q, name) for q in questions().values()] for name in ("name", "doc", "usage")})
        )

    def run(self, name: str) -> LabRun:
        """A run. InputError, with the nearest name, if there is none."""
        return LabRun(self, name)

    def sql(self, sql: str, **limits: Any) -> Result:
        """One SELECT over the views of all runs. `limits`: limit_seconds (30), memory ('4GB'; by default half of what is free),
        max_rows. QueryRefused for other statements and beyond a limit."""
        return self._query(sql, **limits)

    def _query(self, sql: str, *runs: Run, **limits: Any) -> Result:
        return Result(Catalog(Store(self.root), *runs).query(sql, **({"max_rows": MAX_ROWS} | limits)))

    def __repr__(self) -> str:
        return f"<store {self.root}: {len(self.runs)} runs>"


def open(root: str | Path = "opd-store") -> Lab:
    """The store in a folder. InputError where there is none: reading must not make one."""
    folder = Path(root)
    if found := scheme(folder):
        raise InputError(f"{root}: a folder on this machine is needed, and this looks like {found}")
    if not (folder / "artifacts").is_dir():
        raise InputError(f"{folder}: no store in this folder; give the folder that `opd run --root` wrote to")
    return Lab(folder)


def _state(run: Run) -> RunState:
    """The state as the command line shows it: of a run whose process is gone `stopped`, not `running`."""
    holder = run.holder()
    return settled(run.state, holder)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install {name}; or use .arrow or .rows()") from error


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
