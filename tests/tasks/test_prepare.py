"""Prompts: read from every kind of source, filtered and counted, disjoint, rendered and tokenised for both models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_models import Bench, checkpoint

from storage.errors import InputError
from storage.store import Artifact, Store
from tasks.inputs.addition import ANSWER_PATTERN, AdditionSource, additions, answer, scratchpad
from tasks.inputs.models import CheckpointModel, model_work
from tasks.inputs.prompts import PrepareConfig
from tasks.inputs.verifiers import ExactMatch, verify
from tasks.prepare import prepare_work

USER, END, ASSISTANT = 259, 257, 260


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return checkpoint(folder / "student"), checkpoint(folder / "teacher", seed=1, hidden_size=64)


class Desk(Bench):
    """A bench with student and teacher on it."""

    student: Artifact
    teacher: Artifact

    def prepare(self, teacher: bool = True, **fields) -> Artifact:
        config = PrepareConfig.model_validate(fields)
        return self.build(prepare_work(config, self.student, self.teacher if teacher else None))

    def rows(self, artifact: Artifact, split: str) -> list[dict]:
        return [row for row in self.store.read_table(artifact, "prompts").to_pylist() if row["split"] == split]


@pytest.fixture
def desk(tmp_path, checkpoints) -> Desk:
    desk = Desk(Store(tmp_path / "store"))
    desk.student, desk.teacher = (desk.build(model_work(CheckpointModel(path=path), 0)) for path in checkpoints)
    return desk


def write(path: Path, rows: list) -> dict:
    """A JSONL file and the source that reads it."""
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return {"kind": "file", "path": path}


def test_prompt_becomes_a_user_message(desk, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "answer": 2, "id": 7, "completion": "2"}])
    artifact = desk.prepare(train=source)
    (row,) = desk.rows(artifact, "train")
    assert row == {
        "prompt_id": "7",
        "split": "train",
        "text": "<|user|>1+1=<|end|><|assistant|>",
        "messages": None,
        "token_ids": [USER, *b"1+1=", END, ASSISTANT],
        "teacher_token_ids": None,
        "answer": "2",
        "completion": "2",
        "completion_token_ids": [*b"2", END],
        "teacher_id": None,
    }
    assert artifact.meta["longest_prompt"] == 7


def test_plain_prompts_are_tokenised_as_they_are(desk, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    (row,) = desk.rows(desk.prepare(train=source, chat_template=False, append_eos=False), "train")
    assert (row["token_ids"], row["completion_token_ids"]) == ([*b"1+1="], [*b"2"])


def test_messages_in_every_file_format_give_the_same_rows(desk, tmp_path):
    import datasets

    talks = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in ("ab", "cd")]
    records = [{"messages": talk, "id": str(index)} for index, talk in enumerate(talks)]
    write(tmp_path / "a.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    as_text = [{**record, "messages": json.dumps(record["messages"])} for record in records]
    pq.write_table(pa.Table.from_pylist(as_text), tmp_path / "text.parquet")
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, record in enumerate(records):
        write(folder / f"{index}.jsonl", [record])
    names = ("a.jsonl", "a.parquet", "text.parquet", "saved", "folder")
    found = [desk.prepare(train={"kind": "file", "path": tmp_path / name}) for name in names]
    rows = desk.rows(found[0], "train")
    assert [row["text"] for row in rows] == [
        f"<|system|>Be brief.<|end|><|user|>{text}<|end|><|assistant|>" for text in ("ab", "cd")
    ]
    assert json.loads(rows[0]["messages"]) == talks[0]
    assert {artifact.content["prompts"] for artifact in found} == {found[0].content["prompts"]}


def test_template_arguments_reach_the_template(desk, tmp_path, checkpoints):
    folder = Path(shutil.copytree(checkpoints[0], tmp_path / "thinking"))
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0]['content'] }}{% if think %}T{% endif %}{% if add_generation_prompt %}>{% endif %}"
    )
    desk.student = desk.build(model_work(CheckpointModel(path=folder), 0))
    source = write(tmp_path / "a.jsonl", [{"prompt": "x"}])

    def text(**fields):
        return desk.rows(desk.prepare(teacher=False, train=source, **fields), "train")[0]["text"]

    assert text() == "x>"
    assert text(chat_template_kwargs={"think": True}, add_generation_prompt=False) == "xT"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no way') }}")
    desk.student = desk.build(model_work(CheckpointModel(path=folder), 0))
    with pytest.raises(InputError, match=r"a\.jsonl:1: the chat template rejects it .*no way"):
        text()


def test_bad_prompts_are_left_out_counted_and_said(desk, tmp_path):
    rows = ["\n", {"prompt": "good"}, {"prompt": " \n"}, {"prompt": "x" * 50}, {"prompt": "good"}, {"prompt": "other"}]
    artifact = desk.prepare(train=write(tmp_path / "a.jsonl", rows), max_prompt_length=20)
    assert [row["text"][len("<|user|>") :].split("<")[0] for row in desk.rows(artifact, "train")] == ["good", "other"]
    assert artifact.meta["filtered"] == {"train": {"duplicate": 1, "empty": 1, "overlong": 1}}
    assert artifact.meta["prompts"] == {"eval": 0, "train": 2, "warmup": 0}
    for second, reason in (("a", "duplicate"), ("b", "duplicate with another teacher_id")):
        rows = [{"prompt": "good", "teacher_id": name, "id": str(at)} for at, name in enumerate(("a", second))]
        artifact = desk.prepare(train=write(tmp_path / f"{second}.jsonl", rows))
        assert artifact.meta["filtered"] == {"train": {reason: 1}}
    assert "train: 2 prompts; left out: 1 duplicate, 1 empty, 1 overlong" in desk.said


def test_splits_share_no_prompt_and_eval_wins(desk, tmp_path):
    def lines(*prompts):
        return [{"prompt": prompt, "completion": "c"} for prompt in prompts]

    artifact = desk.prepare(
        train=write(tmp_path / "train.jsonl", lines("a", "b", "c", "d")),
        eval=write(tmp_path / "eval.jsonl", lines("a", "e")),
        warmup=write(tmp_path / "warmup.jsonl", lines("a", "b", "f")),
    )
    found = {split: {row["text"][8] for row in desk.rows(artifact, split)} for split in ("eval", "train", "warmup")}
    assert found == {"eval": {"a", "e"}, "train": {"b", "c", "d"}, "warmup": {"f"}}
    assert artifact.meta["filtered"] == {"eval": {}, "train": {"in eval": 1}, "warmup": {"in eval": 1, "in train": 1}}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 90), st.integers(0, 3), st.integers(0, 3))
def test_additions_are_right_distinct_and_found_by_their_pattern(digits, count, seed, other):
    rows = list(additions(AdditionSource(digits=digits, count=count, seed=seed)))
    assert len({row["prompt"] for row in rows}) == count
    assert rows == list(additions(AdditionSource(digits=digits, count=count, seed=seed)))
    for row in rows:
        left, right = re.fullmatch(r"(\d+)\+(\d+)=", row["prompt"]).groups()
        assert len(left) == len(right) == digits
        assert int(row["answer"]) == int(left) + int(right)
        assert verify(ExactMatch(extract=ANSWER_PATTERN), row["completion"], row["answer"])
        for column in row["completion"].split("#")[0].split(" "):
            upper, lower, carry, total = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", column).groups())
            assert upper + lower + carry == total
    assert len({len(row["completion"]) for row in rows}) == 1


def test_scratchpad_by_hand():
    assert scratchpad(4821, 1357, 4) == "1+7+0=08 2+5+0=07 8+3+0=11 4+1+1=06#06178"
    assert answer(99, 1, 2) == "100"


def test_generated_splits_are_disjoint_although_they_overlap(desk):
    def source(count, seed):
        return {"kind": "addition", "digits": 1, "count": count, "seed": seed}

    artifact = desk.prepare(train=source(60, 0), eval=source(30, 1), warmup=source(60, 2))
    texts = [row["text"] for row in desk.store.read_table(artifact, "prompts").to_pylist()]
    assert len(set(texts)) == len(texts) and artifact.meta["filtered"]["train"]["in eval"] > 0
    assert artifact.meta["prompts"]["eval"] == 30


def test_too_many_additions_are_refused():
    with pytest.raises(ValidationError, match="only 100 additions of 1 digits exist"):
        AdditionSource(digits=1, count=101)


def test_teacher_prompt_is_what_the_teacher_reads(desk, tmp_path):
    rows = [{"prompt": "q", "teacher_prompt": "q, hint: 4", "teacher_id": "big"}, {"prompt": "r"}]
    first, second = desk.rows(desk.prepare(train=write(tmp_path / "a.jsonl", rows)), "train")
    assert first["teacher_token_ids"] == [USER, *b"q, hint: 4", END, ASSISTANT]
    assert first["teacher_id"] == "big" and second["teacher_token_ids"] is None
    short = desk.prepare(train={"kind": "file", "path": tmp_path / "a.jsonl"}, max_teacher_prompt_length=8)
    assert short.meta["filtered"] == {"train": {"overlong for the teacher": 1}}


def test_teachers_own_template_by_policy(desk, tmp_path, checkpoints):
    folder = Path(shutil.copytree(checkpoints[1], tmp_path / "template"))
    (folder / "chat_template.jinja").write_text("Q: {{ messages[0]['content'] }}")
    desk.teacher = desk.build(model_work(CheckpointModel(path=folder), 0))
    source = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    with pytest.raises(InputError, match="chat templates differ"):
        desk.prepare(train=source)
    by_teacher = desk.prepare(train=source, tokenizers={"on_template_mismatch": "teacher"})
    by_student = desk.prepare(train=source, tokenizers={"on_template_mismatch": "student"})
    assert desk.rows(by_teacher, "train")[0]["teacher_token_ids"] == [*b"Q: x"]
    assert desk.rows(by_student, "train")[0]["teacher_token_ids"] is None
    assert by_teacher.content["audit"] != by_student.content["audit"]


def test_vocabulary_of_both(desk, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    vocabulary = desk.store.read_table(desk.prepare(train=source), "vocabulary").to_pylist()
    assert {(row["tokenizer"], row["text"]) for row in vocabulary if row["id"] == 65} == {
        ("student", "A"),
        ("teacher", "A"),
    }
    alone = desk.store.read_table(desk.prepare(teacher=False, train=source), "vocabulary")
    assert alone.num_rows == len(vocabulary) // 2 == 261


def test_columns_can_be_named_and_unread_ones_are_warned_of(desk, tmp_path):
    source = write(
        tmp_path / "a.jsonl", [{"question": "x", "label": "y", "level": 3}] * 2 + [{"question": "z", "label": "w"}]
    )
    artifact = desk.prepare(train={**source, "columns": {"prompt": "question", "answer": "label"}, "limit": 2})
    (row,) = desk.rows(artifact, "train")
    assert row["answer"] == "y"
    assert artifact.meta["warnings"] == [f"train: {tmp_path / 'a.jsonl'}: column 'level' is not read"]
    with pytest.raises(
        InputError, match=r"no row has the column 'solution' \(columns\.answer\); found label, level, question"
    ):
        desk.prepare(train={**source, "columns": {"prompt": "question", "answer": "solution"}})


MALFORMED = [
    ('{"prompt": "a"\n', r"a\.jsonl:2: not JSON .*found \{\"prompt\": \"a\""),
    ("[1, 2]\n", r"a\.jsonl:2: every line must be a JSON object, found \[1, 2\]"),
    ({"answer": "x"}, r"a\.jsonl:2: neither a prompt nor messages; found answer"),
    ({"prompt": 5}, r"a\.jsonl:2: prompt must be text or a list of messages, found 5"),
    ({"prompt": "a", "messages": []}, r"a\.jsonl:2: has both"),
    ({"messages": []}, r"a\.jsonl:2: messages must be a list of messages, found \[\]"),
    ({"messages": [{"role": "user"}]}, r"a\.jsonl:2: messages\[0\] must have a role and a text content"),
    ({"messages": "not json"}, r"a\.jsonl:2: messages is text but not JSON"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        r"a\.jsonl:2: messages ends with an assistant's turn",
    ),
    ({"prompt": "a", "answer": ["x"]}, r"a\.jsonl:2: answer must be text, found \[\"x\"\]"),
    ({"prompt": "a", "id": ""}, r"a\.jsonl:2: its id is empty"),
    ({"prompt": "a", "id": "first"}, r"a\.jsonl:2: id 'first' is also the id of another prompt \(.*a\.jsonl:1\)"),
    (b"\xff\xfe\n", r"a\.jsonl:2: not JSON"),
]


@pytest.mark.parametrize("line, message", MALFORMED)
def test_malformed_lines_are_named(desk, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    text = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(b'{"prompt": "fine", "id": "first"}\n' + text)
    with pytest.raises(InputError, match=message):
        desk.prepare(train={"kind": "file", "path": path})


def test_missing_and_unreadable_sources(desk, tmp_path):
    def error(name):
        with pytest.raises(InputError) as caught:
            desk.prepare(train={"kind": "file", "path": tmp_path / name})
        return str(caught.value)

    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "splits" / "train").mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    assert "no such prompt file" in error("missing.jsonl")
    assert "found '.txt'" in error("a.txt")
    assert "not a readable Parquet file" in error("bad.parquet")
    assert "no .parquet or .jsonl in this folder" in error("empty")
    assert "no rows" in error("none.jsonl")
    assert "several splits (train)" in error("splits")


def test_nothing_left_is_an_error(desk, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "x" * 90}, {"prompt": ""}])
    with pytest.raises(InputError, match=r"train: none of 2 prompts is left \(1 empty, 1 overlong\)"):
        desk.prepare(train=source, max_prompt_length=20)


def test_warmup_needs_completions(desk, tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl:1: a warmup row needs a completion"):
        desk.prepare(warmup=write(tmp_path / "a.jsonl", [{"prompt": "x"}]))


def test_key_follows_content_not_place(desk, tmp_path):
    def key(source, **fields):
        config = PrepareConfig.model_validate({"train": source, **fields})
        return prepare_work(config, desk.student, desk.teacher).outputs["prepare"].key

    here = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    there = write(tmp_path / "b.jsonl", [{"prompt": "x"}])
    assert key(here) == key(there)
    assert key(here) != key(here, max_prompt_length=9)
    assert key(here) != key({**here, "limit": 1})
    write(tmp_path / "b.jsonl", [{"prompt": "y"}])
    assert key(here) != key(there)


def test_other_train_prompts_leave_the_evaluation_digest(desk, tmp_path):
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "e"}])
    first = desk.prepare(eval=held_out, train=write(tmp_path / "a.jsonl", [{"prompt": "x"}]))
    second = desk.prepare(eval=held_out, train=write(tmp_path / "b.jsonl", [{"prompt": "y"}]))
    assert first.content["prompts:eval"] == second.content["prompts:eval"]
    assert first.content["prompts:train"] != second.content["prompts:train"]


def test_source_that_changes_after_planning_is_noticed(desk, tmp_path):
    config = PrepareConfig.model_validate({"train": write(tmp_path / "a.jsonl", [{"prompt": "x"}])})
    work = prepare_work(config, desk.student, desk.teacher)
    write(tmp_path / "a.jsonl", [{"prompt": "y"}])
    with pytest.raises(InputError, match="changed while it was read"):
        desk.build(work)
    assert desk.store.list("prepare") == []


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "no prompts: give train, eval or warmup"),
        (
            {"train": {"kind": "file", "path": "a"}, "chat_template_kwargs": {"tokenize": True}},
            "'tokenize' is set by this",
        ),
        ({"train": {"kind": "sql"}}, "sql"),
        ({"train": {"kind": "file", "path": "a", "column": {}}}, "column"),
        (
            {"train": {"kind": "file", "path": "a", "columns": {"question": "q"}}},
            "'question' is not a column of prompts",
        ),
    ],
)
def test_bad_configs_are_refused_when_loaded(fields, message):
    with pytest.raises(ValidationError, match=message):
        PrepareConfig.model_validate(fields)


def test_model_without_tokenizer_is_refused(desk, tmp_path):
    bare = desk.student.model_copy(update={"content": {"weights": "0"}})
    config = PrepareConfig.model_validate({"train": write(tmp_path / "a.jsonl", [{"prompt": "x"}])})
    with pytest.raises(InputError, match="this model has no tokenizer"):
        prepare_work(config, bare, None)


def test_equal_ids_of_two_splits_can_be_set_aside(desk, tmp_path):
    train = write(tmp_path / "train.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}])
    held_out = write(tmp_path / "eval.jsonl", [{"prompt": "c", "id": 1}])
    with pytest.raises(InputError, match=r"train\.jsonl:1: id '1' .*eval\.jsonl:1.*prompts\.equal_ids"):
        desk.prepare(train=train, eval=held_out)
    left = desk.prepare(train=train, eval=held_out, equal_ids="leave_out")
    assert [row["prompt_id"] for row in desk.rows(left, "train")] == ["2"]
    assert left.meta["filtered"]["train"] == {"id in eval": 1}
    renamed = desk.prepare(train=train, eval=held_out, equal_ids="rename")
    assert [row["prompt_id"] for row in desk.rows(renamed, "train")] == ["train:1", "2"]
    assert [row["prompt_id"] for row in desk.rows(renamed, "eval")] == ["1"]


def test_an_end_of_sequence_is_demanded_only_where_a_completion_needs_it(desk, tmp_path, checkpoints):
    folder = tmp_path / "endless"
    shutil.copytree(checkpoints[0], folder)
    settings_file = folder / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"eos_token": None}))
    desk.student = desk.build(model_work(CheckpointModel(path=folder), 0))
    without = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    assert desk.prepare(teacher=False, train=without).rows["prompts"] == 1
    with pytest.raises(InputError, match=r"b\.jsonl:1: append_eos: .*prompts\.append_eos: false"):
        desk.prepare(teacher=False, train=write(tmp_path / "b.jsonl", [{"prompt": "x", "completion": "y"}]))
