"""A real run of pairs (PBSD): the student's completions beside those of itself below the answer; signals, steps, and a replay."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow.compute as pc
import pytest
from opd_cli import opd
from places import TINY
from real_run import replays, table_of

from storage.runs import Run

CHANGES = (
    'teacher={source: {kind: initial}, warmup: null, context: "{answer} {prompt}"}',
    "rollout.behaviour=pairs",
    "rollout.top_p=1.0",
    "objective={estimator: pairs, beta: 0.1}",
    "policy.rounds=2",
)


@pytest.mark.slow
def test_a_student_is_trained_on_pairs_with_its_privileged_self_and_the_round_replays(prepared_root):
    root = prepared_root()
    opd("run", TINY, "--name", "own", "--no-prefect", *(w for c in CHANGES for w in ("--set", c)), root=root)
    table, rounds = partial(table_of, root, "own"), Run.open(root, "own").state.rounds
    drafts = {row["prompt_id"]: row for row in table(1, "draft", "draft", "drafts").to_pylist()}
    assert rounds[1].stages["draft"].artifacts == rounds[2].stages["draft"].artifacts
    for number in (1, 2):
        rows = table(number, "rollout", "rollout", "rollouts").to_pylist()
        assert [row["sample_index"] % 2 for row in rows] == [0, 1] * 32
        for own, teachers in zip(rows[::2], rows[1::2], strict=True):
            draft = drafts[own["prompt_id"]]
            assert (own["behaviour"], teachers["behaviour"]) == ("student", "teacher")
            assert own["prompt_token_ids"] == teachers["prompt_token_ids"] and own["prompt_id"] == teachers["prompt_id"]
            assert teachers["completion_token_ids"] == draft["completion_token_ids"]
        steps = table(number, "train", "train", "training_steps")
        assert all(np.isfinite(steps[name].to_numpy()).all() for name in ("loss", "grad_norm"))
        metrics = rounds[number].metrics
        assert metrics["train_pairs"] == 32 and metrics["train_pairs_left_out"] == 0
        assert pc.sum(steps["tokens"]).as_py() + pc.sum(steps["masked_tokens"]).as_py() == sum(
            len(row["completion_token_ids"]) for row in rows
        )

    # log q of a draft as it was written, below the context: what it was drawn from, so of the scorer's q to rounding
    sampled = {row["sample_id"]: row for row in table(1, "supervise", "sampled", "sampled").to_pylist()}
    first = table(1, "rollout", "rollout", "rollouts").to_pylist()
    for row in first:
        scored = np.array(sampled[row["sample_id"]]["teacher_logprobs"])
        if row["sample_index"] % 2:
            assert np.abs(scored - np.array(row["sampling_logprobs"])).max() < 1e-3
    gaps = [
        np.abs(
            np.array(sampled[r["sample_id"]]["teacher_logprobs"])
            - np.array(sampled[r["sample_id"]]["student_logprobs"])
        )
        for r in first
    ]
    assert max(gap.max() for gap in gaps) > 0.01, "one model in round 1, which reads more as the teacher"

    assert {"rollout", "sampled", "student"} <= replays(root, "own", 2, "rollout", "supervise", "train")
