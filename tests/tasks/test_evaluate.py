"""The stage with the real scorer; the sampler is a plain transformers loop behind the sampler's job interface."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
import torch
from feed import Feed
from pydantic import ValidationError
from scoring import END, InProcess, ScoringBench, model_folder, nucleus_logprobs, plain_logits
from transformers import AutoTokenizer

from storage.artifacts.batches import BatchLog
from storage.artifacts.shards import INTERMEDIATE
from storage.errors import InputError
from storage.schemas import schema_for
from storage.store import Artifact, Store
from tasks.engines.sampler import Sampler
from tasks.evaluate import EvaluateConfig, Prompt, evaluate_work, plan_shards
from tasks.inputs.prompts import PrepareConfig
from tasks.prepare import prepare_work
from tasks.workers.jobs import KLJob, SampleJob, SampleResult, Sampling, ShardDone

CONFIG = EvaluateConfig(
    greedy=True, num_generations=2, temperature=0.7, top_p=0.8, kl_prompts=3, kl_generations=2, max_completion_length=4,
    shard_prompts=2,
)  # fmt: skip


class PlainSampler:
    """Serves sampling jobs as the sampler does, slowly and plainly. `limit`: shards until it is interrupted."""

    limit: int | None = None

    def handle(self, job: SampleJob, link: Feed) -> SampleResult:
        store = Store(job.store)
        writer = store.shard_writer(job.target.stage, job.target.key)
        log, step = BatchLog(writer.path, job.log_table), 0
        table = store.read_table(store.require(job.prompts.stage, job.prompts.key), "prompts").to_pylist()
        prompts = {row["prompt_id"]: row["token_ids"] for row in table if row["split"] == job.split}
        tokenizer = AutoTokenizer.from_pretrained(job.model.path)
        while (item := link.next()) is not None:
            if len(link.results) == self.limit:
                raise KeyboardInterrupt
            log.add(item.shard, step)
            step += 1
            if job.write is not None and item.shard not in job.write:
                continue
            rows = []
            for request in item.requests:
                ids = self.complete(Path(job.model.path), prompts[request.prompt_id], item.sampling, request.seed)
                rows.append(
                    msgspec.structs.asdict(request)
                    | {
                        "prompt_token_ids": prompts[request.prompt_id],
                        "completion_token_ids": ids,
                        "sampling_logprobs": [0.0] * len(ids),
                        "behaviour": "student",
                        "prefix_length": 0,
                        "finish_reason": "stop" if ids[-1] == END else "length",
                        "completion_text": tokenizer.decode(ids, skip_special_tokens=True),
                        "reward": None,
                    }
                )
            if job.batch is None:
                log.writing(item.shard)
            writer.intermediate().write_shard(
                "rollouts", item.shard, pa.Table.from_pylist(rows, schema_for("rollouts"))
            )
            link.done(ShardDone(item.shard, item.size))
        return SampleResult([END], {})

    @staticmethod
    def complete(path: Path, prompt: list[int], how: Sampling, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = []
        while len(ids) < how.max_completion_length and END not in ids:
            logits_V = plain_logits(path, prompt, [*ids, 0])[-1]
            if how.temperature == 0:
                ids.append(int(logits_V.argmax()))
            else:
                probs_V = nucleus_logprobs(logits_V[None], how.temperature, how.top_p, how.top_k)[0].exp()
                ids.append(int(torch.multinomial(probs_V, 1, generator=generator)))
        return ids


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.bench = ScoringBench(Store(root / "store"), InProcess({"head_chunk_tokens": 3}, sampler=PlainSampler()))
        folders = [model_folder(root, "student", 1), model_folder(root, "teacher", 2)]
        self.student, self.teacher = (self.bench.model(folder) for folder in folders)
        self.folders = {"student": folders[0], "teacher": folders[1]}
        self.prompts = self.bench.prompts(self.student, self.teacher, root / "data")

    def make(self, config: EvaluateConfig = CONFIG, **changed: Any) -> Artifact:
        inputs = {"student": self.student, "teacher": self.teacher, "prompts": self.prompts, "seed": 5} | changed
        return self.bench.make(evaluate_work(config, **inputs))["evaluate"]

    def rows(self, artifact: Artifact) -> list[dict[str, Any]]:
        return self.bench.store.read_table(artifact, "evaluations").to_pylist()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_rows_and_metrics(shared):
    artifact = shared.make()
    rows = shared.rows(artifact)
    by_mode = {mode: [row for row in rows if row["mode"] == mode] for mode in ("greedy", "sampled", "kl")}
    assert {mode: len(part) for mode, part in by_mode.items()} == {"greedy": 5, "sampled": 10, "kl": 6}
    assert len({(row["prompt_id"], row["sample_index"]) for row in by_mode["sampled"]}) == 10
    assert len({row["prompt_id"] for row in by_mode["kl"]}) == 3
    assert all(row["correct"] is None and row["verifier"] is None for row in by_mode["kl"])
    for row in by_mode["greedy"] + by_mode["sampled"]:
        assert row["correct"] == (row["completion_text"].strip() == "x") and row["verifier"] == "exact_match"
        assert row["reverse_kl_sum"] is None
    for row in by_mode["kl"]:
        log_p, log_q = (
            plain_logits(shared.folders[name], row["prompt_token_ids"], row["completion_token_ids"]).log_softmax(-1)
            for name in ("student", "teacher")
        )
        assert row["reverse_kl_sum"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-4)
    kl_tokens = sum(row["tokens"] for row in by_mode["kl"])
    assert all(row["tokens"] == len(row["completion_token_ids"]) for row in rows)
    kl = sum(row["reverse_kl_sum"] for row in by_mode["kl"]) / kl_tokens
    clipped = sum(row["finish_reason"] == "length" for row in by_mode["kl"]) / 6

    def error(value: float, total: Callable[[dict[str, Any]], float], weight: Callable[[dict[str, Any]], float]) -> Any:
        """From residuals over the three prompts of two samples each."""
        prompts: dict[str, float] = {}
        for row in by_mode["kl"]:
            prompts[row["prompt_id"]] = prompts.get(row["prompt_id"], 0) + total(row) - value * weight(row)
        everything = sum(weight(row) for row in by_mode["kl"])
        return pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in prompts.values())) / everything, rel=1e-9)

    assert artifact.meta["metrics"] == {
        "accuracy_greedy": 0.0,
        "accuracy_greedy_se": 0.0,
        "accuracy_greedy_n": 5,
        "accuracy_greedy_prompts": 5,
        "accuracy_sampled": 0.0,
        "accuracy_sampled_se": 0.0,
        "accuracy_sampled_n": 10,
        "accuracy_sampled_prompts": 5,
        "reverse_kl": pytest.approx(kl),
        "reverse_kl_se": error(kl, lambda row: row["reverse_kl_sum"], lambda row: row["tokens"]),
        "reverse_kl_n": 6,
        "reverse_kl_prompts": 3,
        "mean_length": kl_tokens / 6,
        "mean_length_se": error(kl_tokens / 6, lambda row: row["tokens"], lambda row: 1),
        "mean_length_n": 6,
        "mean_length_prompts": 3,
        "clipped_ratio": clipped,
        "clipped_ratio_se": error(clipped, lambda row: row["finish_reason"] == "length", lambda row: 1),
        "clipped_ratio_n": 6,
        "clipped_ratio_prompts": 3,
        "eval_tokens": sum(row["tokens"] for row in rows),
    }
    assert shared.bench.progressed[-1] == (5 + 10 + 2 * 6, 5 + 10 + 2 * 6, "sample passes")


def test_a_teacher_that_is_the_student_has_no_kl(shared):
    config = EvaluateConfig(greedy=False, max_completion_length=4)
    assert abs(shared.make(config, teacher=shared.student).meta["metrics"]["reverse_kl"]) < 1e-6
    assert shared.make(config).meta["metrics"]["reverse_kl"] > 0.01


def test_right_answers_are_counted(world):
    """The eval answers become what the student says greedily, for two of five prompts."""
    config = EvaluateConfig(kl_prompts=0, max_completion_length=3)
    said = {row["prompt_id"]: row["completion_text"] for row in world.rows(world.make(config))}
    assert world.make(config).meta["metrics"]["accuracy_greedy"] == 0
    rows = [{"prompt": f"q{i}", "id": f"e{i}"} for i in range(5)]
    rows[0]["answer"], rows[3]["answer"], rows[4]["answer"] = said["e0"] or "", said["e3"] or "", said["e4"] + "no"
    (world.root / "data" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {n: {"kind": "file", "path": str(world.root / "data" / f"{n}.jsonl")} for n in ("train", "eval")}
    prompts = world.bench.make(prepare_work(PrepareConfig(**sources), world.student, world.teacher))["prepare"]
    artifact = world.make(config, prompts=prompts)
    assert {row["prompt_id"]: row["correct"] for row in world.rows(artifact)} == {
        "e0": True, "e1": None, "e2": None, "e3": True, "e4": False,
    }  # fmt: skip
    metrics = artifact.meta["metrics"]
    assert metrics["accuracy_greedy"] == pytest.approx(2 / 3) and metrics["accuracy_sampled"] is None
    assert metrics["reverse_kl"] is None and metrics["mean_length"] > 0
    unjudged = world.make(config.model_copy(update={"verifier": None}), prompts=prompts)
    assert unjudged.meta["metrics"]["accuracy_greedy"] is None and unjudged.meta["judged"] == 0


def test_a_user_function_may_judge_without_an_answer(world, tmp_path, monkeypatch):
    module = tmp_path / "my_verifier_of_evaluate.py"
    module.write_text("def judge(text, answer):\n    return True\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = EvaluateConfig(
        kl_prompts=0, max_completion_length=2, verifier={"kind": "function", "target": "my_verifier_of_evaluate:judge"}
    )
    before = evaluate_work(config, world.student, world.teacher, world.prompts, 5).outputs["evaluate"].key
    assert world.make(config).meta["metrics"]["accuracy_greedy"] == 1
    module.write_text("def judge(text, answer):\n    return False  # another function, another key\n")
    assert evaluate_work(config, world.student, world.teacher, world.prompts, 5).outputs["evaluate"].key != before


def test_keys_leave_the_round_out_and_hold_the_rest(shared):
    def key(config: EvaluateConfig = CONFIG, seed: int = 5, **changed: Artifact) -> str:
        inputs = {"student": shared.student, "teacher": shared.teacher, "prompts": shared.prompts} | changed
        return evaluate_work(config, **inputs, seed=seed).outputs["evaluate"].key

    def other(artifact: Artifact, part: str) -> Artifact:
        return artifact.model_copy(update={"content": artifact.content | {part: "other"}})

    assert key(student=other(shared.student, "model")) == key()
    assert key(prompts=other(shared.prompts, "prompts:train")) == key()
    changed = [
        key(seed=6), key(student=other(shared.student, "weights")), key(student=other(shared.student, "tokenizer")),
        key(teacher=other(shared.teacher, "weights")), key(prompts=other(shared.prompts, "prompts:eval")),
        key(CONFIG.model_copy(update={"top_p": 0.9})),
    ]  # fmt: skip
    assert len({key(), *changed}) == 7
    plain = EvaluateConfig(kl_prompts=0)
    assert key(plain) == key(plain, teacher=other(shared.teacher, "weights"))


class Dead:
    def handle(self, job: KLJob, link: Feed) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_evaluation_goes_on(world):
    """The sampler dies over its fourth shard, then the scorer: what was sampled is kept, though no accuracy or KL is known."""
    pool = world.bench.workers
    sampler, scorer = pool.handlers["sampler"], pool.handlers["scorer"]
    sampler.limit, pool.handlers["scorer"] = 3, Dead()
    for sampled in (range(8), range(3, 8)):
        before = len(pool.jobs)
        with pytest.raises(KeyboardInterrupt):
            world.make()
        (_, _, shards), *_ = pool.jobs[before:]
        assert [item.shard for item in shards] == list(sampled)
        sampler.limit = None
    assert "5 completions of an earlier attempt are there already" in " ".join(world.bench.said)
    pool.handlers["scorer"] = scorer
    before = len(pool.jobs)
    artifact = world.make()
    assert [(role, [item.shard for item in items]) for role, _, items in pool.jobs[before:]] == [("scorer", [6, 7])]
    assert world.bench.progressed[-1] == (5 + 10 + 6, 5 + 10 + 6, "samples")
    whole = World(world.root / "other").make()
    assert artifact.content == whole.content and artifact.meta == whole.meta
    assert not list(world.bench.store.root.rglob(INTERMEDIATE))


def test_completions_made_at_other_numerics_are_sampled_again(world, monkeypatch):
    """What is recorded of a shard holds for its completions too, though they are in a shard of their own until then."""
    pool = world.bench.workers
    scorer, pool.handlers["scorer"] = pool.handlers["scorer"], Dead()
    config = EvaluateConfig(greedy=False, max_completion_length=2)
    with pytest.raises(KeyboardInterrupt):
        world.make(config)
    pool.handlers["scorer"] = scorer
    monkeypatch.setattr("tasks.workers.runtime.RuntimeConfig.numerics", lambda self, *roles: {"threads": 7})
    before = len(pool.jobs)
    artifact = world.make(config)
    assert [role for role, _, _ in pool.jobs[before:]] == ["sampler", "scorer"]
    assert artifact.provenance["numerics"] == {"threads": 7}


def lose(world: World, artifact: Artifact, shard: int) -> None:
    record = world.bench.store.shards(artifact, "evaluations")[shard]
    (world.bench.store.root / "artifacts" / "evaluate" / artifact.key / record.file).unlink()


class Scored:
    """The scorer, which stops after its job: its sums are there, the evaluation's rows are not. `spoil` then runs."""

    def __init__(self, scorer: Any, spoil: Any) -> None:
        self.scorer, self.spoil = scorer, spoil

    def handle(self, job: KLJob, link: Feed) -> None:
        self.scorer.handle(job, link)
        self.spoil(Store(job.store).shard_writer(job.target.stage, job.target.key).intermediate())
        raise KeyboardInterrupt


def made_again(world: World, spoil: Any, whole: Artifact) -> list[tuple[str, list[int]]]:
    """Role and shards of the jobs by which an evaluation that stopped, and was then spoilt, becomes `whole`."""
    pool = world.bench.workers
    scorer = pool.handlers["scorer"]
    pool.handlers["scorer"] = Scored(scorer, spoil)
    with pytest.raises(KeyboardInterrupt):
        world.make()
    pool.handlers["scorer"] = scorer
    before = len(pool.jobs)
    assert world.make().content == whole.content
    return [(role, [item.shard for item in items]) for role, _, items in pool.jobs[before:]]


def test_completions_that_are_sampled_again_are_scored_again(world):
    """The sums of lost completions are left; they are spoilt here, and must not be joined to the new ones."""
    whole = World(world.root / "other").make()

    def spoil(between: Any) -> None:
        sums = between.require("completion_kl", 6)
        between.forget("completion_kl", 6)
        spoilt = sums.set_column(1, sums.schema.field(1), pa.array([7.0] * sums.num_rows, pa.float64()))
        between.write_shard("completion_kl", 6, spoilt)
        between.forget("rollouts", 6)

    assert made_again(world, spoil, whole) == [("sampler", [6]), ("scorer", [6])]


@pytest.mark.parametrize("rows", ["others", "fewer", "another order"])
def test_sums_of_other_completions_are_made_again(world, rows):
    whole = World(world.root / "other").make()

    def spoil(between: Any) -> None:
        sums = between.require("completion_kl", 6)
        between.forget("completion_kl", 6)
        taken = {"others": sums, "fewer": sums.slice(1), "another order": sums.take(list(range(sums.num_rows))[::-1])}
        if rows == "others":
            names = pa.array([f"x{name}" for name in sums["sample_id"].to_pylist()])
            taken[rows] = sums.set_column(0, sums.schema.field(0), names)
        between.write_shard("completion_kl", 6, taken[rows])

    assert made_again(world, spoil, whole) == [("scorer", [6])]


def test_a_repair_that_goes_on_at_other_numerics_samples_again(world, monkeypatch):
    pool = world.bench.workers
    config = EvaluateConfig(greedy=False, max_completion_length=2)
    made = world.make(config)
    recorded = made.provenance["numerics"]
    lose(world, made, 0)
    scorer, pool.handlers["scorer"] = pool.handlers["scorer"], Dead()
    both = ["sampler", "scorer"]
    for numerics, roles in (({"threads": 7}, both), ({"threads": 7}, ["scorer"]), (recorded, both)):
        monkeypatch.setattr("tasks.workers.runtime.RuntimeConfig.numerics", lambda self, *roles, n=numerics: n)
        before = len(pool.jobs)
        with pytest.raises(KeyboardInterrupt):
            world.make(config)
        assert [role for role, _, _ in pool.jobs[before:]] == roles
    pool.handlers["scorer"] = scorer
    before = len(pool.jobs)
    again = world.make(config)
    assert [role for role, _, _ in pool.jobs[before:]] == ["scorer"]
    assert again.content == made.content and again.provenance == made.provenance
    assert not list(world.bench.store.root.rglob("*.made-at.json"))


def test_a_lost_shard_is_sampled_in_the_batch_that_it_was_in(world):
    pool, store = world.bench.workers, world.bench.store
    made = world.make()
    assert made.provenance["batches"] == [{"queue": [[n, n] for n in range(8)], "shards": list(range(8))}]
    (store.root / "artifacts" / "evaluate" / made.key / store.shards(made, "evaluations")[6].file).unlink()
    before = len(pool.jobs)
    again = world.make()
    (_, sampling, sampled), (_, _, scored) = pool.jobs[before:]
    assert sampling.batch == [item.shard for item in sampled] == list(range(8)) and sampling.write == [6]
    assert [item.shard for item in scored] == [6]
    assert again.content == made.content and again.provenance["batches"] == made.provenance["batches"]


def test_the_prompts_are_a_seeded_choice():
    prompts = [Prompt(f"p{i}", [i], None, None) for i in range(20)]

    def ids(config: EvaluateConfig, mode: str, seed: int = 1, given: list[Prompt] = prompts) -> list[str]:
        shards = [shard for shard in plan_shards(given, config, seed) if shard.mode == mode]
        return [prompt.prompt_id for shard in shards for prompt, index in shard.samples if index == 0]

    few = EvaluateConfig(prompts=8, kl_prompts=3, shard_prompts=3, num_generations=2)
    assert len(ids(few, "greedy")) == 8 and ids(few, "sampled") == ids(few, "greedy")
    assert ids(few, "kl") == ids(few, "greedy")[:3]
    assert ids(few, "greedy", given=prompts[::-1]) == ids(few, "greedy")
    assert ids(few, "greedy", seed=2) != ids(few, "greedy")
    assert sorted(ids(EvaluateConfig(), "greedy")) == sorted(p.prompt_id for p in prompts)
    assert [len(shard.prompts) for shard in plan_shards(prompts, few, 1)] == [3, 3, 2, 3, 3, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"greedy": False, "kl_prompts": 0}, "nothing to evaluate"),
        ({"top_p": 0}, "top_p"),
        ({"stop_token_ids": []}, "one or more token ids"),
        ({"verifier": {"kind": "exact"}}, "verifier"),
        ({"kl_generations": 0}, "kl_generations"),
        ({"generations": 1}, "generations"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate(fields)


def test_there_must_be_held_out_prompts(world):
    source = {"kind": "file", "path": str(world.root / "data" / "train.jsonl")}
    prompts = world.bench.make(prepare_work(PrepareConfig(train=source), world.student, world.teacher))["prepare"]
    with pytest.raises(InputError, match=r"prompts\.eval"):
        world.make(prompts=prompts)


def test_jobs_are_such_as_the_sampler_reads(shared):
    """What the real sampler takes from a job before it needs an engine."""
    shared.make(EvaluateConfig(kl_prompts=0, max_completion_length=2))
    job, items = next((job, items) for role, job, items in shared.bench.workers.jobs[::-1] if role == "sampler")
    sampler = Sampler({"device": "cpu", "threads": 1})
    loaded: list[Any] = []
    sampler.engine.load = lambda *arguments: loaded.append(arguments) or (_ for _ in ()).throw(InterruptedError)
    with pytest.raises(InterruptedError):
        sampler.handle(job, Feed(items))
    ((path, weights, dtype, length),) = loaded
    assert path == Path(job.model.path) and weights == shared.student.content["weights"]
    table = shared.bench.store.read_table(shared.prompts, "prompts").to_pylist()
    longest = max(len(row["token_ids"]) for row in table if row["split"] == job.split)
    assert dtype == "float32" and length == longest + items[0].sampling.max_completion_length
