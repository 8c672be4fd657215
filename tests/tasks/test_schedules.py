"""Schedules over optimizer steps: their ends, their bounds, and what a config may say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tasks.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, ScheduleField

FIELD: TypeAdapter = TypeAdapter(ScheduleField)
NUMBERS = st.floats(-100, 100)


@given(NUMBERS, NUMBERS, st.integers(1, 50), st.integers(0, 20), st.integers(0, 100))
def test_an_annealed_value_goes_from_its_first_to_its_last(initial, final, steps, start, step):
    for kind in (LinearSchedule, CosineSchedule):
        schedule = kind(initial=initial, final=final, steps=steps, start=start)
        assert schedule.value(0) == schedule.value(start) == pytest.approx(initial)
        assert schedule.value(start + steps) == schedule.value(start + steps + step) == final
        low, high = schedule.bounds
        assert low - 1e-9 <= schedule.value(step) <= high + 1e-9
        earlier, later = (schedule.value(at) for at in (step, step + 1))
        assert (later - earlier) * (final - initial) >= -1e-9  # never back


def test_values_between():
    linear = LinearSchedule(initial=0.05, steps=50, start=10)
    assert [round(linear.value(step), 6) for step in (0, 10, 20, 35, 60)] == [0.05, 0.05, 0.04, 0.025, 0.0]
    cosine = CosineSchedule(initial=1.0, final=0.5, steps=4)
    assert cosine.value(1) == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 4)))
    assert cosine.value(2) == pytest.approx(0.75)


def test_a_number_is_a_constant():
    assert FIELD.validate_python(0.25) == ConstantSchedule(initial=0.25)
    assert FIELD.validate_python(0).value(10**9) == 0.0
    whole = FIELD.validate_python({"kind": "linear", "initial": 1, "steps": 3})
    assert FIELD.validate_python(whole.model_dump(mode="json")) == whole
    for wrong in (True, "0.5", {"kind": "linear", "initial": 1}, {"kind": "step", "initial": 1}, float("nan")):
        with pytest.raises(ValidationError):
            FIELD.validate_python(wrong)
