"""A small store with finished rounds whose texts try to leave their place in a page; nothing is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
from places import TINY

from flows.experiment import load_experiment
from storage.artifacts.artifact import Artifact, ArtifactSpec
from storage.runs import RoundState, Run, StageState
from storage.schemas import schema_for
from storage.store import Store

HOSTILE = (
    '</script><script>window.broken = 1</script><img src="https://evil.example/x.png" onerror="window.broken = 1">'
)
"""Written by a model, and in a prompt."""
WORDS = ["a", " b", "\n", HOSTILE, "<end>", "é", "{{ 7 * 7 }}"]
K = 3


def commit(store: Store, stage: str, number: object, rows: dict[str, list[dict[str, Any]]]) -> Artifact:
    with store.building(ArtifactSpec.of(stage, 1, {"number": str(number)}, {})) as builder:
        for table, found in rows.items():
            builder.write_shard(table, 0, pa.Table.from_pylist(found, schema_for(table)))
        return builder.commit(tables=dict.fromkeys(rows, 1))


def stage(state: str = "done", **artifacts: Artifact) -> StageState:
    keys = {name: artifact.key for name, artifact in artifacts.items()}
    key = next(iter(keys.values()), None)
    return StageState(key=key, state=state, seconds=2.5 if keys else None, rows=1, artifacts=keys)


def prepared(store: Store) -> Artifact:
    vocabulary = [
        {"tokenizer": "student", "id": n, "token": word, "text": word, "special": word == "<end>"}
        for n, word in enumerate(WORDS)
    ]
    prompts = [
        {"prompt_id": f"{split}{n}", "split": split, "text": f"{split} {n} {HOSTILE}", "token_ids": [1], "answer": "a"}
        for split in ("train", "eval")
        for n in range(30)
    ]
    return commit(store, "prepare", 0, {"vocabulary": vocabulary, "prompts": prompts})


def rollouts(name: object, round: int, completions: int, length: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of rollouts and signals: completion n has a gap of n / completions at every token, NaN at one."""
    found: dict[str, list[dict[str, Any]]] = {"rollouts": [], "sampled": [], "student_topk": [], "mask": []}
    for n in range(completions):
        ids = [(n + place) % len(WORDS) for place in range(length)]
        sample = {"sample_id": f"train{n % 30}/{round}/{n // 30}"}
        student = [-0.5] * length
        teacher = [-0.5 - n / completions] * length
        teacher[0] = math.nan if n == 1 else teacher[0]
        found["rollouts"].append(
            sample
            | {
                "prompt_id": f"train{n % 30}", "sample_index": n // 30, "prompt_token_ids": [1], "completion_token_ids": ids,
                "sampling_logprobs": student, "behaviour": "student", "prefix_length": 0, "finish_reason": "stop",
                "seed": n, "completion_text": "".join(WORDS[i] for i in ids if WORDS[i] != "<end>"),
            }
        )  # fmt: skip
        entropies = [1.0] * length
        found["sampled"].append(
            sample
            | {"student_logprobs": student, "teacher_logprobs": teacher}
            | {"student_entropy": entropies, "teacher_entropy": entropies}
        )
        found["student_topk"].append(
            sample
            | {
                "ids": [[0, 1, 3]] * length, "valid": [K] * length,
                "student_logprobs": [[math.log(p) for p in (0.5, 0.3, 0.1)]] * length,
                "teacher_logprobs": [[math.log(p) for p in (0.2, 0.3, 0.1)]] * length,
                "student_tail_logmass": [math.log(0.1)] * length, "teacher_tail_logmass": [math.log(0.4)] * length,
            }
        )  # fmt: skip
        found["mask"].append(sample | {"mask_reasons": [1 if WORDS[i] == "<end>" else 0 for i in ids]})
    return found


def evaluation(round: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": f"eval{n}", "mode": mode, "sample_index": 0, "prompt_token_ids": [1], "completion_token_ids": [0],
            "completion_text": f"round {round} {HOSTILE}", "finish_reason": "stop",
            "correct": (n % 2 == round % 2) if mode == "greedy" else None,
            "reverse_kl_sum": 1.0 / (1 + round) + n / 100 if mode == "kl" else None, "tokens": 1,
        }
        for mode in ("greedy", "kl")
        for n in range(30)
    ]  # fmt: skip


def judged(round: int, completions: int) -> dict[str, list[dict[str, Any]]]:
    """Rewards of the same completions: of three in turn right, wrong, without a verdict."""
    samples = [f"train{n % 30}/{round}/{n // 30}" for n in range(completions)]
    given = [
        {"reward": float(n % 3 == 0), "feedback": f"why {HOSTILE}"} if n % 3 < 2 else {"failed": f"ended {HOSTILE}"}
        for n in range(completions)
    ]
    return {"rewards": [{"sample_id": sample} | row for sample, row in zip(samples, given, strict=True)]}


def teacher_lists(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The teacher's likeliest tokens: two of the student's three, and another one."""
    found = []
    for row in tables["student_topk"]:
        length = len(row["ids"])
        logprobs = [[math.log(p) for p in (0.4, 0.3, 0.2)]] * length
        found.append(
            {"sample_id": row["sample_id"], "ids": [[5, 1, 0]] * length, "logprobs": logprobs, "valid": [K] * length}
            | {"tail_logmass": [math.log(0.1)] * length}
        )
    return found


def steps(round: int, count: int) -> list[dict[str, Any]]:
    return [
        {"step": count * (round - 1) + n, "round": round, "epoch": 0, "loss": float(n), "grad_norm": 1.0, "lr": 1e-3}
        | {"samples": 4, "tokens": 8, "seconds": 0.5, "drift": None if n % 2 else 0.25}
        for n in range(1, count + 1)
    ]


def add_run(
    root: Path,
    name: str = "hostile",
    rounds: int = 2,
    completions: int = 40,
    length: int = 8,
    step_count: int = 10,
    changes: list[str] | None = None,
    with_judge: bool = False,
) -> Run:
    """A run with these finished rounds beside round 0; `changes`: overrides of the tiny config. `with_judge`: with rewards, and
    with the teacher's lists beside the student's."""
    store = Store(root)
    run = Run.create(root, name, load_experiment(TINY, changes).model_dump(mode="json"), {"name": name})
    first = {"prepare": stage(prepare=prepared(store)), "evaluate": stage(evaluate=_evaluated(store, name, 0))}
    states = [RoundState(round=0, student_sha256="0" * 64, metrics={"reverse_kl": 1.0}, stages=first)]
    for number in range(1, rounds + 1):
        tables = rollouts(name, number, completions, length)
        rewards = judged(number, completions) if with_judge else {}
        tables |= {"teacher_topk": teacher_lists(tables)} if with_judge else {}
        written = commit(store, "rollout", (name, number), {"rollouts": tables.pop("rollouts")})
        signals = {signal: commit(store, signal, (name, number), {signal: rows}) for signal, rows in tables.items()}
        trained = commit(store, "train", (name, number), {"training_steps": steps(number, step_count)})
        stages = {"rollout": stage(rollout=written), "supervise": stage(**signals), "train": stage(train=trained)}
        stages["evaluate"] = stage(evaluate=_evaluated(store, name, number))
        metrics = {"reverse_kl": 1.0 / (1 + number), "rollout_tokens": float(completions * length)}
        if with_judge:
            stages["judge"] = stage(judge=commit(store, "judge", (name, number), rewards))
            metrics |= {"judge_reward": 0.5, "judge_reward_se": 0.1, "judge_success_rate": 0.5}
            metrics |= {"train_overlap_ratio_last": 0.75 + number / 100}
        states.append(RoundState(round=number, student_sha256=f"{number:064x}", metrics=metrics, stages=stages))
    with run.lock():
        state = run.state
        state.status, state.rounds = "finished", states
        run.save(state)
    return run


def _evaluated(store: Store, name: str, round: int) -> Artifact:
    return commit(store, "evaluate", (name, round), {"evaluations": evaluation(round)})
