"""What is planned of a step from stored values: groups of the whole round, whatever the step holds of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from storage.errors import InputError
from tasks.losses.token_credit.config import CreditConfig
from tasks.trainer.data import Ragged, Samples, forward_batch, loss_denominators, with_segments, with_spans
from tasks.trainer.planning import Planner, planner_of

CPU = torch.device("cpu")
SRPO = {
    "reward": {"kind": "group", "std": False, "success_threshold": 0.5},
    "route": "srpo",
    "beside": {"weight": {"kind": "teacher_entropy"}},
}


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged(np.concatenate([np.array(row, np.int64) for row in lists]), np.cumsum([0, *map(len, lists)]))


def round_of(rewards: list[float], groups: list[int], **fields: Any) -> Samples:
    """Samples of one to three tokens; the last token of every third sample is masked."""
    lengths = [1 + i % 3 for i in range(len(rewards))]
    total, random = sum(lengths), np.random.Generator(np.random.PCG64(7))
    keep = np.ones(total, bool)
    keep[np.cumsum(lengths)[2::3] - 1] = False
    names = ("student_logprobs", "teacher_logprobs", "teacher_entropy", "student_entropy")
    values: dict[str, Any] = {
        "ids": [f"s{i}" for i in range(len(rewards))],
        "prompts": ragged([[1, 2]] * len(rewards)),
        "completions": ragged([[3] * n for n in lengths]),
        "keep": keep,
        "floats": {n: (random.random(total) - (1.5 if n.endswith("probs") else 0)).astype(np.float32) for n in names},
        "rewards": np.array(rewards, np.float32),
        "groups": np.array(groups),
        "written": np.ones(total, bool),
        "valid": np.ones(total, bool),
    }
    return Samples(**(values | fields))


def planner(samples: Samples, **config: Any) -> Planner:
    found = planner_of(CreditConfig.model_validate(config), samples, {})
    assert found is not None
    return found


def test_a_step_with_a_part_of_a_group_has_the_advantages_of_the_whole() -> None:
    samples = round_of([1, 0, 1, 0, math.nan, 0], [0, 0, 0, 1, 1, 1])
    plan = planner(samples, reward={"kind": "group", "std": False})
    found = plan([5, 1, 0], 0)
    assert found.columns["advantage"][found.offsets].tolist() == pytest.approx([0, -2 / 3, 1 / 3])
    assert found.columns["advantage"].dtype == np.float32 and len(found.columns["advantage"]) == 3 + 2 + 1


def test_weights_are_relative_to_the_whole_step() -> None:
    """The mean over the step's routed tokens of SRPO's weights is 1, and masked tokens have none."""
    samples = round_of([1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], contexts=np.array([True] * 5 + [False]))
    plan = planner(samples, **SRPO)
    found = plan(range(6), 0)
    routed = found.columns["b"] > 0
    kept = samples.keep
    assert plan.metrics == {"routed_samples": 3 / 6}
    assert routed.sum() == 2 + 2 + 2  # samples 1, 2 and 4, without the masked last token of sample 2
    assert found.columns["b"][routed].mean() == pytest.approx(1)
    assert (found.columns["a"][kept] == ~routed[kept]).all() and not found.columns["a"][~kept].any()


def test_a_micro_batch_takes_its_own_tokens() -> None:
    samples = round_of([1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1])
    rows = [4, 2, 0]
    found = planner(samples, reward="group", scale="rlsd")(rows, 0)
    weights = loss_denominators(samples, rows, "token", None)
    whole = forward_batch(samples, rows, weights, [0, 1, 2], False, CPU, found).tokens
    part = forward_batch(samples, rows, weights, [2, 1], False, CPU, found).tokens
    assert whole.planned is not None and part.planned is not None
    for name, values in whole.planned.items():
        of = [values[whole.sample_N == place] for place in (2, 1)]
        assert torch.equal(part.planned[name], torch.cat(of)), name
    filler = forward_batch(samples, rows, weights, [0], True, CPU, found).tokens
    assert all(float(values.abs().max()) == 0 for values in filler.planned.values())


def test_returns_are_relative_to_all_samples_of_the_prompt_each_once() -> None:
    """Also where a step holds some of them, and one of them twice (the end of an epoch and the start of the next)."""
    samples = round_of([0] * 6, [0, 0, 0, 1, 1, 1])
    plan = planner(samples, add="log_ratio", returns="mean_future")
    whole, part = plan(range(6), 0), plan([2, 0, 2], 0)
    of = {row: whole.columns["delta"][whole.offsets[row] : whole.offsets[row] + 1 + row % 3] for row in range(6)}
    assert part.columns["delta"] == pytest.approx(np.concatenate([of[2], of[0], of[2]]))
    assert np.abs(of[2][:2]).max() > 0.01


def test_groups_of_one_and_rounds_without_a_verdict_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_generations.*") as caught:
        planner(round_of([1, 0, 1], [0, 0, 1]), reward="group")
    assert "'s2'" in str(caught.value)
    with pytest.raises(InputError, match="none of the 2 samples has a reward"):
        planner(round_of([math.nan, math.nan], [0, 0]), reward="group")


def test_memory_goes_on_where_it_was() -> None:
    """A planner that repeats the steps done, or takes the memory of the round before, opens the gate at the same step."""
    samples = round_of([1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1])
    samples.floats["teacher_entropy"][:] = np.linspace(0.1, 1, len(samples.keep))
    config = {"reward": "group", "add": {"kind": "anti_sd", "warm_steps": 2}}
    steps = [[0, 1], [2, 3], [4, 5], [0, 5], [1, 4]]
    whole = planner(samples, **config)
    gates = [whole(rows, number).columns["gate"][0] for number, rows in enumerate(steps)]
    assert gates[:2] == [0, 0] and 1 in gates
    resumed = planner(samples, **config)
    for number, rows in enumerate(steps[:3]):
        resumed.repeat(rows, number)
    assert [resumed(rows, 3 + n).columns["gate"][0] for n, rows in enumerate(steps[3:])] == gates[3:]
    first = planner(samples, **config)
    first(steps[0], 0)
    later = planner_of(CreditConfig.model_validate(config), samples, first.memory)
    assert later is not None
    assert [later(rows, 1 + n).columns["gate"][0] for n, rows in enumerate(steps[1:])] == gates[1:]
    assert {name: values.tolist() for name, values in later.memory.items()} == {
        name: values.tolist() for name, values in whole.memory.items()
    }


def test_segments_of_the_judge_are_half_open() -> None:
    import pyarrow as pa

    samples = round_of([1, 0, 1], [0, 0, 0])
    found = with_segments(samples, pa.table({"segment_ends": [None, [1], [1, 2]]}))
    assert found.segments.tolist() == [0, 0, 1, 0, 1, 2]


def test_spans_are_counted_in_tokens_and_united() -> None:
    import pyarrow as pa

    samples = round_of([1, 0, 1], [0, 0, 0])
    table = {
        "span_starts": [None, [0, 1], [0, 1]],
        "span_ends": [None, [1, 2], [3, 2]],
        "span_kinds": [None, ["key", "other"], ["error", "key"]],
    }
    assert with_spans(samples, pa.table(table)).spans.tolist() == [0, 1, 0, 2, 1, 2]
    marked = {"span_starts": [None, None, [0, 1]], "span_ends": [None, None, [2, 3]]}
    kinds = [None, None, ["error", "remark"]]
    found = with_spans(samples, pa.table(marked | {"span_kinds": kinds})).spans.tolist()
    assert found == [0, 0, 0, 2, 2, 0], "a span of another kind takes nothing away"
    table["span_ends"][2] = [4, 2]
    with pytest.raises(InputError, match="'s2' has a span from 0 to 4, but its completion has 3 tokens"):
        with_spans(samples, pa.table(table))
