"""A real run whose teacher is its own student, shown a correct sibling: scored under what, trained on what, and a replay."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pyarrow.compute as pc
import pytest
from opd_cli import opd
from places import PLUGINS, TINY
from real_run import replays, table_of

from storage.runs import Run

CHANGES = (
    'teacher={source: {kind: initial}, warmup: null, context: "{prompt} {sibling}"}',
    "judge={verifiers: [{kind: function, target: judges:parity}]}",
    f"runtime.modules=[{PLUGINS}]",
    "rollout.top_p=1.0",
    "policy.rounds=1",
)


@pytest.mark.slow
def test_samples_are_scored_below_their_siblings_and_the_others_left_out(prepared_root):
    root = prepared_root()
    opd("run", TINY, "--name", "own", "--no-prefect", *(w for c in CHANGES for w in ("--set", c)), root=root)
    table, entry = partial(table_of, root, "own", 1), Run.open(root, "own").state.rounds[1]
    contexts, sampled = table("context", "context", "contexts"), table("supervise", "sampled", "sampled")
    rollouts, rewards = table("rollout", "rollout", "rollouts"), table("judge", "judge", "rewards")
    names = [t["sample_id"].to_pylist() for t in (contexts, sampled, rollouts, rewards)]
    assert all(found == names[0] for found in names)
    row = dict(zip(names[0], rollouts.to_pylist(), strict=True))
    right = dict(zip(names[0], rewards["reward"].to_pylist(), strict=True))
    there = np.array(contexts["prompt_token_ids"].is_valid())
    assert 0 < there.sum() < len(there)
    for found, has in zip(contexts.to_pylist(), there, strict=True):
        own, other = row[found["sample_id"]], found["sibling_id"]
        siblings = [
            r["sample_id"]
            for r in row.values()
            if r["prompt_id"] == own["prompt_id"]
            and right[r["sample_id"]]
            and r["completion_text"] != own["completion_text"]
        ]
        assert (other in siblings) if has else (not siblings or found["reason"] == "too long")

    # one model in round 1: what is read differs where there is a context, and nowhere else
    gaps = pc.abs(pc.subtract(*(pc.list_flatten(sampled[f"{who}_logprobs"]) for who in ("student", "teacher"))))
    lengths = pc.list_value_length(sampled["teacher_logprobs"]).to_numpy()
    under = np.repeat(there, lengths)
    assert gaps.to_numpy()[~under].max() < 1e-4 and gaps.to_numpy()[under].max() > 0.01

    steps = table("train", "train", "training_steps")
    assert pc.sum(steps["tokens"]).as_py() == under.sum() and pc.sum(steps["masked_tokens"]).as_py() == (~under).sum()
    assert entry.metrics["train_without_context"] == entry.metrics["context_none"] == (~there).sum()
    sql = "SELECT count(*)::BIGINT AS n FROM contexts WHERE source = 'sibling' AND round = 1"
    assert json.loads(opd("query", "own", sql, "--json", root=root).stdout) == [{"n": int(there.sum())}]

    wanted = {"judge", "context", "sampled", "student"}
    assert wanted <= replays(root, "own", 1, "judge", "context", "supervise", "train")
