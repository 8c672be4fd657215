"""The stage with the real scorer: keys, one pass for all that is missing, shards redone alone, masks with reasons."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from scoring import InProcess, ScoringBench, model_folder, plain_logits
from whole_round import from_rollouts

from storage.artifacts.packed import STEP
from storage.errors import ConfigError, CorruptArtifact, InputError
from storage.schemas import MaskReason, schema_for
from storage.store import Artifact, ArtifactSpec, Store
from storage.upkeep.gc import evict
from tasks.engines.teacher import NoTeacher
from tasks.inputs.tokenizers import build_byte_tokenizer
from tasks.losses.config import DirectConfig, TopkSupport
from tasks.losses.needs import SignalNeed
from tasks.rollout_config import RolloutConfig
from tasks.signals import SIGNALS, Shard
from tasks.signals.mask import SpecialTokens, mask_rules, mask_table
from tasks.supervise import SuperviseConfig, supervise_work
from tasks.workers.jobs import ScoreJob, ScoreShard

ROLLOUT = RolloutConfig(temperature=0.8, top_p=0.9)
SHARDS = [4, 3]
NEEDS = (SignalNeed("sampled"), SignalNeed("mask"), SignalNeed("teacher_topk", 6))


class World:
    """Two models, prompts, rollouts, and the stage to try on them."""

    def __init__(self, root: Path) -> None:
        self.folders = {"student": model_folder(root, "student", 1), "teacher": model_folder(root, "teacher", 2)}
        self.bench = ScoringBench(Store(root / "store"), InProcess({"batch_tokens": 64, "head_chunk_tokens": 8}))
        self.student, self.teacher = (self.bench.model(self.folders[name]) for name in ("student", "teacher"))
        self.prompts = self.bench.prompts(self.student, self.teacher, root / "data")
        self.rollouts = self.bench.rollouts(self.folders["student"], self.prompts, SHARDS)

    @property
    def store(self) -> Store:
        return self.bench.store

    def work(self, needs=NEEDS, config=None, **changed: Any):
        inputs = {n: getattr(self, n) for n in ("rollouts", "student", "teacher", "prompts")} | changed
        store = inputs.pop("store", None)
        sampling = inputs.pop("sampling", ROLLOUT)
        return supervise_work(config or SuperviseConfig(), **inputs, needs=needs, sampling=sampling, store=store)

    def make(self, needs=NEEDS, **changed: Any) -> dict[str, Artifact]:
        return self.bench.make(self.work(needs, **changed))

    def jobs(self, needs=NEEDS, **changed: Any) -> list[tuple[ScoreJob, list[ScoreShard]]]:
        """The scoring jobs that making this took, with their shards."""
        before = len(self.bench.workers.jobs)
        self.make(needs, **changed)
        return [(job, items) for _, job, items in self.bench.workers.jobs[before:]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; tests that use it only add artifacts."""
    world = World(tmp_path_factory.mktemp("world"))
    world.make((*NEEDS, SignalNeed("student_topk", 3)))
    return world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def outputs(jobs: list[tuple[ScoreJob, list[ScoreShard]]]) -> list[tuple[int, list[str]]]:
    """(shard, tables) of what the one job of a stage wrote; none where there was no job."""
    assert len(jobs) <= 1, "all missing shards go to the workers at once"
    return [(item.shard, [output.table for output in item.outputs]) for _, items in jobs for item in items]


def test_signals_have_the_rollouts_rows_and_shards(shared):
    made = shared.make((*NEEDS, SignalNeed("student_topk", 3)))
    samples = shared.store.read_table(shared.rollouts, "rollouts")
    lengths = [len(ids) for ids in samples["completion_token_ids"].to_pylist()]
    assert set(made) == {"sampled", "mask", "teacher_topk", "student_topk"}
    for name, artifact in made.items():
        assert [record.rows for record in shared.store.shards(artifact, name)] == SHARDS
        table = shared.store.read_table(artifact, name)
        assert table["sample_id"].to_pylist() == samples["sample_id"].to_pylist()
        for column in table.column_names[1:]:
            assert [len(cell) for cell in table[column].to_pylist()] == lengths, column
    top = shared.store.read_table(made["teacher_topk"], "teacher_topk").to_pylist()
    assert all(len(ids) == len(row["logprobs"][t]) == 6 for row in top for t, ids in enumerate(row["ids"]))
    total = [math.fsum(map(math.exp, [*row["logprobs"][0], row["tail_logmass"][0]])) for row in top]
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_each_model_reads_its_own_prompt(shared):
    """The teacher's prompt of `b` is longer; its values are those after that prompt, aligned by completion."""
    sampled = shared.store.read_table(shared.make()["sampled"], "sampled").to_pylist()
    prompts = {row["prompt_id"]: row for row in shared.store.read_table(shared.prompts, "prompts").to_pylist()}
    assert prompts["a"]["teacher_token_ids"] is None and len(prompts["b"]["teacher_token_ids"]) > 4
    for row, rollout in zip(sampled, shared.store.read_table(shared.rollouts, "rollouts").to_pylist(), strict=True):
        prompt = prompts[rollout["prompt_id"]]
        completion = rollout["completion_token_ids"]
        y_T1 = torch.tensor(completion)[:, None]
        for name, ids in (("student", prompt["token_ids"]), ("teacher", prompt["teacher_token_ids"])):
            logits_TV = plain_logits(shared.folders[name], ids or prompt["token_ids"], completion)
            exact = logits_TV.log_softmax(-1).gather(1, y_T1)[:, 0]
            np.testing.assert_allclose(row[f"{name}_logprobs"], exact.numpy(), atol=2e-5)


def test_metrics_tell_the_sampler_from_the_scorer(shared):
    metrics = shared.make()["sampled"].meta["metrics"]
    assert (
        0
        <= metrics["sampler_mismatch_mean"]
        <= metrics["sampler_mismatch_p99"]
        <= metrics["sampler_mismatch_max"]
        < 1e-4
    )
    shifted = shared.make(sampling=RolloutConfig(temperature=0.7, top_p=0.9))["sampled"].meta["metrics"]
    assert shifted["sampler_mismatch_mean"] > 0.01
    top = shared.make()["teacher_topk"]
    tails = np.concatenate(shared.store.read_table(top, "teacher_topk")["tail_logmass"].to_pylist())
    assert top.meta["metrics"]["teacher_mass"] == pytest.approx(1 - np.exp(tails).mean(), rel=1e-6)


def test_without_the_student_the_teacher_alone_is_run(world):
    """What the teacher says is the same; the student's columns are null, and no value of it masks a token."""
    full = world.make()
    config = SuperviseConfig(student="none")
    world.bench.workers.handlers["scorer"].close()
    loads = world.bench.workers.handlers["scorer"].models.loads
    jobs = world.jobs(config=config)
    made = world.make(config=config)
    assert world.bench.workers.handlers["scorer"].models.loads == loads + 1
    assert outputs(jobs) == [(shard, ["mask", "sampled"]) for shard in (0, 1)]
    assert made["teacher_topk"].key == full["teacher_topk"].key
    before, after = (world.store.read_table(of["sampled"], "sampled") for of in (full, made))
    for column in ("student_logprobs", "student_entropy", "behaviour_logprobs"):
        assert after[column].null_count == after.num_rows and before[column].null_count == 0
    for column in ("sample_id", "teacher_logprobs", "teacher_entropy"):
        assert after[column] == before[column]
    masks = [world.store.read_table(of["mask"], "mask") for of in (full, made)]
    assert masks[0] == masks[1]
    assert set(made["sampled"].meta["metrics"].values()) == {None}
    with pytest.raises(ConfigError, match="student_topk"):
        world.work((*NEEDS, SignalNeed("student_topk", 3)), config)


def test_without_the_teacher_the_student_alone_is_run(world):
    """What the student says is the same; the teacher's columns are null, and its weights are in no key."""
    needs = (SignalNeed("sampled"), SignalNeed("mask"))
    full = world.make(needs)
    config = SuperviseConfig(teacher=NoTeacher())
    world.bench.workers.handlers["scorer"].close()
    loads = world.bench.workers.handlers["scorer"].models.loads
    made = world.make(needs, config=config)
    assert world.bench.workers.handlers["scorer"].models.loads == loads + 1
    before, after = (world.store.read_table(of["sampled"], "sampled") for of in (full, made))
    for column in ("teacher_logprobs", "teacher_entropy"):
        assert after[column].null_count == after.num_rows and before[column].null_count == 0
    for column in ("sample_id", "student_logprobs", "student_entropy", "behaviour_logprobs"):
        assert after[column] == before[column]
    assert world.store.read_table(full["mask"], "mask") == world.store.read_table(made["mask"], "mask")
    assert not {name for of in made.values() for name in of.inputs if name == "teacher:weights"}
    assert {name: of.key for name, of in made.items()}.items().isdisjoint({n: of.key for n, of in full.items()}.items())
    again = world.work(needs, config).outputs
    other = world.work(needs, config, teacher=world.student).outputs
    assert [spec.key for spec in other.values()] == [spec.key for spec in again.values()]
    for need in (SignalNeed("student_topk", 3), SignalNeed("teacher_topk", 3)):
        with pytest.raises(ConfigError, match=f"supervise.teacher: none, but the signal '{need.name}'"):
            world.work((*NEEDS[:2], need), config)


def test_without_the_student_invalid_values_of_the_teacher_are_masked(world, tmp_path):
    broken = shutil.copytree(world.folders["teacher"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name][world.store.read_table(world.rollouts, "rollouts")["completion_token_ids"][0][0].as_py()] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    world.bench.max_invalid = 1.0
    made = world.make(config=SuperviseConfig(student="none"), teacher=world.bench.model(broken))
    reasons = np.concatenate(world.store.read_table(made["mask"], "mask")["mask_reasons"].to_pylist())
    values = np.concatenate(world.store.read_table(made["sampled"], "sampled")["teacher_logprobs"].to_pylist())
    assert ((reasons & int(MaskReason.INVALID_VALUE) != 0) == ~np.isfinite(values)).all() and np.isnan(values).any()
    assert made["mask"].meta["reasons"]["invalid_value"] > 0


def test_one_pass_writes_what_is_missing_and_rewrites_nothing(world):
    assert outputs(world.jobs()) == [(shard, ["mask", "sampled", "teacher_topk"]) for shard in (0, 1)]
    assert world.jobs() == []
    kept = {name: artifact.created for name, artifact in world.make().items()}
    more = (*NEEDS, SignalNeed("student_topk", 3))
    assert outputs(world.jobs(more)) == [(shard, ["student_topk"]) for shard in (0, 1)]
    assert {name: world.make(more)[name].created for name in kept} == kept
    # another mask needs no model: the flags of invalid values come from the signal that is there
    loads = world.bench.workers.handlers["scorer"].models.loads
    config = SuperviseConfig(special_tokens=SpecialTokens(mark="all"))
    jobs = world.jobs(config=config)
    assert outputs(jobs) == [(0, ["mask"]), (1, ["mask"])] and jobs[0][0].student.path == ""
    assert world.bench.workers.handlers["scorer"].models.loads == loads


def test_a_shard_is_redone_alone_and_is_the_same_shard(world, tmp_path):
    made = world.make()
    record = world.store.shards(made["teacher_topk"], "teacher_topk")[1]
    path = world.store.root / "artifacts" / "teacher_topk" / made["teacher_topk"].key / record.file
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(CorruptArtifact):
        world.store.read_shard(made["teacher_topk"], "teacher_topk", 1)
    assert outputs(world.jobs()) == [(1, ["teacher_topk"])]
    again = world.make()["teacher_topk"]
    assert again.content == made["teacher_topk"].content and again.meta == made["teacher_topk"].meta
    assert (
        world.bench.progressed[-1] == (7, 7, "samples") and "4 of 7 samples are there already" in world.bench.said[-1]
    )


def test_what_was_interrupted_goes_on_with_complete_metrics(world):
    class Interrupted(Exception):
        """Stands for Ctrl-C."""

    whole = World(world.store.root.parent / "other").make()["sampled"].meta
    scorer = world.bench.workers.handlers["scorer"]
    score = scorer.score

    def stop_at_second(job, samples, *rest):
        if len(samples) == SHARDS[1]:
            raise Interrupted
        return score(job, samples, *rest)

    scorer.score = stop_at_second
    with pytest.raises(Interrupted):
        world.make()
    scorer.score = score
    assert outputs(world.jobs()) == [(1, ["mask", "sampled", "teacher_topk"])]
    assert world.make()["sampled"].meta == whole and whole["metrics"]["sampler_mismatch_max"] > 0


def test_a_larger_list_serves_a_smaller_need(shared):
    small = (SignalNeed("teacher_topk", 4),)
    larger = shared.make()["teacher_topk"]
    assert shared.work(small).shared == {}
    assert shared.work(small, store=shared.store).shared == {"teacher_topk": larger.key}
    assert shared.jobs(small, store=shared.store) == []
    for other in (
        {"needs": (SignalNeed("teacher_topk", 7),)},
        {"needs": small, "config": SuperviseConfig(encoding="compact")},
        {"needs": small, "config": SuperviseConfig(dtype="bfloat16")},
        {"needs": small, "teacher": shared.student},
        {"needs": (SignalNeed("student_topk", 4),)},
    ):
        assert shared.work(**other, store=shared.store).shared == {}
    assert outputs(shared.jobs((SignalNeed("teacher_topk", 4),))) == [(0, ["teacher_topk"]), (1, ["teacher_topk"])]
    assert shared.work(small, store=shared.store).shared == {}  # the exact one is there now


def test_keys_hold_what_a_signal_depends_on(shared):
    everything = (*NEEDS, SignalNeed("student_topk", 6))

    def keys(**changed: Any) -> dict[str, str]:
        return {name: spec.key for name, spec in shared.work(everything, **changed).outputs.items()}

    def changed(**how: Any) -> set[str]:
        return {name for name, key in keys(**how).items() if key != keys()[name]}

    def other(artifact: Artifact, part: str) -> Artifact:
        return artifact.model_copy(update={"content": artifact.content | {part: "other"}})

    signals = {"sampled", "teacher_topk", "student_topk", "mask"}
    assert changed(rollouts=other(shared.rollouts, "rollouts")) == signals
    assert changed(teacher=other(shared.teacher, "weights")) == signals
    assert changed(student=other(shared.student, "weights")) == signals - {"teacher_topk"}
    assert changed(student=other(shared.student, "model")) == set()  # the same weights in other files
    assert changed(prompts=other(shared.prompts, "prompts:train")) == signals
    assert changed(prompts=other(shared.prompts, "prompts:eval")) == set()
    assert changed(prompts=other(shared.prompts, "audit")) == {"mask"}
    assert changed(sampling=RolloutConfig(temperature=0.8, top_p=0.8)) == {"sampled"}
    assert changed(config=SuperviseConfig(encoding="compact")) == {"teacher_topk", "student_topk"}
    assert changed(config=SuperviseConfig(encoding="packed")) == {"teacher_topk", "student_topk"}
    assert changed(config=SuperviseConfig(tail_mass=0.01)) == {"teacher_topk"}
    assert changed(config=SuperviseConfig(dtype="bfloat16")) == signals
    assert changed(config=SuperviseConfig(special_tokens=SpecialTokens(mark="all"))) == {"mask"}
    for needs in ((SignalNeed("teacher_topk"),), (SignalNeed("sampled", 3),)):
        with pytest.raises(ConfigError, match=r"\bk$"):
            shared.work(needs)


def test_compact_lists_are_rounded_and_smaller(shared):
    needs = (SignalNeed("teacher_topk", 64),)
    exact, compact = (
        shared.make(needs, config=SuperviseConfig(encoding=encoding))["teacher_topk"]
        for encoding in ("exact", "compact")
    )
    tables = [shared.store.read_table(artifact, "teacher_topk") for artifact in (exact, compact)]
    assert tables[0]["ids"] == tables[1]["ids"]
    wide, narrow = (np.array([x for row in t["logprobs"].to_pylist() for at in row for x in at]) for t in tables)
    np.testing.assert_allclose(narrow, wide, rtol=2**-11)
    assert (narrow == narrow.astype(np.float16)).all() and (narrow != wide).any()
    sizes = [sum(r.bytes for r in shared.store.shards(artifact, "teacher_topk")) for artifact in (exact, compact)]
    assert sizes[1] < 0.85 * sizes[0]
    values = {"teacher_top2_ids": [np.array([[7, 8]])], "teacher_top2_logprobs": [np.array([[-1e6, -np.inf]])]}
    values |= {"teacher_top2_valid": [np.array([2])], "teacher_top2_tail": [np.array([-1e6])]}
    row = pa.table({"sample_id": ["s"], "completion_token_ids": [[0]]})
    made = SIGNALS["teacher_topk"].table(Shard(row, values, 2, "compact"))
    assert made["logprobs"].to_pylist() == [[[-65504.0, -math.inf]]]


def test_packed_lists_have_the_same_ids_close_values_and_the_same_mass(shared):
    """Of both models' lists; made again, their shards have the same bytes."""
    needs = (SignalNeed("teacher_topk", 64), SignalNeed("student_topk", 64))
    exact, packed = (shared.make(needs, config=SuperviseConfig(encoding=encoding)) for encoding in ("exact", "packed"))
    for name in exact:
        one, other = (shared.store.read_table(made[name], name) for made in (exact, packed))
        assert one["ids"] == other["ids"] and one["valid"] == other["valid"]
        for column in (name for name in one.column_names if name.endswith("logprobs")):
            tail = column.replace("logprobs", "tail_logmass")
            before, after = (np.array(t[column].to_pylist()[0]) for t in (one, other))
            tails = [np.array(t[tail].to_pylist()[0]) for t in (one, other)]
            np.testing.assert_allclose(after, before, atol=STEP + 1e-5)
            np.testing.assert_allclose(tails[1], tails[0], atol=STEP + 1e-5)
            np.testing.assert_allclose(np.exp(after).sum(1) + np.exp(tails[1]), 1, atol=1e-5)
            assert (before != after).any()
        sizes = [sum(r.bytes for r in shared.store.shards(made[name], name)) for made in (exact, packed)]
        assert sizes[1] < 0.7 * sizes[0], name
        assert shared.store.verify(packed[name]) == []
    again = packed["teacher_topk"]
    digests = [record.sha256 for record in shared.store.shards(again, "teacher_topk")]
    evict(shared.store.root / "artifacts" / "teacher_topk" / again.key)
    assert shared.make(needs, config=SuperviseConfig(encoding="packed"))["teacher_topk"].content == again.content
    assert [record.sha256 for record in shared.store.shards(again, "teacher_topk")] == digests


@pytest.mark.parametrize("encoding", ["exact", "packed"])
def test_a_tail_mass_ends_the_teachers_lists_and_nothing_is_lost(shared, encoding):
    """The fewest entries that leave at most the mass outside; what is cut is in the tail, and the student's lists stay."""
    needs = DirectConfig(support=TopkSupport(kind="union", k=64)).needs()
    whole = shared.make(needs.signals)
    cut = shared.make(needs.signals, config=SuperviseConfig(encoding=encoding, tail_mass=0.4))
    assert (cut["student_topk"].key == whole["student_topk"].key) == (encoding == "exact")
    one, other = (shared.store.read_table(made["teacher_topk"], "teacher_topk").to_pylist() for made in (whole, cut))
    lengths = set()
    for row, short in zip(one, other, strict=True):
        for t, logprobs in enumerate(row["logprobs"]):
            mass = np.exp(np.array([*logprobs, row["tail_logmass"][t]]))
            outside = mass[::-1].cumsum()[::-1]  # of the first entries
            count = short["valid"][t]
            assert outside[count] <= 0.4 < outside[count - 1] and short["ids"][t] == row["ids"][t][:count]
            assert short["tail_logmass"][t] == pytest.approx(
                math.log(outside[count]), abs=1e-5 + STEP * (encoding == "packed")
            )
            lengths.add(count)
    assert len(lengths) > 1 and max(lengths) < 64
    signals = {name: shared.store.read_table(artifact, name) for name, artifact in cut.items()}
    rollouts = shared.store.read_table(shared.rollouts, "rollouts")
    samples = from_rollouts(rollouts, signals, needs, [], rows=264, cut=["teacher_topk"])
    assert samples.keep.all() and samples.invalid == 0
    with pytest.raises(InputError, match="K=64"):
        from_rollouts(rollouts, signals, needs, [], rows=264)


@pytest.mark.parametrize("encoding", ["exact", "compact", "packed"])
@pytest.mark.parametrize("k", [6, 264])
def test_what_the_scorer_writes_passes_the_trainers_checks(shared, encoding, k):
    needs = DirectConfig(support=TopkSupport(kind="union", k=k)).needs()
    made = shared.make(needs.signals, config=SuperviseConfig(encoding=encoding))
    signals = {name: shared.store.read_table(artifact, name) for name, artifact in made.items()}
    samples = from_rollouts(shared.store.read_table(shared.rollouts, "rollouts"), signals, needs, [], rows=264)
    assert samples.keep.all() and samples.invalid == 0


def test_lists_with_unusable_numbers_are_stored_empty():
    """Each of the first six tokens breaks one rule; the last is fine, as is an entry without probability."""
    top = np.full((7, 3), [-1.0, -2.0, -math.inf])
    top[0, 0], top[1, 1], top[2, 0] = math.nan, math.inf, 0.01
    tail = np.array([-3.0, -3.0, -3.0, math.nan, math.inf, 0.01, -3.0])
    values = {"teacher_top3_ids": [np.tile([7, 8, 9], (7, 1))], "teacher_top3_logprobs": [top]}
    values |= {"teacher_top3_tail": [tail], "teacher_top3_valid": [np.full(7, 3)]}
    rollouts = pa.table({"sample_id": ["s"], "completion_token_ids": [[0] * 7]})
    (row,) = SIGNALS["teacher_topk"].table(Shard(rollouts, values, 3)).to_pylist()
    assert row["valid"] == [0] * 6 + [3] and [len(ids) for ids in row["ids"]] == row["valid"]
    assert row["logprobs"][6] == [-1.0, -2.0, -math.inf] and row["tail_logmass"][6] == -3.0
    assert np.isnan(row["tail_logmass"][:6]).all()
    top[0], top[0, 1] = -1.0, math.nan  # past the usable entries nothing matters
    values["teacher_top3_valid"][0][0] = 1
    assert SIGNALS["teacher_topk"].table(Shard(rollouts, values, 3))["valid"].to_pylist()[0][0] == 1


# --- masks -----------------------------------------------------------------------------------------------------------


def rollout_row(completion: list[int], **fields: Any) -> dict[str, Any]:
    row = dict.fromkeys(schema_for("rollouts").names)
    row |= {"sample_id": "s", "prompt_id": "p", "sample_index": 0, "prompt_token_ids": [1], "seed": 0}
    row |= {"completion_token_ids": completion, "sampling_logprobs": [-1.0] * len(completion), "completion_text": ""}
    return row | {"behaviour": "student", "prefix_length": 0, "finish_reason": "stop"} | fields


def reasons(row: dict[str, Any], special=(), unmapped=(), occurrence="all", **values: list[float]) -> list[int]:
    count = len(row["completion_token_ids"])
    columns = dict.fromkeys(("student_logprobs", "teacher_logprobs"), [-0.5] * count)
    columns |= dict.fromkeys(("student_entropy", "teacher_entropy"), [0.5] * count)
    sampled = pa.Table.from_pylist([{"sample_id": "s", **columns, **values}], schema_for("sampled"))
    rules = {"special": list(special), "unmapped": list(unmapped), "teacher_rows": 100, "occurrence": occurrence}
    table = mask_table(pa.Table.from_pylist([row], schema_for("rollouts")), sampled, rules)
    return table["mask_reasons"].to_pylist()[0]


def test_mask_reasons_are_bits_of_what_holds():
    special, truncated, prefix, unmapped, invalid = (int(reason) for reason in MaskReason)
    row = rollout_row([7, 3, 7, 120])
    assert reasons(row) == [0, 0, 0, unmapped]
    assert reasons(row, special=[7]) == [special, 0, special, unmapped]
    assert reasons(row, special=[7], occurrence="first") == [special, 0, 0, unmapped]
    assert reasons(row, special=[3], unmapped=[3, 7]) == [unmapped, unmapped | special, unmapped, unmapped]
    assert reasons(row | {"finish_reason": "length"}) == [truncated] * 3 + [truncated | unmapped]
    assert reasons(row | {"prefix_length": 2}) == [prefix, prefix, 0, unmapped]
    ok = rollout_row([1, 2, 3, 4])
    assert reasons(ok, teacher_logprobs=[-1.0, math.nan, -math.inf, -2.0]) == [0, invalid, invalid, 0]
    assert reasons(ok, student_logprobs=[0.0, 1e-6, 0.01, math.inf]) == [0, 0, invalid, invalid]
    assert reasons(ok, student_entropy=[math.inf, 0.0, -1e-6, -0.1]) == [invalid, 0, 0, invalid]
    assert reasons(ok, behaviour_logprobs=[-1.0, math.nan, 0.01, -math.inf]) == [0, invalid, invalid, invalid]
    assert reasons(ok | {"sampling_logprobs": [0.0, 0.1, math.nan, -math.inf]}) == [0, invalid, invalid, invalid]


def test_invalid_values_of_a_model_are_flagged_and_counted(world):
    """A teacher that gives NaN where it reads token `d` of the prompt `cd`, as a broken checkpoint would."""
    folder = world.folders["teacher"].parent / "broken"
    model_folder(folder.parent, "broken", 2)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("d")] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    broken = world.bench.model(folder)
    with pytest.raises(InputError, match=r"'mask'.*teacher"):  # half of the tokens
        world.make((*NEEDS, SignalNeed("student_topk", 3)), teacher=broken)
    names = ("sampled", "mask", "teacher_topk", "student_topk")
    assert [a for name in names for a in world.bench.store.list(name)] == []
    assert not list(world.bench.store.root.glob("artifacts/*_topk/*/*.parquet")), "the models are asked again"
    world.bench.max_invalid = 0.9
    made = world.make((*NEEDS, SignalNeed("student_topk", 3)), teacher=broken)
    masks = world.store.read_table(made["mask"], "mask")
    rows = {name: world.store.read_table(made[name], name).to_pylist() for name in made if name != "mask"}
    count = 0
    for row, found in enumerate(masks.to_pylist()):
        bad = found["sample_id"].startswith("b/")
        assert found["mask_reasons"] == [16 if bad else 0] * len(found["mask_reasons"])
        assert np.isnan(rows["sampled"][row]["teacher_logprobs"]).all() == bad
        assert np.isfinite(rows["sampled"][row]["student_logprobs"]).all()
        assert set(rows["teacher_topk"][row]["valid"]) == {0 if bad else 6}
        assert set(rows["student_topk"][row]["valid"]) == {0 if bad else 3}
        count += bad * len(found["mask_reasons"])
    assert made["mask"].meta["reasons"] == {
        "special_token": 0, "truncated": 0, "teacher_prefix": 0, "unmapped": 0, "invalid_value": count,
    }  # fmt: skip
    assert made["mask"].meta["metrics"] == {"invalid_tokens": count} and count > 0
    assert any(f"{count} tokens have invalid values" in line for line in world.bench.said)
    assert 0 < made["teacher_topk"].meta["metrics"]["teacher_mass"] < 1


def test_tokens_written_by_others_have_no_behaviour_logprobs(world):
    world.rollouts = world.bench.rollouts(
        world.folders["student"], world.prompts, [2], behaviour="teacher", prefix_length=2
    )
    made = world.make((SignalNeed("sampled"), SignalNeed("mask")))
    assert world.store.read_table(made["sampled"], "sampled")["behaviour_logprobs"].to_pylist() == [None, None]
    assert made["sampled"].meta["metrics"]["sampler_mismatch_mean"] is None
    assert made["mask"].meta["reasons"]["teacher_prefix"] == 4


def test_rules_come_from_the_audit_and_the_vocabularies(tmp_path):
    """A teacher whose end of sequence has another name: masked by policy, and the student's is special."""
    bench = ScoringBench(Store(tmp_path / "store"), InProcess())
    student, teacher = model_folder(tmp_path, "student", 1), model_folder(tmp_path, "teacher", 2)
    tokenizer = build_byte_tokenizer()
    end = tokenizer.eos_token_id
    for file in ("tokenizer.json", "tokenizer_config.json"):
        path = teacher / file
        path.write_text(path.read_text().replace("<|end|>", "<|stop|>"))
    policy = {"on_mismatch": "mask", "on_template_mismatch": "student"}
    prompts = bench.prompts(bench.model(student), bench.model(teacher), tmp_path / "data", tokenizers=policy)
    rules = mask_rules(bench.store, prompts, SpecialTokens())
    assert rules == {"unmapped": [end], "teacher_rows": 264, "special": [end], "occurrence": "all"}
    every = mask_rules(bench.store, prompts, SpecialTokens(mark="all", occurrence="first"))
    assert every["special"] == [256, 257, 258, 259, 260] and every["occurrence"] == "first"
    named = mask_rules(bench.store, prompts, SpecialTokens(tokens=("<", "a", " ")))
    assert named["special"] == sorted({end, ord("<"), ord("a"), ord(" ")})
    with pytest.raises(InputError, match="no token '<|usr|>'.*did you mean '<|user|>'".replace("|", r"\|")):
        mask_rules(bench.store, prompts, SpecialTokens(tokens=("<|usr|>",)))


def contexts_of(world: World, read: dict[str, list[int]], without: str | None = None) -> Artifact:
    """Contexts of the world's rollouts: what the teacher reads, by sample; of the others it reads the plain prompt."""
    with world.store.building(ArtifactSpec.of("context", 1, {"read": read, "without": without}, {})) as builder:
        if builder.committed is not None:
            return builder.committed
        for shard, of_rollouts in enumerate(world.store.shard_readers(world.rollouts, "rollouts")):
            rows = [
                {"sample_id": name, "prompt_token_ids": read.get(name), "source": "sibling" if name in read else "none"}
                for name in of_rollouts(["sample_id"])["sample_id"].to_pylist()
                if name != without
            ]
            builder.write_shard("contexts", shard, pa.Table.from_pylist(rows, schema=schema_for("contexts")))
        return builder.commit(tables={"contexts": len(SHARDS)})


def test_the_teacher_reads_each_sample_in_its_own_context(shared):
    """Also the student's candidates; the student reads its prompt, and samples without a context are scored as without any."""
    rollouts = shared.store.read_table(shared.rollouts, "rollouts").to_pylist()
    read = {row["sample_id"]: [259, *range(97, 97 + 3 * number), 257, 260] for number, row in enumerate(rollouts[::2])}
    needs = (*NEEDS, SignalNeed("student_topk", 3))
    contexts = contexts_of(shared, read)
    [(job, items)] = shared.jobs(needs, contexts=contexts)
    assert job.contexts is not None and len(items) == len(SHARDS), "one pass over each shard"
    made, plain = shared.make(needs, contexts=contexts), shared.make(needs)
    assert all(made[name].key != plain[name].key for name in made)
    rows, before = (shared.store.read_table(of["sampled"], "sampled").to_pylist() for of in (made, plain))
    listed = shared.store.read_table(made["student_topk"], "student_topk").to_pylist()
    for row, own, lists, rollout in zip(rows, before, listed, rollouts, strict=True):
        assert row["student_logprobs"] == pytest.approx(own["student_logprobs"], abs=1e-5)
        if row["sample_id"] not in read:
            assert row["teacher_logprobs"] == pytest.approx(own["teacher_logprobs"], abs=1e-5)
            continue
        completion = rollout["completion_token_ids"]
        logits_TV = plain_logits(shared.folders["teacher"], read[row["sample_id"]], completion)
        exact_TV = logits_TV.log_softmax(-1)
        y_T1 = torch.tensor(completion)[:, None]
        np.testing.assert_allclose(row["teacher_logprobs"], exact_TV.gather(1, y_T1)[:, 0].numpy(), atol=2e-5)
        on_TK = exact_TV.gather(1, torch.tensor(lists["ids"]))
        np.testing.assert_allclose(lists["teacher_logprobs"], on_TK.numpy(), atol=2e-5)


def test_other_contexts_are_other_signals_and_those_that_lack_a_sample_are_refused(world):
    first = world.store.read_table(world.rollouts, "rollouts")["sample_id"][0].as_py()
    keys = [
        {name: spec.key for name, spec in world.work(contexts=contexts).outputs.items()}
        for contexts in (None, contexts_of(world, {}), contexts_of(world, {first: [97]}))
    ]
    assert all(len({of[name] for of in keys}) == 3 for name in keys[0])
    with pytest.raises(InputError, match=rf"context/.*: shard 0 has no row of sample {first!r}"):
        world.make(contexts=contexts_of(world, {}, without=first))
