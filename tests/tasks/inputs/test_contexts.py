"""The teacher's prompt made by `teacher.context`: what is in it, where it ends, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from key_walk import validated
from places import DATA
from pydantic import ValidationError
from small_models import Bench, checkpoint

from flows.config_file import merge
from flows.cross_checks import needs_judge
from flows.experiment import Experiment, TeacherConfig
from storage.artifacts.artifact import Artifact
from storage.disk.yaml_text import load
from storage.errors import InputError
from storage.store import Store
from tasks.engines.scorer import Sample, _passage
from tasks.inputs.models import CheckpointModel, model_work
from tasks.inputs.prompts import PrepareConfig
from tasks.prepare import prepare_work

USER, END, ASSISTANT = 259, 257, 260
JUDGE = {"verifiers": [{"kind": "exact_match"}]}
GOLDEN = load((DATA / "golden.yaml").read_text())


class Desk(Bench):
    model: Artifact

    def prepare(self, contexts: dict[str, str], **fields: Any) -> Artifact:
        config = PrepareConfig.model_validate(fields)
        return self.build(prepare_work(config, self.model, self.model, contexts=contexts))

    def rows(self, contexts: dict[str, str], split: str = "train", **fields: Any) -> list[dict[str, Any]]:
        table = self.store.read_table(self.prepare(contexts, **fields), "prompts")
        return [row for row in table.to_pylist() if row["split"] == split]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def desk(tmp_path: Path, folder: Path) -> Desk:
    desk = Desk(Store(tmp_path / "store"))
    desk.model = desk.build(model_work(CheckpointModel(path=folder), 0))
    return desk


def file(path: Path, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "file", "path": path, **more}


def test_the_context_is_the_users_turn_and_ends_where_the_students_prompt_ends(desk: Desk, tmp_path: Path) -> None:
    source = file(tmp_path / "a.jsonl", {"prompt": "1+1=", "why": "two", "answer": 2}, columns={"solution": "why"})
    [row] = desk.rows({"train": "{solution}, {answer}: {prompt}"}, train=source)
    assert row["token_ids"] == [USER, *b"1+1=", END, ASSISTANT]
    assert row["teacher_token_ids"] == [USER, *b"two, 2: 1+1=", END, ASSISTANT]
    sample = Sample("s", row["token_ids"], [*b"2", END], row["teacher_token_ids"])
    student, teacher = (_passage(name, sample) for name in ("student", "teacher"))
    assert teacher.prompt == row["teacher_token_ids"] and teacher.completion == student.completion == [*b"2", END]
    assert teacher.inputs[-1:] == student.inputs[-1:] and teacher.prompt[-2:] == student.prompt[-2:] == [END, ASSISTANT]


def test_without_a_place_for_the_prompt_it_stands_below_it(desk: Desk, tmp_path: Path) -> None:
    source = file(tmp_path / "a.jsonl", {"prompt": "q{x}", "hint": "see {answer}"})
    [row] = desk.rows({"train": "Hint: {hint}"}, train=source)
    assert row["teacher_token_ids"] == [USER, *b"q{x}\n\nHint: see {answer}", END, ASSISTANT]  # values are no templates


def test_a_system_prompt_and_earlier_turns_stay(desk: Desk, tmp_path: Path) -> None:
    talk = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in talk]
    [row] = desk.rows(
        {"train": "{hint} {prompt}"}, train=file(tmp_path / "a.jsonl", {"messages": messages, "hint": "h"})
    )
    student, teacher = (bytes(i for i in row[name] if i < 256) for name in ("token_ids", "teacher_token_ids"))
    assert (student, teacher) == (b"Sabc", b"Sabh c")


def test_plain_prompts_and_splits(desk: Desk, tmp_path: Path) -> None:
    train = file(tmp_path / "a.jsonl", {"prompt": "1+1=", "solution": "s"})
    held_out = file(tmp_path / "b.jsonl", {"prompt": "1+2=", "answer": "3"})
    fields = {"train": train, "eval": held_out, "chat_template": False}
    [row] = desk.rows({"train": "{solution} {prompt}"}, **fields)
    assert row["teacher_token_ids"] == [*b"s 1+1="]
    [other] = desk.rows({"train": "{solution} {prompt}"}, "eval", **fields)
    assert other["teacher_token_ids"] is None
    with pytest.raises(InputError, match=r"b\.jsonl:1: teacher\.context uses \{solution\}, which is missing here"):
        desk.rows(dict.fromkeys(("train", "eval"), "{solution} {prompt}"), "eval", **fields)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a"}, r"a\.jsonl:2: teacher\.context uses \{solution\}"),
        ({"prompt": "a", "solution": " "}, r"a\.jsonl:2: teacher\.context uses \{solution\}"),
        ({"prompt": "a", "solution": "s", "teacher_prompt": "t"}, r"a\.jsonl:2: has a teacher_prompt"),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "tool", "content": "t"}], "solution": "s"},
            r"a\.jsonl:2: .* ends with a turn of 'tool'",
        ),
    ],
)
def test_rows_that_cannot_have_it_are_refused_by_line(
    desk: Desk, tmp_path: Path, row: dict[str, Any], why: str
) -> None:
    source = file(tmp_path / "a.jsonl", {"prompt": "first", "solution": "s"}, row)
    with pytest.raises(InputError, match=why):
        desk.rows({"train": "{solution}\n{prompt}"}, train=source)


def test_only_a_context_reads_its_columns_and_changes_the_key(desk: Desk, tmp_path: Path) -> None:
    source = file(tmp_path / "a.jsonl", {"prompt": "1+1=", "solution": "s"})
    without, contextual = desk.prepare({}, train=source), desk.prepare({"train": "{solution} {prompt}"}, train=source)
    assert any("'solution' is not read" in text for text in without.meta["warnings"])
    assert contextual.meta["warnings"] == []
    assert without.key != contextual.key and "contexts" not in without.identity
    assert without.content["prompts:train"] != contextual.content["prompts:train"]
    changed = file(tmp_path / "a.jsonl", {"prompt": "1+1=", "solution": "other"})
    assert desk.prepare({"train": "{solution} {prompt}"}, train=changed).key != contextual.key


def test_generated_additions_have_a_solution_and_a_warm_up_can_read_it(desk: Desk) -> None:
    context = "{solution} {prompt}"
    warmup = {"kind": "addition", "digits": 1, "count": 4, "seed": 3}
    rows = desk.rows({}, "warmup", warmup=warmup | {"context": context})
    plain = desk.rows({}, "warmup", warmup=warmup)
    assert [row["completion"] for row in rows] == [row["completion"] for row in plain]
    assert [row["text"] for row in rows[::2]] == [row["text"] for row in plain[::2]]
    assert all(row["completion"] in row["text"] for row in rows[1::2])
    [row, *_] = desk.rows({"train": context}, train=warmup)
    assert row["teacher_token_ids"][1:3] == list(rows[0]["completion"].encode()[:2])


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{soluton}", "did you mean 'solution'"), ("{messages}", "is no column"), ("{answer.real}", "is no column"),
        ("{answer:>5}", "is no column"), ("{answer!r}", "is no column"), ("{", "is no template"), ("plain", "names no column"),
    ],
)  # fmt: skip
def test_templates_that_are_none_are_refused(template: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        TeacherConfig.model_validate({"source": {"kind": "initial"}, "context": template})


@pytest.mark.parametrize(
    ("over", "why"),
    [
        ({"teacher": {"source": {"kind": "ema"}}}, "teacher.warmup: a teacher of kind ema is the student itself"),
        ({"teacher": {"source": {"kind": "ema", "decay": 1.0}, "warmup": None}}, "less than 1"),
        (
            {"teacher": {"context": "{prompt} {answer}"}, "prompts": {"chat_template": False}},
            "the template must end with {prompt}",
        ),
        ({"student": {"source": {"kind": "initial"}}}, "kind"),
        ({"teacher": {"context": "{prompt} {sibling}"}}, r"teacher\.context: \{sibling\} need the judge's rewards"),
        ({"teacher": {"context": ["{sibling}", "{feedback}"]}}, r"\{feedback\} and \{sibling\} need .* set `judge`"),
        (
            {"teacher": {"context": "{sibling}"}, "judge": JUDGE, "rollout": {"num_generations": 1}},
            r"\{sibling\} is another completion .* rollout\.num_generations is 1",
        ),
        (
            {"teacher": {"context": ["{sibling}", "{feedback}"]}, "judge": JUDGE},
            r"\{feedback\} is a text of the judge's, but exact_match gives none",
        ),
        (
            {"teacher": {"context": "{verdict}"}, "judge": {"verifiers": [{"kind": "exact_match", "weight": 0.5}]}},
            r"judge\.success_threshold: missing, but with the weights 0\.5",
        ),
        (
            {
                "teacher": {"context": "{sibling}"},
                "judge": {"verifiers": [*JUDGE["verifiers"], {"kind": "math_verify"}]},
            },
            r"judge\.success_threshold: missing, but with the weights 1, 1",
        ),
        (
            {"teacher": {"context": "{answer} {prompt}", "sibling": {"rule": "draw"}}},
            r"teacher\.sibling: is set, but teacher\.context does not name \{sibling\}",
        ),
        (
            {"teacher": {"context": ["{prompt} {sibling}"]}, "judge": JUDGE, "prompts": {"chat_template": False}},
            r"must end with \{prompt\}, and it is '\{prompt\} \{sibling\}'",
        ),
        ({"teacher": {"context": []}}, "an empty list"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_config_loads(over: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Experiment.model_validate(merge(GOLDEN, over))


def test_the_evaluation_reads_the_context_only_if_it_asks_the_teacher() -> None:
    over = {"teacher": {"context": "{answer} {prompt}"}}
    asks = validated(merge(GOLDEN, over))
    silent = validated(merge(GOLDEN, over | {"evaluate": {"kl_prompts": 0}}))
    assert asks is not None and silent is not None
    assert set(asks.contexts) == {"train", "eval"} and set(silent.contexts) == {"train"}


def test_contexts_of_samples_are_not_made_with_the_prompts() -> None:
    judged = {"judge": JUDGE, "rollout": {"num_generations": 2}}
    single, listed, plain = (
        validated(merge(GOLDEN, {"teacher": {"context": context}} | judged))
        for context in ("{prompt} {sibling} {answer}", ["{sibling}", "{prompt} {hint}"], "{prompt} {hint}")
    )
    assert single is not None and listed is not None and plain is not None
    assert single.contexts == listed.contexts == {} and set(plain.contexts) == {"train", "eval"}
    assert single.context_columns == {"answer": True} and listed.context_columns == {"hint": False}
    assert plain.context_columns is None and plain.sample_contexts == ()
    assert (needs_judge(single), needs_judge(listed), needs_judge(plain)) == (True, True, False)


def test_the_whole_vocabulary_of_a_self_teacher_is_the_students() -> None:
    over = {"teacher": {"source": {"kind": "initial"}, "warmup": None, "context": "{answer}"}}
    data = merge(GOLDEN, over | {"objective": {"support": {"kind": "full"}}})
    assert Experiment.model_validate(data).objective.support.k == 264  # type: ignore[union-attr]
