"""Merged stop ids through the real trainer: the live student's logits are merged, whichever head provider computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_world import K, World, logprobs_of, make, tiny_model

from storage.store import Artifact
from tasks.losses.config import DirectConfig, PolicyGradientConfig
from tasks.train import train_work
from tasks.trainer.config import TrainConfig
from tasks.workers.pool import Worker

CONFIG = TrainConfig.model_validate({"lr": 1e-3, "samples_per_step": 12, "max_grad_norm": None, "metrics_every": 1})


def stops_of(world: World) -> list[int]:
    """Two ids that end completions here and are in none before its end."""
    inner = {token for row in world.samples for token in row["completion_token_ids"][:-1]}
    ends = [row["completion_token_ids"][-1] for row in world.samples]
    return list(dict.fromkeys(end for end in ends if end not in inner))[:2]


def merging(world: World, stops: list[int]) -> Artifact:
    return world.prompts.model_copy(
        update={"content": world.prompts.content | ({"stop_ids": str(stops)} if stops else {})}
    )


def first_loss(world: World, worker: Worker, objective: Any, stops: list[int], tag: str, **runtime: Any) -> float:
    work = train_work(
        CONFIG, objective, world.student, None, world.rollouts, world.signals, 0, 1, prompts=merging(world, stops)
    )
    return float(make(work, world.store, worker, tag, **runtime).losses[0])


def signals_of(world: World, name: str) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for row in world.store.read_table(world.signals[name], name).to_pylist()}


def test_the_sampled_token_is_the_category(world: World, trainers: dict[int, Worker]) -> None:
    stops = stops_of(world)
    assert len(stops) == 2
    sampled, masks, student = signals_of(world, "sampled"), signals_of(world, "mask"), tiny_model(1)
    total, count, categories = 0.0, 0, 0
    for row in world.samples:
        completion, name = row["completion_token_ids"], row["sample_id"]
        p = logprobs_of.__wrapped__(student, row["prompt_token_ids"], completion).exp().double()
        for place, token in enumerate(completion):
            if masks[name]["mask_reasons"][place]:
                continue
            mass = p[place, stops].sum() if token in stops else p[place, token]
            old, teacher = (sampled[name][f"{who}_logprobs"][place] for who in ("student", "teacher"))
            total -= float((teacher - mass.log()).clamp(-6, 6) * (mass.log() - old).exp())
            count, categories = count + 1, categories + (token in stops)
    assert categories >= 1
    loss = first_loss(world, trainers[1], PolicyGradientConfig(), stops, "stops")
    assert loss == pytest.approx(total / count, abs=2e-5)


@pytest.mark.parametrize("outside", ["renormalize", "bucket"])
def test_rows_chunks_and_ranks_give_one_loss(outside: str, world: World, trainers: dict[int, Worker]) -> None:
    """The stop ids are some of the teacher's list, named once, so that what is merged into the first is in use."""
    lists, masks, student = signals_of(world, "teacher_topk"), signals_of(world, "mask"), tiny_model(1)
    listed = [set(ids) for row in lists.values() for ids in row["ids"]]
    inner = {token for row in world.samples for token in row["completion_token_ids"]}
    usual = sorted(set.union(*listed), key=lambda index: -sum(index in ids for ids in listed))
    own = next(index for index in usual if index not in inner)
    other = next(index for index in range(8, 264) if index not in inner and all(index not in ids for ids in listed))
    total, count = 0.0, 0
    for row in world.samples:
        name, completion = row["sample_id"], row["completion_token_ids"]
        p = logprobs_of.__wrapped__(student, row["prompt_token_ids"], completion).exp().double()
        p[:, own] += p[:, other]
        p[:, other] = 0
        for place in range(len(completion)):
            if masks[name]["mask_reasons"][place]:
                continue
            ids = lists[name]["ids"][place]
            q = torch.tensor(lists[name]["logprobs"][place]).double().exp()
            ours = p[place, ids]
            if outside == "renormalize":
                ours, q = ours / ours.sum(), q / q.sum()
            else:
                ours, q = (torch.cat((x, 1 - x.sum(0, keepdim=True))) for x in (ours, q))
            total, count = total + float((ours * (ours / q).log()).sum()), count + 1
    objective = DirectConfig.model_validate({"support": {"kind": "teacher_topk", "k": K, "outside": outside}})
    one = first_loss(world, trainers[1], objective, [own, other], f"one {outside}")
    two = first_loss(world, trainers[2], objective, [own, other], f"two {outside}", head_chunk_tokens=5)
    plain = first_loss(world, trainers[1], objective, [], f"plain {outside}")
    assert one == pytest.approx(total / count, abs=2e-5) and two == pytest.approx(one, abs=1e-6)
    assert abs(plain - one) > 1e-4
