"""`opd status`, `ls`, `logs`, `query`: read-only commands. They load no engine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import SLIM, Json, ReadRoot, Root, RunName, console, example, existing_root, fitting, grid
from flows.run.hints import DEFAULT_ROOT, opd_command
from storage.errors import InputError
from storage.runs import RoundState, Run, RunState

COMPARED = (
    "each row: second minus first, as its name says; ± is one standard error over prompts; not told apart: the 95% interval"
    " contains 0"
)
EXAMPLE_SQL = "SELECT run, round, accuracy_greedy, reverse_kl FROM rounds ORDER BY run, round"
POLL_SECONDS = 0.5
"""How often `opd logs --follow` looks for new lines."""


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd status demo --json"))(status)
    app.command(epilog=example("opd watch demo"))(watch)
    app.command("ls", epilog=example("opd ls --json"))(list_runs)
    app.command(epilog=example("opd compare demo@5 wider@5"))(compare)
    app.command(epilog=example("opd logs demo --stage train --follow"))(logs)
    app.command(
        epilog=example("opd query demo 'SELECT round, avg(teacher_logprob) AS mean FROM tokens GROUP BY round' --csv")
    )(query)


def status(
    name: Annotated[str | None, typer.Argument(help="a run's name (default: the run that changed last)")] = None,
    json_: Json = False,
    root: ReadRoot = DEFAULT_ROOT,
) -> None:
    """Show a run: metrics per round, failures, the student's folder, and commands to continue.

    With --json: name, status, error (of a failed run), updated, next (commands), and for each round metrics, student_sha256, and
    for each stage key, state, seconds, rows, error, evicted.

    Exit codes: 0 shown (whatever the run's status), 2 no such run."""
    from flows.cli.report import print_report, status_json
    from storage.runs import settled

    run = Run.open(root, name) if name is not None else _latest(root)
    holder = run.holder()
    state = settled(run.state, holder)
    if json_:
        typer.echo(json.dumps(status_json(state, root), indent=2))
    else:
        print_report(state, root, holder)


def watch(
    name: Annotated[str | None, typer.Argument(help="a run's name (default: the run that changed last)")] = None,
    every: Annotated[float, typer.Option("--every", min=0.2, help="seconds between two looks")] = 2.0,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Show a run's status again and again until no process works on it or Ctrl-C. It reads only: beside a run it changes nothing.

    Without a terminal: a report whenever the run's state has changed.

    Exit codes: 0 the run is over or not running, 1 it failed, 2 no such run, 130 Ctrl-C."""
    from flows.cli.watch import follow

    run = Run.open(root, name) if name is not None else _latest(root)
    if not follow(run, root, every):
        raise typer.Exit(1)


def list_runs(json_: Json = False, root: ReadRoot = DEFAULT_ROOT) -> None:
    """List the runs of a store, the most recently changed last.

    Exit codes: 0, also when there is no run."""
    from flows.cli.report import evicted
    from flows.run.figures import MAIN
    from flows.run.shown import NOT_EVALUATED, pace_text, samples, status_text, with_error
    from storage.runs import settled

    states = sorted((settled(run.state, run.holder()) for run in Run.list(root)), key=lambda state: state.updated)
    gone = {state.name: sorted({round for round, _ in evicted(state, root)}) for state in states}
    if json_:
        lines = [_line(state, _last(state, root)) | {"evicted_rounds": gone[state.name]} for state in states]
        typer.echo(json.dumps(lines, indent=2))
        return
    if not states:
        typer.echo(f"no runs in {root}; start one with: opd run CONFIG")
        return
    out = console()
    headings = ("run", "status", "round", *(figure.heading for figure in MAIN))
    some_gone = any(gone.values())
    wide, slim = grid(*headings, *(["evicted"] if some_gone else [])), grid(*headings, **SLIM)
    for table in (wide, slim):
        table.columns[1].min_width = len("finished")  # no state breaks within a word
        table.add_column("changed (UTC)")
        for column in table.columns[3:]:
            column.no_wrap = True  # a figure and a time are read on one line
    for state in states:
        last = _last(state, root)
        cells, sizes = ["", ""], ["", ""]
        for place, figure in enumerate(MAIN):
            if last is not None and (text := with_error(last.metrics, figure.metric, figure.form)):
                size = samples(last.metrics, figure.metric)
                cells[place], sizes[place] = text, f" ({size})" if size else ""
        if last is not None and last.unevaluated:
            cells[0], sizes[0] = NOT_EVALUATED, ""
        lost = f"of {len(gone[state.name])} rounds" if gone[state.name] else ""
        first = (
            state.name,
            ", ".join(filter(None, (status_text(state, root), pace_text(state, root)))),
            str(last.round) if last else "",
        )
        changed = state.updated[:16].replace("T", " ")
        sized = (f"{cell}{size}" for cell, size in zip(cells, sizes, strict=True))
        wide.add_row(*first, *sized, *([lost] if some_gone else []), changed)
        slim.add_row(*first, *cells, changed)
    out.print(fitting(out, wide, slim))


def compare(
    first: Annotated[str, typer.Argument(metavar="NAME[@ROUND]", help="a run, or a round of it", show_default=False)],
    others: Annotated[
        list[str] | None, typer.Argument(metavar="NAME[@ROUND]...", help="what to compare with it", show_default=False)
    ] = None,
    json_: Json = False,
    root: ReadRoot = DEFAULT_ROOT,
) -> None:
    """Paired differences between evaluations, on the prompts that both have, with standard errors clustered by prompt.

    One run: each evaluated round minus the one before. Several: each further one minus the first, a run without @ROUND at its
    last evaluated round; also where their configs differ, the figures of every round, and where the greedy answers part. Not told
    apart: the 95% interval contains 0. In SQL: the view `differences`, and `opd query --list`.

    Exit codes: 0 shown, 1 damaged evaluations, 2 no such run or round, or not evaluated."""
    from flows.cli import beside
    from flows.run.compare import compared, evaluated_rounds, point
    from flows.run.figures import PAIRED
    from flows.run.shown import apart
    from storage.store import Store

    store = Store(existing_root(root))
    if others:
        base = point(root, first)
        pairs = [(point(root, other), base) for other in others]
    else:
        rounds = evaluated_rounds(root, first)
        pairs = list(zip(rounds[1:], rounds, strict=False))
    found = [compared(store, one, other) for one, other in pairs]
    if json_:
        more = [beside.as_json(root, line) if others else {} for line in found]
        typer.echo(json.dumps([line.as_json() | added for line, added in zip(found, more, strict=True)], indent=2))
        return
    shown = [figure for figure in PAIRED if any(figure.metric in line.figures for line in found)]
    headings = ("second - first", *(figure.heading for figure in shown), "prompts")
    tables = [grid(*headings, caption=COMPARED, caption_justify="left", **form) for form in ({}, SLIM)]
    for line in found:
        cells = [apart(line.figures[f.metric], f.form) if f.metric in line.figures else "" for f in shown]
        below = [text.replace(", ", ",\n") for text in cells]  # no figure is broken
        for table, texts in zip(tables, (cells, below), strict=True):
            table.add_row(f"{line.one} - {line.other}", *texts, line.prompts)
    out = console()
    out.print(fitting(out, *tables))
    if others:
        beside.print_beside(root, found, console())


def logs(
    name: RunName,
    stage: Annotated[str | None, typer.Option("--stage", help="only logs whose name begins with this")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print new lines until the run ends")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="last lines of each log; 0: all")] = 200,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Show the logs of a run's stages and workers, without secrets.

    Exit codes: 0 shown, 2 no such run or log, 130 Ctrl-C."""
    run = Run.open(root, name)
    names = sorted(path.stem for path in _log_files(run, None))
    shown = _log_files(run, stage)
    if not shown and not follow:
        wanted = f"no log begins with {stage!r}; logs: {', '.join(names) or 'none yet'}" if stage else "no logs yet"
        raise InputError(f"run {name!r}: {wanted}")
    ends = {path: _show_tail(path, lines, len(shown) > 1, follow) for path in shown}
    if follow:
        _follow(run, stage, ends)


def query(
    name_or_sql: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME[@ROUND]", help="a run (default: all runs); for a question also its round", show_default=False
        ),
    ] = None,
    sql: Annotated[
        str | None,
        typer.Argument(metavar="SQL", help="one SELECT, a question's name, or a view's name", show_default=False),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Argument(metavar="PARAMETER=VALUE...", help="of the question, e.g. round=3", show_default=False),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="list the named questions and their parameters")] = False,
    show_sql: Annotated[bool, typer.Option("--sql", help="print the question's SQL instead of asking it")] = False,
    json_: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="print the result as CSV")] = False,
    limit_seconds: Annotated[float, typer.Option("--limit-seconds", min=0.001, help="time limit")] = 30.0,
    memory: Annotated[
        str | None, typer.Option("--memory", help="DuckDB's memory limit (default: half of what is free)")
    ] = None,
    root: ReadRoot = DEFAULT_ROOT,
) -> None:
    """Query the committed artifacts: a named question (--list), or SQL (DuckDB). Without SQL: list the views; with a view's name:
    its columns.

    A query cannot write or read other files. --json prints an array of objects, with NaN and infinities as strings. A query
    that needs rows evicted by `opd gc` fails and names them.

    Exit codes: 0 done, 1 damaged or evicted data, 2 refused, wrong SQL, no such run, or limit exceeded."""
    from flows.cli import questions, tables
    from storage.query.catalog import Catalog
    from storage.query.limits import default_memory, process_limits
    from storage.query.statements import Views
    from storage.store import Store

    if json_ and csv:
        raise InputError("--json and --csv: choose one")
    if list_:
        return questions.print_list(json_, csv, sys.stdout)
    name_or_sql, number = _asked_round(name_or_sql)
    name, statement = (name_or_sql, sql) if sql is not None else (None, name_or_sql)
    if statement is None or (sql is None and any(run.name == statement for run in Run.list(root))):
        views = Catalog(Store(root)).views() if (root / "artifacts").is_dir() else Views()
        run_name = () if statement is None else (statement,)
        commands = (
            f"named questions: {opd_command(root, 'query', '--list')}",
            f"columns of a view: {opd_command(root, 'query', *run_name, 'tokens')}",
            f"a query: {opd_command(root, 'query', *run_name, EXAMPLE_SQL)}",
        )
        tables.print_views(views, json_, csv, sys.stdout, commands)
        return
    named = questions.is_name(statement)
    known = Catalog(Store(root)).views().all if named and (root / "artifacts").is_dir() else Views().all
    a_view = named and statement.casefold() in known
    if name is not None or not a_view:
        questions.check_run_given(root, name_or_sql)
    runs = [Run.open(root, name)] if name is not None else []
    if named:
        if a_view and not (runs and statement in questions.names()):
            return tables.print_columns(known[statement.casefold()], json_, csv, sys.stdout)
        given = [*(parameters or []), *([f"round={number}"] if number is not None else [])]
        statement, runs = questions.statement(root, runs, statement, given, known)
        if show_sql:
            return typer.echo(statement, nl=False)
    elif parameters or show_sql:
        raise InputError("query: parameters and --sql belong to a named question; see: opd query --list")
    if number is not None and not named:
        raise InputError(f"{name}@{number}: in SQL a round is a condition: WHERE round = {number}")
    catalog, memory = Catalog(Store(existing_root(root)), *runs), memory or default_memory()
    with process_limits(limit_seconds, memory):
        result = catalog.query(statement, limit_seconds=limit_seconds, memory=memory)
    if json_:
        tables.write_json(result, sys.stdout)
    elif csv:
        tables.write_csv(result, sys.stdout)
    elif named:
        questions.print_answer(result, console())
    else:
        tables.print_table(result, console())


def _asked_round(text: str | None) -> tuple[str | None, int | None]:
    """Run and round of `NAME@ROUND`; any other text, as SQL with an @ in it, stays as it is."""
    found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)@(\d+)", text or "")
    return (text, None) if found is None else (found[1], int(found[2]))


def _latest(root: Path) -> Run:
    runs = Run.list(root)
    if not runs:
        raise InputError(
            f"no runs in {root}; start one with `opd run CONFIG`, or set the store's folder with --root or OPD_ROOT"
        )
    return max(runs, key=lambda run: run.state.updated)


def _last(state: RunState, root: Path) -> RoundState | None:
    """The run's last trained round, with the errors of its metrics."""
    from storage.query.figures import completed
    from storage.store import Store

    last = state.last_trained
    return None if last is None else completed(Store(root), state.model_copy(update={"rounds": [last]})).rounds[0]


def _line(state: RunState, last: RoundState | None) -> dict[str, Any]:
    return {
        "name": state.name,
        "status": state.status,
        "ended": state.ended,
        "round": last.round if last else None,
        "student_sha256": last.student_sha256 if last else None,
        "metrics": last.metrics if last else {},
        "updated": state.updated,
    }


def _log_files(run: Run, stage: str | None) -> list[Path]:
    """The run's logs, the most recently written last."""
    logs = [path for path in (run.directory / "logs").glob("*.log") if path.stem.startswith(stage or "")]
    return sorted(logs, key=lambda path: (path.stat().st_mtime, path.name))


def _show_tail(path: Path, lines: int, heading: bool, follow: bool) -> int:
    """Prints the last lines of a log, without secrets, and returns the offset behind them."""
    from tasks.workers.logs import CUT, whole_lines

    if heading:
        typer.echo(f"==> {path.stem} <==")
    found = whole_lines(path)
    typer.echo("".join(found.text.splitlines(keepends=True)[-lines:]), nl=False)
    if found.cut and not follow:
        typer.echo(CUT)
    return found.end


def _follow(run: Run, stage: str | None, ends: dict[Path, int]) -> None:
    """Prints new lines of the logs, and new logs, until no process works on the run."""
    import time

    from tasks.workers.logs import CUT, whole_lines

    current = next(reversed(ends), None)
    while True:
        held = run.holder() is not None  # before reading, so that the last lines are read too
        for path in _log_files(run, stage):
            found = whole_lines(path, ends.get(path, 0))
            ends[path] = found.end
            text = found.text + (f"{CUT}\n" if found.cut and not held else "")
            if text:
                if path != current:
                    typer.echo(f"==> {path.stem} <==")
                    current = path
                typer.echo(text, nl=False)
        if not held:
            return
        time.sleep(POLL_SECONDS)
