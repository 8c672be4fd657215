"""Changes that leave a completion's answer as it is: what they do, what they leave alone, where they do not apply."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.inputs.transformations import CERTAIN, NEUTRAL, TRANSFORMATIONS, confident, pad, parts, renumber, reorder

STEPS = "Step 1: 3 apples cost 6.\nStep 2: Bob walks 20 metres.\n\nThe answer is 42.\nDone\n"
LINES = st.lists(
    st.one_of(
        st.builds("Step {}: {}".format, st.integers(1, 9), st.text(max_size=12)),
        st.builds("{}. {} costs {}.".format, st.integers(1, 9), st.sampled_from("xyz"), st.integers(0, 99)),
        st.sampled_from(
            ["", "  ", "The answer is 7.", "#### 7", "<think>", "</think>", "So x = 3.", "```", "\\boxed{7}"]
        ),
        st.text(max_size=20),
    ),
    max_size=8,
)


def test_step_numbers_rise_and_nothing_else_changes() -> None:
    assert renumber(STEPS) == STEPS.replace("Step 1:", "Step 11:").replace("Step 2:", "Step 12:")
    assert renumber("1) a\nthen\n2) b\n3) c\n#### 3") == "11) a\nthen\n12) b\n13) c\n#### 3"
    assert renumber("**Step 4:** a\n**Step 5:** b\n5") == "**Step 14:** a\n**Step 15:** b\n5"


@pytest.mark.parametrize(
    "text",
    [
        "", "42", "1. only one\n42", "1. a\n3. b\n42", "1. a\n2. by step 1, b\n42", "1. a\n2. b\nBy step 2 the answer is 42",
        "1.5 apples\n2.5 pears\n42", "1. a\n```\n2. b\n```\n42", "The answer is 1.\n1. a\n2. b",
    ],
)  # fmt: skip
def test_numbers_that_are_mentioned_or_do_not_count_up_are_left_alone(text: str) -> None:
    assert renumber(text) is None


LISTED = "1. a pen costs 5\n2. {}\n{}"


@pytest.mark.parametrize(
    "said",
    [
        "equation 1 gives b", "by Eq. (1), b", "using 1), b", "from 1 and 2, b", "step two is b", "as in [1], b", "see #1, b",
        "the first line gives b", "the 1st step gives b", "the second of these steps", "the line above is b", "the latter is b",
        "this is b", "by that, b", "with these, b", "| b | c |", "b\tc", "Row 1 is b", "(1) gives b", "line one gives b",
    ],
)  # fmt: skip
def test_a_text_that_may_speak_of_its_lines_keeps_their_numbers(said: str) -> None:
    """In the words of a step, and of the answer."""
    assert renumber(LISTED.format("b", "42")) == "11. a pen costs 5\n12. b\n42"
    assert renumber(LISTED.format(said, "42")) is None
    assert renumber(LISTED.format("b", f"The answer is 42, as {said}")) is None


def test_independent_lines_change_places_and_keep_their_numbers() -> None:
    assert reorder(STEPS) == "Step 1: Bob walks 20 metres.\nStep 2: 3 apples cost 6.\n\nThe answer is 42.\nDone\n"
    assert reorder("x = 3\ny = 4\nx + y = 7\n7") == "y = 4\nx = 3\nx + y = 7\n7"
    assert reorder("a pen costs 2\nso 3 pens cost 6\nThe car drives 50 km\n6") == (
        "a pen costs 2\nThe car drives 50 km\nso 3 pens cost 6\n6"
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "42", "x = 3\n42", "x = 3\ny = x + 4\n7", "it is 5\n2 * 5 = 10\n10", "x = 3\nTherefore y = 4\n7",
        "the price rises\nThe price is 4\n4", "x = 3\n\ny = 4\n7", "x = 3\nas in line 1, y = 4\n7", "<a>\nx = 3\n3",
        "x = 3\nwith this y = 4\n7", "x = 3\ny = 4\nThis gives z\n7", "x = 3\ny = 4\nby the first line, z\n7",
        "x = 3\ny = 4\nThe answer is 7 by equation 2", "| x |\n| y |\n7", "x\t3\ny\t4\n7",
        "x = 3\nThe answer is 3\ny = 4", "x = 3\n```\ny = 4\n```\n7", "We have x = 3:\ny = 4\n7",
    ],
)  # fmt: skip
def test_lines_that_may_depend_on_each_other_stay_in_order(text: str) -> None:
    assert reorder(text) is None


def test_neutral_lines_go_before_the_answer_part() -> None:
    assert pad("42") == f"{NEUTRAL}\n42"
    assert pad("a\n\nb\n42") == f"{NEUTRAL}\na\n{NEUTRAL}\n\nb\n{NEUTRAL}\n42"
    assert pad("<think>\na\n</think>\n42") == f"<think>\n{NEUTRAL}\na\n{NEUTRAL}\n</think>\n42"
    assert [pad(text) for text in ("", " \n", "<answer>42</answer>", "```\n42\n```")] == [None] * 4
    assert not re.search(r"\d", NEUTRAL + CERTAIN), "a verifier that reads the last number must not find another one"


def test_marks_of_confidence_follow_sentences() -> None:
    assert confident("x is 3.\nfine\n3.") == f"x is 3.{CERTAIN}\nfine\n3."
    assert [confident(text) for text in ("", "42.", "x is 3\n42.", "The answer is 3.\nx.")] == [None] * 4


@given(LINES)
def test_the_answer_part_and_the_lines_stay(lines: list[str]) -> None:
    """Whatever the text: what a transformation returns is another text that ends with the same answer part, made of the same
    words beside the ones that it adds, and the same at every call."""
    text = "\n".join(lines)
    body, answer = parts(text)
    assert "".join(body) + answer == text

    def words(of: str) -> list[str]:
        return sorted(re.sub(r"\d", "", of.replace(NEUTRAL, "").replace(CERTAIN, "")).split())

    for name, change in TRANSFORMATIONS.items():
        found = change(text)
        assert found == change(text)
        if found is None:
            continue
        assert found != text and found.endswith(answer) and answer.strip(), name
        assert words(found) == words(text), name
        if "```" in text:
            raise AssertionError(f"{name} changed a text with code")
