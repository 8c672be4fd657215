"""A teacher in vLLM: what it answers about completions is what the local teacher answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scoring import model_folder, tokens

from storage.errors import ConfigError, InputError, OpdError
from tasks.engines.forward import quantization_config
from tasks.engines.listed import ROUNDING, Listed, tail, values_of
from tasks.engines.local import LocalModel
from tasks.engines.teacher import Host, LocalTeacher, Passage, VllmTeacher, Vocabulary
from tasks.engines.vllm_teacher import VllmModel, _listed
from tasks.engines.weight_proof import StaleWeights
from tasks.signals import Ask

ROWS = 264
PIECE = 32
"""Prompt tokens of one engine step: longer passages are prefilled in pieces."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models"), "teacher", 2)


def passages(lengths: list[int]) -> list[Passage]:
    return [Passage(tokens("p", i, length=3 + i), tokens("c", i, length=n)) for i, n in enumerate(lengths)]


def test_values_are_those_of_the_local_teacher(folder):
    host = Host("cpu", PIECE, settings={"threads": 1})
    local, model = LocalModel(folder, "float32", host), VllmTeacher(entropy_k=ROWS).open(folder, "float32", host)
    ask = Ask(logprobs=True, entropy=True, top=frozenset([6, ROWS]))
    try:
        for lengths in ([4, 1, 9], [70, 2]):  # the second needs another engine, and several pieces
            asked = passages(lengths)
            asked[0].completion[2] = ROWS + 3
            model.check(asked, [str(i) for i in range(len(asked))])
            found, expected = (m.score(asked, ask, Vocabulary(ROWS, ROWS), {}) for m in (model, local))
            assert found.keys() == expected.keys()
            for name in ("logprobs", "entropy", "top6_logprobs", "top6_valid", f"top{ROWS}_logprobs"):
                for one, other in zip(found[name], expected[name], strict=True):
                    np.testing.assert_allclose(one, other, atol=1e-4, err_msg=name)
            for one, other in zip(found["top6_tail"], expected["top6_tail"], strict=True):
                np.testing.assert_allclose(np.exp(one), np.exp(other), atol=4 * ROUNDING)
            assert np.isneginf(found[f"top{ROWS}_tail"][1]).all()
        with pytest.raises(InputError, match="5: 256 tokens of prompt and completion and one that is generated"):
            model.check([Passage([1], [2] * 255)], ["5"])
        same = model._llm
        model.check(passages([5]), ["0"])
        assert model._llm is same
    finally:
        model.close()


def test_an_engine_with_other_weights_is_refused(folder, tmp_path, monkeypatch):
    """Its parameters are compared with the checkpoint's: here with those of another one."""
    other = model_folder(tmp_path, "other", 3)
    model = VllmModel(folder, "float32", Host("cpu", PIECE, settings={"threads": 1}), 20)
    import vllm

    made = vllm.LLM
    monkeypatch.setattr(vllm, "LLM", lambda **fields: made(**{**fields, "model": str(other)}))
    with pytest.raises(StaleWeights, match="parameters differ"):
        model.check(passages([4]), ["0"])
    model.close()


class Flat:
    """vLLM's flat lists of a prompt."""

    def __init__(self, ids: list[int], logprobs: list[float], places: int) -> None:
        self.token_ids, self.logprobs, self._places = ids, logprobs, places

    def __len__(self) -> int:
        return self._places


@pytest.mark.parametrize(
    ("flat", "why"),
    [
        (None, "gave 0 of 3 tokens"),
        (Flat([7, 1, 2, 8], [-1.0] * 4, 3), "lists shorter than 2"),
        (Flat([7, 1, 2, 9, 1, 2], [-1.0] * 6, 3), "of other tokens than it was asked about"),
    ],
)
def test_answers_that_are_not_what_was_asked_are_refused(flat, why):
    with pytest.raises(OpdError, match=why):
        _listed(flat, [5, 7, 8], 2, 2)


def test_numbers_that_are_no_log_probabilities_are_invalid_and_not_repaired():
    logprobs = np.log(np.array([[0.5, 0.25], [0.5, 0.5]], np.float32))
    logprobs = np.concatenate([logprobs, [[np.nan, np.nan], [0.5, -1.0]]]).astype(np.float32)
    listed = Listed(np.array([-0.5, 1e-5, np.nan, 3.0], np.float32), np.tile([4, 2], (4, 1)), logprobs)
    found = values_of([listed], Ask(logprobs=True, entropy=True, top=frozenset([2])), Vocabulary(9, 9), 2)
    np.testing.assert_array_equal(found["logprobs"][0], np.array([-0.5, 0, np.nan, np.nan], np.float32))
    assert found["top2_valid"][0].tolist() == [2, 2, 0, 0]
    np.testing.assert_allclose(np.exp(found["top2_tail"][0][:2]), [0.25, ROUNDING], rtol=1e-5)
    assert np.isnan(found["top2_tail"][0][2:]).all() and np.isnan(found["entropy"][0][2:]).all()
    np.testing.assert_allclose(found["entropy"][0][0], -(0.5 * np.log(0.5) + 0.5 * np.log(0.25)), rtol=1e-6)
    assert np.isneginf(tail(np.log(np.array([[0.5, 0.5]])), whole=True)).all()


def test_eight_bits_without_their_library_are_refused(folder):
    assert quantization_config("none") is None
    with pytest.raises(ConfigError, match=r"supervise\.teacher\.quantization: int8 needs the package bitsandbytes"):
        LocalTeacher(quantization="int8").open(folder, "float32", Host("cpu", PIECE))


def test_eight_bits_are_asked_of_transformers(folder, monkeypatch):
    """With the library there: the config that transformers gets, up to the point where it would load it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    asked = {}

    def load(path, **fields):
        asked.update(fields)
        raise OSError("far enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    with pytest.raises(InputError, match="far enough"):
        LocalTeacher(quantization="int8").open(folder, "float32", Host("cpu", PIECE))
    assert asked["quantization_config"].load_in_8bit is True
    asked.clear()
    with pytest.raises(InputError, match="far enough"):
        LocalTeacher().open(folder, "float32", Host("cpu", PIECE))
    assert "quantization_config" not in asked
