"""Generated additions with a digit-by-digit scratchpad; needs no download.

    prompt       4821+1357=
    completion   1+7+0=08 2+5+0=07 8+3+0=11 4+1+1=06#06178

    solution     the completion, for `teacher.context`

    prompt       4821-1357=
    completion   1-7-0=14 2-5-1=16 8-3-1=04 4-1-0=03#03464

From the last digit to the first: both digits, the carry, their sum in two digits; after `#` the result. Of a subtraction: both
digits, the borrow, the next borrow and the digit of the result. All prompts have equal length, and so do all completions. A small
transformer learns one of the tasks in a few hundred steps, and knows nothing of the other."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from storage.identity import Identity, omit_at

ANSWER_PATTERN = r"#(\d+)$"
"""Finds the result in a completion (for the `exact_match` verifier)."""


class AdditionSource(Identity):
    """Generated additions; `answer` and `completion` (the scratchpad) come with every prompt."""

    kind: Literal["addition"] = "addition"
    digits: int = Field(4, ge=1, le=12, description="digits of both numbers; no leading zeros")
    count: int = Field(ge=1, description="number of different prompts")
    seed: int = Field(0, ge=0, description="seed of the prompts; splits never share a prompt, whatever their seeds")
    context: str | None = Field(
        None,
        description="a template over {prompt}, {answer} and {solution} that every second prompt is put into: a warm-up with it"
        " teaches a new model to read such a `teacher.context`",
        json_schema_extra=omit_at(None),
    )

    @field_validator("context")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                value.format(prompt="", answer="", solution="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"context: {value!r} is no template over {{prompt}}, {{answer}} and {{solution}} ({error})"
            ) from None
        return value

    operations: tuple[Literal["add", "subtract"], ...] = Field(
        ("add",),
        min_length=1,
        description="what is asked in turn; of several each prompt's `teacher_id` is its operation",
        json_schema_extra=omit_at(["add"]),
    )

    @model_validator(mode="after")
    def _enough_pairs(self) -> AdditionSource:
        low, high = bounds(self.digits)
        pairs = (high - low + 1) ** 2
        if self.count > pairs:
            raise ValueError(
                f"count: only {pairs} additions of {self.digits} digits exist, {self.count} were asked for"
            )
        return self


def bounds(digits: int) -> tuple[int, int]:
    """Smallest and largest number with that many digits; 0 counts as a number of one digit."""
    return (10 ** (digits - 1) if digits > 1 else 0), 10**digits - 1


def scratchpad(left: int, right: int, digits: int) -> str:
    """The worked solution of `left + right`, both of at most `digits` digits."""
    columns, carry = [], 0
    for place in range(digits):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        total = upper + lower + carry
        columns.append(f"{upper}+{lower}+{carry}={total:02d}")
        carry = total // 10
    return " ".join(columns) + "#" + answer(left, right, digits)


def subtraction(left: int, right: int, digits: int) -> str:
    """The worked solution of `left - right`, which is not negative, both of at most `digits` digits."""
    columns, borrow = [], 0
    for place in range(digits):
        upper, lower = left // 10**place % 10, right // 10**place % 10
        rest = upper - lower - borrow
        columns.append(f"{upper}-{lower}-{borrow}={int(rest < 0)}{rest % 10}")
        borrow = int(rest < 0)
    return " ".join(columns) + "#" + answer(left, -right, digits)


def answer(left: int, right: int, digits: int) -> str:
    """The sum, with zeros in front up to one digit more than the numbers have."""
    return f"{left + right:0{digits + 1}d}"


def additions(source: AdditionSource) -> Iterator[dict[str, str]]:
    """Rows with prompt, answer, completion and solution: `count` different pairs, a pure function of the source's fields."""
    low, high = bounds(source.digits)
    width = high - low + 1
    draw = random.Random(f"addition/{source.digits}/{source.seed}")
    for number, pair in enumerate(draw.sample(range(width * width), source.count)):
        left, right = low + pair // width, low + pair % width
        operation = source.operations[number % len(source.operations)]
        if operation == "subtract":
            left, right = max(left, right), min(left, right)
        adds = operation == "add"
        text = (scratchpad if adds else subtraction)(left, right, source.digits)
        row = {
            "prompt": f"{left}{'+' if adds else '-'}{right}=",
            "answer": answer(left, right if adds else -right, source.digits),
            "solution": text,
        }
        if source.context is not None and number % 2:
            row["prompt"] = source.context.format(**row)
        if len(source.operations) > 1:
            row["teacher_id"] = operation
        yield row | {"completion": row["solution"]}


def marked(completion: str, answer: str, tokens: list[str]) -> dict[str, Any]:
    """A verifier that marks spans: whether the result is right, and the tokens of the result as a `key` or an `error` span."""
    found = re.search(ANSWER_PATTERN, completion)
    if found is None:
        return {"reward": 0.0, "spans": []}
    right, ends = found.group(1) == answer, list(itertools.accumulate(map(len, tokens)))
    inside = [
        place for place, end in enumerate(ends) if end > found.start(1) and end - len(tokens[place]) < found.end(1)
    ]
    spans = [(inside[0], inside[-1] + 1, "key" if right else "error")] if inside else []
    return {"reward": float(right), "spans": spans}
