"""The scorer against plain computations: all logits at once, float64, one sample at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import SAMPLING, VOCABULARY, described, model_folder, nucleus_logprobs, plain_logits, tokens

from storage.errors import InputError
from tasks.engines import distributions, onepass
from tasks.engines.forward import placement, plan_batches
from tasks.engines.scorer import Sample, Scorer, fit_together
from tasks.signals import Ask, Wanted
from tasks.workers.jobs import ArtifactRef, KLJob

BOTH = Ask(logprobs=True, entropy=True)
SAMPLED = Wanted(BOTH, BOTH)


def lists(teacher: int, student: int | None = None) -> Wanted:
    """The teacher's list of so many, and the student's with the teacher's log-probabilities."""
    of_student = frozenset([student] if student else [])
    return Wanted(Ask(top=of_student), Ask(top=frozenset([teacher]), on=of_student))


ALL = SAMPLED | lists(5, 4) | Wanted(Ask(sampling=SAMPLING), reverse_kl=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    wide = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "student": model_folder(root, "student", 1),
        "teacher": model_folder(root, "teacher", 2, **wide),
        "wider": model_folder(root, "wider", 3, vocab_size=VOCABULARY + 8),
        "short": model_folder(root, "short", 4, max_position_embeddings=8),
    }


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Seven prompts and completions of all lengths; the teacher reads some prompts differently."""
    return [
        Sample(f"s{i}", tokens("p", i, length=3 + i), tokens("c", i, length=1 + 2 * i), other)
        for i, other in enumerate([None, tokens("other", length=9), None, None, tokens("other", length=2), None, None])
    ]


def job(models: dict[str, Path], student: str = "student", teacher: str = "teacher", dtype: str = "float32") -> KLJob:
    """What every scoring job says of its models."""
    unused = ArtifactRef("unused", "0")
    return KLJob("", unused, unused, described(models[student]), described(models[teacher]), dtype)


def score(models, samples, wanted=ALL, *, student="student", teacher="teacher", dtype="float32", **settings) -> dict:
    seen: list[int] = []
    scorer = Scorer({"threads": 1, **settings})
    task = job(models, student, teacher, dtype)
    values = scorer.score(task, samples, wanted, seen.append)
    assert seen[-1] == len(samples)
    return values


def expected(models, sample, student="student", teacher="teacher") -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log q), each (T, V) in float64, the teacher cut to the student's rows."""
    logits_TV = plain_logits(models[student], sample.prompt, sample.completion)
    other = sample.prompt if sample.teacher_prompt is None else sample.teacher_prompt
    teacher_TV = plain_logits(models[teacher], other, sample.completion)[:, : logits_TV.shape[1]]
    return logits_TV.log_softmax(-1), teacher_TV.log_softmax(-1)


def close(found: np.ndarray, wanted: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(found).double(), wanted.double(), atol=atol, rtol=2e-5)


@pytest.fixture(params=["small", "large"])
def vocabulary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that small vocabularies are answered, then that of large ones."""
    if request.param == "large":
        monkeypatch.setattr(onepass, "LARGE", 1)
        monkeypatch.setattr(onepass, "WIDTH", 16)
        monkeypatch.setattr(onepass, "SAMPLED", 4)
        monkeypatch.setattr(onepass, "SAMPLED_MORE", 20)


@pytest.mark.parametrize("teacher", ["teacher", "wider"])
@pytest.mark.usefixtures("vocabulary")
def test_every_signal_is_that_of_a_plain_computation(models, samples, teacher):
    values = score(models, samples, teacher=teacher, batch_tokens=40, head_chunk_tokens=7)
    for i, sample in enumerate(samples):
        p_TV, q_TV = expected(models, sample, teacher=teacher)
        y_T1 = torch.tensor(sample.completion)[:, None]
        close(values["student_logprobs"][i], p_TV.gather(1, y_T1)[:, 0])
        close(values["teacher_logprobs"][i], q_TV.gather(1, y_T1)[:, 0])
        close(values["student_entropy"][i], -(p_TV.exp() * p_TV).sum(-1))
        close(values["teacher_entropy"][i], -(q_TV.exp() * q_TV).sum(-1))
        close(values["reverse_kl"][i], (p_TV.exp() * (p_TV - q_TV)).sum(-1))
        top = q_TV.topk(5)
        assert values["teacher_top5_ids"][i].tolist() == top.indices.tolist()
        close(values["teacher_top5_logprobs"][i], top.values)
        close(values["teacher_top5_tail"][i], (1 - top.values.exp().sum(-1)).log(), atol=2e-4)
        top = p_TV.topk(4)
        assert values["student_top4_ids"][i].tolist() == top.indices.tolist()
        close(values["student_top4_logprobs"][i], top.values)
        close(values["teacher_on4_logprobs"][i], q_TV.gather(1, top.indices))
        close(values["student_top4_tail"][i], (1 - top.values.exp().sum(-1)).log(), atol=2e-4)
        rest = 1 - q_TV.gather(1, top.indices).exp().sum(-1)
        close(values["teacher_on4_tail"][i], rest.log(), atol=2e-4)
        assert (values["teacher_top5_valid"][i] == 5).all() and (values["student_top4_valid"][i] == 4).all()


@pytest.mark.usefixtures("vocabulary")
def test_chunks_and_batches_change_nothing_but_rounding(models, samples):
    plain = score(models, samples, batch_tokens=1, head_chunk_tokens=10_000)
    chunked = score(models, samples, batch_tokens=10_000, head_chunk_tokens=3)
    again = score(models, samples, batch_tokens=10_000, head_chunk_tokens=3)
    assert plain.keys() == chunked.keys()
    for name in plain:
        for one, other, third in zip(plain[name], chunked[name], again[name], strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4, err_msg=name)
            np.testing.assert_array_equal(other, third)


def test_a_smaller_list_is_a_slice_of_a_larger_one(models, samples):
    large = score(models, samples, lists(9))
    small = score(models, samples, lists(5))
    for i in range(len(samples)):
        np.testing.assert_array_equal(small["teacher_top5_ids"][i], large["teacher_top9_ids"][i][:, :5])
        np.testing.assert_array_equal(small["teacher_top5_logprobs"][i], large["teacher_top9_logprobs"][i][:, :5])


def test_a_teacher_that_is_the_student_has_no_divergence(models, samples):
    same = [Sample(s.name, s.prompt, s.completion) for s in samples]
    kl = np.concatenate(score(models, same, teacher="student", batch_tokens=50)["reverse_kl"])
    assert len(kl) == sum(len(s.completion) for s in samples) and np.abs(kl).max() < 1e-6
    other = np.concatenate(score(models, same, batch_tokens=50)["reverse_kl"])
    assert other.min() > 1e-3  # a shift by one position would show as well


def test_the_whole_vocabulary_leaves_no_tail(models, samples):
    values = score(models, samples[:2], lists(VOCABULARY, VOCABULARY))
    for name in (f"teacher_top{VOCABULARY}_tail", f"student_top{VOCABULARY}_tail", f"teacher_on{VOCABULARY}_tail"):
        assert all(np.isneginf(array).all() for array in values[name])
    np.testing.assert_allclose(np.exp(values[f"teacher_top{VOCABULARY}_logprobs"][1]).sum(-1), 1, rtol=1e-5)
    with pytest.raises(InputError, match="265 candidates"):
        score(models, samples, lists(VOCABULARY + 1))


@pytest.mark.usefixtures("vocabulary")
def test_a_student_with_more_rows_than_its_teacher(models):
    """Its padding rows are in no list, have no probability for the teacher, and are left out of the KL."""
    foreign = VOCABULARY + 3
    completion = [5, foreign, 7]
    values = score(models, [Sample("s", [1, 2], completion), Sample("t", [1, 2], [5, 6])], student="wider")
    logits_TV = plain_logits(models["wider"], [1, 2], completion)
    close(values["student_logprobs"][0], logits_TV.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    assert values["teacher_logprobs"][0][1] == -np.inf
    # what follows a token that the teacher cannot read has no teacher values, the rest has
    for name in ("teacher_logprobs", "teacher_entropy", "reverse_kl", "teacher_top5_tail"):
        assert np.isnan(values[name][0]).tolist()[2] and not np.isnan(values[name][0][:2]).any(), name
    assert values["teacher_top5_valid"][0].tolist() == [5, 5, 0] and values["student_top4_valid"][0].tolist() == [
        4,
        4,
        0,
    ]
    assert max(array.max() for array in values["student_top4_ids"]) < VOCABULARY
    p_TV = plain_logits(models["wider"], [1, 2], [5, 6])[:, :VOCABULARY].log_softmax(-1)
    q_TV = plain_logits(models["teacher"], [1, 2], [5, 6]).log_softmax(-1)
    close(values["reverse_kl"][1], (p_TV.exp() * (p_TV - q_TV)).sum(-1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0, 1, 5, 29, 30, 99]),
)
def test_sampling_logprobs_are_those_of_the_truncated_distribution(seed, temperature, top_p, top_k):
    logits_NV = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    logprobs_NV = logits_NV.log_softmax(-1)
    naive_NV = logprobs_NV if temperature == 0 else nucleus_logprobs(logits_NV, temperature, top_p, top_k)
    for column in range(30):
        ids_N = torch.full((6,), column)
        found_N, outside_N = distributions.sampling_logprobs(logprobs_NV, ids_N, temperature, top_p, top_k)
        inside_N = naive_NV[:, column].isfinite()
        assert torch.equal(outside_N, ~inside_N)
        torch.testing.assert_close(found_N[inside_N], naive_NV[inside_N, column], atol=1e-9, rtol=1e-9)
        assert found_N[outside_N].isfinite().all() and (found_N[outside_N] < 0).all()


@pytest.mark.usefixtures("vocabulary")
def test_behaviour_logprobs_of_the_model(models, samples):
    values = score(models, samples, Wanted(Ask(sampling=SAMPLING)))
    inside = 0
    for i, sample in enumerate(samples):
        logits_TV = plain_logits(models["student"], sample.prompt, sample.completion)
        naive_T = nucleus_logprobs(logits_TV, **SAMPLING).gather(1, torch.tensor(sample.completion)[:, None])[:, 0]
        here_T = naive_T.isfinite()
        assert (values["student_outside"][i] == ~here_T.numpy()).all()
        close(values["student_behaviour_logprobs"][i][here_T.numpy()], naive_T[here_T])
        inside += int(here_T.sum())
    assert 0 < inside < sum(len(s.completion) for s in samples)


def test_what_is_no_number_is_nan_at_its_position_alone():
    logits_NV = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits_NV[1, 3], logits_NV[2, 0], logits_NV[3, 5] = math.nan, math.inf, -math.inf
    logprobs_NV = distributions.log_probabilities(logits_NV.clone())
    ids_NK, _, valid_N = distributions.top(logprobs_NV, 8, 8)
    assert valid_N.tolist() == [8, 0, 0, 7, 8]  # an id without probability is no candidate
    broken = [False, True, True, False, False]
    ids_N1 = torch.full((5, 1), 2)
    for value_N in (
        distributions.of_tokens(logprobs_NV, ids_N1)[:, 0],
        distributions.of_tokens(logprobs_NV, torch.full((5, 1), 9))[:, 0],
        distributions.entropy(logprobs_NV),
        distributions.tail_logmass(logprobs_NV, ids_NK[:, :2]),
        distributions.reverse_kl(logprobs_NV, logprobs_NV),
        distributions.sampling_logprobs(logprobs_NV, ids_N1[:, 0], 1.0, 0.9, 0)[0],
    ):
        assert value_N.isnan().tolist() == broken
    assert distributions.usable(torch.tensor([0.5, 1e-6, -1.0])).tolist()[1:] == [0.0, -1.0]
    assert distributions.usable(torch.tensor([0.5])).isnan().all()


def test_tails_do_not_cancel():
    """A tail of 1e-12, far below what 1 - sum can resolve in float32."""
    logits_NV = torch.tensor([[30.0, 2.0, 1.0, 0.5]], dtype=torch.float64)
    exact = (logits_NV[:, 1:].logsumexp(-1) - logits_NV.logsumexp(-1)).float()
    logprobs_NV = distributions.log_probabilities(logits_NV.float())
    before = logprobs_NV.clone()
    torch.testing.assert_close(distributions.tail_logmass(logprobs_NV, torch.tensor([[0]])), exact, atol=1e-5, rtol=0)
    assert torch.equal(logprobs_NV, before)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 100))
def test_batches_hold_everything_once_and_keep_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded <= sum(lengths) + budget * len(batches)


def test_models_stay_warm_until_a_job_names_others(models, samples):
    scorer = Scorer({"threads": 1})
    wanted = SAMPLED
    for teacher, loads in (("teacher", 2), ("teacher", 2), ("student", 2), ("teacher", 3)):
        scorer.score(job(models, teacher=teacher), samples[:1], wanted, lambda *_: None)
        assert scorer.models.loads == loads
    scorer.score(job(models), samples[:1], lists(2), lambda *_: None)
    assert scorer.models.loads == 3
    scorer.close()
    scorer.score(job(models), samples[:1], lists(2), lambda *_: None)
    assert scorer.models.loads == 4  # the student is not needed for it


def test_a_scorer_that_rested_has_its_teacher_and_no_student(models, samples):
    scorer = Scorer({"threads": 1})
    before = scorer.score(job(models), samples[:1], SAMPLED, lambda *_: None)
    scorer.rest()
    scorer.score(job(models), samples[:1], lists(2), lambda *_: None)
    assert scorer.models.loads == 2
    after = scorer.score(job(models), samples[:1], SAMPLED, lambda *_: None)
    assert scorer.models.loads == 3
    assert all(np.array_equal(after[name][0], before[name][0]) for name in before)


def test_half_precision_is_scored_in_float32(models, samples):
    exact, rough = (score(models, samples, SAMPLED, dtype=dtype) for dtype in ("float32", "bfloat16"))
    gap = np.abs(np.concatenate(exact["student_logprobs"]) - np.concatenate(rough["student_logprobs"]))
    assert rough["student_logprobs"][0].dtype == np.float32 and gap.max() > 1e-4 and np.median(gap) < 0.1


@pytest.mark.parametrize(
    ("sample", "teacher", "message"),
    [
        (Sample("long", [1] * 5, [2] * 6), "short", "teacher, long: 10 tokens"),
        (Sample("empty", [], [2]), "teacher", "empty: a prompt without tokens"),
        (Sample("alien", [1, 900], [2]), "teacher", "alien: token id 900"),
        (Sample("foreign", [1], [900, 2]), "teacher", "student, foreign: token id 900"),
    ],
)
def test_samples_that_a_model_cannot_read_are_refused(models, sample, teacher, message):
    with pytest.raises(InputError, match=message):
        score(models, [sample], teacher=teacher)


def test_logits_that_are_no_product_are_refused(models, tmp_path):
    model_folder(
        tmp_path, "gemma", 1, model_type="gemma2", final_logit_softcapping=30.0, query_pre_attn_scalar=32,
        sliding_window=64,
    )  # fmt: skip
    with pytest.raises(InputError, match="final_logit_softcapping"):
        score({**models, "gemma": tmp_path / "gemma"}, [Sample("s", [1], [2])], teacher="gemma")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("teacher", ["teacher", "wider", "student"])
def test_two_passes_are_equal_bit_for_bit(models, samples, teacher, dtype):
    """Shard after shard: one model is loaded per shard, and the two are never in memory together."""
    once = score(models, samples, teacher=teacher, dtype=dtype, batch_tokens=40, head_chunk_tokens=5)
    scorer = Scorer({"threads": 1, "passes": 2, "batch_tokens": 40, "head_chunk_tokens": 5})
    for shard in range(3):
        found = scorer.score(job(models, "student", teacher, dtype), samples, ALL, lambda done: None)
        assert found.keys() == once.keys()
        for name, arrays in once.items():
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found[name], arrays, strict=True)), name
        assert scorer.models.loads == (1 if teacher == "student" else 2 + shard)
        assert len(scorer.models._models) == 1
    only = scorer.score(job(models, "student", teacher, dtype), samples, Wanted(Ask(logprobs=True)), lambda done: None)
    assert all(np.array_equal(a, b) for a, b in zip(only["student_logprobs"], once["student_logprobs"], strict=True))


def test_passes_follow_from_the_memory_of_the_gpus():
    billion, gib = 10**9, 2**30
    assert fit_together([2 * billion, 8 * billion], "bfloat16", 80 * gib)
    assert not fit_together([2 * billion, 32 * billion], "bfloat16", 80 * gib)
    assert fit_together([2 * billion, 32 * billion], "bfloat16", 2 * 80 * gib)
    assert not fit_together([2 * billion, 15 * billion], "float32", 80 * gib)


def test_weights_go_straight_to_their_gpus():
    assert placement(torch.device("cpu"), 1) is None and placement(torch.device("cpu"), 4) is None
    assert placement(torch.device("cuda"), 1) == {"": 0} and placement(torch.device("cuda", 2), 1) == {"": 2}
    assert placement(torch.device("cuda"), 4) == "auto"
