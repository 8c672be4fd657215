"""What must not reach a gradient is refused by sample and column; what is legitimate, or masked, passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from clean_round import NAMES, ROWS, K, Rows, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_round import from_rollouts

from storage.artifacts.packed import unpack
from storage.errors import InputError
from storage.schemas import MaskReason, schema_for
from tasks.losses.config import DirectConfig, FullSupport, TopkSupport
from tasks.signals import SIGNALS, Shard
from tasks.trainer.checks import Lists, Tokens, check_lists, mass_limit
from tasks.trainer.data import Samples, from_prompts

INVALID = int(MaskReason.INVALID_VALUE)
NAN, INF = math.nan, math.inf


def load(made: Rows, kind: str = "union", k: int = K, known: int | None = ROWS) -> Samples:
    support = FullSupport(k=k) if kind == "full" else TopkSupport(kind=kind, k=k)
    tables = {name: pa.Table.from_pylist(made[name], schema_for(name)) for name in NAMES}
    needs = DirectConfig(support=support).needs()
    return from_rollouts(tables.pop("rollouts"), tables, needs, [MaskReason.SPECIAL_TOKEN], rows=known)


def put(made: Rows, path: str, value: Any) -> None:
    """Sets `table.column` of the third sample's second token, or with `[i]` entry i of that token's list."""
    table, _, column = path.partition(".")
    column, _, entry = column.rstrip("]").partition("[")
    cell = made[table][2][column]
    if entry:
        cell[1][int(entry)] = value
    else:
        cell[1] = value


LOGPROBS = ("rollouts.sampling_logprobs", "sampled.student_logprobs", "sampled.teacher_logprobs",
            "sampled.behaviour_logprobs")  # fmt: skip
ENTROPIES = ("sampled.student_entropy", "sampled.teacher_entropy")
TAILS = ("teacher_topk.tail_logmass", "student_topk.student_tail_logmass", "student_topk.teacher_tail_logmass")
ENTRIES = ("teacher_topk.logprobs[0]", "student_topk.student_logprobs[2]", "student_topk.teacher_logprobs[3]")
IDS = ("teacher_topk.ids[3]", "student_topk.ids[0]")
BAD: list[tuple[str, Any, str]] = [
    *((path, value, f"found {value}") for path in LOGPROBS for value in (NAN, INF, -INF, 0.01)),
    *((path, value, f"found {value}") for path in ENTROPIES for value in (NAN, INF, -INF, -0.5)),
    *((path, value, f"found {value}") for path in TAILS for value in (NAN, INF, 0.01)),
    *((path, value, f"found {value} at entry") for path in ENTRIES for value in (NAN, INF, 0.01)),
    *((path, value, f"found {value}; ids are from 0 to 15") for path in IDS for value in (-1, ROWS, 10**6)),
    ("rollouts.completion_token_ids", -1, "found -1; ids are from 0 to 15"),
    ("rollouts.completion_token_ids", ROWS, "found 16; ids are from 0 to 15"),
    ("rollouts.prompt_token_ids", ROWS, "found 16; ids are from 0 to 15"),
    ("teacher_topk.logprobs[1]", -9.0, "sorted, likeliest first"),
    ("student_topk.student_logprobs[0]", -9.0, "sorted, likeliest first"),
    ("teacher_topk.valid", K + 1, "found 5 for a list of 4 entries"),
    ("student_topk.valid", -1, "found -1 for a list of 4 entries"),
]


@pytest.mark.parametrize(("path", "value", "says"), BAD)
def test_a_bad_value_is_refused_by_sample_column_and_token(path: str, value: Any, says: str) -> None:
    made = rows()
    put(made, path, value)
    with pytest.raises(InputError) as caught:
        load(made)
    message, column = str(caught.value), path.partition("[")[0]
    assert message.startswith(f"{column}: sample 'p2/1/0', token 1: ") and says in message
    if "token_ids" not in path:
        assert "score it again" in message


@pytest.mark.parametrize("path", [*TAILS, "student_topk.teacher_logprobs[1]"])
def test_more_than_probability_1_is_refused(path: str) -> None:
    made = rows()
    put(made, path, 0.0)
    column = path.partition("[")[0].replace("tail_logmass", "logprobs")
    with pytest.raises(InputError, match=rf"^{column}: sample 'p2/1/0', token 1: found a mass of 1\.\d+; .*at most"):
        load(made)


@pytest.mark.parametrize("path", [path for path, value, _ in BAD if value is NAN] + ["teacher_topk.valid"])
def test_an_invalid_token_is_left_out_counted_and_its_neighbours_stay(path: str) -> None:
    made = rows()
    put(made, path, 99 if path.endswith("valid") else NAN)
    made["mask"][2]["mask_reasons"][1] = INVALID
    samples = load(made)
    assert samples.invalid == 1 and samples.keep.tolist() == [True] * 5 + [False]
    clean = load(rows())
    assert clean.invalid == 0 and clean.keep.all()
    index = np.arange(5)
    found, expected = (vars(each.support.rows(index)) for each in (samples, clean))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("path", ["teacher_topk.valid", "student_topk.valid"])
def test_a_token_whose_list_is_empty_is_left_out_and_counted(path: str) -> None:
    made = rows()
    put(made, path, 0)
    samples = load(made)
    assert samples.invalid == 1 and samples.keep.tolist() == [True] * 5 + [False]


def test_other_masked_tokens_are_not_counted_as_invalid() -> None:
    made = rows()
    made["mask"][0]["mask_reasons"] = [int(MaskReason.SPECIAL_TOKEN), 0, INVALID]
    put(made, "sampled.teacher_logprobs", NAN)
    made["mask"][2]["mask_reasons"][1] = int(MaskReason.SPECIAL_TOKEN)
    samples = load(made)
    assert samples.invalid == 1 and samples.keep.tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize("column", ["logprobs", "ids"])
def test_lists_of_unequal_length_are_refused(column: str) -> None:
    made = rows()
    made["teacher_topk"][2][column][1].pop()
    made["teacher_topk"][2]["valid"][1] = 3
    with pytest.raises(InputError, match=r"teacher_topk.logprobs: sample 'p2/1/0', token 1: found .* as long as"):
        load(made)


def test_lists_that_are_cut_at_other_samples_are_refused() -> None:
    """The same lists in the same order, but the first sample's last one stands with the second sample."""
    made = rows()
    made["teacher_topk"][1]["logprobs"].insert(0, made["teacher_topk"][0]["logprobs"].pop())
    with pytest.raises(InputError, match=r"teacher_topk.logprobs: sample 'p0/1/0' has 2 values for 3"):
        load(made)


def test_an_id_that_a_list_holds_twice_is_refused() -> None:
    made = rows()
    ids = made["student_topk"][2]["ids"][1]
    ids[3] = ids[1]
    with pytest.raises(InputError, match=rf"student_topk.ids: sample 'p2/1/0', token 1: found {ids[1]}; .*unique"):
        load(made)


def test_every_such_token_is_counted_in_the_message() -> None:
    made = rows()
    made["sampled"][0]["teacher_logprobs"] = [NAN] * 3
    put(made, "sampled.teacher_logprobs", NAN)
    with pytest.raises(InputError, match=r"sample 'p0/1/0', token 0: found nan .and 3 more such tokens"):
        load(made)


def test_no_probability_and_rounding_are_legitimate() -> None:
    made = rows()
    put(made, "teacher_topk.logprobs[3]", -INF)
    put(made, "student_topk.teacher_logprobs[0]", -INF)
    put(made, "teacher_topk.tail_logmass", -INF)
    put(made, "sampled.teacher_logprobs", 1e-6)
    put(made, "sampled.teacher_entropy", -1e-6)
    assert load(made).keep.all()


def test_ids_are_not_bounded_above_where_the_vocabulary_is_not_known() -> None:
    made = rows()
    put(made, "teacher_topk.ids[3]", 999)
    assert load(made, known=None).keep.all()
    put(made, "teacher_topk.ids[3]", -1)
    with pytest.raises(InputError, match="found -1; ids are not negative"):
        load(made, known=None)


def test_ids_of_a_warm_up_lie_in_the_vocabulary() -> None:
    row = {"prompt_id": "w", "split": "warmup", "text": "", "token_ids": [1, 2], "completion_token_ids": [3, 9]}
    table = pa.Table.from_pylist([row], schema_for("prompts"))
    assert len(from_prompts(table, 10)) == 1
    for column, bad in (("completion_token_ids", [3, 10]), ("token_ids", [1, -1])):
        table = pa.Table.from_pylist([row | {column: bad}], schema_for("prompts"))
        with pytest.raises(InputError, match=rf"prompts.{column}: sample 'w', token 1: found {bad[1]}"):
            from_prompts(table, 10)


def test_full_support_means_every_id_of_the_student() -> None:
    made = rows()
    with pytest.raises(InputError, match=r"k is 4 and the student has 16 rows; set k: 16"):
        load(made, "full")
    for sample in made["teacher_topk"]:  # a teacher of four rows: nothing lies outside of its lists
        sample["logprobs"] = [np.log([0.4, 0.3, 0.2, 0.1]).tolist() for _ in sample["valid"]]
        sample["tail_logmass"] = [-INF for _ in sample["valid"]]
    assert load(made, "full").keep.all()
    with pytest.raises(InputError, match="k is 3"):
        load(made, "full", k=3)


# --- by hypothesis ---------------------------------------------------------------------------------------------------


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, int, str]:
    """(log-probabilities (T, V) of some distributions, k, encoding)."""
    random = np.random.Generator(np.random.PCG64(draw(st.integers(0, 10**6))))
    vocabulary = draw(st.sampled_from([2, 8, 40, 1000]))
    logits = random.standard_normal((draw(st.integers(1, 9)), vocabulary)) * draw(
        st.sampled_from([0.0, 1.0, 9.0, 60.0])
    )
    logits[random.random(logits.shape) < draw(st.sampled_from([0.0, 0.3]))] = -INF
    logits[:, 0] = 0.0
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logprobs, draw(st.integers(1, vocabulary)), draw(st.sampled_from(["exact", "compact", "packed"]))


def lists_of(logprobs: np.ndarray, k: int, encoding: str) -> tuple[Tokens, Lists]:
    """The teacher's top k as the scorer hands it over and as it is stored."""
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    top = np.take_along_axis(logprobs, ids, axis=1)
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -INF, axis=1)
    valid = np.isfinite(top).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(rest).sum(axis=1))
    quantities = {"ids": ids, "logprobs": top, "valid": valid, "tail": tail}
    values = {f"teacher_top{k}_{name}": [array] for name, array in quantities.items()}
    rollouts = pa.table({"sample_id": ["s"], "completion_token_ids": [[0] * len(logprobs)]})
    made = SIGNALS["teacher_topk"].table(Shard(rollouts, values, k, encoding))
    (row,) = (
        unpack(made, schema_for("teacher_topk").names, made.column_names) if encoding == "packed" else made
    ).to_pylist()
    flat = {name: np.concatenate([np.array(cell) for cell in row[name]]) for name in ("ids", "logprobs")}
    counts = np.array(row["valid"])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    tokens = Tokens(["s"], np.array([0, len(logprobs)]), np.ones(len(logprobs), bool))
    tails = {"tail_logmass": np.array(row["tail_logmass"], np.float32)}
    listed = {"logprobs": flat["logprobs"].astype(np.float32)}
    return tokens, Lists("teacher_topk", starts, counts, flat["ids"].astype(np.int64), listed, tails)


@settings(max_examples=150, deadline=None)
@given(scored())
def test_what_a_scorer_makes_of_a_distribution_passes_in_every_encoding(case) -> None:
    logprobs, k, encoding = case
    tokens, lists = lists_of(logprobs, k, encoding)
    check_lists(tokens, lists, logprobs.shape[1])


@settings(max_examples=100, deadline=None)
@given(scored(), st.sampled_from(["nan", "inf", "above", "unsorted", "twice", "outside", "mass"]), st.data())
def test_one_bad_entry_anywhere_is_found_and_named(case, fault: str, data) -> None:
    logprobs, k, encoding = case
    tokens, lists = lists_of(logprobs, k, encoding)
    several = np.flatnonzero(lists.counts > (1 if fault in ("unsorted", "twice") else 0))
    if not len(several):
        return
    token = int(data.draw(st.sampled_from(several.tolist())))
    start, count = int(lists.starts[token]), int(lists.counts[token])
    entry = start + data.draw(st.integers(0, count - 1))
    values, ids = lists.logprobs["logprobs"], lists.ids
    match fault:
        case "nan" | "inf" | "above":
            values[entry] = {"nan": NAN, "inf": INF, "above": 0.002}[fault]
        case "unsorted":
            values[start] = values[start + count - 1] - 1
        case "twice":
            ids[start] = ids[start + count - 1]
        case "outside":
            ids[entry] = data.draw(st.sampled_from([-1, logprobs.shape[1]]))
        case "mass":
            lists.tails["tail_logmass"][token] = 0.0
            values[start] = 0.0
    with pytest.raises(InputError, match=rf"^teacher_topk\.(logprobs|ids): sample 's', token {token}: "):
        check_lists(tokens, lists, logprobs.shape[1])
    tokens.counted[token] = False
    check_lists(tokens, lists, logprobs.shape[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 20))
def test_the_limit_of_a_mass_bounds_what_float16_can_add(k: int, scale: float) -> None:
    random = np.random.Generator(np.random.PCG64(k))
    logits = random.standard_normal(k + 1) * scale
    exact = logits - np.logaddexp.reduce(logits)
    # the worst rounding there is: every number moves up by half a unit in its last place
    assert np.exp(exact * (1 - 2.0**-11)).sum() <= mass_limit(exact[:k].astype(np.float16).astype(np.float32), k)
    assert mass_limit(np.array([-0.1, -0.7], np.float32), k) == math.exp(1e-3)


def test_a_list_so_long_that_it_is_looked_at_in_pieces() -> None:
    tokens = 40_000
    lists = Lists(
        "teacher_topk",
        np.arange(tokens) * 32,
        np.full(tokens, 32),
        np.tile(np.arange(32), tokens),
        {"logprobs": np.full(tokens * 32, -4.0, np.float32)},
        {"tail_logmass": np.full(tokens, -INF, np.float32)},
    )
    where = Tokens([f"s{i}" for i in range(40)], np.arange(41) * 1000, np.ones(tokens, bool))
    check_lists(where, lists, 32)
    lists.ids[39_999 * 32 + 5] = 7
    with pytest.raises(InputError, match=r"teacher_topk\.ids: sample 's39', token 999: found 7"):
        check_lists(where, lists, 32)
