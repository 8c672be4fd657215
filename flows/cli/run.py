"""`opd run`, `resume`, `stop`, `fork`, `check`: the commands that start, continue and stop runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.cli.options import (
    Quiet,
    Root,
    RunJson,
    RunName,
    Set,
    SetOfRun,
    Verbose,
    console,
    example,
    grid,
)
from flows.run.hints import DEFAULT_ROOT, opd_command, with_resume_hint
from storage.errors import ConfigError, InputError, OpdError
from storage.runs import Run
from storage.text import counted

if TYPE_CHECKING:
    from flows.distill import Further
    from flows.experiment import Experiment
    from flows.run.executor import PlanLine, Reporter

Rounds = Annotated[int | None, typer.Option("--rounds", min=0, help="stop after this round instead of policy.rounds")]
Name = Annotated[str | None, typer.Option("--name", help="the run's name (default: the config's file name)")]
NoPrefect = Annotated[bool, typer.Option("--no-prefect", help="run the stages without Prefect")]

out = console()
err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd run configs/quickstart.yaml --name demo --set train.lr=1e-3"))(run)
    app.command(epilog=example("opd resume demo"))(resume)
    app.command(epilog=example("opd stop demo"))(stop)
    app.command(epilog=example("opd fork demo@2 --name wider --set objective.support.k=32"))(fork)
    app.command(epilog=example("opd check configs/qwen3-gpu.yaml"))(check)


def run(
    config: Annotated[Path, typer.Argument(help="an experiment's YAML, or recipe:NAME", show_default=False)],
    name: Name = None,
    set_: Set = [],  # noqa: B006  typer copies it
    rounds: Rounds = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan, with -v also the resolved config; start nothing")
    ] = False,
    no_prefect: NoPrefect = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json_: RunJson = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Run an experiment; if the run exists, continue it up to policy.rounds.

    Stages whose results are in the store are not run again.

    Exit codes: 0 done, 1 failed, 2 bad config or input, 75 the run is held by another process, 130 interrupted."""
    from flows.config_file import shipped
    from flows.experiment import load_experiment
    from flows.run.runner import has_begun

    name = name or shipped(config).stem
    experiment = load_experiment(config, set_, begun=has_begun(name, root))
    if dry_run:
        return _dry_run(experiment, name, root, rounds, json_, verbose)
    go(experiment, name, root, rounds, no_prefect, Output(json_, verbose, quiet))


def resume(
    name: RunName,
    set_: SetOfRun = [],  # noqa: B006
    rounds: Rounds = None,
    no_prefect: NoPrefect = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json_: RunJson = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Continue a run where it stopped. Only fields of `runtime`, `policy`, `trackers` and `hooks` can be set.

    Exit codes: as for `opd run`."""
    from flows.run.runner import resume_experiment

    go(resume_experiment(name, root, set_), name, root, rounds, no_prefect, Output(json_, verbose, quiet))


def fork(
    point: Annotated[str, typer.Argument(metavar="NAME@ROUND", help="run and round to start from", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="the new run's name")],
    set_: Set = [],  # noqa: B006
    rounds: Rounds = None,
    no_prefect: NoPrefect = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json_: RunJson = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Start a new run from a round of another run, with other fields (another loss, for example).

    It starts from that round's student and optimizer state. Rounds up to ROUND are shared through the store and not run
    again.

    Exit codes: as for `opd run`."""
    from flows.run.runner import changed_fields, fork_experiment, has_begun, standing

    parent, at, number = point.rpartition("@")
    if not at or not number.isdigit():
        raise ConfigError(f"{point!r}: expected NAME@ROUND, for example demo@2")
    experiment = fork_experiment(parent, int(number), root, set_, has_begun(name, root))
    if (held := standing(experiment, name, root)) is not None:
        changed = ", ".join(changed_fields(held.experiment, experiment))
        err.print(
            f"run {name!r} is this fork already: it goes on, as by opd resume"
            + (f", with {changed}" if changed else ""),
            soft_wrap=True,
        )
    go(experiment, name, root, rounds, no_prefect, Output(json_, verbose, quiet))


def stop(
    name: RunName,
    wait: Annotated[float, typer.Option("--wait", min=0, help="seconds to wait for its end")] = 30.0,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Stop a running run and all its processes. It can be resumed.

    Exit codes: 0 stopped, or was not running; 1 did not stop in time; 2 no such run."""
    held = Run.open(root, name)
    holder = held.holder_info()
    if holder is None:
        out.print(f"run {name!r} is not running")
        return
    if holder.host != socket.gethostname():
        raise InputError(f"run {name!r} is held by {holder}: stop it on that host")
    os.kill(holder.pid, signal.SIGTERM)
    deadline = time.monotonic() + wait
    while held.holder() is not None:
        if time.monotonic() > deadline:
            raise OpdError(
                f"run {name!r}: {holder} did not stop within {wait:.0f} s. To end it at once: kill -9 {holder.pid} (its"
                " workers end too; committed results are kept)"
            )
        time.sleep(0.1)
    out.print(f"run {name!r} is stopped; continue with: {opd_command(root, 'resume', name)}", soft_wrap=True)


def check(
    config: Annotated[Path, typer.Argument(help="an experiment's YAML, or recipe:NAME", show_default=False)],
    set_: Set = [],  # noqa: B006
    root: Root = DEFAULT_ROOT,
) -> None:
    """Check a config, its files, tokenizers, plugins and verifier; print lengths, a rendered prompt and sizes. Starts no engine.

    Exit codes: 0 no problem, 2 a problem."""
    from flows.experiment import load_experiment
    from flows.run.check import check_experiment

    for line in check_experiment(load_experiment(config, set_), root):
        out.print(line, markup=False, soft_wrap=True)


def _dry_run(experiment: Experiment, name: str, root: Path, rounds: int | None, as_json: bool, verbose: bool) -> None:
    from flows.cross_checks import NO_TEACHER_PASS, NOT_JUDGED, needs_judge
    from flows.run.pace import estimate, round_seconds
    from flows.run.runner import existing_run, plan

    lines = plan(experiment, root, rounds, name)
    held = existing_run(name, root)
    known = [] if held is None else round_seconds(held.state.rounds)
    left = {line.round for line in lines if line.stage == "train" and line.state in ("run", "pending")}
    takes = estimate(len(left), known)
    if as_json:
        data = {"name": name, "config": experiment.model_dump(mode="json"), "plan": [vars(line) for line in lines]}
        print(json.dumps(data | {"estimate": takes}, indent=2))
        return
    out.print(_plan_table(name, lines))
    for line in lines:
        for note in line.notes:
            out.print(f"note: {line.stage} of round {line.round}: {note}", soft_wrap=True, markup=False)
    if not experiment.supervise.teacher.asked:
        out.print(f"note: {NO_TEACHER_PASS}", soft_wrap=True)
    if experiment.judge is not None and not needs_judge(experiment):
        out.print(f"note: {NOT_JUDGED}", soft_wrap=True)
    if left:
        out.print(takes or f"{counted(len(left), 'round')} to train; how long one takes is known after the first")
    if verbose:
        out.print(experiment.to_yaml(), markup=False)
    else:
        out.print("the resolved config: --dry-run -v", style="dim")


def _plan_table(name: str, lines: list[PlanLine]) -> Table:
    colours = {"cached": "green", "restore": "yellow", "run": "yellow", "pending": "dim"}
    meaning = {
        "cached": "in the store",
        "restore": "evicted, would be rebuilt",
        "run": "would run",
        "pending": "waits for an earlier stage",
    }
    table = grid("round", "stage", "state", "key", title=f"plan of {name}", title_justify="left")
    for line in lines:
        keys = ", ".join(f"{stage}/{key}" for stage, key in line.keys.items())
        what = meaning[line.state]
        if 0 < len(line.missing) < len(line.keys):
            what += f": {', '.join(line.missing)} missing"
        table.add_row(str(line.round), line.stage, f"[{colours[line.state]}]{what}[/]", keys)
    return table


@dataclass(frozen=True)
class Output:
    """How a call reports: a terminal's bars or plain lines, with a line per stage (`verbose`), what is wrong (`quiet`), JSON."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.quiet and (self.json or self.verbose):
            raise InputError(f"--quiet and {'--json' if self.json else '--verbose'}: choose one")

    def reporter(self, stack: ExitStack) -> Reporter:
        from flows.run.events import EventReporter
        from flows.run.progress import LineReporter, QuietReporter, TerminalReporter

        if self.json:
            return EventReporter()
        if self.quiet:
            return QuietReporter()
        if sys.stderr.isatty():
            return stack.enter_context(TerminalReporter(verbose=self.verbose))
        return LineReporter(verbose=self.verbose)


def go(
    experiment: Experiment,
    name: str,
    root: Path,
    rounds: int | None,
    no_prefect: bool,
    output: Output,
    evaluated: Callable[[int], bool] | None = None,
    on_set: Further | None = None,
) -> None:
    """Run in the foreground with progress; print the report at the end. `evaluated`: instead of policy.evaluate_every.
    `on_set`: another evaluation set, or tasks of lm-eval."""
    from flows.cli.report import print_report, status_json
    from flows.run.runner import run_experiment

    with ExitStack() as stack:
        try:
            state, built = run_experiment(
                experiment,
                name=name,
                root=root,
                rounds=rounds,
                prefect=not no_prefect,
                reporter=output.reporter(stack),
                evaluated=evaluated,
                on_set=on_set,
            )
        except KeyboardInterrupt:
            stack.close()
            err.print("\nstopped: all processes of the run have ended; committed results are kept.")
            err.print(f"continue with: {opd_command(root, 'resume', name)}", soft_wrap=True)
            raise typer.Exit(130) from None
        except OpdError as error:
            stack.close()
            error.args = (with_resume_hint(error, name, root), *error.args[1:])
            raise
    if output.json:
        print(json.dumps(status_json(state, root) | {"stages_built": built}, indent=2))
        return
    if output.quiet:
        return
    print_report(state, root)
    if built == 0 and state.ended:
        out.print(
            f"nothing to do; to go on: {opd_command(root, 'resume', name, '--set', 'policy.stop=null')}", soft_wrap=True
        )
    elif built == 0:
        done = max((round.round for round in state.rounds), default=0) if rounds is None else rounds
        out.print(
            f"nothing to do: {f'rounds 0 to {done}' if done else 'round 0'} of {name!r} {'are' if done else 'is'} in the store"
        )
