"""What is refused of a broken model's values, and what is said of tokens that the data mask."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from storage.errors import InputError
from tasks.signals import require_usable
from tasks.workers.metrics import latest, left_out, summarised, summary

TRUNCATED, UNMAPPED, INVALID = 2, 8, 16


@pytest.mark.parametrize(
    ("masks", "limit", "refused"),
    [
        ([[0] * 99 + [INVALID]], 0.01, False),  # 1 of 100 is not above 1%
        ([[0] * 98 + [INVALID] * 2], 0.01, True),
        (
            [[0] * 50 + [INVALID | UNMAPPED] * 50],
            0.01,
            False,
        ),  # what the teacher's vocabulary lacks is no fault of its own
        ([[TRUNCATED] * 100], 0.01, False),
        ([[INVALID] * 100], 1.0, False),
        ([[0] * 99 + [INVALID]], 0.0, True),
    ],
)
def test_the_share_of_unusable_values(masks, limit, refused) -> None:
    rows = pa.table({"sample_id": ["a"], "mask_reasons": pa.array(masks, pa.list_(pa.int32()))})
    if refused:
        with pytest.raises(InputError, match=r"runtime\.scorer\.max_invalid"):
            require_usable("supervise", {"mask": [rows.select]}, limit)
    else:
        require_usable("supervise", {"mask": [rows.select]}, limit)


def test_lists_are_counted_too() -> None:
    valid = pa.array([[4] * 9 + [0]], pa.list_(pa.int16()))
    rows = pa.table({"sample_id": ["a"], "valid": valid})
    for name in ("teacher_topk", "student_topk"):
        with pytest.raises(InputError, match=f"1 of 10 tokens .*{name}"):
            require_usable("train", {name: [rows.select]}, 0.09)
        require_usable("train", {name: [rows.select]}, 0.1)


def row(loss: float, tokens: int, masked: int = 0) -> dict:
    return {"loss": loss, "grad_norm": 0.5 if tokens else 0.0, "tokens": tokens, "masked_tokens": masked, "drift": None}


def test_a_round_says_what_was_masked_and_an_empty_step_is_no_loss_of_zero() -> None:
    rows = [row(0.0, 0, 30), row(0.4, 20, 10), row(0.2, 30), row(0.0, 0, 30)]
    found = summarised(rows) | {"tokens": 50.0, "masked_tokens": 70.0, "empty_steps": 2.0}
    assert (found["loss_first"], found["loss_last"]) == (0.4, 0.2) and latest(rows)["loss"] == 0.2
    assert left_out(found) == ["masked 70 of 120 tokens", "2 steps without a counted token"]
    assert summary(found) == (
        "loss 0.4 → 0.2  grad norm ≤ 0.5  masked 70 of 120 tokens  2 steps without a counted token"
    )
    nothing = summarised(rows[:1]) | {"tokens": 0.0, "masked_tokens": 30.0, "empty_steps": 1.0}
    assert nothing["loss_first"] is None and nothing["loss_last"] is None
    assert summary(nothing) == "grad norm ≤ 0  masked 30 of 30 tokens  1 steps without a counted token"
    assert np.isclose(found["grad_norm_max"], 0.5)
