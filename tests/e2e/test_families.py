"""Architectures that transformers and vLLM share: each runs, or is refused before an engine starts (docs/models.md)."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from families import FAMILIES, VARIANTS, config, family, prompt_files
from places import CHECKOUT

from flows.experiment import Experiment, experiment_of
from flows.run.check import check_experiment
from flows.run.runner import run_experiment
from storage.errors import InputError
from storage.store import Store
from tasks.workers.pool import WorkerPool

PAGE = CHECKOUT / "docs" / "models.md"
ROWS = {kind: (kind, {}) for kind in FAMILIES} | VARIANTS


def table() -> dict[str, str]:
    """The page's table: architecture -> result."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip("` "): row[1].strip() for row in rows}


def experiment_with(name: str, folder: Path) -> Experiment:
    kind, fields = ROWS[name]
    student, teacher = (family(folder / side, kind, seed, **fields) for seed, side in enumerate(("student", "teacher")))
    return experiment_of(config(student, teacher, prompt_files(folder)), name)


def test_the_table_has_every_architecture_and_its_refusals(tmp_path):
    found = {}
    for number, name in enumerate(ROWS):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            list(check_experiment(experiment_with(name, folder), folder / "store"))
            found[name] = "runs"
        except InputError as error:
            found[name] = str(error).splitlines()[0]
    shown = table()
    assert list(shown) == sorted(found)
    for name, result in found.items():
        assert (shown[name] == "runs") == (result == "runs"), (name, result)
        if result != "runs":
            reason = shown[name].removeprefix("refused: ").replace("`", "")
            assert reason in result, (name, result)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Workers that stay warm from one architecture to the next."""
    folder = tmp_path_factory.mktemp("pool")
    file = prompt_files(folder)
    runtime = experiment_of(config(folder, folder, file), "pool").runtime
    with WorkerPool(runtime, folder / "logs") as workers:
        yield workers


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if not table().get(name, "runs").startswith("refused")])
def test_an_architecture_goes_through_every_stage(name, tmp_path, pool):
    """vLLM and transformers agree about every sampled token; training changes the student, and the engine takes the new one."""
    experiment = experiment_with(name, tmp_path)
    root = tmp_path / "store"
    state, _ = run_experiment(experiment, name="run", root=root, prefect=False, workers=pool)
    assert state.status == "finished"
    store = Store(root)
    before, after = (state.rounds[number] for number in (0, 1))
    assert before.student_sha256 != after.student_sha256
    kl = [entry.metrics["reverse_kl"] for entry in (before, after)]
    assert all(math.isfinite(value) for value in kl) and kl[0] > 0.1
    (signal,), (rollouts,) = store.list("sampled"), store.list("rollout")
    tables = store.read_table(rollouts, "rollouts"), store.read_table(signal, "sampled")
    engine, scored = (
        pc.list_flatten(t[c]) for t, c in zip(tables, ("sampling_logprobs", "student_logprobs"), strict=True)
    )
    gap = pc.max(pc.abs(pc.subtract(engine.cast(pa.float64()), scored.cast(pa.float64())))).as_py()
    assert gap < 1e-3, gap
    (steps,) = store.list("train")
    assert all(loss > 0 for loss in store.read_table(steps, "training_steps")["loss"].to_pylist())
