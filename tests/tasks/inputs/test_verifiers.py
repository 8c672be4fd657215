"""Verdicts of the three verifiers, and that a hanging comparison costs its time limit and no more."""

from __future__ import annotations

import sys
import threading
import time
from fractions import Fraction

import pytest
from pydantic import TypeAdapter, ValidationError

from storage.errors import ConfigError, InputError, OpdError
from tasks.inputs import verifiers
from tasks.inputs.verifiers import ExactMatch, FunctionVerifier, MathVerify, VerifierConfig, verifier_digest, verify


@pytest.mark.parametrize(
    "config, completion, answer, right",
    [
        (ExactMatch(), " 42\n", "42", True),
        (ExactMatch(strip=False), " 42", "42", False),
        (ExactMatch(), "the answer is 42", "42", False),
        (ExactMatch(extract=r"#(\d+)"), "1+1=02#01 wait #00002", "00002", True),
        (ExactMatch(extract=r"#(\d+)$"), "#00002 and more", "00002", False),
        (ExactMatch(extract=r"\d+"), "7 then 8", "8", True),
        (ExactMatch(extract=r"a(b)?"), "a", "", True),
    ],
)
def test_exact_match(config, completion, answer, right):
    assert verify(config, completion, answer) is right


MATHEMATICS = [
    (r"So it is $\frac{1}{2}$.", "0.5", True),
    (r"Therefore \boxed{x^2+2x+1}", "(x+1)^2", True),
    ("The result is 12.", "12", True),
    ("The result is 13.", "12", False),
    ("no mathematics here", "12", False),
    ("", "12", False),
]


@pytest.mark.parametrize("completion, answer, right", MATHEMATICS)
def test_mathematics(completion, answer, right):
    assert verify(MathVerify(), completion, answer) is right


def test_mathematics_works_in_threads():
    verdicts = {}

    def ask(index):
        completion, answer, _ = MATHEMATICS[index]
        verdicts[index] = verify(MathVerify(), completion, answer)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(MATHEMATICS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdicts[index] for index in range(len(MATHEMATICS))] == [right for _, _, right in MATHEMATICS]


def test_endless_mathematics_is_wrong_and_the_next_question_is_answered():
    verify(MathVerify(), "1", "1")
    started = time.monotonic()
    assert verify(MathVerify(timeout=1), r"\boxed{9^{9^{9^{9^{9}}}}}", r"9^{9^{9^{9^{8}}}}") is False
    assert time.monotonic() - started < 30
    assert verify(MathVerify(), r"\boxed{\frac{2}{4}}", "1/2") is True


def test_judge_that_is_killed_is_started_again():
    verify(MathVerify(), "1", "1")
    process = verifiers._judge()._process
    process.kill()
    process.wait()
    assert verify(MathVerify(), "$3$", "3") is True


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "judge_fractions.py").write_text(
        "from fractions import Fraction\n"
        "def right(text, answer):\n    return Fraction(text) == Fraction(answer)\n"
        "import numpy\n"
        "def chatty(text, answer):\n    return 'yes'\n"
        "def silent(text, answer):\n    text == answer\n"
        "def score(text, answer):\n    return 0.5\n"
        "def array(text, answer):\n    return numpy.array([text]) == numpy.array([answer])\n"
        "def vector(text, answer):\n    return (numpy.array([text]) == numpy.array([answer]))[0]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "judge_fractions.py"
    sys.modules.pop("judge_fractions", None)


def test_users_function_judges(plugin):
    config = FunctionVerifier(target="judge_fractions:right")
    assert Fraction(1, 2) == Fraction("0.5")
    assert verify(config, "1/2", "0.5") is True
    assert verify(config, "1/3", "0.5") is False


def test_users_function_that_fails_is_named_with_its_completion(plugin):
    with pytest.raises(OpdError, match=r"judge_fractions:right' failed on 'one half', answer '0\.5': ValueError"):
        verify(FunctionVerifier(target="judge_fractions:right"), "one half", "0.5")
    with pytest.raises(OpdError, match="must return True or False, found 'yes'"):
        verify(FunctionVerifier(target="judge_fractions:chatty"), "1", "1")


def test_what_a_users_function_returns_is_named(plugin):
    assert verify(FunctionVerifier(target="judge_fractions:vector"), "1", "1") is True  # numpy's bool
    for name, found in (
        ("silent", r"found None \(NoneType\)"),
        ("score", r"found 0\.5 \(float\)"),
        ("array", "ndarray"),
    ):
        with pytest.raises(OpdError, match=f"judge_fractions:{name}' must return True or False, .*{found}"):
            verify(FunctionVerifier(target=f"judge_fractions:{name}"), "1", "1")


@pytest.mark.parametrize(
    ("source", "found"), [("1 +", "SyntaxError"), ("import nowhere_x", "imports 'nowhere_x'"), ("1/0", "Zero")]
)
def test_a_module_that_fails_on_import_is_a_config_error(tmp_path, monkeypatch, source, found):
    (tmp_path / "broken_judge.py").write_text(f"{source}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"'broken_judge' .*{found}"):
        verifiers.verifier_digest(FunctionVerifier(target="broken_judge:f"))


@pytest.mark.parametrize(
    "target, message",
    [
        ("no_such_module:f", "no module 'no_such_module'"),
        ("judge_fractions:wrong", "has no function 'wrong'"),
        ("judge_fractions:number", "is not callable, but int"),
    ],
)
def test_function_that_cannot_be_found(plugin, target, message):
    with pytest.raises(ConfigError, match=message):
        verify(FunctionVerifier(target=target), "1", "1")


def test_digest_of_a_function_follows_its_source(plugin):
    config = FunctionVerifier(target="judge_fractions:right")
    before = verifier_digest(config)
    assert verifier_digest(config) == before
    plugin.write_text(plugin.read_text() + "# changed\n")
    assert verifier_digest(config) != before
    assert verifier_digest(ExactMatch()) is None


@pytest.mark.parametrize("config", [ExactMatch(), MathVerify()])
def test_missing_answer_is_an_error_not_a_wrong_answer(config):
    with pytest.raises(InputError, match="a prompt has no answer"):
        verify(config, "42", None)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "exact_match", "extract": "(open"}, "not a regular expression"),
        ({"kind": "function", "target": "module.function"}, "target"),
        ({"kind": "math_verify", "timeout": 0}, "timeout"),
        ({"kind": "exact_match", "regex": "x"}, "regex"),
        ({"kind": "guess"}, "guess"),
    ],
)
def test_bad_verifiers_are_refused_when_loaded(fields, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(VerifierConfig).validate_python(fields)
