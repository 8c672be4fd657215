"""From tables to tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from whole_round import from_rollouts

from storage.errors import ConfigError, InputError
from storage.schemas import MaskReason, schema_for
from tasks.losses.config import CreditConfig, DirectConfig, PolicyGradientConfig, SftConfig, TopkSupport
from tasks.losses.needs import CreditNeeds, Needs
from tasks.trainer.batching import Step
from tasks.trainer.config import OptimizerSettings
from tasks.trainer.data import Samples, forward_batch, loss_denominators
from tasks.trainer.deepspeed_file import deepspeed_config
from tasks.trainer.planning import Planner
from tasks.trainer.topk_lists import TopK, UnionTopK
from tasks.trainer.trainer import refuse_lost_steps

CPU = torch.device("cpu")
SPECIAL = [MaskReason.SPECIAL_TOKEN]


def tables(lengths: list[int] = (3, 1, 2), k: int = 4) -> tuple[pa.Table, dict[str, pa.Table]]:
    """Token t of sample i has the id 10 i + t; its top-K ids are 100 id + rank, likeliest first."""
    random = np.random.Generator(np.random.PCG64(1))
    rows: dict[str, list] = {"rollouts": [], "sampled": [], "teacher_topk": [], "student_topk": [], "mask": []}
    for index, length in enumerate(lengths):
        completion = [10 * index + t for t in range(length)]
        name = f"p{index}/1/0"
        values = {
            "student_logprobs": [-float(i) for i in completion],
            "teacher_logprobs": [-0.5 * i for i in completion],
            "student_entropy": [1.0] * length,
            "teacher_entropy": [2.0] * length,
        }
        fixed = {"sample_index": 0, "behaviour": "student", "prefix_length": 0, "finish_reason": "stop", "seed": 0}
        lists = {
            "prompt_token_ids": [1] * (index + 1),
            "completion_token_ids": completion,
            "sampling_logprobs": [-1.0] * length,
        }
        rows["rollouts"].append(fixed | lists | {"sample_id": name, "prompt_id": f"p{index}", "completion_text": ""})
        rows["sampled"].append({"sample_id": name} | values)
        mass = random.dirichlet(np.ones(k + 5), size=length)
        mass[:, :k] = -np.sort(-mass[:, :k], axis=1)
        ids = [[100 * token + rank for rank in range(k)] for token in completion]
        shared = {"sample_id": name, "valid": [k] * length}
        top, tail = np.log(mass[:, :k]).tolist(), np.log(mass[:, k:].sum(axis=1)).tolist()
        rows["teacher_topk"].append(shared | {"ids": ids, "logprobs": top, "tail_logmass": tail})
        shifted = [[i + 2 for i in row] for row in ids]
        both = {"student_logprobs": top, "teacher_logprobs": np.log(mass[:, :k] * 0.01).tolist()}
        tails = {"student_tail_logmass": tail, "teacher_tail_logmass": tail}
        rows["student_topk"].append(shared | {"ids": shifted} | both | tails)
        rows["mask"].append({"sample_id": name, "mask_reasons": [0] * length})
    made = {name: pa.Table.from_pylist(found, schema_for(name)) for name, found in rows.items()}
    return made.pop("rollouts"), made


def needs(kind: str = "teacher_topk", k: int = 4) -> DirectConfig:
    return DirectConfig(support=TopkSupport(kind=kind, k=k)).needs()


def replaced(table: pa.Table, column: str, values: list) -> pa.Table:
    rows = table.to_pylist()
    for row, value in zip(rows, values, strict=True):
        row[column] = value
    return pa.Table.from_pylist(rows, table.schema)


def test_tokens_stand_with_their_signals_and_hidden_states() -> None:
    rollouts, signals = tables()
    signals["sampled"] = signals["sampled"].take([2, 0, 1])  # joined by sample_id, not by place
    masks = [[0, 1, 0], [16], [2, 0]]
    signals["mask"] = replaced(signals["mask"], "mask_reasons", masks)
    samples = from_rollouts(rollouts, signals, needs(), SPECIAL)
    rows = (2, 0, 1)
    batch = forward_batch(samples, rows, loss_denominators(samples, rows, "token", None), (0, 1, 2), False, CPU)
    tokens = batch.tokens
    assert tokens.token_ids_N.tolist() == [20, 21, 0, 2], "masked: 1 special, 16 invalid; 2 truncated is no reason here"
    assert tokens.student_logprobs_N.tolist() == [-20.0, -21.0, 0.0, -2.0]
    assert tokens.sample_N.tolist() == [0, 0, 1, 1] and tokens.position_N.tolist() == [0, 1, 0, 2]
    assert tokens.support_ids_NK[:, 0].tolist() == [2000, 2100, 0, 200]
    assert batch.weight_N.tolist() == [0.25] * 4
    # the hidden state before each token: prompts of 3, 1 and 2 tokens, forward length 4
    assert batch.input_ids_BT.tolist() == [[1, 1, 1, 20], [1, 0, 1, 0], [1, 1, 0, 0]]
    assert batch.hidden_index_N.tolist() == [2, 3, 4 + 0, 4 + 2]


def test_weights_of_the_three_normalisations() -> None:
    rollouts, signals = tables([3, 1, 2, 2])
    signals["mask"] = replaced(signals["mask"], "mask_reasons", [[0, 1, 0], [0], [1, 1], [0, 0]])
    samples = from_rollouts(rollouts, signals, needs(), SPECIAL)
    rows = (3, 1, 0, 2)  # with 2, 1, 2 and 0 tokens left
    assert loss_denominators(samples, rows, "token", None).tolist() == [1 / 5] * 4
    assert loss_denominators(samples, rows, "sequence", None).tolist()[:3] == [1 / 6, 1 / 3, 1 / 6]
    assert loss_denominators(samples, rows, "constant", 10).tolist() == [1 / 40] * 4
    with pytest.raises(ConfigError, match="normalisation"):
        loss_denominators(samples, rows, "constant", None)


def test_fillers_and_empty_batches_count_for_nothing() -> None:
    rollouts, signals = tables([2, 2])
    signals["mask"] = replaced(signals["mask"], "mask_reasons", [[16, 16], [0, 0]])
    topk = signals["teacher_topk"]
    signals["teacher_topk"] = replaced(topk, "tail_logmass", [[float("nan")] * 2, topk["tail_logmass"][1].as_py()])
    samples = from_rollouts(rollouts, signals, needs(), SPECIAL)
    weights = loss_denominators(samples, (0, 1), "token", None)
    for places, filler in (((0,), False), ((1,), True)):
        batch = forward_batch(samples, (0, 1), weights, places, filler, CPU)
        assert batch.tokens.loss_mask_N.tolist() == [0.0] and batch.weight_N.tolist() == [0.0]
        finite = (batch.tokens.teacher_tail_logmass_N, batch.tokens.teacher_support_logprobs_NK)
        assert all(values.isfinite().all() for values in finite)


def test_a_smaller_k_is_a_slice_with_the_rest_in_the_tail() -> None:
    rollouts, signals = tables()
    wide, narrow = (from_rollouts(rollouts, signals, needs(k=k), SPECIAL).support for k in (4, 2))
    index = np.arange(6)
    all_of_it, sliced = wide.rows(index), narrow.rows(index)
    assert (sliced.ids_NK == all_of_it.ids_NK[:, :2]).all() and (sliced.valid_N == 2).all()
    mass = np.exp(sliced.teacher_NK).sum(1) + np.exp(sliced.teacher_tail_N)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-6)


def test_lists_shorter_than_k_are_padded() -> None:
    entries = np.array([7, 8, 9]), np.array([-1.0, -2.0, -0.5], np.float32)
    found = TopK(2, np.array([0, 2]), np.array([2, 1]), *entries, None, np.array([-3.0, -4.0])).rows(np.array([1, 0]))
    assert found.ids_NK.tolist() == [[9, 0], [7, 8]] and found.valid_N.tolist() == [1, 2]
    assert found.teacher_NK.tolist() == [[-0.5, -np.inf], [-1.0, -2.0]]


def test_a_union_holds_both_lists_once_and_keeps_the_mass() -> None:
    teacher = TopK(2, np.array([0]), np.array([2]), np.array([5, 6]), np.log([0.5, 0.2]), None, np.log([0.3]))
    student = TopK(
        2, np.array([0]), np.array([2]), np.array([6, 9]), np.log([0.2, 0.1]), np.log([0.6, 0.3]), np.log([0.7])
    )
    found = UnionTopK(teacher, student).rows(np.array([0]))
    assert found.ids_NK.tolist() == [[5, 6, 9, 0]] and found.valid_N.tolist() == [3]
    assert found.teacher_valid_N.tolist() == [2]  # the front is the teacher's own list
    np.testing.assert_allclose(np.exp(found.teacher_NK[0]), [0.5, 0.2, 0.1, 0.0], rtol=1e-6)
    np.testing.assert_allclose(np.exp(found.teacher_tail_N), [0.2], rtol=1e-6)


def test_union_support_needs_both_signals() -> None:
    rollouts, signals = tables()
    samples = from_rollouts(rollouts, signals, needs("union"), SPECIAL)
    assert samples.support.rows(np.arange(6)).valid_N.tolist() == [6] * 6  # ids 0..3 and 2..5
    weights = loss_denominators(samples, (0, 1), "token", None)
    batches = [forward_batch(samples, (0, 1), weights, (0, 1), filler, CPU).tokens for filler in (False, True)]
    assert set(batches[0].support_teacher_valid_N.tolist()) == {4}
    assert batches[1].support_teacher_valid_N.tolist() == [1]  # every micro-batch has the same metrics
    del signals["student_topk"]
    with pytest.raises(InputError, match="'student_topk'"):
        from_rollouts(rollouts, signals, needs("union"), SPECIAL)


@pytest.mark.parametrize(
    ("signal", "change", "named"),
    [
        ("sampled", lambda t: t.slice(1), "p0/1/0"),
        ("sampled", lambda t: pa.concat_tables([t, t.slice(0, 1)]), "sampled: sample 'p0/1/0' is there 2 times"),
        ("sampled", lambda t: replaced(t, "teacher_logprobs", [[-1.0] * 3, [-1.0] * 2, [-1.0] * 2]), "'p1/1/0' has 2"),
        ("mask", lambda t: replaced(t, "mask_reasons", [[0] * 3, [], [0] * 2]), "mask.mask_reasons"),
        ("teacher_topk", lambda t: replaced(t, "tail_logmass", [[-1.0] * 2, [-1.0], [-1.0] * 2]), "tail_logmass"),
        ("teacher_topk", lambda t: replaced(t, "logprobs", [[[-1.0]] * 3, [[-1.0]], [[-1.0]] * 2]), "as long as"),
    ],
)
def test_lengths_that_disagree_are_refused(signal: str, change, named: str) -> None:
    rollouts, signals = tables()
    signals[signal] = change(signals[signal])
    with pytest.raises(InputError, match=named):
        from_rollouts(rollouts, signals, needs(), SPECIAL)


@pytest.mark.parametrize("rows", [[0, 0, 1], [0, 1, 2, 0]], ids=["in the place of another", "one too many"])
def test_a_rollout_that_is_there_twice_is_refused_by_name(rows: list[int]) -> None:
    """Also where the number of rows is right, and by an objective that reads no signal."""
    rollouts, signals = tables()
    for given, wanted in ((signals, needs()), ({}, SftConfig().needs())):
        with pytest.raises(InputError, match=r"rollouts: sample 'p0/1/0' is there 2 times \(1 rows too many\)"):
            from_rollouts(rollouts.take(rows), given, wanted, SPECIAL)


def test_more_candidates_than_stored_are_refused() -> None:
    rollouts, signals = tables()
    with pytest.raises(InputError, match=r"K=8.*4 entries"):
        from_rollouts(rollouts, signals, needs(k=8), SPECIAL)


def credited(**fields: object) -> Needs:
    return replace(PolicyGradientConfig().needs(), credit=CreditNeeds(**fields))


def judged(
    lengths: list[int], prompts: list[str], rewards: list[float | None]
) -> tuple[pa.Table, dict[str, pa.Table], pa.Table]:
    """Rollouts, signals, and rewards in another order."""
    rollouts, signals = tables(lengths)
    rows = [
        {"sample_id": name, "reward": r} for name, r in zip(rollouts["sample_id"].to_pylist(), rewards, strict=True)
    ]
    return (
        replaced(rollouts, "prompt_id", prompts),
        signals,
        pa.Table.from_pylist(rows[::-1], schema_for("rewards")),
    )


def test_a_credit_gets_rewards_groups_and_segments_and_nothing_unasked() -> None:
    """A group's rewards are those of the round, also of samples that are in no micro-batch of this one."""
    rollouts, signals, rewards = judged([3, 1, 2], ["b", "a", "b"], [1.0, 0.5, -2.0])
    needs = credited(reward=True, groups=True, segment_ends=(0, 20))
    samples = from_rollouts(rollouts, signals, needs, SPECIAL, rewards=rewards)
    rows = (2, 1, 0)
    weights = loss_denominators(samples, rows, "token", None)
    tokens = forward_batch(samples, rows, weights, (2, 0), False, CPU).tokens
    assert tokens.token_ids_N.tolist() == [0, 1, 2, 20, 21]
    assert tokens.reward_N.tolist() == [1.0] * 3 + [-2.0] * 2
    assert tokens.group_N.tolist() == [0] * 5 and samples.groups.tolist() == [0, 1, 0]
    assert tokens.group_rewards_NG.tolist() == [[1.0, -2.0]] * 5
    assert tokens.segment_N.tolist() == [0, 1, 1, 0, 1], "an end belongs to its segment"
    alone = forward_batch(samples, rows, weights, (1,), True, CPU).tokens  # a filler
    assert alone.reward_N.tolist() == [0.5] and alone.loss_mask_N.tolist() == [0.0]
    assert alone.group_rewards_NG[0, 0] == 0.5 and alone.group_rewards_NG[0, 1].isnan()
    plain = from_rollouts(rollouts, signals, credited(), SPECIAL, rewards=rewards)
    none = forward_batch(plain, rows, weights, (2, 0), False, CPU).tokens
    assert (none.reward_N, none.group_N, none.group_rewards_NG, none.segment_N) == (None,) * 4


def test_a_reward_at_the_threshold_is_correct_in_training_as_it_is_for_siblings() -> None:
    """0.7 rounded to float32 is less than 0.7; the stage `context` compares the stored number."""
    rollouts, signals, rewards = judged([3, 1, 2], ["a", "a", "a"], [0.7, 0.9, 0.0])
    group = {"kind": "group", "success_threshold": 0.7}
    config = CreditConfig.model_validate({"reward": group, "scale": "rlrt"})
    samples = from_rollouts(rollouts, signals, config.needs(), SPECIAL, rewards=rewards)
    planned = Planner(config, samples, {})((0, 1, 2), 0)
    assert (planned.columns["scale_share"] > 0).tolist() == [True] * 4 + [False] * 2
    weights = loss_denominators(samples, (0, 1, 2), "token", None)
    tokens = forward_batch(samples, (0, 1, 2), weights, (0,), False, CPU).tokens
    assert tokens.reward_N.dtype == tokens.group_rewards_NG.dtype == torch.float32


@pytest.mark.parametrize("left_out", [True, False])
def test_statistics_of_log_ratios_leave_out_what_the_teacher_reads_otherwise(left_out: bool) -> None:
    """An unmapped token's log-ratio is that of two different tokens; special and truncated ones have a log-ratio of their own."""
    rollouts, signals = tables([4])
    marks = [MaskReason(0), MaskReason.UNMAPPED, MaskReason.SPECIAL_TOKEN, MaskReason.INVALID_VALUE]
    signals["mask"] = replaced(signals["mask"], "mask_reasons", [[int(mark) for mark in marks]])
    config = CreditConfig.model_validate({"add": "sod"})
    reasons = [*SPECIAL, *([MaskReason.UNMAPPED] if left_out else [])]
    samples = from_rollouts(rollouts, signals, config.needs(), reasons)
    assert samples.valid.tolist() == [True, not left_out, True, False]
    assert samples.keep.tolist() == [True, not left_out, False, False]


def test_a_sample_whose_judge_failed_has_no_number_and_stays_in_its_group() -> None:
    rollouts, signals, rewards = judged([3, 1, 2], ["a", "a", "b"], [1.0, None, None])
    samples = from_rollouts(rollouts, signals, credited(reward=True, groups=True), SPECIAL, rewards=rewards)
    assert np.array_equal(samples.rewards, np.array([1.0, np.nan, np.nan]), equal_nan=True)
    assert np.isnan(samples.group_rewards).tolist() == [[False, True], [False, True], [True, True]]


@pytest.mark.parametrize(
    ("rewards", "found"),
    [
        ([1.0, 0.0, float("nan")], "sample 'p2/1/0' has the reward nan"),
        ([float("inf"), 0.0, 1.0], "sample 'p0/1/0' has the reward inf"),
        (None, "needs the rewards of the stage `judge`"),
    ],
)
def test_rewards_that_are_missing_or_not_finite_are_refused_where_they_are_needed(
    rewards: list[float | None] | None, found: str
) -> None:
    rollouts, signals, table = judged([3, 1, 2], ["a", "a", "b"], rewards or [0.0] * 3)
    assert len(from_rollouts(rollouts, signals, credited(groups=True), SPECIAL)) == 3
    with pytest.raises(InputError, match=found):
        from_rollouts(rollouts, signals, credited(reward=True), SPECIAL, rewards=table if rewards else None)


def test_rewards_of_other_samples_are_refused() -> None:
    rollouts, signals, rewards = judged([3, 1, 2], ["a", "a", "b"], [1.0, 0.0, 1.0])
    with pytest.raises(InputError, match=r"rewards.*'p0/1/0'"):
        from_rollouts(rollouts, signals, credited(reward=True), SPECIAL, rewards=rewards.slice(0, 2))


@pytest.mark.parametrize("name", ["teacher_entropy", "student_entropy"])
def test_entropies_that_were_not_stored_are_refused_where_a_credit_needs_them(name: str) -> None:
    rollouts, signals = tables()
    signals["sampled"] = replaced(signals["sampled"], name, [None] * 3)
    assert len(from_rollouts(rollouts, signals, credited(), SPECIAL)) == 3
    with pytest.raises(InputError, match=f"sampled.{name}"):
        from_rollouts(rollouts, signals, credited(**{name: True}), SPECIAL)


def test_deepspeed_file_decides_zero_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    settings = OptimizerSettings(lr=0.1, dtype="bfloat16", max_grad_norm=2.0)
    file.write_text('{"zero_optimization": {"stage": 2}}')
    made = deepspeed_config(str(file), settings, 1000)
    assert made["zero_optimization"]["stage"] == 2 and made["gradient_clipping"] == 2.0
    assert made["data_types"]["grad_accum_dtype"] == "fp32"
    for text, named in (
        ('{"optimizer": {}}', "train.lr"),
        ("{", "JSON"),
        ('{"zero_optimization": {"stage": 4}}', "stage"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=named):
            deepspeed_config(str(file), settings, 1000)


def loaded(masks: list[list[int]], broken_lists: bool = False) -> Samples:
    rollouts, signals = tables([len(reasons) for reasons in masks])
    signals["mask"] = replaced(signals["mask"], "mask_reasons", masks)
    if broken_lists:
        rows = signals["teacher_topk"].to_pylist()
        for row in rows[:2]:
            length = len(row["valid"])
            row |= {"valid": [0] * length, "ids": [[]] * length, "logprobs": [[]] * length}
            row["tail_logmass"] = [math.nan] * length
        signals["teacher_topk"] = pa.Table.from_pylist(rows, signals["teacher_topk"].schema)
    return from_rollouts(rollouts, signals, needs(), SPECIAL)


@pytest.mark.parametrize(
    ("masks", "lost", "refused"),
    [
        ([[16, 16], [16]], [2, 1], True),  # a broken teacher
        ([[1, 16], [1]], [1, 0], True),  # the data mask the rest
        ([[16, 16], [0]], [2, 0], False),  # one token is left
        ([[1, 1], [1]], [0, 0], False),  # the data say so
        ([[17, 1], [1]], [0, 0], False),  # masked in any case
    ],
)
def test_a_step_is_refused_where_invalid_values_leave_it_nothing(masks, lost, refused) -> None:
    samples = loaded(masks)
    assert samples.lost.tolist() == lost
    whole, other = Step((0, 1), 0), loaded([*masks, [0]])
    if refused:
        with pytest.raises(InputError, match="step 1 of round 3"):
            refuse_lost_steps(samples, [whole], 3)
        with pytest.raises(InputError, match="step 2 of round 3"):
            refuse_lost_steps(other, [Step((2,), 0), whole], 3)
    else:
        refuse_lost_steps(samples, [whole], 3)
    refuse_lost_steps(other, [Step((0, 1, 2), 0)], 3)


def test_lists_without_usable_numbers_count_as_lost() -> None:
    samples = loaded([[0, 0], [1], [0]], broken_lists=True)
    assert samples.lost.tolist() == [2, 0, 0] and samples.kept.tolist() == [0, 0, 1]
    with pytest.raises(InputError):
        refuse_lost_steps(samples, [Step((1, 0), 0)], 1)
