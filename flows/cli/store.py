"""`opd verify`, `gc`, `restore`, `replay`: verification, collection, rebuilding and replay of a store."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.cli.options import Json, Root, RunName, console, example, existing_root, grid
from flows.run.hints import DEFAULT_ROOT, opd_command
from storage.errors import ConfigError, InputError, OpdError
from storage.runs import Run
from storage.text import counted, size_text

if TYPE_CHECKING:
    from flows.run.executor import Reporter
    from storage.artifacts.verify import Verified
    from storage.upkeep.gc import Plan

out = console()
err = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd verify demo"))(verify)
    app.command(epilog=example("opd gc --keep rollouts=2 --keep signals=2 --apply"))(gc)
    app.command(epilog=example("opd restore demo --round 1"))(restore)
    app.command(epilog=example("opd replay demo --round 5"))(replay)


def verify(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="a run's name", show_default=False)] = None,
    all_: Annotated[bool, typer.Option("--all", help="every artifact of the store instead of one run's")] = False,
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Hash everything that a run depends on: files, rows, manifests, models. Remembered hashes are not used.

    Damaged files move to quarantine with the reason, and `opd resume` rebuilds only these.

    Exit codes: 0 everything is unchanged, 1 damage, 2 no such run."""
    from storage.artifacts.verify import Verified, move_damaged, verify_run, verify_store
    from storage.store import Store

    if (name is None) == (not all_):
        raise InputError("name one run, or give --all: opd verify NAME | opd verify --all")
    store = Store(existing_root(root))
    found, started = Verified(), time.monotonic()
    with err.status("verifying") as status:
        show = lambda artifact: status.update(f"verifying {artifact}")  # noqa: E731
        if name is not None:
            verify_run(store.root, Run.open(root, name), found, show)
        else:
            verify_store(store.root, found, show)
    moved = move_damaged(store.root, found.problems)
    seconds = time.monotonic() - started
    if json_:
        print(json.dumps(_verified_json(found, moved, seconds), indent=2))
    else:
        what = f"run {name!r}" if name else f"the store {root}"
        gone = f" ({found.evicted:,} of them evicted: no data to read)" if found.evicted else ""
        out.print(
            f"verified {what}: {found.artifacts:,} artifacts{gone}, {found.files:,} files, {size_text(found.bytes)} in"
            f" {seconds:.1f} s, every byte hashed",
            soft_wrap=True,
        )
        if not found.problems:
            out.print("no damage found")
    if found.problems:
        raise OpdError(_damage(found, moved, root, name))


def gc(
    keep: Annotated[
        list[str],
        typer.Option("--keep", metavar="WHAT=ROUNDS", help="last rounds to keep, overriding each run's policy.retain"),
    ] = [],  # noqa: B006  typer copies it
    quarantine_days: Annotated[
        float,
        typer.Option("--quarantine-days", min=0, help="also remove damaged files quarantined longer ago than this"),
    ] = 30.0,
    apply: Annotated[bool, typer.Option("--apply", "--yes", help="remove; without it only the plan is shown")] = False,
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """List what no run needs; with --apply, remove it. Whatever a running run, a builder or a reader uses is kept.

    WHAT is rollouts, signals, trainer_state or students, the fields of a run's policy.retain; ROUNDS is a number or all. Without
    --keep each run's best round stays too. An evicted artifact keeps its manifest,
    counts as done, and is rebuilt when a stage must read it.

    Exit codes: 0 done, 1 a run cannot be read (nothing is removed), 2 bad arguments, 75 another collection is running."""
    from storage.store import Store
    from storage.upkeep.gc import Collector, run_retention, unrepeatable_note

    changes = dict(_kept(text) for text in keep)
    store = Store(existing_root(root))
    collector = Collector(
        store, lambda run: run_retention(run).with_changes(changes), quarantine_days, best=not changes
    )
    plan = collector.plan()
    removed = collector.apply(plan) if apply else []
    if json_:
        items = [
            {"kind": item.kind, "path": str(item.path.relative_to(store.root)), "bytes": item.bytes}
            for item in (removed if apply else plan.items)
        ]
        unrepeatable = [f"{stage}/{key}" for stage, key in sorted(plan.unrepeatable)]
        print(
            json.dumps({"applied": apply, "items": items, "in_use": plan.busy, "unrepeatable": unrepeatable}, indent=2)
        )
        return
    _print_plan(plan, store.root)
    if (note := unrepeatable_note(plan.unrepeatable)) is not None:
        out.print(note, soft_wrap=True, markup=False)
    if apply:
        left = len(plan.items) - len(removed)
        out.print(
            f"removed {size_text(sum(item.bytes for item in removed))}"
            + (f"; {left} kept, in use by now" if left else "")
        )
    elif plan.items:
        words = [word for text in keep for word in ("--keep", text)]
        words += ["--quarantine-days", f"{quarantine_days:g}"] if quarantine_days != 30 else []
        out.print(f"nothing was removed; to remove: {opd_command(root, 'gc', *words, '--apply')}", soft_wrap=True)


def restore(
    name: RunName,
    round: Annotated[int, typer.Option("--round", min=0, help="round to rebuild", show_default=False)],
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Rebuild what `opd gc` evicted from a round, and its evicted inputs.

    The result must match the recorded digests.

    Exit codes: 0 done, 1 failed or not reproduced, 2 no such run or round, or the training's settings have changed since,
    75 the run is held by another process, 130 interrupted."""
    from flows.cli.report import evicted
    from flows.run.progress import LineReporter, SilentReporter, TerminalReporter
    from flows.run.runner import run_experiment, stored_experiment

    run = Run.open(root, name)
    if round > (last := run.state.rounds_done):
        raise InputError(f"run {name!r}: round {round} is not finished; the last finished one is {last}")
    with ExitStack() as stack:
        reporter: Reporter = SilentReporter() if json_ else LineReporter()
        if not json_ and sys.stderr.isatty():
            reporter = stack.enter_context(TerminalReporter())
        experiment = stored_experiment(run)
        _, built = run_experiment(
            experiment,
            name=name,
            root=root,
            rounds=last,
            prefect=False,
            reporter=reporter,
            restore=round,
            evaluated=lambda _: False,
        )
    left = {label: names for (number, label), names in evicted(run.state, root).items() if number == round}
    if json_:
        print(json.dumps({"run": name, "round": round, "stages_built": built, "evicted": left}, indent=2))
    else:
        out.print(f"round {round} of {name!r} is complete; {counted(built, 'stage')} rebuilt")


def replay(
    name: RunName,
    round: Annotated[int, typer.Option("--round", min=1, help="round to replay", show_default=False)],
    stages: Annotated[
        str, typer.Option("--stages", help="any of rollout,judge,context,supervise,train,evaluate")
    ] = "train",
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="runtime.X=Y", help="runtime fields that differ from the recorded ones"),
    ] = [],  # noqa: B006
    keep: Annotated[bool, typer.Option("--keep", help="keep the scratch store and print its folder")] = False,
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Rerun a round's training from its stored inputs and compare bit for bit.

    It runs in a scratch store with the recorded threads, ranks, DeepSpeed settings and micro-batches. The store must still
    have the stage's inputs: for train, the round's rollouts and signals, and the previous round's student and
    trainer_state. All files and all columns except wall seconds are compared.

    A stage whose shards were made with different settings cannot be replayed; the message lists them. Equal bits need a
    processor of the same kind (provenance.processor in a manifest); on another one the message says how far numbers are apart.

    Exit codes: 0 identical, 1 different, not replayable, or an input is evicted or damaged, 2 no such run or round."""
    from flows.run.replay import replay_round

    show = (lambda line: None) if json_ else (lambda line: err.print(line, soft_wrap=True))
    chosen = tuple(part.strip() for part in stages.split(",") if part.strip())
    results = replay_round(Run.open(root, name), existing_root(root), round, chosen, set_, keep, show)
    if json_:
        print(json.dumps([result.as_json() for result in results], indent=2))
    else:
        table = grid("stage", "artifact", "", "seconds")
        for result in results:
            verdict = "[green]identical[/]" if not result.differences else "[red]differs[/]"
            verdict = "[yellow]cannot be replayed[/]" if result.unrepeatable else verdict
            table.add_row(result.stage, result.artifact, verdict, f"{result.seconds:.1f}")
        out.print(table)
    problems = [f"{result.artifact}: {line}" for result in results for line in result.differences]
    problems += [
        f"{result.artifact}: numbers are at most {result.largest_difference:.3g} apart"
        for result in results
        if result.largest_difference is not None
    ]
    if problems:
        problems.insert(0, f"round {round} of {name!r} was not reproduced:")
    if others := {result.other_processor for result in results if result.other_processor}:
        problems.append(
            f"the recorded round was made on {sorted(others)[0]}: sums of another processor round otherwise, so compare on one"
            " of the same kind"
        )
    if mixed := [f"{result.artifact}: {result.unrepeatable}" for result in results if result.unrepeatable]:
        problems += [
            f"round {round} of {name!r} cannot be replayed; its shards were made with different settings:",
            *mixed,
        ]
    if problems:
        raise OpdError("\n".join(problems))
    if not json_:
        out.print(f"round {round} of {name!r} replays bit for bit")


def _verified_json(found: Verified, moved: int, seconds: float) -> dict[str, Any]:
    problems = [
        {"artifact": p.artifact, "path": str(p.path), "reason": p.reason, "ours": p.ours} for p in found.problems
    ]
    counts = {"artifacts": found.artifacts, "evicted": found.evicted, "files": found.files, "bytes": found.bytes}
    return counts | {"seconds": seconds, "quarantined": moved, "problems": problems}


def _damage(found: Verified, moved: int, root: Path, name: str | None) -> str:
    """The problems, what was quarantined, and the command that repairs."""
    from storage.runs import find_use

    lines = [counted(len(found.problems), "problem"), *(f"{p.artifact}: {p}" for p in found.problems)]
    if moved:
        lines.append(f"{counted(moved, 'damaged piece')} moved to {root / 'quarantine'}, each with its reason")
    if any(not p.ours and not p.artifact.startswith("run ") for p in found.problems):
        lines.append("files in your own folders were not touched: restore the old ones")
    uses = {find_use(root, *p.artifact.split("/")) for p in found.problems if "/" in p.artifact}
    runs = [name] if name is not None else sorted({use[0] for use in uses if use})
    if any("/" in p.artifact for p in found.problems):
        commands = " and ".join(opd_command(root, "resume", run) for run in runs)
        lines.append(
            f"to rebuild only these: {commands}"
            if runs
            else f"no run uses them; to remove the rest: {opd_command(root, 'gc', '--apply')}"
        )
    return "\n".join(lines)


def _kept(text: str) -> tuple[str, int | None]:
    what, equals, number = text.partition("=")
    if not equals or not (number.isdigit() or number == "all"):
        raise ConfigError(
            f"--keep {text!r}: expected WHAT=ROUNDS, for example --keep rollouts=2 or --keep students=all"
        )
    return what, None if number == "all" else int(number)


def _print_plan(plan: Plan, root: Path) -> None:
    from storage.upkeep.gc import MEANING

    if not plan.items:
        out.print("nothing to remove: every artifact is needed by a run")
    else:
        table = grid("kind", "what", "bytes", title="removable", title_justify="left")
        for item in sorted(plan.items, key=lambda item: (list(MEANING).index(item.kind), item.path)):
            table.add_row(item.kind, str(item.path.relative_to(root)), size_text(item.bytes))
        out.print(table)
        for kind, meaning in MEANING.items():
            if items := [item for item in plan.items if item.kind == kind]:
                out.print(f"{kind}: {len(items):,}, {size_text(plan.bytes(kind))} ({meaning})", soft_wrap=True)
        out.print(f"total {size_text(plan.bytes())}")
    for name, who in plan.busy.items():
        out.print(f"run {name!r} is running; everything it uses is kept ({who})", soft_wrap=True)
