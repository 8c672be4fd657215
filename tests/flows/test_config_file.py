"""Configs as they are written: files, overrides, short forms, numbers and paths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import CHECKOUT, TINY

from flows.config_file import parse_override, read_yaml
from flows.experiment import load_experiment
from flows.study.spec import load_study, nested
from storage.errors import ConfigError
from storage.identity import canonical_json
from storage.runs import Run


def refused(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(TINY, list(changes))
    return str(caught.value)


def test_a_config_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ConfigError, match=r"no such config file; did you mean 'mine.yaml'\?"):
        load_experiment(tmp_path / "mine.yml", [])
    with pytest.raises(ConfigError, match=r"no such config file$"):
        load_experiment(tmp_path / "elsewhere" / "mine.yml", [])


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1"])
def test_a_malformed_override_shows_the_form(text):
    with pytest.raises(ConfigError, match=r"FIELD\.FIELD=VALUE"):
        load_experiment(TINY, [text])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("-1E5", -1e5), (".5e3", 500.0), ("2.e-3", 2e-3), ("'1e-5'", "1e-5"), ("3e4f", "3e4f")],
)
def test_numbers_in_scientific_notation_are_numbers(text, value, tmp_path):
    (tmp_path / "config.yaml").write_text(f"a: [{text}]")
    assert read_yaml(tmp_path / "config.yaml") == {"a": [value]}
    assert parse_override(f"a={text}") == {"a": value}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=c.d=e", {"a": {"b": "c.d=e"}}),
        ('teachers."v1.5".source=x', {"teachers": {"v1.5": {"source": "x"}}}),
        ('"a=b.c".d={e: [1]}', {"a=b.c": {"d": {"e": [1]}}}),
        ("a=", {"a": None}),
    ],
)
def test_names_with_dots_stand_in_quotes(text, value):
    assert parse_override(text) == value


@pytest.mark.parametrize("text", ["a.b", "=1", "a..b=1", ".a=1", "a.=1", 'a."".b=1', 'a."b=1', 'a"b".c=1'])
def test_overrides_without_a_field_are_refused(text):
    with pytest.raises(ConfigError, match=r"expected FIELD\.FIELD=VALUE"):
        parse_override(text)


def same(*pairs: tuple[str, str]) -> None:
    for short, long in pairs:
        one, other = (load_experiment(TINY, [text]) for text in (short, long))
        assert one == other
        assert canonical_json(one.identity()) == canonical_json(other.identity()), short


def test_short_forms_are_the_long_forms():
    same(
        ("objective.divergence=jsd", "objective.divergence={kind: jsd}"),
        ("objective.support=student_topk", "objective.support={kind: student_topk}"),
        ("objective.support=full", "objective.support={kind: full, k: 264}"),
        ("objective.token_weight=none", "objective.token_weight={kind: none}"),
        ("evaluate.verifier=math_verify", "evaluate.verifier={kind: math_verify}"),
        ("prompts.train=addition", "prompts.train={kind: addition}"),
        ("prompts.train=/data/a.jsonl", "prompts.train={kind: file, path: /data/a.jsonl}"),
        ("student=/models/x", "student={source: {kind: checkpoint, path: /models/x}}"),
        ("student.source=/models/x", "student.source={kind: checkpoint, path: /models/x}"),
        ("student.source.tokenizer=/models/x", "student.source.tokenizer={kind: folder, path: /models/x}"),
    )


def test_a_short_form_over_the_same_kind_keeps_its_other_fields(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {TINY}\nobjective: {{divergence: {{kind: jsd, beta: 0.3}}}}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nobjective: {divergence: jsd}\n")
    assert load_experiment(tmp_path / "b.yaml").objective.divergence.beta == 0.3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("objective.divergence=revers_kl", "objective.divergence: 'revers_kl' is not one of reverse_kl"),
        ("objective.divergence=3", "objective.divergence: expected a mapping"),
        ("evaluate.verifier=[1]", "evaluate.verifier: expected a mapping"),
        ("student=[1]", "student: expected a mapping"),
        ('prompts.chat_template_kwargs={a: "x\\ud83d"}', "prompts.chat_template_kwargs.a: character 1 is U+D83D"),
        ("student=hub:me/x", "{kind: hub, repo: OWNER/NAME"),
        ("prompts.train=s3://bucket/x.jsonl", "prompts.train.path: expected a path on this machine"),
        ("train.lr=.inf", "train.lr: inf is not a finite number"),
        ("train.lr=12e45678", "train.lr: inf is not a finite number"),
    ],
)
def test_what_is_no_form_of_a_field_is_named_without_pydantics_words(change, field):
    message = refused(change)
    assert field in message and "Input should" not in message and "discriminator" not in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train: {lr: 1}\nseed: 1\ntrain:\n  lr: 2\n", ("'train'", "line 2", "line 4")),
        ("train:\n  schedule:\n    kind: linear\n    kind: cosine\n", ("'kind'", "line 4", "line 5")),
        ("train: {lr: 1, lr: 2}\n", ("'lr'", "line 2")),
        ("train: [{a: 1}, {b: 1, b: 2}]\n", ("'b'", "line 2")),
        ("'train': {lr: 1}\ntrain: {lr: 1}\n", ("'train'", "line 2", "line 3")),
    ],
)
def test_a_key_that_occurs_twice_is_refused_with_both_lines(text, line, tmp_path):
    path, child, study = (tmp_path / f"{name}.yaml" for name in ("base", "child", "study"))
    path.write_text(f"base: {TINY}\n{text}")
    child.write_text(f"base: {path}\n")
    study.write_text("name: s\n" + text)
    for read in (lambda: load_experiment(path), lambda: load_experiment(child), lambda: load_study(study)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert all(part in str(caught.value) for part in line)
    with pytest.raises(ConfigError, match=r"--set .*'lr' occurs twice"):
        load_experiment(TINY, ["train={lr: 1, lr: 2}"])


def test_merge_keys_and_anchors_may_set_a_key_again(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"base: {TINY}\ntrain:\n  schedule: &s {{kind: constant, warmup_steps: 2}}\n"
        "student: {warmup: {schedule: {<<: *s, warmup_steps: 3}}}\n"
    )
    found = load_experiment(path)
    assert (found.train.schedule.warmup_steps, found.student.warmup.schedule.warmup_steps) == (2, 3)


def test_an_anchor_that_contains_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"base: {TINY}\nprompts: {{chat_template_kwargs: &x {{y: [*x]}}}}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: .*alias of itself"):
        load_experiment(tmp_path / "a.yaml")


def test_a_study_that_sets_a_field_dotted_and_nested_is_refused():
    assert nested({"train.lr": 1, "train": {"dtype": "float32"}}) == {"train": {"lr": 1, "dtype": "float32"}}
    with pytest.raises(ConfigError, match=r"train\.lr is set twice"):
        nested({"train.lr": 1, "train": {"lr": 2}})


@pytest.mark.parametrize("text", ["12e45678", "010", "1234567", "2024-01-01", "1e3", "0x10", "'1e3'"])
def test_a_field_of_text_gets_what_is_written(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"base: {TINY}\nstudent: {{source: {{kind: hub, repo: a/b, revision: {text}}}}}\n")
    given = load_experiment(TINY, [f"student.source={{kind: hub, repo: a/b, revision: {text}}}"])
    assert load_experiment(path).student.source.revision == given.student.source.revision == text.strip("'")


def test_numbers_are_read_as_in_yaml_1_2_and_quoted_ones_stay_text(tmp_path):
    given = load_experiment(
        TINY, ["seed=010", "train.lr='1e-3'", "prompts.chat_template_kwargs={a: '1e3', b: 1e3, c: 010}"]
    )
    assert (given.seed, given.train.lr) == (10, 1e-3)
    kwargs = {"a": "1e3", "b": 1000.0, "c": 10}
    assert given.prompts.chat_template_kwargs == kwargs
    given = load_experiment(TINY, ["prompts.chat_template_kwargs={a: '1e3', b: '08', c: '1:30', d: '.5', e: '010'}"])
    path = tmp_path / "resolved.yaml"
    path.write_text(given.to_yaml())
    assert load_experiment(path) == given
    run = Run.create(tmp_path, "r", given.model_dump(mode="json"), given.identity())
    assert load_experiment(run.directory / "experiment.yaml") == given


def test_yaml_is_utf8_whatever_the_locale(tmp_path):
    path = tmp_path / "a.yaml"
    text = f"base: {TINY}\nprompts: {{chat_template_kwargs: {{x: é}}}}\n"
    code = (
        "import sys; from flows.experiment import load_experiment;"
        " print(ascii(load_experiment(sys.argv[1]).prompts.chat_template_kwargs['x']))"
    )
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + text.encode())
        for encoding in ("0", "1"):
            settings = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": encoding, "PYTHONCOERCECLOCALE": "0"}
            command = [sys.executable, "-c", code, str(path)]
            assert subprocess.check_output(command, env=settings, cwd=CHECKOUT, text=True).strip() == r"'\xe9'"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml: line 2: byte 0xe9 is not UTF-8"):
        load_experiment(path)


def test_paths_of_a_file_start_from_it_and_those_of_set_from_the_shell(tmp_path, monkeypatch):
    here, shell = tmp_path / "configs", tmp_path / "shell"
    for folder in (here / "base", here / "data", shell / "data"):
        folder.mkdir(parents=True)
    prompts = "{train: data/a.jsonl, eval: {kind: file, path: ../e.jsonl}}"
    (here / "base" / "b.yaml").write_text(f"base: {TINY}\nprompts: {prompts}\n")
    (here / "a.yaml").write_text(
        "base: base/b.yaml\nprompts: {warmup: data/w.jsonl}\nruntime: {trainer: {deepspeed: z.json}}\n"
    )
    monkeypatch.chdir(shell)
    config = Path("..") / "configs" / "a.yaml"
    found = load_experiment(config, ["student=m", "prompts.train={kind: file, path: data/t.jsonl}"])
    assert found.prompts.eval.path == here / "e.jsonl" and found.prompts.warmup.path == here / "data" / "w.jsonl"
    assert found.prompts.train.path == shell / "data" / "t.jsonl" and found.student.source.path == shell / "m"
    assert found.runtime.trainer.deepspeed == here / "z.json"
    (shell / "data" / "w.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"a\.yaml: prompts\.warmup\.path: .*write \.\./shell/data/w\.jsonl"):
        load_experiment(config)
    (here / "data" / "w.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"prompts\.warmup\.path: .* exists too"):
        load_experiment(config)
    (shell / "data" / "w.jsonl").unlink()
    (shell / "data" / "w.jsonl").symlink_to(here / "data" / "w.jsonl")  # one file by two names is no ambiguity
    assert load_experiment(config).prompts.warmup.path == here / "data" / "w.jsonl"


def test_a_variant_without_its_kind_names_the_kinds(tmp_path):
    data = yaml.safe_load(TINY.read_text()) | {"student": {"source": {"repo": "a/b"}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=r"student\.source: 'kind' is missing; one of checkpoint, hub, architecture"):
        load_experiment(tmp_path / "a.yaml")


def test_text_that_is_no_path_stays_as_it_is():
    found = load_experiment(TINY, ["prompts.chat_template_kwargs={path: a/b}"])
    assert found.prompts.chat_template_kwargs == {"path": "a/b"}
