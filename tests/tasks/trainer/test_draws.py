"""The draws behind a Bernoulli gate, and tokens that a teacher wrote, on their way into a micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from whole_round import from_rollouts

from storage.schemas import MaskReason, schema_for
from tasks.losses.config import PolicyGradientConfig
from tasks.trainer.data import Samples, forward_batch

TROPD = PolicyGradientConfig.model_validate({"trust_region": {"kind": "tropd", "outliers": "mask"}})
PREFIX = MaskReason.TEACHER_PREFIX


def load(lengths: dict[str, int], seed: int = 0, prefix: int = 0, needs: Any = None) -> Samples:
    """Samples of the given names and lengths; the first `prefix` tokens of each come from the teacher."""
    rollouts, sampled, masks = [], [], []
    for name, length in lengths.items():
        rollouts.append(
            {
                "sample_id": name,
                "prompt_id": name,
                "sample_index": 0,
                "prompt_token_ids": [1, 2],
                "completion_token_ids": list(range(length)),
                "sampling_logprobs": [-1.0] * length,
                "behaviour": "student",
                "prefix_length": prefix,
                "finish_reason": "stop",
                "seed": 0,
                "completion_text": "",
            }
        )
        signals = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
        sampled.append({"sample_id": name} | {s: [1.0 if "entropy" in s else -1.0] * length for s in signals})
        masks.append({"sample_id": name, "mask_reasons": [int(PREFIX)] * prefix + [0] * (length - prefix)})
    tables = [
        pa.Table.from_pylist(rows, schema_for(name))
        for name, rows in (("rollouts", rollouts), ("sampled", sampled), ("mask", masks))
    ]
    signals = {"sampled": tables[1], "mask": tables[2]}
    return from_rollouts(tables[0], signals, needs or TROPD.needs(), [PREFIX], seed)


def draws(samples: Samples) -> dict[str, list[float]]:
    offsets = samples.completions.offsets
    return {name: samples.floats["uniform"][offsets[i] : offsets[i + 1]].tolist() for i, name in enumerate(samples.ids)}


def test_a_draw_belongs_to_its_seed_sample_and_position() -> None:
    many = draws(load({f"p{i}/1/0": 20 for i in range(50)}))
    alone = draws(load({"p7/1/0": 20}))
    longer = draws(load({"p3/1/0": 5, "p7/1/0": 33}))
    assert many["p7/1/0"] == alone["p7/1/0"] == longer["p7/1/0"][:20]
    assert len({value for row in many.values() for value in row}) > 990
    assert draws(load({"p7/1/0": 20}, seed=1)) != alone
    assert draws(load({"p7/2/0": 20}))["p7/2/0"] != alone["p7/1/0"]


def test_draws_are_uniform() -> None:
    values = load({f"p{i}/1/0": 100 for i in range(200)}).floats["uniform"]
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_draws_are_the_same_in_any_micro_batch() -> None:
    samples = load({f"p{i}/1/0": 4 + i for i in range(6)})
    weights = np.ones(6)
    whole = forward_batch(samples, range(6), weights, [0, 1, 2, 3, 4, 5], False, torch.device("cpu")).tokens
    parts = [forward_batch(samples, range(6), weights, p, False, torch.device("cpu")).tokens for p in ([3, 1], [5])]
    for part in parts:
        for place in part.sample_N.unique():
            assert torch.equal(part.uniform_N[part.sample_N == place], whole.uniform_N[whole.sample_N == place])


def test_prefix_tokens_are_left_to_an_objective_that_has_a_term_for_them() -> None:
    lengths = {"p0/1/0": 5, "p1/1/0": 3}
    samples = load(lengths, prefix=2)
    assert samples.floats["teacher_prefix"].tolist() == [1, 1, 0, 0, 0, 1, 1, 0] and samples.keep.all()
    other = load(lengths, prefix=2, needs=PolicyGradientConfig().needs())
    assert other.keep.tolist() == [False, False, True, True, True, False, False, True]
    assert "teacher_prefix" not in other.floats and "uniform" not in other.floats
