"""Training stopped inside a round: only whole checkpoints are used (row 4), and what goes on from one ends bit for bit where
an undisturbed round does (row 5)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_trials import FULL_SECONDS, Trials, both_forms
from pydantic import TypeAdapter
from safetensors.torch import load_file
from trainer_world import Judged, K, Made, Paired, launch_trainer, make, make_judged, make_paired, make_world

from flows.experiment import load_experiment
from storage.artifacts.checkpoints import CHECKPOINT, RECORD
from storage.disk import failpoints
from storage.errors import OpdError
from storage.store import Store
from tasks.inputs.teachers import EmaStudent
from tasks.losses.config import AnyObjective, DirectConfig, ObjectiveConfig, TopkSupport
from tasks.stage import Work
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import CHECKOUT, Worker, WorkerDied

STEPS = 12
BUCKET = DirectConfig(support=TopkSupport(k=8, outside="bucket"))
SETTINGS: dict[str, Any] = {
    "lr": 1e-3, "samples_per_step": 4, "epochs_per_round": 4, "max_grad_norm": 0.1, "weight_decay": 0.01,
    "schedule": {"warmup_steps": 3},
}  # fmt: skip
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]}}
ZERO = CHECKOUT / "configs" / "deepspeed"
SETUPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "ZeRO 2": ({}, {"deepspeed": str(ZERO / "zero2.json")}),
    "ZeRO 3": ({"dtype": "bfloat16"}, {"deepspeed": str(ZERO / "zero3.json")}),
    "LoRA": (LORA, {"deepspeed": str(ZERO / "zero1.json")}),
}
"""What is trained how: (training settings, runtime settings)."""
AVERAGES = {
    "average per step": EmaStudent(per="step"),
    "average per round": EmaStudent(decay=0.5),
}
"""What the trainer keeps for a teacher of kind ema."""


def recipe_objective(path: Path) -> AnyObjective:
    """A recipe's objective over the lists of `make_world`: 8 tokens, and what is outside where the objective itself is one
    divergence; beside a policy gradient, whose temperatures and targets a category of the rest does not have, the 8 alone."""
    objective = load_experiment(path).objective.model_dump()
    return TypeAdapter(ObjectiveConfig).validate_python(over_lists(objective, objective["estimator"] == "credit"))


def over_lists(part: dict[str, Any], alone: bool) -> dict[str, Any]:
    if part.get("kind") == "full":
        return {"kind": "teacher_topk", "k": K, "outside": "renormalize" if alone else "bucket"}
    found = {name: over_lists(value, alone) if isinstance(value, dict) else value for name, value in part.items()}
    return found | ({"k": K} if (found.get("k") or 0) > K else {})


RECIPES = {path.stem: recipe_objective(path) for path in sorted((CHECKOUT / "configs" / "recipes").glob("*.yaml"))}
PAIRS = next(name for name, own in RECIPES.items() if own.needs().pairs)
SHORT = ("tropd", "reopold")
"""Recipes in `make test`: one that draws per token, one that weighs by the ratio to the policy of the rollouts."""
SAVING = {
    0: ("begun", "before_write", "after_write", "after_sync", "before_record", "before_rename", "after_rename", "before_sweep"),
    1: ("before_write", "after_write", "after_sync"),
}  # fmt: skip
"""Moments of saving, by the rank that is there."""
NAMED = ("after_rename", "before_sweep")
"""At these the new checkpoint counts already."""


GATED = TypeAdapter(ObjectiveConfig).validate_python(
    {
        "estimator": "credit",
        "reward": "group",
        "clip": {},
        "add": {"kind": "anti_sd", "warm_steps": 5, "close_below": 0.99},
    }
)
"""AntiSD, whose gate remembers the steps before; here it opens and closes in 12 steps."""
GATE = "the gate of AntiSD"


@dataclass
class Bench:
    """A store, warm trainers of one and two ranks, and undisturbed rounds to compare with."""

    judged: Judged
    paired: Paired
    folder: Path
    warm: dict[int, Worker]
    whole: dict[tuple[str, int, int], Made]

    @property
    def store(self) -> Store:
        return self.judged.world.store

    def work(self, setup: str, ranks: int, number: int) -> Work:
        """The training of round `number`; the second goes on from the first, undisturbed one of that setup."""
        config = TrainConfig.model_validate(SETTINGS | SETUPS.get(setup, ({}, {}))[0])
        world, objective = self.judged.world, GATED if setup == GATE else RECIPES.get(setup, BUCKET)
        more: dict[str, Any] = {"average": AVERAGES.get(setup)}
        student, state, rollouts, signals = world.student, None, world.rollouts, world.signals
        if objective.needs().pairs:
            rollouts, signals = self.paired.rollouts, self.paired.signals
        if objective.estimator == "credit":
            rollouts = self.judged.rollouts
            more |= {"judged": self.judged.rewards}
            more |= {"contexts": self.judged.contexts} if objective.needs().credit.contexts else {}
        if number > 1:
            before = self.undisturbed(setup, ranks).artifacts
            student, state = before["student"], before["trainer_state"]
        return train_work(config, objective, student, state, rollouts, signals, 0, number, **more)

    def train(
        self,
        setup: str,
        ranks: int,
        tag: str,
        minutes: float | None = 0,
        number: int = 1,
        worker: Worker | None = None,
        **runtime: Any,
    ) -> Made:
        """`worker`: in the place of the warm one of so many ranks. `runtime` may have `said`, a list that gets what is logged,
        also where the job fails."""
        runtime = SETUPS.get(setup, ({}, {}))[1] | {"checkpoint_minutes": minutes} | runtime
        return make(self.work(setup, ranks, number), self.store, worker or self.warm[ranks], tag, **runtime)

    def undisturbed(self, setup: str, ranks: int, number: int = 1) -> Made:
        place = (setup, ranks, number)
        if place not in self.whole:
            self.whole[place] = self.train(setup, ranks, f"whole {setup} {ranks}", None, number)
        return self.whole[place]

    def killed(self, setup: str, ranks: int, tag: str, spec: str, number: int = 1) -> list[str]:
        """A trainer of its own that dies at a failpoint; the supervisor hears of it. What was logged until then."""
        said: list[str] = []
        log = self.folder / f"{re.sub('[^a-z0-9]+', '-', tag.lower())}.log"
        armed = {failpoints.SPEC: spec, failpoints.LOG: str(log.with_suffix(".hits"))}
        worker = launch_trainer(ranks, log, **armed)
        try:
            with pytest.raises(WorkerDied):
                self.train(setup, ranks, tag, number=number, worker=worker, said=said)
        finally:
            worker.kill()
        return said

    def checkpoints(self) -> list[Path]:
        return sorted((self.store.root / "artifacts").glob(f"*/*/{CHECKPOINT}*"))

    def check(self, made: Made, setup: str, ranks: int, number: int = 1) -> None:
        found, expected = told(made), told(self.undisturbed(setup, ranks, number))
        for part in expected:
            assert found[part] == expected[part], part
        assert self.checkpoints() == [] and list(self.store.root.rglob(".tmp-*")) == []

    def memory(self, made: Made) -> dict[str, list[float]]:
        """What the objective remembers after the round."""
        folder = self.store.materialize(made.artifacts["trainer_state"], "state")
        return {name: tensor.tolist() for name, tensor in load_file(folder / "memory.safetensors").items()}


def told(made: Made) -> dict[str, Any]:
    """Weights, optimizer state and every figure of every step, but for the seconds."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in made.rows]
    assert len(rows) == STEPS
    return {"rows": rows} | {name: artifact.content for name, artifact in made.artifacts.items()}


def resumed_after(made: Made) -> int:
    """The step that the log names, 0 where it names none."""
    return next((int(found[1]) for line in made.said if (found := re.search(r"continuing after step (\d+)", line))), 0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, trainers: dict[int, Worker]) -> Bench:
    folder = tmp_path_factory.mktemp("checkpoints")
    world = make_world(folder / "store")
    return Bench(make_judged(world), make_paired(world), folder, trainers, {})


@pytest.mark.parametrize(
    "setup",
    [
        *SETUPS,
        *AVERAGES,
        GATE,
        *(pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in RECIPES),
    ],
)
def test_a_round_that_stops_goes_on_bit_for_bit(bench: Bench, setup: str) -> None:
    """A warm trainer, stopped by an error after some step, twice."""
    tag = f"stopped {setup}"
    for stop in (3, 7):
        with pytest.raises(OpdError, match="a failpoint"):
            bench.train(setup, 1, tag, failpoints=f"train.after_step=raise:OpdError@{stop}")
    made = bench.train(setup, 1, tag)
    assert resumed_after(made) == 2 + 7 - 1
    bench.check(made, setup, 1)


def test_saving_changes_nothing(bench: Bench) -> None:
    bench.check(bench.train("float32", 1, "saving"), "float32", 1)


def test_other_numerics_begin_anew_and_say_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OpdError, match="a failpoint"):
        bench.train("float32", 1, "other", failpoints="train.after_step=raise:OpdError@5")
    (newest, *_) = reversed(bench.checkpoints())
    monkeypatch.setattr("tasks.workers.runtime.RuntimeConfig.numerics", lambda self, *roles: {"threads": 7})
    made = bench.train("float32", 1, "other")
    assert resumed_after(made) == 0
    assert any("step 4 was made with other settings" in line and "threads 2, now 7" in line for line in made.said)
    assert any("training restarts at the first of 12 steps" in line for line in made.said)
    assert not newest.exists()
    bench.check(made, "float32", 1)


# --- damage ----------------------------------------------------------------------------------------------------------


def torn_record(path: Path) -> None:
    cut(path / RECORD)


def torn_tensors(path: Path) -> None:
    cut(sorted(path.glob("rank-*"))[-1])


def no_tensors(path: Path) -> None:
    sorted(path.glob("rank-*"))[-1].unlink()


def flipped_bit(path: Path) -> None:
    file = sorted(path.glob("rank-*"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


DAMAGE: tuple[Callable[[Path], None], ...] = (torn_record, torn_tensors, no_tensors, flipped_bit)


@pytest.mark.parametrize("both", [False, True], ids=["newest", "both"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_never_used(bench: Bench, damage: Callable[[Path], None], both: bool) -> None:
    """The one before it is, and where none is left the log says that training begins anew."""
    tag = f"{damage.__name__} {both}"
    with pytest.raises(OpdError, match="a failpoint"):
        bench.train("float32", 1, tag, failpoints="train.after_step=raise:OpdError@7")
    older, newer = bench.checkpoints()
    for path in (older, newer) if both else (newer,):
        damage(path)
    made = bench.train("float32", 1, tag)
    assert resumed_after(made) == (0 if both else 5)
    warnings = [line for line in made.said if "warning" in line]
    assert len(warnings) == (3 if both else 1)
    assert "the checkpoint of step 6 is damaged and in quarantine" in warnings[0]
    if both:
        assert "no checkpoint can be used: training restarts at the first of 12 steps" in warnings[-1]
    reasons = [path.read_text() for path in (bench.store.root / "quarantine").glob("*.reason.json")]
    assert any(newer.name in reason and "a damaged checkpoint" in reason for reason in reasons)
    bench.check(made, "float32", 1)


@pytest.mark.parametrize("end", ["error", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_round_that_begins_anew_says_so_until_it_has_a_checkpoint(bench: Bench, end: str) -> None:
    """The attempt that finds all checkpoints damaged ends before it has saved one; the next finds none at all."""
    tag, anew = f"damaged, then {end}", "no checkpoint can be used: training restarts at the first of 12 steps"
    with pytest.raises(OpdError, match="a failpoint"):
        bench.train("float32", 1, tag, failpoints="train.after_step=raise:OpdError@7")
    for path in (damaged := bench.checkpoints()):
        torn_tensors(path)
    if end == "kill":
        first = bench.killed("float32", 1, tag, "train.after_step=kill@1")
    else:
        first = []
        with pytest.raises(OpdError, match="a failpoint"):
            bench.train("float32", 1, tag, said=first, failpoints="train.after_step=raise:OpdError@1")
    assert sum("is damaged and in quarantine" in line for line in first) == 2 and any(anew in line for line in first)
    assert bench.checkpoints() == []
    made = bench.train("float32", 1, tag)
    assert resumed_after(made) == 0 and any(anew in line for line in made.said)
    [before] = [line for line in made.said if "in quarantine from before" in line]
    assert all(path.name in before for path in damaged)
    bench.check(made, "float32", 1)


# --- kills -----------------------------------------------------------------------------------------------------------


@both_forms(short=1, full=(len(SETUPS) + len(AVERAGES)) * sum(map(len, SAVING.values())))
def test_a_rank_killed_while_it_saves(bench: Bench, trials: Trials, count: int) -> None:
    """Every rank at every moment of saving, at two ranks, in every setup: on from the last checkpoint that was whole."""
    moments = [(rank, point) for rank, points in SAVING.items() for point in points]
    names = [f"{setup}, rank {rank} at {point}" for setup in SETUPS for rank, point in moments]
    random.Random("ranks").shuffle(names)
    averages = [f"{setup}, rank {rank} at {point}" for setup in AVERAGES for rank, point in moments]
    random.Random("averages").shuffle(averages)
    names += averages

    def attempt(name: str) -> None:
        setup, rank, point = re.fullmatch(r"(.*), rank (\d) at (\w+)", name).groups()  # type: ignore[union-attr]
        which = random.Random(f"save {name}").randint(1, STEPS - 1)
        bench.killed(setup, 2, name, f"checkpoint.{point}=kill#{rank}@{which}")
        step = which if point in NAMED else which - 1
        made = bench.train(setup, 2, name)
        assert resumed_after(made) == step
        bench.check(made, setup, 2)

    trials(4, "a rank of two killed while a checkpoint is saved", names[:count], attempt)


@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_killed_after_a_random_step(bench: Bench, trials: Trials) -> None:
    def attempt(name: str) -> None:
        draw = random.Random(f"step {name}")
        setup, ranks, step = draw.choice(list(SETUPS)), draw.choice((1, 2)), draw.randint(1, STEPS)
        bench.killed(setup, ranks, f"killed {name}", f"train.after_step=kill#{draw.randrange(ranks)}@{step}")
        made = bench.train(setup, ranks, f"killed {name}")
        assert resumed_after(made) in (step - 1, step)  # the other rank may not have heard of it yet
        bench.check(made, setup, ranks)

    trials(5, "SIGKILL after a random step, one and two ranks", map(str, range(20)), attempt)


@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_an_average_goes_on_bit_for_bit_after_a_kill(bench: Bench, trials: Trials) -> None:
    """Compared are, among others, the average in the trainer's state and the exported teacher. Per round it is updated after the
    last step alone, so the last step is always among those after which a rank dies."""

    def attempt(name: str) -> None:
        setup, ranks, step = re.fullmatch(r"(.*), ranks (\d), step (\d+)", name).groups()  # type: ignore[union-attr]
        count, rank = int(ranks), random.Random(name).randrange(int(ranks))
        bench.killed(setup, count, name, f"train.after_step=kill#{rank}@{step}")
        made = bench.train(setup, count, name)
        assert resumed_after(made) in (int(step) - 1, int(step))
        assert "teacher_ema" in made.artifacts
        bench.check(made, setup, count)

    steps = [1, *sorted(random.Random("steps").sample(range(2, STEPS), 3)), STEPS]
    names = [f"{setup}, ranks {ranks}, step {step}" for setup in AVERAGES for ranks in (1, 2) for step in steps]
    trials(5, "SIGKILL after a step, averaged teacher per step and per round, one and two ranks", names, attempt)


@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_pairs_go_on_bit_for_bit_after_a_kill(bench: Bench, trials: Trials) -> None:
    """Both completions of a pair are in one step and one micro-batch, on whichever rank. A rank dies early, in the middle, and
    after the last step."""

    def attempt(name: str) -> None:
        ranks, step = map(int, re.fullmatch(r"ranks (\d), step (\d+)", name).groups())  # type: ignore[union-attr]
        rank = random.Random(name).randrange(ranks)
        bench.killed(PAIRS, ranks, f"pairs {name}", f"train.after_step=kill#{rank}@{step}")
        made = bench.train(PAIRS, ranks, f"pairs {name}")
        assert resumed_after(made) in (step - 1, step)
        bench.check(made, PAIRS, ranks)

    names = [f"ranks {ranks}, step {step}" for step in (6, 1, STEPS) for ranks in (2, 1)]
    trials(5, "SIGKILL after a step, pairs of completions (PBSD), one and two ranks", names, attempt)


@pytest.mark.promise(5, "the gate of AntiSD opens and closes in both rounds of the trials that compare it")
def test_the_gate_remembers_both_rounds(bench: Bench) -> None:
    """What the trials below compare."""
    first, second = (bench.undisturbed(GATE, 1, number) for number in (1, 2))
    assert [bench.memory(made)["steps"] for made in (first, second)] == [[STEPS], [2 * STEPS]]
    assert bench.memory(first)["warm"] == bench.memory(second)["warm"] != []
    assert bench.memory(first)["entropies"] == bench.memory(second)["entropies"] == []


@both_forms(short=1, full=16)
def test_what_an_objective_remembers_goes_on_bit_for_bit_after_a_kill(bench: Bench, trials: Trials, count: int) -> None:
    """Killed while the gate is still being warmed, and after; in the first round and in the second, whose memory is that of the
    state before."""

    def attempt(name: str) -> None:
        ranks, number, step = map(int, re.fullmatch(r"ranks (\d), round (\d), step (\d+)", name).groups())  # type: ignore[union-attr]
        rank = random.Random(name).randrange(ranks)
        bench.undisturbed(GATE, ranks)
        bench.killed(GATE, ranks, f"gate {name}", f"train.after_step=kill#{rank}@{step}", number)
        made = bench.train(GATE, ranks, f"gate {name}", number=number)
        assert resumed_after(made) in (step - 1, step)
        assert bench.memory(made) == bench.memory(bench.undisturbed(GATE, ranks, number))
        bench.check(made, GATE, ranks, number)

    names = [
        f"ranks {ranks}, round {number}, step {step}" for number in (2, 1) for ranks in (1, 2) for step in (7, 2, 5, 12)
    ]
    trials(
        5,
        "SIGKILL after a step, an objective that remembers (AntiSD's gate), two rounds, one and two ranks",
        names[:count],
        attempt,
    )


@pytest.mark.faults
@pytest.mark.timeout(FULL_SECONDS)
def test_every_recipe_goes_on_bit_for_bit(bench: Bench, trials: Trials) -> None:
    """Draws of trust regions, ratios to the rollouts' policy and metrics of every objective depend on no step before. The pairs
    of PBSD come in the same order, of two completions each."""

    def attempt(name: str) -> None:
        draw = random.Random(f"recipe {name}")
        step = draw.randint(2, STEPS)
        bench.killed(name, 2, f"recipe {name}", f"train.after_step=kill#{draw.randrange(2)}@{step}")
        made = bench.train(name, 2, f"recipe {name}")
        assert resumed_after(made) in (step - 1, step)
        bench.check(made, name, 2)

    trials(5, "SIGKILL after a random step, every recipe, two ranks", RECIPES, attempt)
