"""`opd check`: all checks of an experiment that need no engine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from flows.distill import inputs
from flows.experiment import Experiment, dtype_warning, with_plugins
from flows.run.executor import Maker
from flows.run.preflight import Known, findings, require
from flows.run.progress import SilentReporter
from flows.run.runner import bytes_per_round
from storage.errors import ConfigError
from storage.runs import Run
from storage.store import Artifact, Store
from tasks.inputs.tokenizers import audit_tokenizers
from tasks.stage import Context
from tasks.workers.metrics import StageProgress
from tasks.workers.pool import WorkerPool


def check_experiment(experiment: Experiment, root: str | Path) -> Iterator[str]:
    """Read both models' configs and tokenizers and all prompts into a scratch store; yield report lines.

    Raises ConfigError or InputError for the first problem."""
    experiment.runtime.tell_libraries()
    mixed = dtype_warning(experiment)
    experiment = with_plugins(experiment)
    yield "config: valid"
    if mixed:
        yield f"warning: {mixed}"
    try:
        experiment.runtime.require_gpus()
    except ConfigError as error:  # a config may be checked on another machine than it will run on
        yield f"warning: not on this machine: {error}"
    with tempfile.TemporaryDirectory(prefix="opd-check-") as scratch:
        store = Store(scratch)
        run = Run.create(scratch, "check", {}, {})
        with WorkerPool(experiment.runtime, Path(scratch) / "logs") as workers:

            def context(progress: StageProgress) -> Context:
                return Context(store, experiment.runtime, workers, progress, lambda line: None)

            maker = Maker(store, run, run.state, context, SilentReporter())
            student, teacher = (maker_model(experiment, maker, side) for side in ("student", "teacher"))
            audit = audit_tokenizers(
                store.materialize(student), store.materialize(teacher), experiment.prompts.tokenizers
            )
            yield str(audit)
            audit.require()
            _, _, prompts = inputs(experiment, maker)
            yield from _prompts(prompts)
            found = findings(Known.of(experiment, store, student, teacher, prompts))
            yield from (f"note: {finding.text}" for finding in found if not finding.refused)
            require(found)
    yield (
        f"a round: {experiment.rollout.prompts_per_round * experiment.rollout.num_generations:,} completions,"
        f" {experiment.steps_per_round:,} optimizer steps, at most {bytes_per_round(experiment) / 2**20:,.1f} MiB of"
        " rollouts and signals before compression"
    )


def maker_model(experiment: Experiment, maker: Maker, side: str) -> Artifact:
    """One side's model in the scratch store."""
    from tasks.inputs.models import model_work

    source = getattr(experiment, side).source
    result: Artifact = maker(f"model_{side}", model_work, source, seed=experiment.seed)["model"]
    return result


def _prompts(prompts: Artifact) -> Iterator[str]:
    counts = prompts.meta.get("prompts") or {}
    for split, count in counts.items():
        dropped = (prompts.meta.get("filtered") or {}).get(split) or {}
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number)
        yield f"prompts: {count:,} for {split}" + (f" (left out: {left_out})" if left_out else "")
    for warning in prompts.meta.get("warnings") or []:
        yield f"warning: {warning}"
