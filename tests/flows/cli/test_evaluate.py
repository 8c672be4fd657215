"""Options of `opd evaluate` that do not go together, and what is missing, are refused before anything starts."""

from __future__ import annotations

import sys

import pytest

from flows.cli.app import main
from tasks.inputs import harness


@pytest.fixture
def evaluate(monkeypatch, capsys, example_store):
    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["opd", "evaluate", "demo", *map(str, args), "--root", str(example_store)])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "gsm8k", "--prompts", "x.jsonl"], "--prompts and --tasks"),
        (["--num-fewshot", "0"], "--num-fewshot: goes with --tasks"),
        (["--prompts", "x.jsonl", "--apply-chat-template"], "--apply-chat-template: goes with --tasks"),
        (["--tasks", "gsm8k", "--verifier", "none"], "--verifier: goes with --prompts"),
        (["--limit", "5"], "--limit: goes with --prompts or --tasks"),
        (["--tasks", "gsm8k", "--round", "9"], "round 9 is not trained yet"),
        (["--tasks", " , "], "names no task"),
    ],
)
def test_options_that_do_not_go_together(evaluate, args, message) -> None:
    code, err = evaluate(*args)
    assert code == 2 and message in err


def test_without_lm_eval_the_extra_is_named(evaluate, monkeypatch, example_store) -> None:
    find = harness.importlib.util.find_spec
    monkeypatch.setattr(
        harness.importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    before = sorted(example_store.rglob("*"))
    code, err = evaluate("--tasks", "gsm8k")
    assert code == 2 and "pip install 'opdflow[lm-eval]'" in err and err.count("\n") == 1
    assert sorted(example_store.rglob("*")) == before
