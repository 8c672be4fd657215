"""A mixture of teachers against a plain computation over the whole vocabulary, in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring import VOCABULARY, described, model_folder, plain_logits, tokens

from storage.errors import ConfigError
from tasks.engines import local
from tasks.engines.mixture import mixed
from tasks.engines.scorer import Sample, Scorer
from tasks.engines.teacher import Capabilities, Host, LocalTeacher, opened
from tasks.signals import Ask, Wanted
from tasks.workers.jobs import ArtifactRef, KLJob, MemberRef, ModelRef

WEIGHTS = (0.3, 0.7)
WANTED = Wanted(Ask(top=frozenset([4])), Ask(True, True, frozenset([5]), frozenset([4])), reverse_kl=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    wider = model_folder(root, "wider", 3, vocab_size=VOCABULARY + 8)
    return [model_folder(root, "student", 1), model_folder(root, "teacher", 2), wider]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [Sample(f"s{i}", tokens("p", i, length=3 + i), tokens("c", i, length=2 + i)) for i in range(4)]


def mixture(folders: list[Path], average: str) -> ModelRef:
    members = [MemberRef(str(path), weight) for path, weight in zip(folders[1:], WEIGHTS, strict=True)]
    return ModelRef("", f"weights {average}", "architecture of two", members=members, average=average)


def score(folders: list[Path], samples: list[Sample], average: str, **settings: int) -> dict[str, list[np.ndarray]]:
    unused = ArtifactRef("unused", "0")
    job = KLJob("", unused, unused, described(folders[0]), mixture(folders, average), "float32")
    return Scorer({"threads": 1, "batch_tokens": 30, "head_chunk_tokens": 5, **settings}).score(
        job, samples, WANTED, lambda done: None
    )


def expected(folders: list[Path], sample: Sample, average: str) -> torch.Tensor:
    parts = [
        plain_logits(path, sample.prompt, sample.completion)[:, :VOCABULARY].log_softmax(-1) for path in folders[1:]
    ]
    if average == "probs":
        return sum(weight * part.exp() for part, weight in zip(parts, WEIGHTS, strict=True)).log()
    return sum(weight * part for part, weight in zip(parts, WEIGHTS, strict=True)).log_softmax(-1)


@pytest.mark.parametrize("average", ["probs", "logprobs"])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_a_mixture_answers_is_that_of_the_average_over_the_vocabulary(folders, samples, average, passes):
    values = score(folders, samples, average, passes=passes)
    for i, sample in enumerate(samples):
        q_TV = expected(folders, sample, average)
        p_TV = plain_logits(folders[0], sample.prompt, sample.completion).log_softmax(-1)
        found = {
            "teacher_logprobs": q_TV.gather(1, torch.tensor(sample.completion)[:, None])[:, 0],
            "teacher_entropy": -(q_TV.exp() * q_TV).sum(-1),
            "teacher_top5_logprobs": q_TV.topk(5).values,
            "teacher_on4_logprobs": q_TV.gather(1, p_TV.topk(4).indices),
            "reverse_kl": (p_TV.exp() * (p_TV - q_TV)).sum(-1),
        }
        for name, wanted in found.items():
            np.testing.assert_allclose(values[name][i], wanted, atol=3e-5, err_msg=name)


def test_with_two_passes_one_model_is_in_memory_at_a_time(folders, samples, monkeypatch):
    whole: list[int] = []
    alive = set()

    class Watched(local.LocalModel):
        def __init__(self, *how):
            super().__init__(*how)
            alive.add(id(self))
            whole.append(len(alive))

        def read_ahead(self, batches):
            super().read_ahead(batches)
            alive.discard(id(self))

        def close(self):
            super().close()
            alive.discard(id(self))

    monkeypatch.setattr("tasks.engines.mixture.LocalModel", Watched)
    monkeypatch.setattr(local, "LocalModel", Watched)
    score(folders, samples, "probs", passes=2)
    assert whole == [1, 1, 1]


def test_a_backend_without_whole_distributions_is_refused(folders):
    class Served(LocalTeacher):
        kind: str = "served"
        capabilities = Capabilities(full_distribution=False)

    with pytest.raises(ConfigError, match=r"mixture: needs supervise\.teacher"):
        opened(mixture(folders, "probs"), "float32", Served(), Host("cpu", 8))


@given(st.lists(st.lists(st.floats(-20, 20), min_size=5, max_size=5), min_size=2, max_size=4), st.data())
def test_an_average_is_a_distribution_between_its_members(logits, data):
    shares = data.draw(st.lists(st.floats(0.05, 1), min_size=len(logits), max_size=len(logits)))
    weights = [share / sum(shares) for share in shares]
    parts = [torch.tensor([row], dtype=torch.float32).log_softmax(-1) for row in logits]
    for average in ("probs", "logprobs"):
        found = mixed([part.clone() for part in parts], weights, average)
        assert abs(float(found.exp().sum()) - 1) < 1e-4
    low, high = torch.stack(parts).min(0).values, torch.stack(parts).max(0).values
    found = mixed(parts, weights, "probs")
    assert (found >= low - 1e-4).all() and (found <= high + 1e-4).all()


def test_an_id_that_one_member_excludes():
    parts = [torch.tensor([[-np.inf, 0.0]]), torch.tensor([[np.log(0.5), np.log(0.5)]])]
    np.testing.assert_allclose(mixed([p.clone() for p in parts], [0.5, 0.5], "probs").exp(), [[0.25, 0.75]], atol=1e-6)
    np.testing.assert_allclose(mixed(parts, [0.5, 0.5], "logprobs").exp(), [[0, 1]], atol=1e-6)
