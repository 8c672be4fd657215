"""The stage with real workers: faults of single samples, resume, keys, metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from feed import InProcessPool
from places import PLUGINS

from storage.artifacts.artifact import MANIFEST
from storage.errors import ConfigError, OpdError
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Store
from tasks.engines.judge import Judge, Lateness
from tasks.judge import JudgeConfig, judge_work, metrics_of, threshold_of
from tasks.stage import Context
from tasks.workers import jobs
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

SECRET = "correct-horse-battery-staple"
NAMED = {"kind": "function", "target": "judges:named"}
EXACT = {"kind": "exact_match"}


def config_of(*verifiers: dict[str, Any], **fields: Any) -> JudgeConfig:
    return JudgeConfig.model_validate({"verifiers": list(verifiers), **fields})


class World:
    """A store with prompts of answer 7 and completions of these texts, `size` per shard, two per prompt."""

    def __init__(self, root: Path, texts: Sequence[str], size: int = 4, answer: str | None = "7") -> None:
        self.store = Store(root / "store")
        self.logs, self.said, self.progress = root / "logs", list[str](), list[tuple[int, int]]()
        prompts = [
            {"prompt_id": f"p/{i}", "split": "train", "text": f"ask {i}", "token_ids": [i], "answer": answer}
            for i in range((len(texts) + 1) // 2)
        ]
        words = [
            {"tokenizer": who, "id": i, "token": f"<{i}>", "text": None if i == 2 else f"{who}{i}", "special": False}
            for who in ("student", "teacher")
            for i in range(5)
        ]
        with self.store.building(ArtifactSpec.of("prepare", 1, {}, {})) as builder:
            builder.write_shard("prompts", 0, pa.Table.from_pylist(prompts, schema_for("prompts")))
            builder.write_shard("vocabulary", 0, pa.Table.from_pylist(words, schema_for("vocabulary")))
            self.prompts = builder.commit(content={"prompts:train": f"answers {answer}"})
        rows = [
            {
                "sample_id": f"p/{i // 2}/1/{i % 2}",
                "prompt_id": f"p/{i // 2}",
                "sample_index": i % 2,
                "prompt_token_ids": [i // 2],
                "completion_token_ids": [1, 2, 3][: 1 + i % 3],
                "sampling_logprobs": [-1.0] * (1 + i % 3),
                "behaviour": "student",
                "prefix_length": 0,
                "finish_reason": "stop",
                "seed": i,
                "completion_text": text,
            }
            for i, text in enumerate(texts)
        ]
        with self.store.building(ArtifactSpec.of("rollout", 1, {"texts": list(texts)}, {})) as builder:
            for shard, start in enumerate(range(0, len(rows), size)):
                part = pa.Table.from_pylist(rows[start : start + size], schema_for("rollouts"))
                builder.write_shard("rollouts", shard, part)
            self.rollouts = builder.commit()

    def make(self, config: JudgeConfig, pool: Any = None, **runtime: Any) -> Artifact:
        if pool is None:
            settings = RuntimeConfig(device="cpu", threads=1, modules=(PLUGINS,), **runtime)
            with WorkerPool(settings, self.logs) as own:
                return self.make(config, own)
        work = judge_work(config, self.rollouts, self.prompts)  # type: ignore[arg-type]
        context = Context(
            self.store,
            pool.runtime,
            pool,
            lambda done, total, unit: self.progress.append((done, total)),
            self.said.append,
        )
        with self.store.building(work.outputs["judge"]) as builder:
            work.build({"judge": builder}, context)
            assert builder.committed is not None
            return builder.committed

    def rows(self, artifact: Artifact) -> list[dict[str, Any]]:
        return self.store.read_table(artifact, "rewards").to_pylist()

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.logs.glob("*.log"))


@pytest.fixture(autouse=True)
def _judges(monkeypatch: pytest.MonkeyPatch, own_workers: None) -> None:
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)


FAULTY = ["good", "hang", "exit", "true", "crash", "print", "raise", "nan", "span", "leak"]


def test_a_judge_that_hangs_crashes_prints_secrets_or_returns_nonsense_fails_single_samples(tmp_path: Path) -> None:
    world = World(tmp_path, FAULTY)
    made = world.make(config_of(NAMED, timeout=1), judge={"workers": 2})
    rows = world.rows(made)
    assert [row["sample_id"] for row in rows] == [f"p/{i // 2}/1/{i % 2}" for i in range(10)]
    rewards = {text: row["reward"] for text, row in zip(FAULTY, rows, strict=True)}
    good = {"good": 1.0, "true": 1.0, "print": 1.0, "leak": 0.5}
    assert rewards == {text: good.get(text) for text in FAULTY}
    failed = {text: row["failed"] for text, row in zip(FAULTY, rows, strict=True) if row["reward"] is None}
    assert failed == {
        "hang": "'judges:named' took longer than judge.timeout (1 s)",
        "exit": "'judges:named' ended its process (exit 3)",
        "crash": "'judges:named' ended its process (killed by signal 11)",
        "raise": "'judges:named': ValueError: no score, key *** second line",
        "nan": "'judges:named': the reward is nan, no finite number",
        "span": "'judges:named': 'spans': (0, 99) is past the completion of 3 tokens",
    }
    assert all((row["failed"] is None) == (row["reward"] is not None) == (row["parts"] is not None) for row in rows)
    assert rows[-1]["feedback"] == "see ***"
    assert all(f"{what} ***" in world.log for what in ("printed", "to stderr", "by the system"))
    metrics = made.meta["metrics"]
    assert (metrics["failed"], metrics["reward_n"], metrics["reward"]) == (6, 4, 0.875)
    assert (metrics["groups"], metrics["groups_without_signal"]) == (5, 5)
    assert sum(made.meta["failures"].values()) == 6
    assert any("6 of 10 completions have no reward" in line for line in world.said)
    stored = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in data for data in stored)
    assert SECRET not in "".join(world.said) and (10, 10) in world.progress


def test_verifiers_are_weighted_and_everything_is_stored(tmp_path: Path) -> None:
    world = World(tmp_path, ["7", "8", "7", " 7 ", "777777"])
    graded = {"kind": "function", "target": "judges:graded", "weight": 0.5, "name": "graded"}
    made = world.make(config_of(EXACT, graded))
    rows = world.rows(made)
    assert [row["parts"] for row in rows] == [[1, 1], [0, 0], [1, 1], [1, 1], [0, 0]]
    assert [row["reward"] for row in rows] == [1.5, 0.0, 1.5, 1.5, 0.0]
    assert [row["segment_ends"] for row in rows] == [[1], [1, 2], [1, 3], [1], [1, 2]]
    assert rows[1]["feedback"] == "'ask 0' expects '7', found '8' in 2 tokens"
    assert [(row["span_starts"], row["span_ends"], row["span_kinds"]) for row in rows] == [([0], [1], ["first"])] * 5
    assert made.content.keys() == {"rewards"} and made.inputs.keys() == {"rollouts", "prompts", "vocabulary"}
    assert made.meta["metrics"]["reward/exact_match"] == 0.6 and made.meta["metrics"]["success_rate"] is None
    threshold = world.make(config_of(EXACT, graded, success_threshold=1))
    assert threshold.key != made.key and threshold.meta["metrics"]["success_rate"] == 0.6


def test_a_verifier_of_weight_0_that_fails_drops_no_reward(tmp_path: Path) -> None:
    """Its part is null and counted, whatever it does; the user is told why."""
    texts = ["good", "hang", "exit", "nan", "good"]
    world = World(tmp_path, texts)
    longer = {"kind": "function", "target": "judges:longer"}
    made = world.make(config_of(longer, NAMED | {"weight": 0, "name": "watched"}, timeout=1))
    rows = world.rows(made)
    assert [row["reward"] for row in rows] == [len(text) / 8 for text in texts]
    assert [row["parts"] for row in rows] == [[len(text) / 8, 1.0 if text == "good" else None] for text in texts]
    assert all(row["failed"] is None for row in rows)
    metrics = made.meta["metrics"]
    assert (metrics["failed"], metrics["failed/watched"], metrics["reward/watched"]) == (0, 3, 1.0)
    assert (metrics["reward_n"], metrics["reward/watched_n"]) == (5, 2) and "failed/judges:longer" not in metrics
    assert any("no verdict at 3 completions, whose rewards stay" in line and "'watched'" in line for line in world.said)


def test_feedback_is_cut_at_its_limit_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret at the place of the cut is removed before it."""
    (tmp_path / "wordy_judge.py").write_text(
        "import os\ndef score(completion, answer):\n"
        "    return {'reward': 1, 'feedback': '.' * int(completion) + os.environ['JUDGE_API_KEY']}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    world = World(tmp_path, ["0", "7", "18"])
    config = config_of({"kind": "function", "target": "wordy_judge:score"}, max_feedback=20)
    with WorkerPool(RuntimeConfig(device="cpu", threads=1, modules=(tmp_path,)), world.logs) as pool:
        made = world.make(config, pool)
    feedback = [row["feedback"] for row in world.rows(made)]
    assert feedback == ["***", "." * 7 + "***", "." * 18 + "** [... 1 characters cut]"]
    assert made.meta["metrics"]["feedback_cut"] == 1
    assert JudgeConfig.model_fields["max_feedback"].default is None
    keys = {
        judge_work(config_of(EXACT, **fields), world.rollouts, world.prompts).outputs["judge"].key  # type: ignore[arg-type]
        for fields in ({}, {"max_feedback": None}, {"max_feedback": 20})
    }
    assert len(keys) == 2


def test_a_verifier_that_hangs_again_and_again_is_told_and_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.judge.LATE_LEAST", 12)
    world = World(tmp_path, ["good", "hang", "good", *["hang"] * 9, "good"], size=20)
    slow: Any = InProcessPool(judge=Judge({}))
    slow.runtime = RuntimeConfig(device="cpu", threads=1)
    with pytest.raises(OpdError, match=r"judge\.timeout \(0\.2 s\) at 10 of 13 completions"):
        world.make(config_of(NAMED, timeout=0.2), slow)
    told = [line for line in world.said if "5 completions one after another" in line]
    assert len(told) == 1 and "'judges:named' (0.2 s, judge.timeout)" in told[0] and "raise judge.timeout" in told[0]


def test_a_round_most_of_whose_completions_were_stopped_at_the_limit_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no single worker had seen enough of them."""
    monkeypatch.setattr("tasks.judge.LATE_LEAST", 4)
    world = World(tmp_path, ["hang", "good", "hang", "hang"], size=1)
    slow: Any = InProcessPool(judge=Judge({}))
    slow.runtime = RuntimeConfig(device="cpu", threads=1)
    with pytest.raises(OpdError, match=r"judge\.timeout \(0\.2 s\) at 3 of 4 completions"):
        world.make(config_of(NAMED, timeout=0.2), slow)
    assert not list((world.store.root / "artifacts" / "judge").glob("*/*.parquet"))
    made = World(tmp_path / "half", ["hang", "good", "hang", "good"]).make(config_of(NAMED, timeout=0.2))
    assert (made.meta["metrics"]["timed_out"], made.meta["metrics"]["failed"]) == (2, 2)


def test_lateness_counts_rows_of_completions() -> None:
    counts = Lateness()
    late = [counts.after(who) is not None for who in [*["a"] * 4, None, *["a"] * 6, None, *["a"] * 5]]
    assert [at for at, told in enumerate(late) if told] == [9, 16]


def test_tokens_are_the_texts_of_the_students_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token_judge.py").write_text(
        "def score(completion, answer, tokens):\n    return {'reward': len(tokens), 'feedback': '|'.join(tokens)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    world = World(tmp_path, ["a", "b", "c"])
    with WorkerPool(RuntimeConfig(device="cpu", threads=1, modules=(tmp_path,)), world.logs) as pool:
        rows = world.rows(world.make(config_of({"kind": "function", "target": "token_judge:score"}), pool))
    assert [row["feedback"] for row in rows] == ["student1", "student1|<2>", "student1|<2>|student3"]


@pytest.mark.parametrize(
    ("texts", "config", "why"),
    [
        (
            ["nan", "raise", "none"],
            {"verifiers": [NAMED]},
            r"none of 3 completions has a reward.*no finite number \(1\)",
        ),
        (["exit"] * 12, {"verifiers": [NAMED]}, "each of the first 10 completions.*exit 3"),
    ],
)
def test_a_judge_that_fails_everywhere_ends_the_stage_and_leaves_nothing_behind(
    tmp_path: Path, texts: list[str], config: dict[str, Any], why: str
) -> None:
    world = World(tmp_path, texts, size=30)
    with pytest.raises(OpdError, match=why):
        world.make(JudgeConfig.model_validate(config))
    assert not list((world.store.root / "artifacts" / "judge").glob("*/*.parquet"))
    assert not list((world.store.root / "artifacts" / "judge").glob(f"*/{MANIFEST}"))


def test_prompts_without_answers_fail_where_a_verifier_compares_with_them(tmp_path: Path) -> None:
    world = World(tmp_path, ["7", "8"], answer=None)
    with pytest.raises(OpdError, match="the prompt has no answer"):
        world.make(config_of(EXACT))
    named = world.make(config_of(NAMED | {"target": "judges:longer"}))
    assert [row["reward"] for row in world.rows(named)] == [0.125, 0.125]


class Counting:
    """A pool that ends after some shards, and remembers which were asked for."""

    def __init__(self, below: WorkerPool, limit: int | None = None) -> None:
        self.below, self.limit, self.runtime, self.asked = below, limit, below.runtime, list[int]()

    def share(self, role: str, job: Any, items: Sequence[Any], *more: Any) -> Any:
        self.asked += [item.shard for item in items]
        found = self.below.share(role, job, list(items)[: self.limit], *more)
        if self.limit is not None:
            raise KeyboardInterrupt
        return found


def test_finished_shards_are_kept_and_the_rest_is_judged_later(tmp_path: Path) -> None:
    config = config_of(EXACT, {"kind": "function", "target": "judges:longer", "weight": 2})
    texts = [str(i) for i in range(10)]
    whole = World(tmp_path / "whole", texts)
    expected = whole.make(config)
    world = World(tmp_path / "part", texts)
    with WorkerPool(RuntimeConfig(device="cpu", threads=1, modules=(PLUGINS,)), world.logs) as pool:
        with pytest.raises(KeyboardInterrupt):
            world.make(config, Counting(pool, 1))
        resumed = Counting(pool)
        made = world.make(config, resumed)
        assert resumed.asked == [1, 2] and any("4 of 10 samples are there already" in line for line in world.said)
        assert (made.key, made.content, made.meta) == (expected.key, expected.content, expected.meta)
        damaged = next((world.store.root / "artifacts" / "judge" / made.key).glob("rewards-*1*.parquet"), None)
        assert damaged is not None
        damaged.write_bytes(damaged.read_bytes()[:-20])
        world.store.verify(made)
        repaired = Counting(pool)
        again = world.make(config, repaired)
    assert len(repaired.asked) == 1 and (again.content, again.meta) == (made.content, made.meta)
    assert world.rows(again) == whole.rows(expected)


def test_every_input_has_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keyed_judge.py"
    file.write_text("def score(completion, answer): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    worlds = [
        World(tmp_path / "one", ["7"]),
        World(tmp_path / "other", ["8"]),
        World(tmp_path / "answer", ["7"], answer="8"),
    ]
    function = {"kind": "function", "target": "keyed_judge:score"}
    configs = [
        config_of(EXACT),
        config_of(EXACT | {"weight": 2}),
        config_of(EXACT | {"extract": "x"}),
        config_of(EXACT | {"name": "a"}),
        config_of(EXACT, timeout=3),
        config_of(EXACT, success_threshold=0.5),
        config_of({"kind": "math_verify"}),
        config_of(EXACT, {"kind": "math_verify"}),
        config_of(function),
    ]

    def key(world: World, config: JudgeConfig) -> str:
        return judge_work(config, world.rollouts, world.prompts).outputs["judge"].key  # type: ignore[arg-type]

    keys = [key(worlds[0], config) for config in configs] + [key(world, configs[0]) for world in worlds[1:]]
    file.write_text(file.read_text() + "# changed\n")
    keys.append(key(worlds[0], configs[-1]))
    assert len(set(keys)) == len(keys)
    with pytest.raises(ConfigError, match="needs the parameter 'rubric'"):
        judge_work(config_of(NAMED | {"target": "judges:needs_more"}), worlds[0].rollouts, worlds[0].prompts)  # type: ignore[arg-type]


def test_metrics_of_groups_by_hand() -> None:
    rewards = [1.0, 0.0, 1.0, 1.0, None, None, 0.0, None]
    prompts = ["a", "a", "b", "b", "c", "c", "d", "d"]
    lengths = [1, 2, 3, 4, 5, 6, 7, 8]
    rows = [{"sample_id": str(i), "reward": r, "parts": None if r is None else [r]} for i, r in enumerate(rewards)]
    table = pa.Table.from_pylist(rows, schema_for("rewards"))
    rollouts = pa.table({"prompt_id": prompts, "completion_token_ids": [[0] * n for n in lengths]})
    found = metrics_of(config_of(EXACT), table, rollouts)
    assert (found["reward"], found["success_rate"], found["failed"]) == (0.6, 0.6, 3)
    assert (found["groups"], found["groups_without_signal"]) == (4, 3)
    assert (found["length_correct"], found["length_wrong"]) == (8 / 3, 4.5)
    moved = [(1 - 2 * 0.6) / 5, (2 - 2 * 0.6) / 5, (0 - 0.6) / 5]  # a, b, d: their sums against 0.6 per sample
    assert found["reward_se"] == pytest.approx(math.sqrt(3 / 2 * sum(d * d for d in moved)))
    assert (found["reward_n"], found["reward_prompts"]) == (5, 3)
    graded = pa.chunked_array([pa.array([0.5, 1.0])])
    assert threshold_of(config_of(EXACT), graded) is None
    assert threshold_of(config_of(EXACT, success_threshold=1), graded) == 1


def test_a_judges_worker_has_no_gpu_and_no_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    runtime = RuntimeConfig(device="cuda", judge={"workers": 3})
    assert runtime.gpus("judge") == [[], [], []] and runtime.numerics("judge") == {}
    assert jobs.ROLES["judge"] == "tasks.engines.judge:Judge"
