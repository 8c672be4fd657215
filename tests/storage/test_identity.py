import enum
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from storage.identity import Identity, RunPolicy, Runtime, artifact_key, by_kind, canonical_json, derive_seed, omit_at

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

slowly = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are shared


class Colour(enum.Enum):
    RED = "red"


class Sampling(Identity):
    top_p: float = 1.0
    stop: tuple[int, ...] = ()
    min_p: float = Field(0.0, json_schema_extra=omit_at(0))
    extra: Identity | None = Field(None, json_schema_extra=omit_at(None))


class Devices(Runtime):
    gpus: int = 1


class Nested(Identity):
    devices: Any


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shuffled(value[name]) for name in sorted(value, reverse=True)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@slowly
@given(JSON)
def test_canonical_json_keeps_the_value_and_forgets_the_order(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert canonical_json(shuffled(value)) == text
    assert canonical_json(json.loads(text)) == text


@slowly
@given(JSON, JSON)
def test_canonical_json_tells_different_values_apart(one: Any, other: Any) -> None:
    if json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True) and one != other:
        assert canonical_json(one) != canonical_json(other)


def test_plain_forms() -> None:
    value = {"colour": Colour.RED, "path": Path("a") / "b", "pair": (1, -0.0), "yes": True}
    assert canonical_json(value) == '{"colour":"red","pair":[1,0.0],"path":"a/b","yes":true}'
    assert canonical_json([1, 1.0, True]) == "[1,1.0,true]"


@pytest.mark.parametrize(
    "value", [{1, 2}, b"x", object(), np.int64(3), {1: "a"}, {Colour.RED: 1}, len, Devices(), Nested(devices=Devices())]
)
def test_what_has_no_identity_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="canonical_json"):
        canonical_json(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_wherever_they_hide(value: float) -> None:
    with pytest.raises(ValueError, match=r"value\.a\[0\]"):
        canonical_json({"a": [value]})


def test_a_later_field_changes_no_key_at_its_old_value() -> None:
    assert canonical_json(Sampling()) == '{"stop":[],"top_p":1.0}'
    assert canonical_json(Sampling(min_p=0.1)) == '{"min_p":0.1,"stop":[],"top_p":1.0}'
    assert canonical_json(Sampling(extra=Sampling())) == '{"extra":{"stop":[],"top_p":1.0},"stop":[],"top_p":1.0}'


def test_omission_does_not_take_false_for_zero() -> None:
    class Flag(Identity):
        value: bool | int = Field(0, json_schema_extra=omit_at(0))

    assert canonical_json(Flag(value=False)) == '{"value":false}'
    assert canonical_json(Flag(value=0)) == "{}"


@pytest.mark.parametrize("kind", [Sampling, Devices, RunPolicy])
def test_unknown_fields_are_refused(kind: type) -> None:
    with pytest.raises(ValidationError, match="unknwon"):
        kind(unknwon=1)


def test_identity_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Sampling().top_p = 0.5  # type: ignore[misc]


def test_golden_keys() -> None:
    """These never change: stores of users hang on them."""
    assert artifact_key("rollout", 1, Sampling(top_p=0.9), {"weights": "ab", "prompts": "cd"}) == "1f1c9c29f6efc516"
    assert artifact_key("rollout", 2, {}, {}) == "48a6019469ce40f1"
    assert derive_seed(0, 1, "prompt", 3) == 548_940_029


def test_every_part_enters_the_key() -> None:
    keys = {
        artifact_key("a", 1, {"x": 1}, {"i": "1"}),
        artifact_key("b", 1, {"x": 1}, {"i": "1"}),
        artifact_key("a", 2, {"x": 1}, {"i": "1"}),
        artifact_key("a", 1, {"x": 2}, {"i": "1"}),
        artifact_key("a", 1, {"x": 1}, {"i": "2"}),
        artifact_key("a", 1, {"x": 1}, {"j": "1"}),
    }
    assert len(keys) == 6


@slowly
@given(st.lists(st.integers() | st.text(), max_size=4), st.lists(st.integers() | st.text(), max_size=4))
def test_seeds_fit_and_differ(one: list[int | str], other: list[int | str]) -> None:
    seed = derive_seed(*one)
    assert 0 <= seed < 2**31 - 1
    assert (derive_seed(*other) == seed) == (one == other)


def test_unstable_seed_parts_are_refused() -> None:
    for part in (1.0, True, None):
        with pytest.raises(TypeError, match="derive_seed"):
            derive_seed(part)  # type: ignore[arg-type]


def test_a_field_that_was_a_string_keeps_its_canonical_json() -> None:
    """Only where nothing but `kind` would be written; what a later field adds at its value of old is not written."""

    class Plain(Identity):
        kind: str = "plain"
        later: int = Field(0, json_schema_extra=omit_at(0))

    class Holder(Identity):
        was_a_string: Plain = Field(Plain(), json_schema_extra=by_kind())
        always_a_model: Plain = Plain()

    assert canonical_json(Holder()) == '{"always_a_model":{"kind":"plain"},"was_a_string":"plain"}'
    changed = Holder(was_a_string=Plain(later=1))
    assert canonical_json(changed) == '{"always_a_model":{"kind":"plain"},"was_a_string":{"kind":"plain","later":1}}'
