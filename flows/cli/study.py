"""`opd study`: compare methods over seeds, with learning rates from a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.options import Root, console, example, grid, local
from flows.run.hints import DEFAULT_ROOT, opd_command
from storage.errors import OpdError

if TYPE_CHECKING:
    from flows.study.results import Grid
    from flows.study.spec import StudyPlan, StudyRun

out = console()
err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd study configs/study.yaml --dry-run"))(study)


def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="a study's YAML", show_default=False)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the runs and their stages in the store; start nothing")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="folder for the results (default: studies/NAME in the store)", callback=local),
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Compare methods over seeds: tables, CSV, Parquet and a plot. Repeat the command to continue.

    A sweep of equal budget first finds each group's learning rate. The report lists failed runs; the next call tries them
    again.

    Exit codes: 0 done, 1 a run of a method failed, 2 bad study or config, 75 a run is held by another process,
    130 interrupted."""
    from flows.study.files import PAGE, default_folder, write_files
    from flows.study.progress import StudyReporter
    from flows.study.results import Known, grids, read_rows
    from flows.study.run import run_study
    from flows.study.spec import load_study

    plan = load_study(config, root)
    if dry_run:
        return _dry_run(plan, root)
    words = ("study", str(config), *(("--out", str(folder)) if folder else ()))
    folder = folder or default_folder(root, plan.study.name)
    known = Known()

    def write() -> None:
        write_files(plan, read_rows(plan, root, known), folder)

    def say(line: str) -> None:
        err.print(line, markup=False, soft_wrap=True)

    try:
        built = run_study(plan, root, reporter=StudyReporter(err), say=say, changed=write)
    except KeyboardInterrupt:
        write()
        err.print(f"\nstopped; results so far are in {folder}", soft_wrap=True)
        err.print(f"continue with: {opd_command(root, *words)}", soft_wrap=True)
        raise typer.Exit(130) from None
    rows = read_rows(plan, root, known)
    pages = [folder / PAGE] if built == 0 and (folder / PAGE).exists() else _page(plan, root, folder)
    written = [*write_files(plan, rows, folder), *pages]
    for result in grids(plan, rows):
        out.print(_table(result))
    out.print("written: " + ", ".join(map(str, written)), soft_wrap=True)
    if built == 0:
        out.print("nothing to do: every run of this study is in the store")
    finished = {row["run"] for row in rows if row["part"] == "study" and row["status"] == "finished"}
    missing = [run.name for run in plan.method_runs() if run.name not in finished]
    if missing:
        raise OpdError(
            f"{len(missing)} runs of the methods did not finish: {', '.join(missing)}; the report has the reasons"
        )


def _page(plan: StudyPlan, root: Path, folder: Path) -> list[Path]:
    """Writes the page of the methods' runs with the first seed, and returns its path. None where no run has a finished round, or
    where their data cannot be read: the study's own results do not depend on it."""
    from flows.cli.page import write
    from flows.page.build import MOST_RUNS, page
    from flows.study.files import PAGE
    from storage.runs import Run

    wanted = [run.name for run in plan.method_runs() if run.seed == plan.study.seeds[0]]
    try:
        there = {run.name for run in Run.list(root) if run.name in wanted and run.state.last_trained is not None}
        names = [name for name in wanted if name in there][:MOST_RUNS]
        if not names:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / PAGE, page(root, names).html)
    except OpdError as error:
        err.print(f"{folder / PAGE} is not written: {error}", markup=False, soft_wrap=True)
        return []
    return [folder / PAGE]


def _table(result: Grid) -> Table:
    title = Text.assemble((result.title, "bold"), f" ({result.note})")
    table = grid(*result.header, title=title, title_justify="left", title_style="")
    for line in result.lines:
        table.add_row(*map(Text, line))
    return table


def _dry_run(plan: StudyPlan, root: Path) -> None:
    from flows.study.results import best_lrs, read_rows

    lrs = best_lrs(plan, read_rows(plan, root))
    table = grid("run", "method", "seed", "lr", "rounds", "in the store", "to run")
    ready = {run.name: run for run in plan.method_runs(lrs)}
    for run in (*plan.sweep_runs(), *plan.method_runs()):
        known = ready.get(run.name, run)
        waits = known.part == "study" and known.name not in ready
        lr, *counts = ("after the sweep", "", "") if waits else _counts(plan, known, root)
        table.add_row(run.name, run.method, str(run.seed), lr, str(run.rounds), *counts)
    out.print(table)
    if (takes := _takes(plan, root)) is not None:
        out.print(takes)


def _takes(plan: StudyPlan, root: Path) -> str | None:
    """How long the rounds that are not done take, from those of this study that are."""
    from flows.run.pace import estimate, round_seconds
    from flows.run.runner import existing_run

    left, known = 0, list[float]()
    for run in (*plan.sweep_runs(), *plan.method_runs()):
        held = existing_run(run.name, root)
        state = None if held is None else held.state
        left += run.rounds - min(run.rounds, 0 if state is None else state.rounds_done)
        known += [] if state is None else round_seconds(state.rounds)
    return estimate(left, known)


def _counts(plan: StudyPlan, run: StudyRun, root: Path) -> tuple[str, str, str]:
    from flows.run.runner import plan as plan_of

    experiment = plan.experiment(run.method, run.seed, run.lr)
    states = [line.state for line in plan_of(experiment, root, run.rounds)]
    cached = states.count("cached")
    return f"{experiment.train.lr:g}", str(cached), str(len(states) - cached)
