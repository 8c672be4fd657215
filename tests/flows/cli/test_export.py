"""What `opd export` leaves behind is the student that the run recorded, or nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from flows.cli.app import main
from flows.run.card import base_of
from storage.artifacts.digests import weights_digest
from storage.runs import Run, StageState


@pytest.fixture
def export(monkeypatch, capsys, example_store):
    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opd", "export", *map(str, args), "--root", str(example_store)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return call


def recorded(root: Path, round: int) -> str:
    return str(Run.open(root, "demo").state.rounds[round].student_sha256)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(("args", "round"), [([], 2), (["--round", 1], 1), (["--round", 0], 0)])
def test_the_copy_is_the_recorded_student(args, round, export, example_store, tmp_path):
    target = tmp_path / "deep" / "student"
    code, out, err = export("demo", target, *args)
    assert (code, err) == (0, "")
    assert files(target) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert recorded(example_store, round) in out
    assert weights_digest(target) == recorded(example_store, round)
    assert files(target.parent)[:1] == ["README.md"]  # no temporary folder stays beside it


def test_an_empty_folder_is_filled_and_json_says_where(export, example_store, tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    code, out, _ = export("demo", target, "--json")
    said = json.loads(out)
    assert code == 0
    assert said == {
        "run": "demo",
        "round": 2,
        "directory": str(target),
        "student_sha256": recorded(example_store, 2),
    }


def test_the_teacher_is_copied_after_its_warm_up(export, example_store, tmp_path):
    target = tmp_path / "teacher"
    code, _, err = export("demo", target, "--teacher")
    assert code == 2 and "has made no teacher yet" in err and not target.exists()
    run = Run.open(example_store, "demo")
    with run.lock():
        state = run.state
        made = state.rounds[1].stages["train"].artifacts["student"]  # any other checkpoint
        state.rounds[0].stages["warmup_teacher"] = StageState(state="done", artifacts={"student": made})
        run.save(state)
    code, out, err = export("demo", target, "--teacher")
    assert (code, err) == (0, "")
    assert weights_digest(target) == recorded(example_store, 1) and recorded(example_store, 1) in out


def test_changing_the_copy_leaves_the_store_alone(export, example_store, tmp_path):
    target = tmp_path / "student"
    export("demo", target)
    with (target / "model.safetensors").open("r+b") as file:
        file.write(b"garbage")
    assert export("demo", tmp_path / "again")[0] == 0
    assert weights_digest(tmp_path / "again") == recorded(example_store, 2)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_nothing_is_overwritten(what, export, tmp_path):
    target = tmp_path / "student"
    if what == "folder":
        target.mkdir()
    mine = target / "mine" if what == "folder" else target
    mine.write_text("keep")
    code, _, err = export("demo", target)
    assert code == 2 and "choose another DIR" in err
    assert mine.read_text() == "keep" and len(list(tmp_path.iterdir())) == 2  # with the store


def test_an_unknown_round_is_answered_with_the_finished_ones(export, tmp_path):
    code, _, err = export("demo", tmp_path / "student", "--round", 7)
    assert code == 2 and "finished rounds: 0, 1, 2" in err


def test_a_damaged_student_is_not_exported(export, example_store, tmp_path):
    import os

    key = Run.open(example_store, "demo").state.rounds[2].stages["train"].artifacts["student"]
    path = next((example_store / "artifacts" / "student" / key).rglob("*.safetensors"))
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, out, err = export("demo", tmp_path / "student")
    assert code == 1 and out == "" and "sha256" in err
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    code, _, err = export("demo", tmp_path / "student")  # the file is in quarantine now
    assert code == 1 and "opd resume demo" in err
    assert export("demo", tmp_path / "student", "--round", 1)[0] == 0


def test_a_card_says_what_the_student_is(export, example_store, tmp_path):
    code, _, err = export("demo", tmp_path / "student", "--round", 1)
    assert (code, err) == (0, "")
    head, _, text = (tmp_path / "student" / "README.md").read_text().removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["on-policy-distillation", "opdflow"],
    }
    assert "# demo, round 1" in text and "| base model | `small` |" in text
    assert "| teacher | acme/large at `0123abc` |" in text and f"`{recorded(example_store, 1)}`" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| accuracy |")]
    metrics = Run.open(example_store, "demo").state.rounds
    for number in (0, 1):
        assert f"{metrics[number].metrics['accuracy_greedy']:.1%}" in row
    assert "/models" not in text and "/data" not in text  # no folder of this machine


def test_the_card_of_a_base_model_keeps_its_licence(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [chat]\n---\n# Base\n")
    assert base_of({"kind": "checkpoint", "path": str(folder)}) == (None, "apache-2.0")
    assert base_of({"kind": "hub", "repo": "acme/base", "revision": "1"}) == ("acme/base", None)
    assert base_of({"kind": "architecture"}) == (None, None)


def test_best_is_the_round_of_the_highest_accuracy(export, example_store, tmp_path):
    metrics = {r.round: r.metrics["accuracy_greedy"] for r in Run.open(example_store, "demo").state.rounds}
    expected = max(metrics, key=lambda round: (metrics[round], -round))
    code, out, _ = export("demo", tmp_path / "student", "--best")
    assert code == 0 and recorded(example_store, expected) in out
    code, _, err = export("demo", tmp_path / "other", "--best", "--round", 1)
    assert code == 2 and "both are given" in err


CONVERTER = """#!/usr/bin/env python
import sys, pathlib
folder, _, out, _, kind = sys.argv[1:]
pathlib.Path(out).write_text(f"{kind} of {sorted(p.name for p in pathlib.Path(folder).iterdir())[0]}")
"""


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """In the place of llama.cpp's, which is not installed here."""
    place = tmp_path / "llama.cpp"
    place.mkdir()
    script = place / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    return script


def test_gguf_is_written_by_the_converter_on_path(export, example_store, tmp_path, converter):
    target = tmp_path / "student"
    code, out, err = export("demo", target, "--gguf", "q8_0")
    assert (code, err) == (0, "") and out.endswith(f"and in {target / 'student-q8_0.gguf'}\n")
    assert (target / "student-q8_0.gguf").read_text() == "q8_0 of README.md"
    assert weights_digest(target) == recorded(example_store, 2)
    assert json.loads(export("demo", tmp_path / "b", "--gguf", "f16", "--json")[1])["gguf"].endswith("b-f16.gguf")


def test_a_converter_that_fails_leaves_the_checkpoint_and_its_last_line(export, example_store, tmp_path, converter):
    converter.write_text('import sys; sys.exit("reading\\nBPE pre-tokenizer was not recognized")')
    target = tmp_path / "student"
    code, _, err = export("demo", target, "--gguf", "f16")
    assert code == 1 and "BPE pre-tokenizer was not recognized" in err and "Traceback" not in err
    assert weights_digest(target) == recorded(example_store, 2)
    assert files(target) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(("kind", "why"), [("q4_0", "choose one of f32"), ("f16", "is not on PATH")])
def test_gguf_is_refused_before_anything_is_copied(export, tmp_path, monkeypatch, kind, why):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = export("demo", tmp_path / "student", "--gguf", kind)
    assert code == 2 and "--gguf" in err and why in err and not (tmp_path / "student").exists()
