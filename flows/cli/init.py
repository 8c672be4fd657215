"""`opd init`: a first config for models and prompts of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.options import example, local
from storage.errors import InputError, OpdError


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command(epilog=example("opd init --student models/small --teacher models/large --prompts train.jsonl"))(init)


def init(
    student: Annotated[str, typer.Option(help="a checkpoint folder, or OWNER/NAME@COMMIT of the Hub")],
    teacher: Annotated[str, typer.Option(help="the same")],
    prompts: Annotated[Path, typer.Option(help="JSONL, Parquet or a dataset's folder", callback=local)],
    held_out: Annotated[
        Path | None,
        typer.Option("--eval", help="held-out prompts; default: the first rows of --prompts", callback=local),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="the YAML to write", callback=local)] = Path(
        "experiment.yaml"
    ),
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="default: cuda where there is a GPU")] = None,
) -> None:
    """Write a commented config for your models and prompts, from what their files say. Nothing is overwritten.

    Exit codes: 0 written, 2 the models or prompts cannot be read or do not fit."""
    from flows.experiment import load_experiment
    from flows.run.starter import Starter
    from tasks.workers.devices import gpu_count

    if output.exists():
        raise InputError(f"{output}: exists; choose another file with --output, nothing is overwritten")
    starter = Starter(student, teacher, prompts, held_out, device or ("cuda" if gpu_count() else "cpu"))
    text = starter.text(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    try:
        load_experiment(output, [])
    except OpdError:
        output.unlink()
        raise
    typer.echo(f"{output} is written. Next:\n  opd check {output}\n  opd run {output} --rounds 1")
