"""The report of a run: metrics per round, failures, the student's folder, commands to continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.cli.of_sets import sets_table, tasks_table
from flows.cli.options import SLIM, console, fitting, grid
from flows.run.earlier import outdated
from flows.run.figures import DIAGNOSED
from flows.run.hints import DEFAULT_ROOT, opd_command
from flows.run.shown import (
    BY_ROUND,
    by_teacher,
    cells,
    failed_stages,
    failure,
    pace_text,
    sample_sizes,
    status_text,
)
from flows.run.warnings import run_warnings
from storage.artifacts.artifact import Artifact, TreeRecord, artifact_directory, load_manifest
from storage.artifacts.summary import summary
from storage.artifacts.trees import tree_directory
from storage.disk.remote import address
from storage.errors import CorruptArtifact, StoreError
from storage.query.figures import FIGURES, completed
from storage.runs import RoundState, RunState, StageState
from storage.store import Store

_LEGEND = (
    "round 0 is the student before distillation; reverse KL is to the teacher, on fresh rollouts; ± is one standard error"
    " over prompts"
)
_NOW_AND_THEN = ("train_overlap_ratio_last", "train_student_entropy_last")
_COLOURS = {"new": "dim", "running": "cyan", "stopped": "yellow", "failed": "red", "finished": "green"}
_STUDENT_STAGES = (("train", "student"), ("warmup", "student"), ("model", "model"))
"""(stage of a round, artifact) that can hold its student, in order of preference."""


def status_json(state: RunState, root: Path) -> dict[str, Any]:
    """The JSON of `opd status` and `opd run`: name, status, error, rounds with metrics (each NAME of an evaluation with NAME_se,
    NAME_n, NAME_prompts), student digest and stages; for each stage also its evicted artifacts; `outdated`: which of its
    results an earlier version made otherwise, and why."""
    status = completed(Store(root), state).model_dump(mode="json") | {"outdated": outdated(state, root)}
    gone = evicted(state, root)
    for round in status["rounds"]:
        for label, stage in round["stages"].items():
            stage["evicted"] = gone.get((round["round"], label), [])
    told = {"error": failure(state), "pace": pace_text(state, root), "warnings": run_warnings(state)}
    return status | told | {"next": next_commands(state, root)}


def evicted(state: RunState, root: Path) -> dict[tuple[int, str], list[str]]:
    """(round, stage label) -> its artifacts whose data `opd gc` removed. Damaged manifests are ignored."""
    found: dict[tuple[int, str], list[str]] = {}
    for round in state.rounds:
        for label, record in round.stages.items():
            for stage, key in record.artifacts.items():
                try:
                    made = summary(artifact_directory(root, stage, key), root / "memo")
                except (StoreError, CorruptArtifact):
                    continue
                if made is not None and made.evicted is not None:
                    found.setdefault((round.round, label), []).append(f"{stage}/{key}")
    return found


def print_report(state: RunState, root: Path, holder: str | None = None, out: Console | None = None) -> None:
    """The report on standard output."""
    out = out or console()
    for part in report(state, root, holder, out):
        out.print(part, soft_wrap=isinstance(part, Text))  # paths and commands stay on one line, for copying


def report(state: RunState, root: Path, holder: str | None, out: Console) -> list[Table | Text]:
    """Of a failed run the error, its time and the way on; then the table of rounds, the student's folder and useful commands."""
    parts: list[Table | Text] = [_heading(state, root, holder)]
    if (where := pace_text(state, root)) is not None:
        parts.append(Text(where))
    resume = opd_command(root, "resume", state.name)
    if (why := failure(state)) is not None:
        parts.append(Text(f"failed at {state.updated}: {why}", style="red"))
        parts.append(Text(f"after fixing the cause, continue with: {resume}"))
        if state.failed_at_start:
            changed = opd_command(root, "run", "CONFIG", "--name", state.name)
            parts.append(Text(f"where the config has to change: {changed}"))
    parts += [
        Text(
            f"made otherwise by an earlier version: {reason}. {resume} makes this, and all that follows, again",
            style="red",
        )
        for reason in outdated(state, root)
    ]
    if state.rounds:
        gone = evicted(state, root)
        state = completed(Store(root), state)
        parts += _rounds(state, gone, out)
        parts += _diagnosed(state)
        headings, rows = by_teacher(state.rounds)
        if rows:
            table = grid(*headings)
            for row in rows:
                table.add_row(*row)
            parts.append(table)
        parts += [table for table in (sets_table(state), tasks_table(state)) if table is not None]
        sizes = sample_sizes(state.rounds, FIGURES)
        parts.append(Text(f"{_LEGEND}: {sizes}" if sizes else _LEGEND, style="dim"))
        if any(round.unevaluated for round in state.rounds):
            later = opd_command(root, "evaluate", state.name, "--round", "N")
            parts.append(Text(f"not evaluated: left out by policy.evaluate_every; to do it now: {later}", style="dim"))
        if gone:
            first = min(round for round, _ in gone)
            again = opd_command(root, "restore", state.name, "--round", str(first))
            parts.append(
                Text(
                    f"evicted: removed by policy.retain or opd gc; rebuilt when a stage reads it, or by: {again}",
                    style="dim",
                )
            )
    parts += [Text(f"warning: {line}", style="yellow") for line in run_warnings(state)]
    if why is None:
        parts += [_trouble(round.round, label, stage) for round, label, stage in failed_stages(state)]
    last = state.last_trained
    if last is not None:
        parts.append(_student(state, root, last))
    parts.append(Text("next:", style="bold"))
    return parts + [Text(f"  {command}") for command in next_commands(state, root)]


def student_of(store: Store, round: RoundState) -> Artifact | None:
    """The committed artifact that holds a round's student, recognised by its weights. None if there is none."""
    for label, kind in _STUDENT_STAGES:
        stage = round.stages.get(label)
        key = stage.artifacts.get(kind) if stage is not None else None
        artifact = store.get(kind, key) if key is not None else None
        if artifact is not None and artifact.content.get("weights") == round.student_sha256:
            return artifact
    return None


def tree_of(store: Store, artifact: Artifact, name: str = "model") -> tuple[Path, TreeRecord]:
    """The folder of an artifact's tree, and its recorded files. Nothing is verified."""
    directory = artifact_directory(store.root, artifact.stage, artifact.key)
    manifest = load_manifest(directory)
    if manifest is None or name not in manifest.trees:
        raise CorruptArtifact(f"{artifact.stage}/{artifact.key}: no tree {name!r} in {store.root}; run again")
    return tree_directory(directory, manifest.trees[name]), manifest.trees[name]


def next_commands(state: RunState, root: Path) -> list[str]:
    """Up to three useful commands."""
    name, last = state.name, state.last_trained
    if (there := address(root)) != str(root):
        return [
            opd_command(root, "query", name, _question(last)),
            opd_command(DEFAULT_ROOT, "pull", name, there),
        ]
    failed = [label for _, label, _ in failed_stages(state)]
    if state.status == "running":
        watch = [("watch", name), ("logs", name, "--follow"), ("stop", name)]
        return [opd_command(root, *words) for words in watch]
    commands: list[tuple[str, ...]] = []
    if state.status != "finished":
        commands.append(("resume", name))
    if failed:
        commands.append(("logs", name))
    if last is None:
        commands += [("status", name, "--json"), ("ls",)]
    else:
        commands += [("export", name, f"{name}-student"), ("query", name, _question(last))]
        commands.append(("fork", f"{name}@{max(last.round - 1, 0)}", "--name", f"{name}-2", "--set", "train.lr=1e-4"))
    return [opd_command(root, *words) for words in commands[:3]]


def _question(last: RoundState | None) -> str:
    """One that has an answer: a run with rewards may have no teacher, and so no worst tokens."""
    if last is None or last.round == 0:
        return "SELECT prompt_id, completion_text, correct FROM evaluations LIMIT 10"
    return "groups" if "judge" in last.stages else "worst-tokens"


def _heading(state: RunState, root: Path, holder: str | None) -> Text:
    line = Text(state.name, style="bold")
    line.append(f"  {status_text(state, root)}", style=_COLOURS[state.status])
    if state.ended:
        line.append(f" {state.ended}", style="dim")
    if state.forked_from:
        line.append(f"  forked from {state.forked_from}", style="dim")
    if holder:
        line.append(f"  by {holder}", style="dim")
    return line


def _rounds(state: RunState, gone: dict[tuple[int, str], list[str]], out: Console) -> list[Table | Text]:
    """The table of rounds. Where it is wider than `out`, the seconds of the stages follow it, round by round; if it still
    is, it has fewer lines, then length and clipped without their errors."""
    rounds = sorted(state.rounds, key=lambda r: r.round)
    shown, rows = cells(rounds, BY_ROUND)
    times = [_stages(round, {label for number, label in gone if number == round.round}) for round in rounds]
    whole, narrow, slim, brief = grid("round"), grid("round"), grid("round", **SLIM), grid("round", **SLIM)
    for figure in shown:
        for table in (whole, narrow, slim, brief):
            table.add_column(figure.heading, justify="right", overflow="fold")
    whole.add_column("seconds per stage")
    for round, metrics, time in zip(rounds, rows, times, strict=True):
        short = [
            text.partition(" ±")[0] if figure.metric in ("mean_length", "clipped_ratio") else text
            for figure, text in zip(shown, metrics, strict=True)
        ]
        whole.add_row(str(round.round), *metrics, time)
        brief.add_row(str(round.round), *short)
        for table in (narrow, slim):
            table.add_row(str(round.round), *metrics)
    if fitting(out, whole, narrow) is whole:
        return [whole]
    seconds = Table.grid(padding=(0, 1))
    seconds.add_column(no_wrap=True)
    for round, time in zip(rounds, times, strict=True):
        seconds.add_row(f"  round {round.round}:", time)
    return [fitting(out, narrow, slim, brief), Text("seconds per stage:"), seconds]


def _diagnosed(state: RunState) -> list[Table | Text]:
    """What the rounds' rewards and trainings are like; nothing before the first."""
    rounds = [r for r in sorted(state.rounds, key=lambda r: r.round) if r.round]
    shown, rows = cells(rounds, DIAGNOSED)
    if not shown:
        return []
    table = grid("round", title="rollouts and training", title_justify="left")
    for figure in shown:
        table.add_column(figure.heading, justify="right", overflow="fold")
    for round, row in zip(rounds, rows, strict=True):
        table.add_row(str(round.round), *row)
    now_and_then = [figure.metric for figure in shown if figure.metric in _NOW_AND_THEN]
    trained = [round for round in rounds if round.student_sha256]
    if any(round.metrics.get(metric) is None for round in trained for metric in now_and_then):
        note = "overlap and entropy: measured every train.metrics_every steps; empty where a round has no such step"
        return [table, Text(note, style="dim")]
    return [table]


def _stages(round: RoundState, gone: set[str]) -> Text:
    line = Text()
    for label, stage in round.stages.items():
        if line:
            line.append(", ")
        line.append(f"{label} ")
        if stage.state == "done" and stage.seconds is not None:
            line.append(f"{stage.seconds:.1f}")
        else:
            line.append(stage.state, style="red" if stage.state == "failed" else "dim")
        if label in gone:
            line.append(" (evicted)", style="yellow")
    return line


def _trouble(round: int, label: str, stage: StageState) -> Text:
    return Text(f"round {round} {label}: {stage.error or 'failed'}", style="red")


def _student(state: RunState, root: Path, round: RoundState) -> Text:
    store = Store(root)
    artifact = student_of(store, round)
    line = Text(f"student of round {round.round}: ")
    if artifact is None:
        return line.append(f"no longer in the store; `opd resume {state.name}` rebuilds it", style="yellow")
    if store.evicted(artifact) is not None:
        again = opd_command(root, "restore", state.name, "--round", str(round.round))
        return line.append(f"evicted; rebuild it with: {again}", style="yellow")
    if store.remote is not None:
        line.append(f"at {store.remote}", style="bold")
    else:
        line.append(str(tree_of(store, artifact)[0]), style="bold")
    return line.append(f"  (sha256 {(round.student_sha256 or '')[:16]})", style="dim")
