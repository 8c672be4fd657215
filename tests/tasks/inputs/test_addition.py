"""The generated task: sums and differences are worked out right, and of several operations each prompt names its own."""

from __future__ import annotations

import re

import pytest

from tasks.inputs.addition import AdditionSource, additions, marked, subtraction


def source(**fields: object) -> AdditionSource:
    return AdditionSource.model_validate({"kind": "addition", "digits": 3, "count": 60, "seed": 1, **fields})


def test_additions_alone_name_no_teacher() -> None:
    rows = list(additions(source()))
    assert len(rows) == 60 and all("teacher_id" not in row and "+" in row["prompt"] for row in rows)


@pytest.mark.parametrize("context", [None, "{solution} {prompt}"])
def test_of_several_operations_each_prompt_names_its_own(context: str | None) -> None:
    rows = list(additions(source(operations=["add", "subtract"], context=context)))
    assert [row["teacher_id"] for row in rows] == ["add", "subtract"] * 30
    for row in rows:
        found = re.search(r"(\d+)([+-])(\d+)=$", row["prompt"])
        assert found is not None
        left, sign, right = int(found[1]), found[2], int(found[3])
        assert sign == {"add": "+", "subtract": "-"}[row["teacher_id"]]
        result = left + right if sign == "+" else left - right
        assert 0 <= result == int(row["answer"]) and row["completion"].endswith(f"#{row['answer']}")


def test_the_steps_of_a_subtraction_are_right() -> None:
    assert subtraction(4821, 1357, 4) == "1-7-0=14 2-5-1=16 8-3-1=04 4-1-0=03#03464"
    for left, right in ((1000, 1), (905, 896), (777, 777), (5000, 4999)):
        steps, _, answer = subtraction(left, right, 4).partition("#")
        borrow, digits = 0, ""
        for step in steps.split(" "):
            upper, lower, taken, made = map(int, re.fullmatch(r"(\d)-(\d)-(\d)=(\d\d)", step).groups())  # type: ignore[union-attr]
            assert taken == borrow and 10 * (made // 10) + upper - lower - taken == made % 10
            borrow, digits = made // 10, str(made % 10) + digits
        assert borrow == 0 and int(digits) == left - right == int(answer)


def test_the_result_is_marked_in_tokens() -> None:
    tokens = ["1+", "2", "#", "0", "3", "<end>"]
    assert marked("1+2#03", "03", tokens) == {"reward": 1.0, "spans": [(3, 5, "key")]}
    assert marked("1+2#03", "04", tokens) == {"reward": 0.0, "spans": [(3, 5, "error")]}
    assert marked("1+2", "03", tokens[:2]) == {"reward": 0.0, "spans": []}
