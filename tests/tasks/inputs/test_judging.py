"""What a judge's config refuses, and what a verifier may return."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import PLUGINS
from pydantic import ValidationError

from storage.errors import ConfigError
from storage.identity import canonical_json
from tasks.inputs.judging import (
    JudgeConfig,
    JudgeFunction,
    Outcome,
    Unusable,
    given_to,
    outcome_of,
    summed,
)

EXACT = {"kind": "exact_match"}


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGINS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"verifiers": []}, "verifiers"),
        ({"verifiers": [EXACT | {"weight": -0.5}]}, "weight"),
        ({"verifiers": [EXACT | {"weight": 0}]}, "every weight is 0"),
        ({"verifiers": [EXACT, EXACT | {"extract": "x"}]}, "two are called 'exact_match'"),
        ({"verifiers": [EXACT | {"name": "a"}, {"kind": "math_verify", "name": "a"}]}, "two are called 'a'"),
        ({"verifiers": [EXACT | {"name": "a/b"}]}, "name"),
        ({"verifiers": [EXACT], "timeout": 0}, "timeout"),
        ({"verifiers": [{"kind": "guess"}]}, "guess"),
        ({"verifiers": [{"kind": "function", "target": "no colon"}]}, "target"),
        ({"verifier": EXACT}, "verifier"),
    ],
)
def test_bad_configs_are_refused_when_loaded(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JudgeConfig.model_validate(fields)


def test_names_and_one_key_per_meaning() -> None:
    function = {"kind": "function", "target": "judges:longer"}
    config = JudgeConfig.model_validate({"verifiers": [EXACT, {"kind": "math_verify", "name": "maths"}, function]})
    assert config.names == ["exact_match", "maths", "judges:longer"]
    first, second = (
        JudgeConfig.model_validate({"verifiers": [EXACT | {"weight": weight}], "timeout": timeout})
        for weight, timeout in ((1, 10), (1.0, 10.0))
    )
    assert canonical_json(first) == canonical_json(second)


def test_a_function_gets_what_it_has_parameters_for(judges: None) -> None:
    takes = {name: given_to(JudgeFunction(target=f"judges:{name}")) for name in ("longer", "graded")}
    assert takes == {"longer": (), "graded": ("prompt", "token_ids", "tokens")}
    for name, message in (
        ("one_argument", "takes 1 positional"),
        ("needs_more", "needs the parameter 'rubric'"),
        ("nowhere", "has no function 'nowhere'"),
    ):
        with pytest.raises(ConfigError, match=message):
            given_to(JudgeFunction(target=f"judges:{name}"))


def test_a_function_of_any_keywords_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keyword_judge.py").write_text("def score(completion, answer, **more): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert given_to(JudgeFunction(target="keyword_judge:score")) == ("prompt", "token_ids", "tokens")
    sys.modules.pop("keyword_judge", None)


@pytest.mark.parametrize(
    ("found", "reward"),
    [
        (True, 1.0),
        (0, 0.0),
        (-2.5, -2.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.int64(3), 3.0),
        (Fraction(1, 4), 0.25),
        ({"reward": False}, 0.0),
    ],
)
def test_numbers_that_are_rewards(found: object, reward: float) -> None:
    assert outcome_of(found, 3) == Outcome(reward)


def test_everything_that_a_dict_may_hold() -> None:
    found = {"reward": 1, "feedback": "fine", "segments": [1, np.int64(3)], "spans": [(0, 2, "key"), [1, 3, "error"]]}
    assert outcome_of(found, 3) == Outcome(1.0, "fine", (1, 3), ((0, 2, "key"), (1, 3, "error")))
    nothing = {"reward": 1, "feedback": None, "segments": None, "spans": None}
    assert outcome_of(nothing, 3) == Outcome(1.0)
    assert outcome_of({"reward": 1, "segments": [], "spans": []}, 0) == Outcome(1.0, None, (), ())


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "lack a return"),
        ("1", r"a dict, found '1' \(str\)"),
        (float("nan"), "nan, no finite"),
        ({"reward": -np.inf}, "-inf, no finite"),
        (10**400, "too large"),
        ([1.0], "list"),
        (1j, "complex"),
        ({}, "no 'reward'"),
        ({"reward": None}, "'reward' must be"),
        ({"reward": 1, "score": 1}, "'score' is none of"),
        ({"reward": 1, "feedback": ["x"]}, "'feedback' must be a text"),
        ({"reward": 1, "feedback": "\ud800"}, "no valid Unicode"),
        ({"reward": 1, "segments": 3}, "list of ends"),
        ({"reward": 1, "segments": [0, 2]}, "0 is not after 0"),
        ({"reward": 1, "segments": [2, 1]}, "1 is not after 2"),
        ({"reward": 1, "segments": [1, 4]}, "4 is past the completion of 3 tokens"),
        ({"reward": 1, "segments": [1.5]}, "no place in tokens"),
        ({"reward": 1, "segments": [True]}, "no place in tokens"),
        ({"reward": 1, "spans": [(0, 4, "a")]}, r"\(0, 4\) is past the completion of 3 tokens"),
        ({"reward": 1, "spans": [(2, 2, "a")]}, "holds no token"),
        ({"reward": 1, "spans": [(-1, 2, "a")]}, "holds no token"),
        ({"reward": 1, "spans": [(0, 1)]}, "must be .start, end, kind."),
        ({"reward": 1, "spans": [(0, 1, 2)]}, "must be .start, end, kind."),
        ({"reward": 1, "spans": ["0-1"]}, "must be .start, end, kind."),
    ],
)
def test_what_is_no_result_is_refused_with_its_part(found: object, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        outcome_of(found, 3)


def test_a_value_whose_own_text_fails_is_no_crash() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(Unusable, match="an object"):
        outcome_of(Broken(), 1)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-10, 10)), min_size=1, max_size=5))
def test_the_sum_is_weighted(parts: list[tuple[float, float]]) -> None:
    verifiers = [EXACT | {"name": f"v{i}", "weight": 1 + weight} for i, (weight, _) in enumerate(parts)]
    config = JudgeConfig.model_validate({"verifiers": verifiers})
    whole = summed(config, [Outcome(reward) for _, reward in parts])
    assert whole.reward == pytest.approx(sum((1 + weight) * reward for weight, reward in parts), abs=1e-9)
    assert (whole.feedback, whole.segments, whole.spans) == (None, None, None)


def test_texts_and_spans_are_joined_and_two_segmentations_refused() -> None:
    config = JudgeConfig.model_validate({"verifiers": [EXACT, {"kind": "math_verify"}]})
    one = Outcome(1.0, "first", None, ((0, 1, "a"),))
    other = Outcome(0.0, "second", (2,), ((1, 2, "b"),))
    assert summed(config, [one, other]) == Outcome(1.0, "first\nsecond", (2,), ((0, 1, "a"), (1, 2, "b")))
    with pytest.raises(Unusable, match="'exact_match' and 'math_verify' both give segments"):
        summed(config, [Outcome(1.0, segments=(1,)), other])
    huge = JudgeConfig.model_validate({"verifiers": [EXACT | {"weight": 1e300}]})
    with pytest.raises(Unusable, match="sum"):
        summed(huge, [Outcome(1e300)])
