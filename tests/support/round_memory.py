"""`python round_memory.py SMALL LARGE`: loads the synthetic rounds of two stores as the trainer does and walks over one epoch of
each. Prints in MiB how much more memory this process has had for the large one."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from synthetic_round import VOCABULARY, train_job

from storage.store import Store
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.trainer.batching import plan_steps, split_step
from tasks.trainer.data import forward_batch, loss_denominators
from tasks.trainer.reading import collect_round
from tasks.workers.jobs import ArtifactRef

STEP, BUDGET = 8, 512


def largest() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def epoch(root: Path) -> None:
    store = Store(root)
    signals = {artifact.stage: [ArtifactRef.of(artifact)] for artifact in store.list()}
    (rollouts,) = signals.pop("rollout")
    objective = DirectConfig(support=TopkSupport(k=64, outside="bucket"))
    job = train_job(root, rollouts, signals, objective)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        samples = collect_round(job, objective.needs(), [], VOCABULARY, store, Path(folder)).mapped()
    for step in plan_steps(0, 1, len(samples), STEP, len(samples)):
        weights = loss_denominators(samples, step.rows, "token", None)
        (micros,) = split_step(samples.forward_lengths[list(step.rows)].tolist(), 1, BUDGET)
        for micro in micros:
            forward_batch(samples, step.rows, weights, micro.places, micro.filler, torch.device("cpu"))
        samples.drop_pages()


if __name__ == "__main__":
    small, large = map(Path, sys.argv[1:])
    epoch(small)
    before = largest()
    epoch(large)
    print(largest() - before)
