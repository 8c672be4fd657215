"""Bad numbers never reach the loss (row 7): what engines hand over in a whole run of scripted engines, loaded as the trainer
loads it; and what the real sampler does with an engine's bad output."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import scripted_run
from clean_round import same_neighbours
from fault_trials import Trials, both_forms
from feed import Feed
from rollout_stage import Stage
from whole_round import from_rollouts

from flows.run.runner import run_experiment
from storage.errors import InputError
from storage.runs import Run
from storage.schemas import MaskReason
from storage.store import Store
from tasks.engines.vllm_engine import SamplingFailed
from tasks.trainer.batching import plan_steps
from tasks.trainer.data import Samples
from tasks.trainer.trainer import refuse_lost_steps
from tasks.workers.jobs import SampleJob, SampleResult, Sampling, TrainJob, TrainResult
from tasks.workers.runtime import RuntimeConfig

Values = dict[str, list[np.ndarray]]
K = scripted_run.EXPERIMENT["objective"]["support"]["k"]
SAMPLED = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
TOP = (f"teacher_top{K}_logprobs", f"teacher_top{K}_tail")
FOREIGN = (-1, scripted_run.ROWS, 2**31 - 1)
MASKED = {
    "NaN": SAMPLED + TOP,
    "+inf": SAMPLED + TOP,
    "-inf": SAMPLED,  # in a list it is a probability of zero
    "log-probabilities > 0, entropies < 0": ("sampling_logprobs", *SAMPLED, *TOP),
}
"""Fault -> quantities; the token is left out and counted."""
REFUSED = {
    "unsorted lists": TOP[:1],
    "ids out of range in lists": (f"teacher_top{K}_ids",),
    "an id twice in a list": (f"teacher_top{K}_ids",),
    "lists shorter than counted": (f"teacher_top{K}_valid",),
    "mass > 1 + tolerance": TOP[1:],
    "fewer or more values than tokens": SAMPLED
    + TOP
    + ("sampling_logprobs", f"teacher_top{K}_ids", f"teacher_top{K}_valid"),
    "token ids out of range": ("completion_token_ids",),
}


class Spoiler:
    """Changes one number of what an engine answers about one of a round's eight samples; all is drawn from the name."""

    def __init__(self, fault: str, name: str) -> None:
        self.draw, self.fault = random.Random(f"{fault} {name}"), fault
        self.quantity = self.draw.choice((MASKED | REFUSED)[fault])
        self.turn, self.met, self.sample, self.token = self.draw.randrange(8), 0, "", 0

    def __call__(self, ids: list[str], values: Values) -> Values:
        """The values of these samples, changed where the turn comes to one of them."""
        if self.quantity not in values:
            return values
        row, self.met = self.turn - self.met, self.met + len(ids)
        if not 0 <= row < len(ids):
            return values
        array = np.array(values[self.quantity][row])
        self.sample, self.token = ids[row], self.draw.randrange(len(array))
        arrays = list(values[self.quantity])
        arrays[row] = self.changed(array, self.token)
        return values | {self.quantity: arrays}

    def changed(self, array: np.ndarray, token: int) -> np.ndarray:
        draw, entry = self.draw, (token, self.draw.randrange(K))[: array.ndim]
        sign = -1 if self.quantity.endswith("entropy") else 1
        match self.fault:
            case "NaN":
                array[entry] = math.nan
            case "+inf":
                array[entry] = math.inf
            case "-inf":
                array[entry] = -math.inf
            case "log-probabilities > 0, entropies < 0":
                array[entry] = sign * 10 ** draw.uniform(-2.9, 30)
            case "unsorted lists":
                array[token, draw.randrange(K - 1)] -= draw.uniform(0.2, 9)
            case "ids out of range in lists" | "token ids out of range":
                array[entry] = draw.choice(FOREIGN)
            case "an id twice in a list":
                low, high = draw.sample(range(K), 2)
                array[token, low] = array[token, high]
            case "lists shorter than counted":
                array[token] = K + draw.randint(1, 9)
            case "mass > 1 + tolerance":
                array[token] = math.log(10 ** draw.uniform(-0.8, 0))  # the list itself has 0.87
            case "fewer or more values than tokens":
                array = array[:-1] if draw.random() < 0.5 else np.concatenate([array, array])
        return array


class Pool(in_process.InProcess):
    """The scripted engines, spoilt; the trainer first loads its round as the real one does."""

    def __init__(self, spoil: Any) -> None:
        super().__init__()
        import scripted_engines as engines

        self.loaded = loaded = list[Samples]()
        round_of = scripted_run.experiment()

        class Sampler(engines.Sampler):
            def handle(self, job: SampleJob, link: Feed) -> SampleResult:
                self.names = {request.seed: request.sample_id for item in link.items for request in item.requests}
                return super().handle(job, link)

            def complete(self, job: SampleJob, sampling: Sampling, prompt: list[int], seed: int) -> dict:
                made = super().complete(job, sampling, prompt, seed)
                if job.intermediate:  # an evaluation's
                    return made
                values = {
                    "completion_token_ids": [np.array(made["token_ids"])],
                    "sampling_logprobs": [made["logprobs"]],
                }
                values = spoil([self.names[seed]], values)
                ids, logprobs = (np.array(arrays[0]).tolist() for arrays in values.values())
                return made | {"token_ids": ids, "logprobs": logprobs}

        class Scorer(engines.Scorer):
            def sampled(self, models: dict, rollouts: Any) -> Values:
                return spoil(rollouts["sample_id"].to_pylist(), super().sampled(models, rollouts))

            def top(self, models: dict, rollouts: Any, k: int) -> Values:
                values = super().top(models, rollouts, k)
                # equal shares would hide a wrong order
                values[TOP[0]] = [array - np.float32(0.1) * np.arange(k) for array in values[TOP[0]]]
                return spoil(rollouts["sample_id"].to_pylist(), values)

        class Trainer(engines.Trainer):
            def handle(self, job: TrainJob, link: Feed) -> TrainResult:
                store, signals = Store(job.store), {name: place for name, (place,) in job.signals.items()}
                places = {"rollouts": job.rollouts, **signals}
                tables = {name: store.read_table(store.require(at.stage, at.key), name) for name, at in places.items()}
                reasons = [MaskReason[name.upper()] for name in json.loads(bytes(job.config))["mask_reasons"]]
                rollouts, needs = tables.pop("rollouts"), round_of.objective.needs()
                samples = from_rollouts(rollouts, tables, needs, reasons, job.seed, scripted_run.ROWS)
                per_step = json.loads(bytes(job.config))["samples_per_step"]
                refuse_lost_steps(
                    samples, plan_steps(job.seed, job.round, len(samples), per_step, len(samples)), job.round
                )
                loaded.append(samples)
                return super().handle(job, link)

        self.handlers = {"sampler": Sampler({}), "scorer": Scorer({}), "trainer": Trainer({})}


def run(root: Path, spoil: Any, max_invalid: float = 1.0) -> list[Samples]:
    """What the trainer has loaded in a run of one round. One bad token of a few dozen is above the default of `max_invalid`."""
    pool, experiment = Pool(spoil), scripted_run.experiment(1)
    experiment.runtime.scorer.max_invalid = max_invalid
    run_experiment(experiment, name="trial", root=root, prefect=False, workers=pool)  # type: ignore[arg-type]
    return pool.loaded


@pytest.fixture(scope="module")
def clean(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    root = tmp_path_factory.mktemp("clean") / "store"
    shutil.copytree(template, root)
    (samples,) = run(root, lambda ids, values: values)
    assert samples.keep.all() and samples.invalid == 0
    return samples


@pytest.mark.parametrize("fault", MASKED | REFUSED)
@both_forms(short=1, full=100)
def test_a_bad_number_from_an_engine(
    clean: Samples, template: Path, trials: Trials, tmp_path: Path, fault: str, count: int
) -> None:
    def attempt(name: str) -> None:
        root, spoil = tmp_path / name, Spoiler(fault, name)
        shutil.copytree(template, root)
        if fault in MASKED:
            (samples,) = run(root, spoil)
            row = clean.ids.index(spoil.sample)
            same_neighbours(samples, clean, int(clean.completions.offsets[row]) + spoil.token)
            if spoil.quantity not in TOP:
                (mask,) = Store(root).list("mask")
                assert mask.meta["metrics"]["invalid_tokens"] == 1
        else:
            with pytest.raises(InputError) as refused:
                run(root, spoil)
            assert f"sample {spoil.sample!r}" in str(refused.value), refused.value
            assert [a for stage in ("train", "student", "trainer_state") for a in Store(root).list(stage)] == []
        shutil.rmtree(root)

    trials(7, f"from engines: {fault}", map(str, range(count)), attempt)


# --- the real sampler ------------------------------------------------------------------------------------------------

OUTPUTS = {
    "nan": "a log-probability is not finite",
    "plus_infinite": "a log-probability is not finite",
    "infinite": "a log-probability is not finite",
    "short": "log-probabilities are missing",
    "negative_id": "a token is not among the 256 of the vocabulary",
    "foreign_id": "a token is not among the 256 of the vocabulary",
}


class OneSampler(in_process.InProcess):
    def __init__(self) -> None:
        super().__init__()
        import scripted_sampler

        self.runtime = RuntimeConfig(device="cpu", threads=1)
        self.handlers = {"sampler": scripted_sampler.Scripted({})}


@both_forms(short=len(OUTPUTS), full=10 * 2 * len(OUTPUTS))
def test_an_output_that_cannot_be_used_is_asked_for_again(trials: Trials, tmp_path: Path, count: int) -> None:
    """With the same seed; after three times the sample is named."""
    whole = Stage(tmp_path / "whole").build(OneSampler())  # type: ignore[arg-type]

    def attempt(name: str) -> None:
        kind, at, times = name.split()
        stage = Stage(tmp_path / name.replace(" ", "-"))
        sample = [sample for shard in stage.shards for sample in shard][int(at)]
        (stage.store.root / "fault").write_text(json.dumps({"kind": kind, "seed": sample.seed, "times": int(times)}))
        if times == "1":
            assert stage.build(OneSampler()).content == whole.content  # type: ignore[arg-type]
            assert Counter(stage.noted("asked"))[sample.seed] == 2
        else:
            message = (
                rf"1 of \d samples of shard \d failed at every try: {sample.sample_id} \(seed {sample.seed}\):"
                rf" {OUTPUTS[kind]}"
            )
            with pytest.raises(SamplingFailed, match=message):
                stage.build(OneSampler())  # type: ignore[arg-type]
            assert Counter(stage.noted("asked"))[sample.seed] == 3
        shutil.rmtree(tmp_path / name.replace(" ", "-"))

    names = [f"{kind} {at} {times}" for at in range(10) for times in (1, 99) for kind in OUTPUTS]
    trials(7, "from a sampling engine: not finite, missing, foreign ids", names[:count], attempt)


# --- a broken teacher ------------------------------------------------------------------------------------------------


def broken_teacher(ids: list[str], values: Values) -> Values:
    """Every log-probability of the teacher is NaN."""
    name = "teacher_logprobs"
    return values | {name: [np.full(len(array), math.nan) for array in values[name]]} if name in values else values


def test_a_broken_teacher_is_no_finished_run(template: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(template, root)
    with pytest.raises(InputError, match=r"100\.0%"):
        run(root, broken_teacher, max_invalid=0.01)
    state = Run.open(root, "trial").state
    assert state.status == "failed" and state.rounds[1].stages["supervise"].state == "failed"
    assert [
        a for stage in ("sampled", "mask", "teacher_topk", "student", "train") for a in Store(root).list(stage)
    ] == []
    run(root, lambda ids, values: values, max_invalid=0.01)  # repaired: the models are asked again
    assert Run.open(root, "trial").state.status == "finished"


def test_signals_that_another_run_accepts_are_refused_in_training(template: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(template, root)
    with pytest.raises(InputError, match="no token to train on"):
        run(root, broken_teacher)
    with pytest.raises(InputError, match=r"train: .*runtime\.scorer\.max_invalid"):
        run(root, broken_teacher, max_invalid=0.01)
    assert Store(root).list("student") == []
