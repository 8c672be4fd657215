"""The stage `context`: which sibling a sample is shown, what it reads then, what does not fit, keys, and shards redone alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from contexts import ASSISTANT, END, Room, Said, names, read_as, room, tokens
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigError, InputError
from tasks.context import examples
from tasks.inputs.contexts import SiblingConfig, per_sample, without_thinking
from tasks.inputs.siblings import Correct, siblings_of, source_of

SIBLING = "{prompt} see {sibling}"
SDPO = ("{prompt} see {sibling}", "{prompt} note {feedback}")
ROUND = [
    [Said("a", "2 x"), Said("a", "2", 1.0), Said("a", "2!", 1.0), Said("b", "5", 0.0, "too high")],
    [Said("b", "9", 0.0), Said("b", "4", None), Said("a", "2", 1.0)],
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Room:
    return room(tmp_path_factory.mktemp("room"))


def test_a_sample_reads_the_first_correct_sibling_as_a_turn(shared: Room) -> None:
    rows = shared.contexts([SIBLING], ROUND)
    assert [row["sample_id"] for row in rows] == [name for shard in names(ROUND) for name in shard]
    siblings = [row["sibling_id"] for row in rows]
    # the second `2` of prompt a is in another shard, and is no sibling of the first: their texts are equal
    assert siblings == ["a/1/1", "a/1/2", "a/1/1", None, None, None, "a/1/2"]
    assert rows[0]["prompt_token_ids"] == read_as("1+1= see 2") and rows[1]["prompt_token_ids"] == read_as(
        "1+1= see 2!"
    )
    assert all(row["prompt_token_ids"][-2:] == [END, ASSISTANT] for row in rows if row["sibling_id"])
    assert [row["source"] for row in rows] == ["sibling"] * 3 + ["none"] * 3 + ["sibling"]
    assert [row["reason"] for row in rows] == [None] * 3 + ["no sibling"] * 3 + [None]


def test_feedback_is_read_where_there_is_no_sibling_and_else_nothing(shared: Room) -> None:
    artifact = shared.build(shared.work(SDPO, ROUND))
    rows = shared.store.read_table(artifact, "contexts").to_pylist()
    assert [row["source"] for row in rows] == ["sibling"] * 3 + ["feedback", "none", "none", "sibling"]
    assert rows[3]["prompt_token_ids"] == read_as("2+2= note too high") and rows[3]["sibling_id"] is None
    assert rows[4]["prompt_token_ids"] is None and rows[4]["reason"] == "no sibling, no feedback"
    metrics = artifact.meta["metrics"]
    assert metrics == {"samples": 7, "sibling": 4, "feedback": 1, "none": 2, "too_long": 0}


def test_feedback_beside_a_sibling_is_a_template_of_its_own(shared: Room) -> None:
    said = [[Said("a", "2", 1.0, "well"), Said("a", "3", 0.0, "off by one"), Said("a", "x", 0.0)]]
    templates = ("{prompt} {sibling} {feedback}", "{prompt} {sibling}", "{prompt} {feedback}")
    rows = shared.contexts(templates, said)
    assert [row["source"] for row in rows] == ["feedback", "both", "sibling"]
    assert rows[1]["prompt_token_ids"] == read_as("1+1= 2 off by one")


def test_the_last_template_may_be_the_prompt_itself(shared: Room) -> None:
    rows = shared.contexts((SIBLING, "{prompt}"), ROUND)
    assert [row["source"] for row in rows] == ["sibling"] * 3 + ["prompt"] * 3 + ["sibling"]
    assert rows[3]["prompt_token_ids"] == read_as("2+2=")


def test_a_verdict_needs_a_reward(shared: Room) -> None:
    rows = shared.contexts(["{prompt} Your answer is {verdict}."], ROUND)
    assert rows[0]["prompt_token_ids"] == read_as("1+1= Your answer is incorrect.")
    assert rows[1]["prompt_token_ids"] == read_as("1+1= Your answer is correct.")
    assert (rows[5]["prompt_token_ids"], rows[5]["reason"]) == (None, "no verdict")


def test_columns_of_prompts_stand_in_where_a_sample_has_no_sibling(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "1+1=", "solution": "two"}, {"id": "b", "prompt": "2+2="}]
    found = room(tmp_path, rows=rows).contexts(("{sibling}", "{solution}"), [[Said("a", "3"), Said("b", "5")]])
    assert [row["source"] for row in found] == ["prompt", "none"]
    assert found[0]["prompt_token_ids"] == read_as("1+1=\n\ntwo") and found[1]["reason"] == "no sibling, no solution"


@pytest.mark.parametrize(
    ("templates", "rows", "why"),
    [
        (
            ["{sibling} {hint}"],
            [{"hint": "h"}, {}],
            r"train\.jsonl:2: teacher\.context uses \{hint\}, which is missing",
        ),
        (["{sibling}", "{hint}"], [{}, {}], r"train: teacher\.context uses \{hint\}, which no row has"),
        ([SIBLING], [{"teacher_prompt": "t"}, {}], r"train\.jsonl:1: has a teacher_prompt"),
    ],
)
def test_prompts_that_cannot_have_contexts_are_refused_by_prepare(
    tmp_path: Path, templates: list[str], rows: list[dict[str, Any]], why: str
) -> None:
    given = [{"id": name, "prompt": f"{name}?", **row} for name, row in zip("ab", rows, strict=True)]
    with pytest.raises(InputError, match=why):
        room(tmp_path, rows=given).prompts(templates)


def test_what_is_too_long_gives_way_to_the_next_and_then_to_nothing(tmp_path: Path) -> None:
    """256 positions: prompt, completion and one token."""
    long = "9" * 212
    said = [[Said("a", "x" * 30), Said("a", long, 1.0), Said("a", "8" * 150, 1.0), Said("a", "y" * 120)]]
    desk = room(tmp_path)
    exact = len(read_as(f"1+1= see {long}")) + len(tokens("x" * 30)) + 1
    assert exact == 256
    artifact = desk.build(desk.work([SIBLING], said))
    rows = desk.store.read_table(artifact, "contexts").to_pylist()
    assert [row["sibling_id"] for row in rows] == ["a/1/1", None, None, None]
    assert [row["reason"] for row in rows] == [None, "too long", "too long", "too long"]
    assert artifact.meta["metrics"]["too_long"] == 3
    assert any("3 samples have none" in line for line in desk.said)
    longer = [[Said("a", "x" * 31), *said[0][1:]]]
    assert desk.contexts([SIBLING], longer)[0]["sibling_id"] == "a/1/2"


def test_what_a_teacher_may_read_can_be_limited(tmp_path: Path) -> None:
    said = [[Said("a", "x"), Said("a", "2" * 20, 1.0), Said("a", "2", 1.0)]]
    desk = room(tmp_path, prepare={"max_teacher_prompt_length": 20})
    assert desk.contexts([SIBLING], said)[0]["sibling_id"] == "a/1/2"


def test_thoughts_are_left_out_and_what_is_only_a_thought_is_no_sibling(shared: Room) -> None:
    said = [[Said("a", "<think>hm", 1.0), Said("a", "<think>1</think>\n\n2", 1.0), Said("a", "3"), Said("a", "2")]]
    rows = shared.contexts([SIBLING], said)
    assert rows[2]["prompt_token_ids"] == read_as("1+1= see 2")
    assert rows[3]["sibling_id"] is None  # it is what the sample wrote itself
    kept = shared.contexts([SIBLING], said, sibling={"strip_thinking": False})
    assert kept[2]["prompt_token_ids"] == read_as("1+1= see <think>hm") and kept[3]["sibling_id"] == "a/1/0"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a</think> x", "x"), ("a</think>\nx", "x"), ("<think>cut off", ""), ("plain", "plain"),
        ("x <think>\na</think>y <think>b</think>z", "x y z"), ("a</think>x<think>b</think>y", "xy"),
    ],
)  # fmt: skip
def test_without_thinking(text: str, rest: str) -> None:
    assert without_thinking(text) == rest


@given(
    st.lists(st.tuples(st.text("ab", max_size=2), st.booleans()), min_size=1, max_size=6),
    st.sampled_from(["first", "draw"]),
    st.integers(0, 3),
)
def test_no_sample_is_its_own_sibling_and_a_draw_is_an_order_of_all(said, rule: str, seed: int) -> None:
    texts = [text for text, _ in said]
    group = [Correct(f"p/1/{i}", i, text, text) for i, (text, correct) in enumerate(said) if correct]
    for i, text in enumerate(texts):
        found = siblings_of(f"p/1/{i}", text, group, SiblingConfig(rule=rule), seed)
        assert {other.sample_id for other in found} == {o.sample_id for o in group if o.text != text}
        assert found == siblings_of(f"p/1/{i}", text, group[::-1], SiblingConfig(rule=rule), seed)
        if rule == "first":
            assert [other.sample_index for other in found] == sorted(other.sample_index for other in found)


def test_draws_differ_by_sample_and_seed(shared: Room) -> None:
    said = [[Said("a", str(i), 1.0) for i in range(8)] + [Said("a", f"x{i}") for i in range(8)]]

    def drawn(seed: int) -> list[str]:
        return [row["sibling_id"] for row in shared.contexts([SIBLING], said, sibling={"rule": "draw"}, seed=seed)]

    assert len(set(drawn(0)[8:])) > 2 and drawn(0) != drawn(1)


def test_rewards_other_than_0_and_1_need_a_threshold(shared: Room) -> None:
    said = [[Said("a", "x", 0.2), Said("a", "2", 0.7), Said("a", "2.0", 0.9)]]
    with pytest.raises(InputError, match=r"judge\.success_threshold: missing, but sample 'a/1/0' .* 0\.2"):
        shared.contexts([SIBLING], said)
    rows = shared.contexts([SIBLING], said, success_threshold=0.8)
    assert [row["sibling_id"] for row in rows] == ["a/1/2", "a/1/2", None]
    assert shared.contexts(["{feedback}", "{prompt}"], said)[0]["source"] == "prompt"  # nothing asks what is correct


def test_a_key_holds_what_the_templates_name(shared: Room) -> None:
    def key(templates=SDPO, said=ROUND, **more: Any) -> str:
        return shared.work(templates, said, **more).outputs["context"].key

    first = key()
    assert first == key(seed=5), "nothing is drawn"
    assert key(sibling={"rule": "draw"}) != key(sibling={"rule": "draw"}, seed=5) != first
    assert first not in {key([SIBLING]), key(sibling={"strip_thinking": False}), key(SDPO[::-1])}
    otherwise = [[Said("a", "2 x", 1.0), *ROUND[0][1:]], ROUND[1]]
    assert first != key(said=otherwise)
    plain = ["{prompt} {answer}", "{prompt}"]
    assert shared_key_without(shared, plain, ROUND) == shared_key_without(shared, plain, otherwise)
    assert key(["{feedback}"]) == key(["{feedback}"], sibling={"rule": "draw"})


def shared_key_without(shared: Room, templates: list[str], said: list[list[Said]]) -> str:
    """The key of contexts that ask the judge nothing."""
    rows = [{**row, "answer": "2"} for row in shared.rows]
    desk = room(shared.folder / "answers", rows=rows)
    return desk.work(templates, said).outputs["context"].key


def test_without_rewards_it_is_refused_and_the_judge_is_not_asked_for_nothing(shared: Room) -> None:
    with pytest.raises(ConfigError, match=r"\{feedback\} and \{sibling\} come from the judge"):
        shared.work(SDPO, ROUND, judged=False)
    shared.work(["{prompt}", "{prompt}!"], ROUND, judged=False)


def test_missing_shards_are_made_alone_and_equal(tmp_path: Path) -> None:
    desk = room(tmp_path)
    work = desk.work(SDPO, ROUND)
    whole = desk.store.read_table(desk.build(work), "contexts")
    other = room(tmp_path / "again")
    again = other.work(SDPO, ROUND)
    assert again.outputs["context"].key == work.outputs["context"].key
    with other.store.building(again.outputs["context"]) as builder:
        builder.write_shard("contexts", 1, whole.slice(4))
    built = other.build(again)
    assert other.store.read_table(built, "contexts").equals(whole)
    assert any("3 of 7 samples are there already" in line for line in other.said)
    assert built.meta["metrics"]["samples"] == 7


def test_a_round_without_any_context_says_so(shared: Room) -> None:
    shared.contexts([SIBLING], [[Said("a", "1"), Said("b", "1")]])
    assert any("no sample of this round has a context" in line for line in shared.said)


def test_a_check_shows_where_the_columns_of_the_round_stand(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "1+1="}, {"id": "b", "prompt": "2+2=", "solution": "4"}]
    desk = room(tmp_path, rows=rows)
    templates = ("{prompt} see {sibling}", "{solution} ({verdict})")
    found = list(examples(templates, desk.config, desk.model, desk.model, desk.prompts(templates), desk.store))
    assert found == [
        "<|user|>1+1= see {sibling}<|end|><|assistant|>",
        "<|user|>2+2=\n\n4 ({verdict})<|end|><|assistant|>",
    ]


def test_which_contexts_are_of_samples() -> None:
    assert [per_sample(context) for context in (None, "{prompt} {hint}", SIBLING, ("{hint}",))] == [False] * 2 + [
        True
    ] * 2
    sources = [source_of(t) for t in ("{sibling}{feedback}", "{sibling}{hint}", "{feedback}", "{verdict}", "{prompt}")]
    assert sources == ["both", "sibling", "feedback", "prompt", "prompt"]
