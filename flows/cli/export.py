"""`opd export`: a copy of a round's student as a checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import AtRound, Json, Root, at_round, example, existing_root, local
from flows.run.hints import DEFAULT_ROOT, opd_command
from storage.disk.files import TEMPORARY, explain_full_disk, fsync_directory, require_space, unique
from storage.errors import CorruptArtifact, InputError
from storage.runs import RoundState, Run

if TYPE_CHECKING:
    from flows.run.gguf import Converter
    from flows.run.hub import Destination
    from storage.artifacts.artifact import TreeRecord
    from storage.store import Store

CARD = "README.md"


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command(epilog=example("opd export demo ./demo-student --round 2"))(export)


def export(
    name: AtRound,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a new or empty folder", show_default=False, callback=local)
    ],
    round: Annotated[int | None, typer.Option("--round", min=0, help="round (default: the last)")] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="the round of the highest accuracy, else of the lowest reverse KL",
        ),
    ] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="the teacher instead, after its warm-up")] = False,
    teacher_name: Annotated[
        str | None,
        typer.Option("--teacher-name", help="of several teachers the one with this name", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="OWNER/NAME", help="commit DIR to this repository of the Hub", show_default=False
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="with --push: a private repository, never a public one")
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option("--gguf", metavar="TYPE", help="also DIR/DIR-TYPE.gguf: f32, f16, bf16, q8_0", show_default=False),
    ] = None,
    json_: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Copy a round's student to DIR: a Hugging Face checkpoint (safetensors, tokenizer, configs) with a model card. With
    --teacher: the run's teacher, for example to serve it; of several that with --teacher-name.

    The hash of every file and of the weights is verified; the hash of the weights is printed. DIR appears complete or not at
    all. --gguf calls llama.cpp's convert_hf_to_gguf.py, which must be on PATH. --push uploads all of it afterwards, with the
    token of HF_TOKEN or `hf auth login`.

    Exit codes: 0 done, 1 the store is damaged, the disk full, or converter or upload failed, 2 no such run or round, DIR is not
    empty, no token, no converter, or a public repository with --private."""
    from flows.cli.report import student_of, tree_of
    from flows.run.card import card
    from storage.store import Store

    name, round = at_round(name, round)
    run = Run.open(root, name)
    store = Store(existing_root(root))
    if private and push is None:
        raise InputError("--private: goes with --push")
    if teacher or teacher_name is not None:
        _export_teacher(run, store, directory, teacher_name, json_, push, private, gguf)
        return
    if best and round is not None:
        raise InputError("--best and a round: both are given; give one of them")
    chosen = _round(run, best_of(run) if best else round)
    artifact = student_of(store, chosen)
    if artifact is None:
        raise CorruptArtifact(
            f"the student of {name!r} round {chosen.round} is damaged or missing; rebuild it with:"
            f" {opd_command(root, 'resume', name)}"
        )
    hub, converter = _destination(directory, push, private), _converter(gguf)
    source = store.materialize(artifact)
    sha256 = str(chosen.student_sha256)
    sha = _copy(source, tree_of(store, artifact)[1], directory, sha256, card(run, store, chosen.round, sha256))
    what = f"student of {name!r} round {chosen.round}"
    said: dict[str, str | int] = {
        "run": name,
        "round": chosen.round,
        "directory": str(directory),
        "student_sha256": sha,
    }
    _report(what, said, sha, directory, hub, converter, json_)


def _converter(gguf: str | None) -> Converter | None:
    if gguf is None:
        return None
    from flows.run.gguf import Converter

    return Converter(gguf)


def _destination(directory: Path, push: str | None, private: bool) -> Destination | None:
    """Where the export is uploaded to. InputError where DIR or the Hub would not take it."""
    _refuse_unless_free(directory)
    if push is None:
        return None
    from flows.run.hub import Destination

    return Destination(push, private)


def _report(
    what: str,
    said: dict[str, str | int],
    sha: str,
    directory: Path,
    hub: Destination | None,
    converter: Converter | None,
    json_: bool,
) -> None:
    """Say where the export is; convert and upload it where that was asked for, and say where that is."""
    if not json_:
        typer.echo(f"{what} is in {directory}\nweights sha256: {sha}")
    if converter is not None:
        said["gguf"] = str(converter.convert(directory))
        if not json_:
            typer.echo(f"and in {said['gguf']}")
    if hub is not None:
        said["hub"] = hub.upload(directory, what, sha)
        if not json_:
            typer.echo(f"and in {said['hub']}")
    if json_:
        typer.echo(json.dumps(said))


def _export_teacher(
    run: Run,
    store: Store,
    directory: Path,
    name: str | None,
    json_: bool,
    push: str | None,
    private: bool,
    gguf: str | None,
) -> None:
    from flows.cli.report import tree_of
    from tasks.inputs.teachers import SELF_TEACHERS

    names = sorted(run.experiment.get("teachers") or {})
    if (name is None and names) or (name is not None and name not in names):
        there = f"the teachers are {', '.join(names)}; choose one with --teacher-name" if names else "use --teacher"
        asked = "has several teachers" if name is None else f"has no teacher {name!r}"
        raise InputError(f"run {run.name!r} {asked}: {there}")
    source = ((run.experiment.get("teacher") or {}).get("source") or {}).get("kind")
    if source in SELF_TEACHERS:
        raise InputError(
            f"the teacher of run {run.name!r} is its own student ({source}); export that, without --teacher, of the round that"
            " you want (--round)"
        )
    if source == "served":
        raise InputError(
            f"the teacher of run {run.name!r} is on a server, which does not give its weights;"
            " copy the model that the server loaded"
        )
    suffix = "" if name is None else f"_{name}"
    stages = run.state.rounds[0].stages if run.state.rounds else {}
    found = [
        (kind, stages[label].artifacts[kind])
        for label, kind in ((f"warmup_teacher{suffix}", "student"), (f"model_teacher{suffix}", "model"))
        if label in stages and kind in stages[label].artifacts
    ]
    artifact = store.get(*found[0]) if found else None
    if artifact is None or "weights" not in artifact.content:
        raise InputError(f"run {run.name!r} has made no teacher yet; see: opd status {run.name}")
    hub, converter = _destination(directory, push, private), _converter(gguf)
    sha = _copy(store.materialize(artifact), tree_of(store, artifact)[1], directory, artifact.content["weights"])
    who = "teacher" if name is None else f"teacher {name}"
    said: dict[str, str | int] = {"run": run.name, "directory": str(directory), "teacher_sha256": sha}
    _report(f"{who} of {run.name!r}", said, sha, directory, hub, converter, json_)


def _round(run: Run, number: int | None) -> RoundState:
    state = run.state
    last = state.last_trained
    if last is None:
        raise InputError(f"run {run.name!r} has no finished round yet; see: opd status {run.name}")
    if number is None:
        return last
    finished = {r.round: r for r in state.rounds if r.student_sha256}
    if number not in finished:
        there = ", ".join(str(n) for n in sorted(finished))
        raise InputError(f"run {run.name!r} has no finished round {number}; finished rounds: {there}")
    return finished[number]


def _refuse_unless_free(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise InputError(f"{directory}: exists and is not a folder; choose another DIR")
    if directory.is_dir() and any(directory.iterdir()):
        raise InputError(f"{directory}: not empty; choose another DIR, nothing is overwritten")


def best_of(run: Run) -> int:
    """The best evaluated round. InputError where none is evaluated."""
    from storage.upkeep.retention import best_round

    found = best_round(run.state)
    if found is None:
        raise InputError(f"--best: no round of {run.name!r} is evaluated; choose one with --round")
    return found


def _copy(source: Path, tree: TreeRecord, directory: Path, expected: str, card: str | None = None) -> str:
    """Copies the recorded files to a folder beside DIR, verifies the copies, adds the model card in place of a README.md, renames
    the folder. Returns the weights' sha256."""
    from storage.artifacts.digests import file_sha256, weights_digest
    from storage.artifacts.trees import fsync_tree

    target = directory.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, sum(file.bytes for file in tree.files), "the exported student")
    temporary = target.parent / f"{TEMPORARY}{target.name}-{unique()}"
    try:
        with explain_full_disk(target):
            for file in tree.files:
                copy = temporary / file.path
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file.path, copy)
                if file_sha256(copy) != file.sha256:
                    raise CorruptArtifact(f"{source / file.path}: changed during the copy; export again")
        sha = weights_digest(temporary)
        if sha != expected:
            raise CorruptArtifact(f"{source}: weights {sha[:16]}, the run recorded {expected[:16]}; run `opd resume`")
        if card is not None:
            (temporary / CARD).write_text(card)
        fsync_tree(temporary, [path for path in temporary.rglob("*") if path.is_file()])
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sha


def _publish(temporary: Path, target: Path) -> None:
    try:
        os.replace(temporary, target)  # replaces an empty folder only
    except OSError as error:
        raise InputError(f"{target}: cannot be created ({error.strerror}); choose a DIR that does not exist") from error
    fsync_directory(target.parent)
