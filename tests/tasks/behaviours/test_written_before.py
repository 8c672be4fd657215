"""Behaviours over completions that the student did not write: teacher prefixes (TrOPD's guidance) and mixtures (GKD)."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import InputError
from storage.identity import derive_seed
from tasks.behaviours import Behaviour, Completion, Draft, Draw, Drawn, Start, pair_of
from tasks.behaviours.mixture import Mixture
from tasks.behaviours.pairs import Pairs
from tasks.behaviours.student import StudentWrites
from tasks.behaviours.teacher_prefix import TeacherPrefix
from tasks.engines.drafts import draft_of
from tasks.rollout_config import RolloutConfig
from tasks.workers.jobs import Request

PROMPT = (1, 2, 3)
DRAFT = Draft([10, 11, 12, 13, 99], [-0.1, -0.2, -0.3, -0.4, -0.5], "stop")
COSINE = {"kind": "cosine", "initial": 40, "final": 0, "steps": 100}


def written(
    behaviour: Behaviour, seed: int, draft: Draft | None = DRAFT, max_tokens: int = 8, index: int = 0
) -> tuple[list[Draw], Completion]:
    """What the behaviour asked of the engine, and its completion. The engine writes 50, 51 and the stop token 98."""
    turns, asked = behaviour.write(Start(PROMPT, max_tokens, seed, draft=draft, index=index)), []
    try:
        draw = next(turns)
        while True:
            asked.append(draw)
            ids = [50, 51, 98][: draw.max_tokens]
            draw = turns.send(Drawn(ids, [-1.0] * len(ids), "stop" if ids[-1] == 98 else "length"))
    except StopIteration as end:
        return asked, end.value


def lengths(behaviour: Behaviour, count: int, draft: Draft = DRAFT, max_tokens: int = 8) -> Counter[int]:
    seeds = (derive_seed("sample", number) for number in range(count))
    return Counter(written(behaviour, seed, draft, max_tokens)[1].prefix_length for seed in seeds)


def test_the_student_continues_a_prefix_of_the_draft() -> None:
    behaviour = TeacherPrefix(cap=3, fraction=1, length="fixed")
    [draw], made = written(behaviour, 7)
    assert draw == Draw((*PROMPT, 10, 11, 12), 5, 7)
    assert made == Completion([10, 11, 12, 50, 51, 98], [-0.1, -0.2, -0.3, -1, -1, -1], "stop", 3, label="blended")


def test_a_prefix_never_holds_the_stop_token_and_leaves_the_student_a_token() -> None:
    always = TeacherPrefix(cap=7, fraction=1, length="fixed")
    assert written(always, 1)[1].token_ids == [10, 11, 12, 13, 50, 51, 98]
    cut = Draft(DRAFT.token_ids, DRAFT.logprobs, "length")
    assert written(always, 1, cut)[1].prefix_length == 5
    [draw], made = written(always, 1, cut, max_tokens=4)
    assert draw.max_tokens == 1 and made.prefix_length == 3 and len(made.token_ids) == 4
    assert written(always, 1, Draft([99], [-1.0], "stop"))[1].prefix_length == 0
    assert written(always, 1, None)[1] == Completion([50, 51, 98], [-1, -1, -1], "stop")


def test_guided_samples_are_a_fraction_and_lengths_are_uniform() -> None:
    """4,000 samples; five standard errors of a binomial share. Draws depend on the sample's seed alone."""
    long = Draft(list(range(30)), [-1.0] * 30, "length")
    found = lengths(TeacherPrefix(cap=9, fraction=0.5), 4000, long, max_tokens=40)
    share = 0.5 / 10
    assert set(found) == set(range(10))
    for length in range(1, 10):
        assert abs(found[length] / 4000 - share) < 5 * math.sqrt(share * (1 - share) / 4000)
    assert found == lengths(TeacherPrefix(cap=9, fraction=0.5), 4000, long, max_tokens=40)
    assert set(lengths(TeacherPrefix(cap=9, fraction=0.5, length="fixed"), 200, long, max_tokens=40)) == {0, 9}


def test_the_cap_of_a_round_is_that_of_its_first_step() -> None:
    behaviour = TeacherPrefix.model_validate({"cap": COSINE})
    caps = [behaviour.at(step) for step in (0, 50, 80)]
    assert [made.cap.initial for made in caps] == [40, 20, 3]
    assert behaviour.at(99) == behaviour.at(1000) == StudentWrites()
    assert behaviour.at(0).at(50) == behaviour.at(0)


def test_a_share_of_the_samples_is_the_students_own() -> None:
    found = Counter(written(Mixture(on_policy_fraction=0.3), derive_seed("sample", n))[1].label for n in range(4000))
    assert abs(found[None] / 4000 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000) and found[None] + found["teacher"] == 4000


@given(st.integers(0, 2**31 - 2), st.integers(1, 8))
def test_off_policy_completions_are_the_drafts_whole_or_cut(seed: int, max_tokens: int) -> None:
    asked, made = written(Mixture(on_policy_fraction=0), seed, max_tokens=max_tokens)
    length = min(5, max_tokens)
    reason = "stop" if length == 5 else "length"
    assert asked == []
    assert made == Completion(DRAFT.token_ids[:length], DRAFT.logprobs[:length], reason, length, label="teacher")


def test_what_is_read_follows_the_share() -> None:
    mixed = Mixture.model_validate({"on_policy_fraction": {"kind": "linear", "initial": 0, "final": 1, "steps": 10}})
    assert mixed.reads == mixed.at(0).reads == {"drafts"}
    assert [mixed.draws, mixed.at(0).draws, mixed.at(5).draws] == [True, False, True]
    assert mixed.at(10) == StudentWrites()
    given_ones = Mixture(on_policy_fraction=0, completions="prompts")
    assert given_ones.reads == {"completions"}
    with pytest.raises(InputError, match="no completion"):
        written(given_ones, 1, None)


def test_of_each_two_samples_the_student_writes_the_first_and_the_teacher_the_second() -> None:
    behaviour = Pairs()
    for index in range(6):
        asked, made = written(behaviour, 7 + index, index=index)
        if index % 2:
            assert asked == [] and made == Completion(DRAFT.token_ids, DRAFT.logprobs, "stop", 5, label="teacher")
        else:
            assert asked == [Draw(PROMPT, 8, 7 + index)] and made.label is None and made.prefix_length == 0
    assert written(behaviour, 1, max_tokens=3, index=1)[1].finish_reason == "length"
    with pytest.raises(InputError, match="pairs: there is no completion"):
        written(behaviour, 1, None, index=1)


def test_pairs_take_the_drafts_of_their_prompt_in_turn() -> None:
    drafts = [Draft([number], [-1.0], "stop") for number in range(3)]
    requests = [Request(f"a/1/{index}", "a", index, 0) for index in range(8)]

    def numbers(behaviour: Behaviour) -> list[int]:
        found = [draft_of({"a": drafts}, request, behaviour) for request in requests]
        return [draft.token_ids[0] for draft in found if draft is not None]

    assert numbers(Pairs()) == [0, 0, 1, 1, 2, 2, 0, 0]
    assert numbers(Mixture(on_policy_fraction=0)) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [pair_of(index) for index in range(4)] == [0, 0, 1, 1]
    assert Pairs().reads == {"drafts"} and Pairs().draws and Pairs().at(99) == Pairs() and Pairs().pairs


@pytest.mark.parametrize("count", [1, 3])
def test_pairs_need_an_even_number_of_completions(count: int) -> None:
    with pytest.raises(ValidationError, match=f"num_generations: {count}, .* use an even number \\({count + 1}"):
        RolloutConfig(behaviour=Pairs(), num_generations=count)
    assert RolloutConfig(behaviour=Pairs(), num_generations=count + 1).behaviour == Pairs()


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (Pairs, {"drafts": {"per_prompt": 0}}, "per_prompt"),
        (TeacherPrefix, {"cap": -1}, "cap"),
        (TeacherPrefix, {"cap": 4, "fraction": 0}, "fraction"),
        (TeacherPrefix, {}, "cap"),
        (TeacherPrefix, {"cap": 4, "drafts": {"per_prompt": 0}}, "per_prompt"),
        (Mixture, {"on_policy_fraction": 1.1}, "on_policy_fraction"),
        (
            Mixture,
            {"on_policy_fraction": {"kind": "linear", "initial": 1, "final": -1, "steps": 5}},
            "on_policy_fraction",
        ),
        (Mixture, {"on_policy_fraction": {"kind": "linear", "initial": 1}}, "steps"),
    ],
)
def test_bad_fields_are_refused(kind: type[Behaviour], fields: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        kind.model_validate(fields)
