"""Real training through DeepSpeed's launcher: what one rank and two ranks make of the same shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from trainer_world import Made, World, commit_model, logprobs_of, make, tiny_model
from transformers import AutoModelForCausalLM

from storage.artifacts.packed import pack
from storage.errors import InputError, OpdError
from storage.schemas import TABLES, schema_for
from storage.store import Artifact, ArtifactSpec
from tasks.losses.config import DirectConfig, PolicyGradientConfig, SftConfig, TopkSupport
from tasks.train import train_work
from tasks.trainer.config import TrainConfig, WarmupConfig
from tasks.warmup import warmup_work
from tasks.workers.pool import CHECKOUT, Worker

BUCKET = DirectConfig(support=TopkSupport(k=8, outside="bucket"))
ZERO = CHECKOUT / "configs" / "deepspeed"
Train = Callable[..., Made]


def config(**fields: Any) -> TrainConfig:
    return TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 4, "max_grad_norm": None} | fields)


ONE_STEP = config(samples_per_step=12)
"""All samples in one step: from zero moments, exp_avg is 0.1 x the gradient."""
TWELVE = config(epochs_per_round=4, max_grad_norm=0.1, weight_decay=0.01, schedule={"warmup_steps": 3})


@pytest.fixture(scope="module")
def train(world: World, trainers: dict[int, Worker]) -> Train:
    """Trains on the world's rollouts; every distinct call once."""
    done: dict[str, Made] = {}

    def run(
        settings: TrainConfig,
        ranks: int = 1,
        after: Made | None = None,
        objective: Any = BUCKET,
        round: int = 1,
        again: int = 0,
        signals: dict | None = None,
        **runtime: Any,
    ) -> Made:
        student, state = (
            (after.artifacts["student"], after.artifacts["trainer_state"]) if after else (world.student, None)
        )
        tag = f"{ranks} {sorted(runtime.items())} {again}"
        work = train_work(settings, objective, student, state, world.rollouts, signals or world.signals, 0, round)
        name = f"{work.outputs['student'].key} {tag}"
        if name not in done:
            done[name] = make(work, world.store, trainers[ranks], tag, **runtime)
        return done[name]

    return run


def gradients(made: Made) -> dict[str, torch.Tensor]:
    return {name: tensor * 10 for name, tensor in made.tensors("exp_avg").items()}


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], limit: float = 1e-6) -> None:
    assert one.keys() == other.keys() and one
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < limit


def kept(world: World) -> list[np.ndarray]:
    masks = world.store.read_table(world.signals["mask"], "mask")["mask_reasons"].to_pylist()
    return [np.flatnonzero(np.array(reasons) == 0) for reasons in masks]


@pytest.fixture(scope="module")
def by_hand(world: World) -> tuple[float, dict[str, torch.Tensor]]:
    return formula(world, world.signals["teacher_topk"])


def formula(world: World, signal: Artifact) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the first step, by autograd over whole sequences and the formula of bucketed reverse KL."""
    student, total, count = tiny_model(1), torch.zeros(()), 0
    topk = world.store.read_table(signal, "teacher_topk").to_pylist()
    for row, lists, keep in zip(world.samples, topk, kept(world), strict=True):
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        logits = student(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)
        for t in keep:
            ids = torch.tensor(lists["ids"][t])
            outside = log_p[t].scatter(0, ids, -torch.inf).logsumexp(0, keepdim=True)
            p = torch.cat([log_p[t, ids], outside])
            q = torch.tensor([*lists["logprobs"][t], lists["tail_logmass"][t]])
            total, count = total + (p.exp() * (p - q)).sum(), count + 1
    (total / count).backward()
    return float(total.detach() / count), {name: p.grad for name, p in student.named_parameters()}


def test_the_first_step_is_the_formulas(train: Train, by_hand: tuple) -> None:
    loss, gradient = by_hand
    made = train(ONE_STEP)
    assert made.losses[0] == pytest.approx(loss, abs=1e-6)
    assert_near(gradients(made), gradient)
    norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
    assert made.rows[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_packed_lists_that_a_tail_mass_ends_train_by_the_same_formula(
    train: Train, world: World, by_hand: tuple
) -> None:
    """Lists of different lengths; what is cut off is in the bucket."""
    rows = []
    for row in world.store.read_table(world.signals["teacher_topk"], "teacher_topk").to_pylist():
        kept = [max(1, count - place % count) for place, count in enumerate(row["valid"])]
        cut = [
            [*logprobs[n:], tail] for logprobs, n, tail in zip(row["logprobs"], kept, row["tail_logmass"], strict=True)
        ]
        rows.append(
            row
            | {name: [cell[:n] for cell, n in zip(row[name], kept, strict=True)] for name in ("ids", "logprobs")}
            | {"valid": kept, "tail_logmass": [float(np.logaddexp.reduce(values)) for values in cut]}
        )
    schema = TABLES["teacher_topk"]
    spec = ArtifactSpec.of("teacher_topk", 1, {"encoding": "packed", "tail_mass": 0.5}, {})
    with world.store.building(spec) as builder:
        builder.write_shard("teacher_topk", 0, pack(schema, pa.Table.from_pylist(rows, schema.arrow)))
        signal = builder.commit()
    loss, gradient = formula(world, signal)
    made = train(ONE_STEP, signals=world.signals | {"teacher_topk": signal})
    assert made.losses[0] == pytest.approx(loss, abs=1e-6) and abs(loss - by_hand[0]) > 1e-3
    assert_near(gradients(made), gradient)


@pytest.mark.parametrize(
    ("ranks", "runtime"),
    [
        (2, {"deepspeed": "zero2"}),
        (2, {"deepspeed": "zero1"}),
        (2, {"deepspeed": "zero3"}),
        (2, {"deepspeed": "partitioned", "activation_checkpointing": True, "micro_batch_tokens": 40}),
        (1, {"micro_batch_tokens": 1, "head_chunk_tokens": 3}),
        (1, {"micro_batch_tokens": 100_000, "activation_checkpointing": True}),
    ],
)
def test_one_steps_gradient_depends_on_no_topology(
    train: Train, ranks: int, runtime: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runtime = with_file(runtime, tmp_path_factory)
    made, reference = train(ONE_STEP, ranks, **runtime), train(ONE_STEP)
    assert_near(gradients(made), gradients(reference))
    assert made.losses[0] == pytest.approx(reference.losses[0], abs=1e-6)
    assert made.rows[0]["grad_norm"] == pytest.approx(reference.rows[0]["grad_norm"], rel=1e-5)


def with_file(runtime: dict[str, Any], tmp: pytest.TempPathFactory) -> dict[str, Any]:
    """Names of ZeRO files become paths; `partitioned` is stage 3 with even the smallest parameter in pieces."""
    if runtime.get("deepspeed") == "partitioned":
        file = tmp.mktemp("zero") / "partitioned.json"
        file.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
        return runtime | {"deepspeed": str(file)}
    return runtime | ({"deepspeed": str(ZERO / f"{runtime['deepspeed']}.json")} if "deepspeed" in runtime else {})


def test_two_ranks_follow_one_for_twelve_steps(train: Train) -> None:
    one, two = train(TWELVE), train(TWELVE, 2, deepspeed=str(ZERO / "zero2.json"))
    assert len(one.losses) == 12 and one.losses[-1] < one.losses[0]
    np.testing.assert_allclose(two.losses[:10], one.losses[:10], atol=1e-5, rtol=0)
    assert [row["samples"] for row in two.rows] == [4] * 12
    assert [row["tokens"] for row in two.rows] == [row["tokens"] for row in one.rows]
    assert all(row["grad_norm"] > 0.1 for row in one.rows[:2]), "clipping is on, or the test shows less than it says"


def test_a_round_of_one_rank_goes_on_with_two(train: Train) -> None:
    settings = TWELVE.model_copy(update={"samples_per_step": 12})
    first = train(settings)
    assert first.artifacts["trainer_state"].meta["last_step"] == 4
    ends = [train(settings, ranks, first, round=2, **runtime) for ranks, runtime in topologies()]
    for end in ends:
        assert [row["step"] for row in end.rows] == [5, 6, 7, 8]
        assert_near(end.tensors("master"), ends[0].tensors("master"), 2e-5)
        assert_near(end.tensors("exp_avg"), ends[0].tensors("exp_avg"))
    # whole batches: two rounds are one long round, but for the order in which samples are summed
    long = train(settings.model_copy(update={"epochs_per_round": 8}))
    both = np.concatenate([first.losses, ends[0].losses])
    np.testing.assert_allclose(both, long.losses, atol=1e-5, rtol=0)
    assert_near(long.tensors("exp_avg_sq"), ends[0].tensors("exp_avg_sq"), 1e-7)


def topologies() -> list[tuple[int, dict]]:
    return [(1, {}), (2, {"deepspeed": str(ZERO / "zero2.json")}), (2, {"deepspeed": str(ZERO / "zero3.json")})]


def test_a_loaded_state_is_the_saved_one_to_the_bit(train: Train) -> None:
    first = train(TWELVE)
    frozen = config(lr=0.0, betas=(0.0, 0.0))
    stood = [train(frozen, ranks, first, round=2, **runtime) for ranks, runtime in topologies()]
    for made in stood:
        for name, tensor in first.tensors("master").items():
            assert torch.equal(made.tensors("master")[name], tensor), f"{name} moved"


def test_the_same_job_gives_the_same_bits(train: Train) -> None:
    """The first time this was asked of the workers, and now, after other jobs with other engines."""
    train(config(lr=0.0))
    runtime = {"deepspeed": str(ZERO / "zero2.json")}
    for ranks, more in ((1, {}), (2, runtime)):
        fresh = train(TWELVE, ranks, **more)
        warm = train(TWELVE, ranks, again=1, **more)
        assert warm.artifacts["student"].content == fresh.artifacts["student"].content
        assert warm.artifacts["trainer_state"].content == fresh.artifacts["trainer_state"].content
        assert [row | {"seconds": 0} for row in warm.rows] == [row | {"seconds": 0} for row in fresh.rows]


def test_learning_rate_zero_changes_nothing(train: Train, world: World) -> None:
    made = train(config(lr=0.0))
    assert made.artifacts["student"].content["weights"] == world.student.content["weights"]
    assert made.artifacts["student"].content["tokenizer"] == world.student.content["tokenizer"]


def test_learning_rate_follows_the_schedule_over_rounds(train: Train) -> None:
    cosine = {"kind": "cosine", "warmup_steps": 2, "horizon_steps": 5}
    settings = config(schedule=cosine)
    first = train(settings)
    second = train(settings, after=first, round=2)
    factors = [settings.schedule.factor(step) for step in range(1, 7)]
    assert [row["lr"] / 1e-3 for row in first.rows + second.rows] == pytest.approx(factors)
    assert factors[-1] == 0.0 and {row["round"] for row in second.rows} == {2}


def test_metrics_are_token_means_and_null_between(train: Train, world: World) -> None:
    rows = train(config(metrics_every=2)).rows
    assert [row["student_entropy"] is None for row in rows] == [False, True, False]
    first = train(ONE_STEP).rows[0]
    sampled = world.store.read_table(world.signals["sampled"], "sampled").to_pylist()[::-1]
    for column in ("teacher_entropy", "student_entropy"):
        values = np.concatenate([np.array(s[column])[keep] for s, keep in zip(sampled, kept(world), strict=True)])
        assert first[column] == pytest.approx(float(values.mean()), abs=1e-5)
    assert abs(first["log_ratio_mean"]) < 1e-6 and first["log_ratio_p05"] <= first["log_ratio_p95"] < 1e-5
    assert first["reverse_kl"] == pytest.approx(first["loss"], abs=1e-6)
    two = train(ONE_STEP, 2, deepspeed=str(ZERO / "zero2.json")).rows[0]
    for column in ("student_mass", "teacher_mass", "overlap_ratio", "log_ratio_p50", "tokens"):
        assert two[column] == pytest.approx(first[column], abs=1e-6)


def test_figures_are_told_on_the_way_and_summed_up_at_the_end(train: Train) -> None:
    made = train(config(metrics_every=2))
    first, _, last = made.rows
    for name in ("loss", "grad_norm", "teacher_mass", "student_entropy", "log_ratio_p50"):
        assert made.metrics[name] == last[name] is not None
    metrics = made.artifacts["train"].meta["metrics"]
    assert (metrics["loss_first"], metrics["loss_last"]) == (first["loss"], last["loss"])
    assert metrics["teacher_mass_last"] == last["teacher_mass"] and metrics["invalid_tokens"] == 0
    assert made.said[-1].startswith(f"train: 3 steps: loss {first['loss']:.4g} → {last['loss']:.4g}  grad norm ≤ ")


def test_importance_weights_are_truncated_ratios(train: Train, world: World) -> None:
    settings = config(samples_per_step=12, importance_correction={"kind": "truncated", "cap": 1.05})
    objective = PolicyGradientConfig()
    sampled = world.store.read_table(world.signals["sampled"], "sampled").to_pylist()[::-1]
    weights, losses = [], []
    for row, found, keep in zip(world.samples, sampled, kept(world), strict=True):
        behaviour, sampling = np.array(found["behaviour_logprobs"]), np.array(row["sampling_logprobs"])
        weights.append(np.minimum(np.exp(behaviour - sampling), 1.05)[keep])
        # on-policy: the ratio is 1 and the centred advantage of reverse KL is log u
        losses.append(-np.array(found["teacher_logprobs"])[keep] + behaviour[keep])
    weight, loss = np.concatenate(weights), np.concatenate(losses)
    assert 0.1 < (weight == 1.05).mean() < 0.9
    for ranks in (1, 2):
        [step] = train(settings, ranks, objective=objective).rows
        assert step["importance_weight_mean"] == pytest.approx(weight.mean(), rel=1e-5)
        assert step["loss"] == pytest.approx((weight * loss).mean(), rel=1e-5)


def test_biased_weights_lead_back_to_the_student(train: Train, world: World) -> None:
    """The student at temperature 1 over the distribution sampled from, whatever shaped that."""
    settings = config(samples_per_step=12, importance_correction={"kind": "biased_truncated", "cap": 1.2})
    sampled = world.store.read_table(world.signals["sampled"], "sampled").to_pylist()[::-1]
    weights, losses = [], []
    for row, found, keep in zip(world.samples, sampled, kept(world), strict=True):
        student, sampling = np.array(found["student_logprobs"]), np.array(row["sampling_logprobs"])
        weights.append(np.minimum(np.exp(student - sampling), 1.2)[keep])
        losses.append((student - np.array(found["teacher_logprobs"]))[keep])
    weight, loss = np.concatenate(weights), np.concatenate(losses)
    [step] = train(settings, 1, objective=PolicyGradientConfig(advantage="stop_gradient")).rows
    assert step["importance_weight_mean"] == pytest.approx(weight.mean(), rel=1e-5)
    assert step["loss"] == pytest.approx((weight * loss).mean(), rel=1e-5)


@pytest.mark.parametrize("normalisation", ["sequence", "constant"])
def test_other_normalisations_are_global_too(train: Train, world: World, normalisation: str) -> None:
    length = 30 if normalisation == "constant" else None
    objective = PolicyGradientConfig(normalisation=normalisation, normalisation_length=length)
    sampled = world.store.read_table(world.signals["sampled"], "sampled").to_pylist()[::-1]
    values = [
        (np.array(found["student_logprobs"]) - np.array(found["teacher_logprobs"]))[keep]
        for found, keep in zip(sampled, kept(world), strict=True)
    ]
    some = [v for v in values if len(v)]
    expected = np.mean([v.mean() for v in some]) if length is None else np.concatenate(some).sum() / (12 * 30)
    for ranks in (1, 2):
        [step] = train(ONE_STEP, ranks, objective=objective).rows
        assert step["loss"] == pytest.approx(expected, rel=1e-5)


def test_max_drift_ends_the_round_early(train: Train) -> None:
    steps = len(train(config(lr=0.05, epochs_per_round=4, max_drift=0.5)).rows)
    assert 1 < steps < 12
    assert len(train(config(lr=1e-6, epochs_per_round=4, max_drift=0.5)).rows) == 12


def test_drift_is_the_k3_estimate_of_a_kl(train: Train, world: World) -> None:
    """Of the second step: the student after the first one, against the log-probabilities that are stored of the rollouts."""
    one = config(samples_per_step=12, lr=0.01)
    moved = AutoModelForCausalLM.from_pretrained(world.store.materialize(train(one).artifacts["student"])).eval()
    sampled = world.store.read_table(world.signals["sampled"], "sampled").to_pylist()
    before = {row["sample_id"]: row["student_logprobs"] for row in sampled}
    ratios = []
    for row, keep in zip(world.samples, kept(world), strict=True):
        old = before[row["sample_id"]]
        ids = torch.tensor(row["completion_token_ids"])[:, None]
        now = logprobs_of(moved, row["prompt_token_ids"], row["completion_token_ids"]).gather(1, ids)[:, 0]
        ratios.append((now.double() - torch.tensor(old).double())[torch.tensor(keep)])
    log_r = torch.cat(ratios)
    first, second = train(config(samples_per_step=12, lr=0.01, epochs_per_round=2, max_drift=99)).rows
    assert second["drift"] == pytest.approx(float((log_r.exp() - 1 - log_r).mean()), rel=1e-3)
    assert first["drift"] == pytest.approx(0, abs=1e-9) and second["drift"] > 0
    assert second["log_ratio_mean"] == pytest.approx(float(log_r.mean()), rel=1e-3)
    assert second["masked_tokens"] == sum(len(r["completion_token_ids"]) for r in world.samples) - second["tokens"]


def test_the_estimator_of_earlier_runs_stops_where_it_did(train: Train) -> None:
    fields = {"lr": 0.05, "epochs_per_round": 4}
    old = train(config(**fields, max_drift=0.5, drift_estimator="log_ratio")).rows
    assert [-row["log_ratio_mean"] > 0.5 for row in old] == [False] * (len(old) - 1) + [True]
    new = train(config(**fields, max_drift=0.5)).rows
    assert [row["drift"] > 0.5 for row in new] == [False] * (len(new) - 1) + [True]


@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero2"), (2, "zero3")])
def test_bfloat16_trains_a_float32_master(train: Train, ranks: int, zero: str) -> None:
    runtime = {"deepspeed": str(ZERO / f"{zero}.json")}
    settings = TWELVE.model_copy(update={"dtype": "bfloat16"})
    made = train(settings, ranks, **runtime)
    np.testing.assert_allclose(made.losses, train(TWELVE).losses, rtol=0.1)
    exported = load_file(made.store.materialize(made.artifacts["student"]) / "model.safetensors")
    master = made.tensors("master")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert all(torch.equal(exported[name], master[name].bfloat16()) for name in exported)
    assert any(not torch.equal(tensor.bfloat16().float(), tensor) for tensor in master.values())
    stood = train(settings.model_copy(update={"lr": 0.0, "weight_decay": 0.0}), ranks, made, round=2, **runtime)
    assert all(torch.equal(stood.tensors("master")[name], tensor) for name, tensor in master.items())


@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero3")])
def test_lora_trains_adapters_and_exports_them_merged(train: Train, world: World, ranks: int, zero: str) -> None:
    settings = TWELVE.model_copy(update={"lr": 0.01}) if ranks else TWELVE
    settings = TrainConfig.model_validate(
        settings.model_dump() | {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}}
    )
    runtime = {"deepspeed": str(ZERO / f"{zero}.json")}
    first = train(settings, ranks, **runtime)
    second = train(settings, ranks, first, round=2, **runtime)
    assert second.losses[-1] < first.losses[0]
    before = load_file(world.store.materialize(world.student) / "model.safetensors")
    for made in (first, second):
        adapters = made.tensors("master")
        assert all("lora_" in name for name in adapters)
        after = load_file(made.store.materialize(made.artifacts["student"]) / "model.safetensors")
        for name, tensor in before.items():
            stem = name.removesuffix(".weight")
            if "q_proj" in name:
                b, a = (adapters[f"{stem}.lora_{part}.default.weight"] for part in "BA")
                assert float(b.abs().max()) > 0
                torch.testing.assert_close(after[name], tensor + 2 * b @ a, atol=1e-6, rtol=0)
            else:
                assert torch.equal(after[name], tensor), name
    with pytest.raises(InputError, match="lora"):
        train(TWELVE, 1, first, round=2)


def test_warmup_learns_the_given_text(world: World, trainers: dict[int, Worker]) -> None:
    settings = WarmupConfig(lr=3e-3, steps=20, samples_per_step=6, max_grad_norm=1.0)
    made = {
        ranks: make(warmup_work(settings, world.student, world.prompts, 0), world.store, trainers[ranks], str(ranks))
        for ranks in (1, 2)
    }
    np.testing.assert_allclose(made[1].losses[:10], made[2].losses[:10], atol=1e-5, rtol=0)
    assert made[1].losses[-1] < made[1].losses[0] / 2
    assert [row["epoch"] for row in made[1].rows[:5]] == [0, 0, 1, 1, 2]
    model, tokens, total = tiny_model(1), 0, 0.0
    after = made[1].student()
    for row in world.samples:
        target = torch.tensor(row["completion_token_ids"])
        total += float(
            F.nll_loss(logprobs_of(model, row["prompt_token_ids"], target.tolist()), target, reduction="sum")
        )
        tokens += len(target)
    first_epoch = made[1].rows[:2]
    rough = sum(row["loss"] * row["tokens"] for row in first_epoch) / tokens
    assert rough == pytest.approx(total / tokens, rel=0.1), "two steps of the first epoch, the second a step further on"
    row = world.samples[0]
    target = torch.tensor(row["completion_token_ids"])
    better, worse = (logprobs_of(m, row["prompt_token_ids"], target.tolist()) for m in (after, model))
    assert F.nll_loss(better, target) < F.nll_loss(worse, target) / 2
    folder = world.store.materialize(made[1].artifacts["student"])
    source = world.store.materialize(world.student)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_warmup_stops_at_a_running_loss(world: World, trainers: dict[int, Worker]) -> None:
    settings = WarmupConfig(lr=3e-3, steps=20, samples_per_step=6, stop_loss=4.5)
    trained = make(warmup_work(settings, world.student, world.prompts, 0), world.store, trainers[1], "stop")
    losses = trained.losses
    assert any(f"after {len(losses)} of 20 steps (stop_loss)" in text for text in trained.said)
    running = [losses[0]]
    for loss in losses[1:]:
        running.append(0.9 * running[-1] + 0.1 * loss)
    assert 1 < len(losses) < 20 and running[-1] < 4.5 <= min(running[:-1])


@pytest.mark.promise(7, "a loss that is not finite stops the step, real trainer")
def test_a_loss_that_is_not_finite_names_the_sample(world: World, trainers: dict[int, Worker]) -> None:
    """A student that breaks where it reads a token that one sample alone has."""
    reads = {row["sample_id"]: {*row["prompt_token_ids"], *row["completion_token_ids"][:-1]} for row in world.samples}
    mine = reads.pop("p5/1/0")
    student = tiny_model(1, tied=False)
    with torch.no_grad():
        student.get_input_embeddings().weight[min(mine.difference(*reads.values()))] = torch.nan
    broken = commit_model(world.store, 9, student)
    work = train_work(config(), PolicyGradientConfig(), broken, None, world.rollouts, world.signals, 0, 1)
    with pytest.raises(OpdError, match=r"loss is not finite at step \d \(round 1.*: p5/1/0$"):
        make(work, world.store, trainers[1], "broken")
    assert all(world.store.get(spec.stage, spec.key) is None for spec in work.outputs.values())


@pytest.mark.promise(7, "a bad value is refused before any step, real trainer")
def test_a_bad_value_is_refused_before_any_step(train: Train, world: World) -> None:
    rows = world.store.read_table(world.signals["sampled"], "sampled").to_pylist()
    [bad] = [row for row in rows if row["sample_id"] == "p5/1/0"]
    bad["teacher_logprobs"] = [float("nan")] * len(bad["teacher_logprobs"])
    spec = ArtifactSpec.of("sampled", 1, {"spoilt": True}, {})
    with world.store.building(spec) as builder:
        builder.write_shard("sampled", 0, pa.Table.from_pylist(rows, schema_for("sampled")))
        spoilt = builder.commit()
    signals = world.signals | {"sampled": spoilt}
    with pytest.raises(InputError, match=r"sampled\.teacher_logprobs: sample 'p5/1/0', token 0: found nan"):
        train(config(), objective=PolicyGradientConfig(), signals=signals)
    work = train_work(config(), PolicyGradientConfig(), world.student, None, world.rollouts, signals, 0, 1)
    assert all(world.store.get(spec.stage, spec.key) is None for spec in work.outputs.values())


def test_work_refuses_a_foreign_state_and_missing_signals(train: Train, world: World) -> None:
    made = train(TWELVE)
    with pytest.raises(InputError, match="belongs to the student"):
        train_work(TWELVE, BUCKET, world.student, made.artifacts["trainer_state"], world.rollouts, world.signals, 0, 2)
    with pytest.raises(InputError, match="'sampled'"):
        train_work(TWELVE, BUCKET, world.student, None, world.rollouts, {"mask": world.signals["mask"]}, 0, 1)


def test_keys_depend_on_what_is_used(world: World) -> None:
    def key(
        settings: TrainConfig = TWELVE, objective: Any = BUCKET, seed: int = 0, round: int = 1, **signals: Any
    ) -> str:
        given = world.signals | signals
        return (
            train_work(settings, objective, world.student, None, world.rollouts, given, seed, round)
            .outputs["train"]
            .key
        )

    keys = [key(), key(seed=1), key(round=2), key(TWELVE.model_copy(update={"lr": 1.0})), key(objective=SftConfig())]
    assert len(set(keys)) == 5
    assert key(student_topk=world.signals["mask"]) == keys[0], "a signal that the objective does not read"
