"""`opd push` and `opd pull`: runs and what they need to and from S3, GCS or another folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flows.cli.options import Json, Root, console, example, existing_root
from flows.run.hints import DEFAULT_ROOT
from storage.errors import InputError, RunBusy
from storage.runs import Run
from storage.text import size_text

if TYPE_CHECKING:
    from storage.disk.remote import Moved
    from storage.upkeep.remote_layout import Plan

out = console()
err = Console(stderr=True, highlight=False)
LINE_SECONDS = 15.0
"""Between two lines of progress without a terminal."""

First = Annotated[str, typer.Argument(metavar="[NAME]", help="a run's name; without it give --all", show_default=False)]
Second = Annotated[
    str | None,
    typer.Argument(metavar="REMOTE", help="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or a folder", show_default=False),
]
All = Annotated[bool, typer.Option("--all", help="every run instead of one")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be moved, and move nothing")]
Transfers = Annotated[int, typer.Option("--transfers", min=1, max=64, help="files that are moved at the same time")]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd push demo s3://my-bucket/opd"))(push)
    app.command(epilog=example("opd pull demo s3://my-bucket/opd"))(pull)


def push(
    first: First,
    second: Second = None,
    all_: All = False,
    again: Annotated[
        bool, typer.Option("--verify", help="read back what is there already too, and send again what is damaged there")
    ] = False,
    dry_run: DryRun = False,
    transfers: Transfers = 8,
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Send a run, its artifacts and what they were made from to REMOTE; only what is missing there.

    Every file is read back and its sha256 compared. A run appears there when all that it needs is there; after an interruption
    the same command goes on. Nothing is removed or replaced there but a run's state by a later one. Evicted artifacts go as
    records, logs and models in folders of your own not at all. With --all, a run that is running is left out.

    Exit codes: 0 done, 1 damage in this store, 2 no such run, or a REMOTE that cannot be used or has other content, 75 a run is
    held by another process, 130 interrupted."""
    from storage.disk.remote import remote_of
    from storage.store import Store
    from storage.upkeep.push import push as send

    name, address = _asked("push", first, second, all_)
    existing_root(root)
    runs = [Run.open(root, name)] if name is not None else Run.list(root)
    remote, began = remote_of(address), time.monotonic()
    with _progress("pushing", json_) as (planned, moved):
        plan = send(
            Store(root), remote, runs, leave_out_busy=name is None, again=again, apply=not dry_run, transfers=transfers,
            planned=planned, moved=moved,
        )  # fmt: skip
    _report("push", plan, str(remote), dry_run, time.monotonic() - began, json_)


def pull(
    first: First,
    second: Second = None,
    all_: All = False,
    dry_run: DryRun = False,
    transfers: Transfers = 8,
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Fetch a run and all that it needs from REMOTE, where `opd push` sent it; only what is missing here.

    Every file's sha256 is verified. The run appears when all that it needs is here; after an interruption the same command goes
    on. What `opd gc` evicted here stays evicted. A run that has gone on here is left as it is. A missing store is made.

    Exit codes: 0 done, 2 no such run, a REMOTE that cannot be used, or bytes that are not the recorded ones, 75 the run is held
    by another process, 130 interrupted."""
    from storage.disk.remote import remote_of
    from storage.store import Store
    from storage.upkeep.pull import pull as fetch
    from storage.upkeep.remote_layout import require_store

    name, address = _asked("pull", first, second, all_)
    remote, began = remote_of(address), time.monotonic()
    require_store(remote)  # before a store is made here
    wait = lambda holder: err.print(f"another process builds an artifact; waiting for {holder}")  # noqa: E731
    with _progress("pulling", json_) as (planned, moved):
        plan = fetch(
            Store(root), remote, None if name is None else [name], apply=not dry_run, transfers=transfers,
            planned=planned, moved=moved, waiting=wait,
        )  # fmt: skip
    _report("pull", plan, str(remote), dry_run, time.monotonic() - began, json_)


def _asked(command: str, first: str, second: str | None, all_: bool) -> tuple[str | None, str]:
    """(the run, None for all; the remote)."""
    if all_ == (second is not None):
        raise InputError(
            f"name one run and the remote, or give --all: opd {command} NAME REMOTE | opd {command} --all REMOTE"
        )
    return (None, first) if second is None else (first, second)


@contextmanager
def _progress(doing: str, quiet: bool) -> Iterator[tuple[Any, Moved]]:
    """(called with the plan, called with the bytes of each block): a bar in a terminal, else a line now and then."""
    if quiet:
        yield (lambda plan: None), (lambda count: None)
    elif err.is_terminal:
        columns = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(
            TextColumn("[cyan]{task.description}"), BarColumn(16), *columns, console=err, transient=True
        ) as bar:
            task = bar.add_task(doing, total=None)
            yield (lambda plan: bar.update(task, total=plan.bytes)), (lambda count: bar.advance(task, count))
    else:
        counts, began = {"done": 0, "total": 0}, time.monotonic()
        last = began

        def moved(count: int) -> None:
            nonlocal last
            counts["done"] += count
            if (now := time.monotonic()) - last >= LINE_SECONDS:
                last = now
                speed = counts["done"] / (now - began)
                err.print(
                    f"{doing}: {size_text(counts['done'])} of {size_text(counts['total'])} ({size_text(int(speed))}/s)"
                )

        yield (lambda plan: counts.update(total=plan.bytes)), moved


def _report(command: str, plan: Plan, remote: str, dry_run: bool, seconds: float, json_: bool) -> None:
    evicted = sum(entry.evicted for entry in plan.artifacts.values())
    counts = {"artifacts": len(plan.artifacts), "evicted": evicted, "files": plan.files, "bytes": plan.bytes}
    if json_:
        said = {"remote": remote, "dry_run": dry_run, "runs": plan.runs, **counts, "already_there": plan.present}
        said |= {"notes": plan.notes, "left_out": plan.left_out, "seconds": round(seconds, 3)}
        print(json.dumps(said, indent=2))
    else:
        done = {"push": "pushed", "pull": "pulled"}[command]
        gone = f" ({evicted:,} of them evicted: records only)" if evicted else ""
        what = f"{len(plan.artifacts):,} artifacts{gone}, {plan.files:,} files, {size_text(plan.bytes)}"
        already = f"; {plan.present:,} artifacts were there already" if plan.present else ""
        runs = ", ".join(plan.runs) or "no run's state"
        way = f"{'to' if command == 'push' else 'from'} {remote}"
        line = (
            f"would {command} {way}: {runs}; {what}" if dry_run else f"{done} {way}: {runs}; {what} in {seconds:.1f} s"
        )
        out.print(line + already, soft_wrap=True, markup=False)
        for note in plan.notes:
            out.print(note, soft_wrap=True, markup=False)
    if plan.left_out:
        name, holder = next(iter(plan.left_out.items()))
        more = f" and {len(plan.left_out) - 1} more" if len(plan.left_out) > 1 else ""
        raise RunBusy(
            f"left out, because it is running: {name!r} ({holder}){more}; push it when it has stopped", holder
        )
