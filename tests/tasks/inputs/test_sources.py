"""Rows as files of other programs hold them: text that is none, other formats, what Arrow adds, numbers."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import InputError
from tasks.inputs.rows import Row
from tasks.inputs.sources import FileSource, corrected, read_rows, source_identity

ASK = [{"role": "user", "content": "add"}]
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\6\0\0\0"), pa.py_buffer(b"ok\xc3\xa9\xffx")]
)
"""Two strings; the second is an e with an accent, a byte that is no UTF-8, an x."""


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, table: Any) -> Path:
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), path)
    return path


def rows(path: Path, **fields: Any) -> list[Row]:
    return read_rows(FileSource(path=path, **fields))[0]


def refusal(path: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        rows(path, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "column", "character"),
    [
        ({"prompt": "cut \ud83d"}, "prompt", 4),
        ({"prompt": "a", "answer": "\ud83d"}, "answer", 0),
        ({"prompt": "a", "completion": "ab\udc00"}, "completion", 2),
        ({"prompt": "a", "teacher_prompt": "\udfff"}, "teacher_prompt", 0),
        ({"prompt": "a", "id": "x\ud800"}, "id", 1),
        ({"prompt": "a", "teacher_id": "\ud800"}, "teacher_id", 0),
        ({"messages": [{"role": "system", "content": "be\ud83d"}, *ASK]}, "messages[0].content", 2),
        ({"messages": json.dumps([{"role": "user", "content": "\ud83d"}])}, "messages[0].content", 0),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"arguments": {"x": "\ud83d"}}]}]},
         "messages[0].tool_calls[0].arguments.x", 0),
    ],
)  # fmt: skip
def test_half_of_a_surrogate_pair_is_named_by_place(tmp_path, row, column, character):
    message = refusal(lines(tmp_path / "a.jsonl", {"prompt": "fine"}, row))
    assert f"a.jsonl:2: {column}: character {character} " in message


def test_bytes_that_are_no_utf8_are_named_by_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "fine"}\n{"prompt": "a\xc3\xa9\xff"}\n')
    assert "a.jsonl:2: prompt: character 2 is byte 0xff" in refusal(tmp_path / "a.jsonl")
    flat = parquet(tmp_path / "a.parquet", pa.table({"prompt": NOT_UTF8}))
    assert "a.parquet, row 1: prompt: character 1 is byte 0xff" in refusal(flat)
    message = pa.StructArray.from_arrays([pa.array(["user"] * 2), NOT_UTF8], ["role", "content"])
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), message)
    assert "b.parquet, row 1: messages: character 1 is" in refusal(
        parquet(tmp_path / "b.parquet", pa.table({"messages": nested}))
    )
    (tmp_path / "utf16.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-16")
    assert "utf16.jsonl:1: the file is UTF-16" in refusal(tmp_path / "utf16.jsonl")


def test_text_of_columns_that_are_not_read_and_whole_pairs_are_no_matter(tmp_path):
    found = rows(lines(tmp_path / "a.jsonl", '{"prompt": "\\ud83d\\ude00", "junk": "\\ud83d"}\n'))
    assert [row.prompt for row in found] == ["\N{GRINNING FACE}"]
    assert len(rows(parquet(tmp_path / "a.parquet", pa.table({"prompt": ["a", "b"], "junk": NOT_UTF8})))) == 2


def test_a_list_in_prompt_is_messages_and_a_mapped_column_is_read_once(tmp_path):
    trl = lines(
        tmp_path / "a.jsonl", {"prompt": ASK, "answer": "2", "completion": [{"role": "assistant", "content": "4"}]}
    )
    assert rows(trl) == rows(trl, columns={"messages": "prompt"})
    (row,) = rows(trl)
    assert row.prompt == ASK and row.completion == "4"
    verl = [{"data_source": "x", "prompt": ASK, "reward_model": {"style": "rule", "ground_truth": "7"}}]
    for path in (lines(tmp_path / "b.jsonl", *verl), parquet(tmp_path / "b.parquet", verl)):
        assert [(r.prompt, r.answer) for r in rows(path, columns={"answer": "reward_model.ground_truth"})] == [
            (ASK, "7")
        ]
    swapped = FileSource(path=lines(tmp_path / "c.jsonl", {"prompt": "a", "id": "7"}), columns={"answer": "id"})
    (row,) = read_rows(swapped)[0]
    assert (row.answer, row.id) == ("7", None)
    assert corrected(swapped) == ["columns"]
    both = rows(swapped.path, columns={"answer": "id", "id": "id"})
    assert (both[0].answer, both[0].id) == ("7", "7")


def call(**arguments: Any) -> dict[str, Any]:
    function = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [function]}


TOOLS = [
    {"messages": [*ASK, call(city="Oslo"), {"role": "tool", "content": "cold"}]},
    {"messages": [*ASK, call(zone="CET", deep={"a": [{"x": 1}, {"y": 2}]}), {"role": "tool", "content": "noon"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
]


def test_nulls_that_arrow_made_do_not_reach_a_prompt(tmp_path):
    expected = [row.prompt for row in rows(lines(tmp_path / "a.jsonl", *TOOLS[:2]))]
    assert expected == [row["messages"] for row in TOOLS[:2]]
    table = parquet(tmp_path / "a.parquet", TOOLS[:2])
    datasets.Dataset.from_list(TOOLS[:2]).save_to_disk(str(tmp_path / "saved"))
    as_prompt = parquet(tmp_path / "b.parquet", [{"prompt": row["messages"]} for row in TOOLS[:2]])
    for path in (table, tmp_path / "saved", as_prompt):
        assert [row.prompt for row in rows(path)] == expected
    parts = parquet(tmp_path / "c.parquet", TOOLS[2:])
    assert [row.prompt for row in rows(parts)] == [[{"role": "user", "content": "ab"}]]
    teacher = parquet(tmp_path / "d.parquet", [{"prompt": "a", "teacher_prompt": row["messages"]} for row in TOOLS[:2]])
    assert [row.teacher_prompt for row in rows(teacher)] == expected
    own = {"messages": [*ASK, call(city=None), *ASK]}  # the user's own null, which JSON keeps
    assert rows(lines(tmp_path / "own.jsonl", own))[0].prompt == own["messages"]


def test_only_files_that_are_read_otherwise_than_before_get_another_key(tmp_path):
    def reading(path: Path) -> Any:
        return source_identity(FileSource(path=path)).get("reading")

    assert reading(parquet(tmp_path / "a.parquet", TOOLS[:1])) is None
    assert reading(parquet(tmp_path / "b.parquet", TOOLS[:2])) == ["nulls"]
    assert reading(parquet(tmp_path / "c.parquet", [{"prompt": "a", "answer": 0.5}])) is None
    assert reading(parquet(tmp_path / "d.parquet", [{"prompt": "a", "answer": 2.0}])) == ["numbers"]
    assert reading(lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": 2}, {"prompt": "b", "answer": "2.0"})) is None
    assert reading(lines(tmp_path / "b.jsonl", {"prompt": "a", "answer": 2.0})) == ["numbers"]
    assert reading(lines(tmp_path / "c.jsonl", '{"prompt": "a", "id" : -1E1}\n')) == ["numbers"]
    assert source_identity(FileSource(path=tmp_path / "a.jsonl")).keys() == {"kind", "content", "columns", "limit"}


NUMBERS = [
    (2.0, "2"), (-3.0, "-3"), (-0.0, "0"), (0.5, "0.5"), (1e16, "10000000000000000"), (1e300, "1e+300"), (7, "7"),
    (10**30, "1" + "0" * 30), (float("nan"), None), (float("inf"), None), (None, None), ("2.0", "2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "answer"), NUMBERS)
def test_an_integral_double_is_an_integer_and_no_number_is_no_answer(tmp_path, value, answer):
    (row,) = rows(lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": value, "teacher_id": value}))
    assert (row.answer, row.teacher_id) == (answer, answer)
    if isinstance(value, float):
        (row,) = rows(parquet(tmp_path / "a.parquet", pa.table({"prompt": ["a"], "answer": [value], "id": [value]})))
        assert (row.answer, row.id) == (answer, answer)


def test_numbers_of_other_arrow_types(tmp_path):
    for values, answers in [
        (pa.array([0.1, 2.0, None], pa.float32()), ["0.1", "2", None]),
        (pa.array([0.5, 2.0, None], pa.float16()), ["0.5", "2", None]),
        (pa.array([Decimal("2.00"), Decimal("2.50"), None]), ["2", "2.5", None]),
        (pa.array([2.0, None, 6.0]), ["2", None, "6"]),
        (pa.array([2, None, 6], pa.uint8()), ["2", None, "6"]),
    ]:
        path = parquet(tmp_path / "a.parquet", pa.table({"prompt": ["a", "b", "c"], "answer": values}))
        assert [row.answer for row in rows(path)] == answers
    truth = parquet(tmp_path / "b.parquet", pa.table({"prompt": ["a"], "answer": [True]}))
    assert "b.parquet, row 0: answer must be text or a number, found true" in refusal(truth)
    empty = pa.table(
        {"prompt": ["a"], "completion": pa.array([float("nan")]), "teacher_prompt": pa.array([float("nan")])}
    )
    (row,) = rows(parquet(tmp_path / "c.parquet", empty))  # a text column of which pandas knew only missing values
    assert (row.completion, row.teacher_prompt) == (None, None)


def test_dot_names_in_a_folder_are_left_out(tmp_path):
    folder = tmp_path / "data"
    for name in ("a.jsonl", "sub/b.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines(folder / name, {"prompt": name})
    before = source_identity(FileSource(path=folder))
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "sub/.b.jsonl", "__MACOSX/._a.jsonl", ".git/x.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"draft")
    assert [row.prompt for row in rows(folder)] == ["a.jsonl", "sub/b.jsonl"]
    assert source_identity(FileSource(path=folder)) == before
    inside_hidden = tmp_path / ".cache" / "data"
    inside_hidden.mkdir(parents=True)
    lines(inside_hidden / "a.jsonl", {"prompt": "x"})
    assert len(rows(inside_hidden)) == 1  # the folder that the user names may be anywhere


def test_no_content_beside_tool_calls_is_the_empty_text(tmp_path):
    said = {**call(city="Oslo"), "content": None}
    without = {name: value for name, value in said.items() if name != "content"}
    for name, message in (("a", said), ("b", without)):
        record = {"messages": [*ASK, message, {"role": "tool", "content": "cold"}]}
        for path in (lines(tmp_path / f"{name}.jsonl", record), parquet(tmp_path / f"{name}.parquet", [record])):
            prompt = rows(path)[0].prompt
            assert isinstance(prompt, list) and prompt[1] == call(city="Oslo")
    assert "messages[0] must have a role" in refusal(
        lines(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": None}]})
    )


def test_a_teacher_prompt_is_messages_only_where_it_is_their_json(tmp_path):
    texts = ["[{1, 2}, {3}] is a list of sets", '[{"a": 1}]', "[{", '[{"role": "user", "content": "z"}]']
    found = rows(lines(tmp_path / "a.jsonl", *({"prompt": str(i), "teacher_prompt": t} for i, t in enumerate(texts))))
    assert [row.teacher_prompt for row in found] == [*texts[:3], [{"role": "user", "content": "z"}]]


def test_formats_of_others_are_read_or_refused_with_the_field_to_set(tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = lines(tmp_path / "a.jsonl", {"conversations": turns})
    assert "columns: {messages: conversations}" in refusal(path)
    assert "last_turn_is_completion: true" in refusal(path, columns={"messages": "conversations"})
    (row,) = rows(path, columns={"messages": "conversations"}, last_turn_is_completion=True)
    assert row.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert row.completion == "a"
    for name in ("question", "problem", "instruction"):
        assert f"columns: {{prompt: {name}}}" in refusal(lines(tmp_path / "b.jsonl", {name: "q", "answer": "a"}))
    (tmp_path / "c.json").write_text("[]")
    assert "one JSON object per line" in refusal(tmp_path / "c.json")


def test_a_conversation_and_an_answer_inside_another_column_are_read_like_those_of_their_own(tmp_path):
    """Nulls that Arrow made, and numbers in single precision."""
    talks = [[*ASK, call(city="Oslo")], [*ASK, call(zone="CET")]]
    single = pa.array([{"gt": 0.1}, {"gt": 2.0}], pa.struct([("gt", pa.float32())]))
    fields: dict[str, Any] = {"columns": {"messages": "x.talk", "answer": "r.gt"}}
    for talk in talks:
        talk.append({"role": "tool", "content": "t"})
    nested = parquet(tmp_path / "a.parquet", pa.table({"x": [{"talk": talk} for talk in talks], "r": single}))
    found = rows(nested, **fields)
    assert [row.prompt for row in found] == talks and [row.answer for row in found] == ["0.1", "2"]
    assert corrected(FileSource(path=nested, **fields)) == ["nulls", "numbers"]
    file = lines(tmp_path / "a.jsonl", {"prompt": "a", "r": {"gt": 2.0}})
    assert corrected(FileSource(path=file, columns={"answer": "r.gt"})) == ["numbers"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "answer": "1", "answer": "2"}', "the row has the key 'answer' twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "messages[0] has the key 'content' twice"),
        (
            json.dumps({"messages": '[{"role": "user", "role": "tool", "content": "a"}]'}),
            "messages[0] has the key 'role' twice",
        ),
    ],
)
def test_a_key_that_occurs_twice_is_refused(tmp_path, line, says):
    assert f"a.jsonl:1: {says}" in refusal(lines(tmp_path / "a.jsonl", line + "\n"))


def test_a_key_twice_in_a_column_that_is_not_read_is_no_matter(tmp_path):
    assert (
        rows(lines(tmp_path / "a.jsonl", '{"prompt": "a", "junk": {"b": 1, "b": 2}, "c": 1, "c": 2}\n'))[0].prompt
        == "a"
    )


def test_files_behind_links_are_read_and_a_broken_link_is_refused(tmp_path):
    folder, outside = tmp_path / "d", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    lines(folder / "a.jsonl", {"prompt": "a"})
    lines(outside / "b.jsonl", {"prompt": "b"})
    (folder / "more").symlink_to(outside)
    (outside / "round").symlink_to(folder)  # leads back
    assert [row.prompt for row in rows(folder)] == ["a", "b"]
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    assert "gone.jsonl: a link whose target is missing" in refusal(folder)


def test_files_of_other_formats_in_a_folder_are_reported(tmp_path):
    lines(tmp_path / "A.JSONL", {"prompt": "a"})
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    found, warnings = read_rows(FileSource(path=tmp_path))
    assert [row.prompt for row in found] == ["a"] and ["b.jsonl.gz is not read" in text for text in warnings] == [True]
    (tmp_path / "A.JSONL").unlink()
    assert "b.jsonl.gz is not read; unpack it first" in refusal(tmp_path)


def test_roles_and_texts_that_are_probably_not_meant_are_reported_once(tmp_path):
    talk = [{"from": "Human", "value": "q"}, {"from": "function_call", "value": "{}"}, {"from": "Human", "value": "r"}]
    text = json.dumps(ASK)
    source = FileSource(path=lines(tmp_path / "a.jsonl", *[{"messages": talk}] * 2, *[{"prompt": text}] * 2))
    found, warnings = read_rows(source)
    assert [message["role"] for message in found[0].prompt] == ["user", "function_call", "user"]
    assert [text.partition(": ")[0] for text in warnings] == [f"{source.path}:1", f"{source.path}:3"]
    assert "'function_call'" in warnings[0] and "columns: {messages: prompt}" in warnings[1]


def test_no_tool_calls_may_be_an_empty_list_and_a_null_prompt_is_called_one(tmp_path):
    turn = {"role": "assistant", "content": "a", "tool_calls": []}
    file = lines(tmp_path / "a.jsonl", {"messages": [*ASK, turn]}, {"prompt": "b", "completion": [turn]})
    assert [row.completion for row in rows(file, last_turn_is_completion=True)] == ["a", "a"]
    assert "b.jsonl:2: its prompt is null" in refusal(lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": None}))
    file = lines(tmp_path / "d.jsonl", {"question": "a"}, {"question": None})
    assert "d.jsonl:2: its question is null; remove" in refusal(file, columns={"prompt": "question"})
    other = lines(tmp_path / "e.jsonl", {"question": "a"}, {"q": "b"})
    assert "e.jsonl:2: it has no column 'question' (columns.prompt); found q" in refusal(
        other, columns={"prompt": "question"}
    )
    table = pa.table({"prompt": pa.array([b"a"], pa.binary())})
    assert "prompt is bytes" in refusal(parquet(tmp_path / "c.parquet", table))
