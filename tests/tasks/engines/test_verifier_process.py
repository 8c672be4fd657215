"""The verifiers' process with real functions of a user that hang, crash, print and return nonsense; limits are short."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from places import PLUGINS

from storage.errors import ConfigError, InputError
from tasks.engines.verifier_process import CUT, ENDING_SECONDS, REASON_LENGTH, NoVerdict, VerifierProcess, reason_of
from tasks.inputs.judging import JudgeConfig, Outcome
from tasks.judge import sources_of

SECRET = "correct-horse-battery-staple"


@pytest.fixture(autouse=True)
def _judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)


def started(*verifiers: dict[str, Any], **fields: Any) -> VerifierProcess:
    config = JudgeConfig.model_validate({"verifiers": list(verifiers), **fields})
    return VerifierProcess(config, sources_of(config))


@pytest.fixture
def named() -> Iterator[VerifierProcess]:
    process = started({"kind": "function", "target": "judges:named", "name": "mine"}, timeout=1)
    yield process
    process.close()


def ask(process: VerifierProcess, completion: str, place: int = 0, answer: str | None = "7") -> Outcome:
    return process.ask(place, {"completion": completion, "answer": answer, "length": 3})


@pytest.mark.parametrize(
    ("completion", "reason", "ended"),
    [
        ("hang", r"'mine' took longer than judge\.timeout \(1 s\)", True),
        ("spin", r"'mine' took longer than judge\.timeout", True),
        ("exit", r"'mine' ended its process \(exit 3\)", True),
        ("crash", r"'mine' ended its process \(killed by signal 11\)", True),
        ("quit", r"'mine' ended its process \(exit 1\)", True),
        ("linger", r"'mine' ended its process \(exit 4\)", True),
        ("disconnect", r"'mine' ended its process \(it closed its connection\)", True),
        ("mute", r"'mine' ended its process \(it closed its connection\)", True),
        ("stop", r"'mine' took longer than judge\.timeout", True),
        ("slain", r"'mine' ended its process \(killed by signal 9\)", True),
        ("nan", "no finite number", False),
        ("inf", "no finite number", False),
        ("none", "lack a return", False),
        ("word", "a number or a dict", False),
        ("key", "'score' is none of", False),
        ("empty", "no 'reward'", False),
        ("feedback", "must be a text", False),
        ("span", "past the completion of 3 tokens", False),
        ("backwards", "holds no token", False),
        ("segment", "past the completion of 3 tokens", False),
        ("unordered", "not after", False),
        ("surrogate", "no valid Unicode", False),
        ("unknown", "KeyError", False),
    ],
)
def test_one_completion_fails_and_the_next_is_judged(
    named: VerifierProcess, completion: str, reason: str, ended: bool
) -> None:
    with pytest.raises(NoVerdict, match=reason) as failed:
        ask(named, completion)
    assert failed.value.ended == ended
    assert ask(named, "good") == Outcome(1.0)


def test_a_closed_connection_is_noticed_at_once(named: VerifierProcess) -> None:
    """The process goes on, so neither its own limit nor that of an end is waited for."""
    assert ask(named, "good") == Outcome(1.0)
    begun, pid = time.monotonic(), named._process.pid  # type: ignore[union-attr]
    with pytest.raises(NoVerdict, match="closed its connection"):
        ask(named, "disconnect")
    assert time.monotonic() - begun < ENDING_SECONDS / 2 and not psutil.pid_exists(pid)


def test_a_hanging_function_is_killed_with_what_it_started(named: VerifierProcess) -> None:
    assert ask(named, "good") == Outcome(1.0)
    pid = named._process.pid  # type: ignore[union-attr]
    with pytest.raises(NoVerdict):
        ask(named, "hang")
    assert not psutil.pid_exists(pid)


def test_output_goes_to_this_process_without_secrets(named: VerifierProcess, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(named, "print") == Outcome(1.0)
    with pytest.raises(NoVerdict) as failed:
        ask(named, "raise")
    named.close()
    shown = capfd.readouterr()
    text = shown.out + shown.err
    assert [line.split(" ***")[0] for line in text.splitlines()] == ["printed", "to stderr", "by the system"]
    assert SECRET not in text
    assert reason_of(str(failed.value)) == "'mine': ValueError: no score, key *** second line"


def test_no_half_of_a_secret_is_passed_on(named: VerifierProcess, capfd: pytest.CaptureFixture[str]) -> None:
    assert ask(named, "halves") == Outcome(1.0)
    named.close()
    assert capfd.readouterr().out.splitlines() == [CUT, "between", CUT]


def test_reasons_are_short_and_can_be_stored() -> None:
    assert len(reason_of("x" * 1000)) == REASON_LENGTH
    assert reason_of("a \ud800\n b").encode() == b"a \\ud800 b"


def test_a_reason_is_the_same_in_every_process() -> None:
    reason = reason_of(f"it must return a number, found {object()!r}, and {object()!r}")
    assert reason == "it must return a number, found <object object>, and <object object>"


def test_own_verifiers_judge_as_in_evaluations() -> None:
    process = started({"kind": "exact_match", "extract": r"#(\d+)"}, {"kind": "math_verify", "timeout": 5})
    try:
        assert [ask(process, text).reward for text in ("#7", "#8", "no")] == [1.0, 0.0, 0.0]
        assert [ask(process, text, 1).reward for text in ("$14/2$", "$8$")] == [1.0, 0.0]
        with pytest.raises(NoVerdict, match="no answer"):
            ask(process, "#7", answer=None)
    finally:
        process.close()


def test_an_expression_that_backtracks_forever_is_stopped() -> None:
    process = started({"kind": "exact_match", "extract": r"(a+)+$"}, timeout=1)
    try:
        with pytest.raises(NoVerdict, match="took longer"):
            ask(process, "a" * 60 + "b")
        assert ask(process, "7").reward == 0.0
    finally:
        process.close()


def test_endless_mathematics_is_wrong_as_in_evaluations() -> None:
    process = started({"kind": "math_verify", "timeout": 1})
    try:
        assert ask(process, r"\boxed{9^{9^{9^{9^{9}}}}}", answer=r"9^{9^{9^{9^{8}}}}").reward == 0.0
        assert ask(process, "$7$").reward == 1.0
    finally:
        process.close()


def test_a_function_reads_what_it_asks_for() -> None:
    process = started({"kind": "function", "target": "judges:graded"})
    try:
        assert process.given() == [["prompt", "token_ids", "tokens"]]
        question = {
            "completion": "b",
            "answer": None,
            "length": 2,
            "prompt": "a",
            "token_ids": [1, 2],
            "tokens": ["b", ""],
        }
        found = process.ask(0, question)
        assert found == Outcome(0.0, "'a' expects None, found 'b' in 2 tokens", (1, 2), ((0, 1, "first"),))
    finally:
        process.close()


def test_a_file_that_changed_since_the_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "edited_judge.py"
    file.write_text("def score(completion, answer): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = JudgeConfig.model_validate({"verifiers": [{"kind": "function", "target": "edited_judge:score"}]})
    process = VerifierProcess(config, sources_of(config))
    file.write_text("def score(completion, answer): return 0\n")
    with pytest.raises(InputError, match="has changed"):
        process.given()
    file.unlink()
    with pytest.raises(ConfigError, match="no module 'edited_judge'"):
        VerifierProcess(config, process.sources).given()


def test_the_process_ends_with_the_one_that_asks(named: VerifierProcess) -> None:
    """Its socket closes, whatever else happens."""
    assert ask(named, "good") == Outcome(1.0)
    process = named._process
    assert process is not None and named._socket is not None
    named._socket.close()
    process.wait(20)
    assert process.returncode == 0


def test_no_thread_and_no_descriptor_is_left(named: VerifierProcess) -> None:
    ask(named, "good")
    named.close()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for completion in ("exit", "hang", "good"):
        try:
            ask(named, completion)
        except NoVerdict:
            continue
    named.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before[1] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
