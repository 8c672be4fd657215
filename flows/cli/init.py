"""`opd init`: a first config for models and prompts of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli.options import example, local
from storage.errors import InputError, OpdError

if TYPE_CHECKING:
    from flows.experiment import Experiment


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command(epilog=example("opd init --student models/small --teacher models/large --prompts train.jsonl"))(init)


def decisions(e: Experiment, held_out: Path | None) -> list[str]:
    """What the config has that nobody gave: a line each, with the field to change."""
    prompts, rollout, verifier = e.prompts, e.rollout, e.evaluate.verifier
    held = (
        f"the rows of {held_out}" if held_out is not None else "the first rows of the prompts, which are not trained on"
    )
    policy = prompts.tokenizers.model_dump(exclude_defaults=True)
    columns = getattr(prompts.train, "columns", {})
    found = {
        "prompts.train.columns": ", ".join(f"{ours} is {name}" for ours, name in columns.items()) or None,
        "runtime.device": e.runtime.device,
        "prompts.eval": held,
        "prompts.max_prompt_length": f"{prompts.max_prompt_length} tokens; longer prompts are left out",
        "prompts.chat_template": None if prompts.chat_template is not False else "none: a tokenizer has none",
        "prompts.tokenizers": ", ".join(f"{k}: {v}" for k, v in policy.items()) or None,
        "rollout": f"{rollout.prompts_per_round} prompts a round, at most {rollout.max_completion_length} tokens each",
        "train": f"{rollout.prompts_per_round // e.train.samples_per_step} steps a round, lr {e.train.lr:g}, {e.train.dtype}",
        "evaluate.verifier": verifier.kind if verifier is not None else "none: the prompts have no answers",
        "policy.rounds": str(e.policy.rounds),
    }
    return ["decided from the files:", *(f"  {field:<26} {text}" for field, text in found.items() if text is not None)]


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
    for line in decisions(load_experiment(output, []), held_out):
        typer.echo(line)
    typer.echo(f"{output} is written. Next:\n  opd check {output}\n  opd run {output} --rounds 1")
