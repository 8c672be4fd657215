"""Completions that came with the prompts are refused where rollouts cannot take them, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import config, family, prompt_files

from flows.experiment import experiment_of
from flows.run.check import check_experiment
from flows.run.runner import run_experiment
from storage.errors import InputError
from tasks.inputs.tokenizers import build_byte_tokenizer

pytestmark = pytest.mark.usefixtures("own_workers")
GIVEN = {"kind": "mixture", "on_policy_fraction": 0.5, "completions": "prompts"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


def rows(folder: Path, *completions: str | None, column: str = "completion", **more: Any) -> Path:
    """train.jsonl with a prompt per completion; None: without."""
    file = prompt_files(folder)
    lines = [
        {"prompt": f"Say {n}", **({column: text} if text is not None else {}), **more}
        for n, text in enumerate(completions)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def experiment(student: Path, file: Path, behaviour: dict[str, Any] = GIVEN, **sections: Any) -> Any:
    rollout = {"behaviour": behaviour, **sections.pop("rollout", {})}
    return experiment_of(config(student, student, file, rollout=rollout, **sections), "test")


def refused(folder: Path, *given: Any, **sections: Any) -> list[str]:
    try:
        list(check_experiment(experiment(*given, **sections), folder / "store"))
    except InputError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (("one", None, "three", None), "2 of 4 prompts that rounds draw have none ({file}:2, {file}:4); give each row"),
        (("one", "two", "", "four"), "1 of 4 prompts that rounds draw have an empty one ({file}:3); remove"),
        (
            ("one", "a" * 12, "three", "b" * 11),
            "rollout.max_completion_length, 12 ({file}:2: 13 tokens); set it to 13, or",
        ),
    ],
    ids=["missing", "empty", "long"],
)
def test_a_bad_completion_is_refused_with_its_line(tmp_path, student, completions, message):
    file = rows(tmp_path, *completions)
    found = refused(tmp_path, student, file)
    assert len(found) == 1 and found[0].startswith(
        "rollout.behaviour: 'mixture' takes the completions of prompts.train"
    )
    named = message.format(file=file)
    assert all(part in found[0] for part in named.split(", and "))


def test_a_column_of_another_name_is_named_and_all_findings_come_at_once(tmp_path, student):
    file = rows(tmp_path, *["fine"] * 4, column="response")
    (found,) = refused(tmp_path, student, file)
    assert "4 of 4 prompts" in found and f"{file}:" in found and "prompts.train.columns: {completion: NAME}" in found
    renamed = {"train": {"kind": "file", "path": str(file), "columns": {"completion": "response"}}}
    assert refused(tmp_path, student, file, prompts=renamed) == []
    assert len(refused(tmp_path, student, rows(tmp_path, "", None, "c" * 40, "fine"))) == 3


def test_ids_that_the_student_lacks_are_refused(tmp_path):
    """The tokenizer has an id past the rows of the student, which no prompt needs."""
    student = family(tmp_path / "model", "qwen3", vocab_size=260)
    last = build_byte_tokenizer().convert_ids_to_tokens(260)
    file = rows(tmp_path, "one", f"two{last}", "three", "four")
    (found,) = refused(tmp_path, student, file, prompts={"chat_template": False})
    assert f"lacks ({file}:2: id 260)" in found and "260 rows" in found


def test_only_what_rollouts_read_counts(tmp_path, student):
    fine = rows(tmp_path, *(f"word {n}" for n in range(4)))
    assert refused(tmp_path, student, fine) == []
    bad = rows(tmp_path, None, "", "c" * 40, "fine")
    for behaviour in (GIVEN | {"on_policy_fraction": 1}, GIVEN | {"completions": "teacher"}, {"kind": "student"}):
        assert refused(tmp_path, student, bad, behaviour) == []
    assert refused(tmp_path, student, bad, policy={"rounds": 0}) == []


def test_a_run_is_refused_before_its_first_worker_starts(tmp_path, student):
    file = rows(tmp_path, "one", "", "three", "four")
    with pytest.raises(InputError, match=rf"have an empty one \({file}:2\)"):
        run_experiment(experiment(student, file), name="x", root=tmp_path / "store", prefect=False)
    assert [path.name for path in (tmp_path / "store" / "runs" / "x" / "logs").iterdir()] == ["run.log"]
