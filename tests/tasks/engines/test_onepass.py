"""Large vocabularies in few passes, against sorting all of them and against plain float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import nucleus_logprobs

from tasks.engines import distributions, onepass
from tasks.engines.teacher import Vocabulary
from tasks.losses.stop_ids import merge_ids
from tasks.signals import Ask

INF = math.inf


def scores(seed: int, rows: int, kind: str, tokens: int = 3) -> torch.Tensor:
    """Logits (tokens, rows): peaked or flat; with most of them equal; or with ids of probability 0."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(tokens, rows, generator=generator) * {"flat": 0.3, "ties": 1.0}.get(kind, 8.0)
    if kind == "ties":
        return found.round()  # about seven values, the two zeros among them
    if kind == "masked":
        found[torch.rand(tokens, rows, generator=generator) < 0.7] = -INF
        found[:, 0] = 0.0
    return found


KINDS = st.sampled_from(["peaked", "flat", "ties", "masked"])
ROWS = st.sampled_from([64, 65, 640, 1000, 1023, 2048, 5000])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), ROWS, KINDS, st.integers(1, 70))
def test_the_largest_are_the_first_of_a_stable_sort(seed, rows, kind, k):
    scores_NV = scores(seed, rows, kind)
    ids_NK, values_NK = onepass.largest(scores_NV, min(k, rows))
    wanted = scores_NV.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids_NK, wanted.indices[:, :k]) and torch.equal(values_NK, wanted.values[:, :k])


@pytest.mark.parametrize("k", [1000, 1003])
def test_the_largest_of_all_are_all(k):
    scores_NV = scores(1, 1003, "ties")
    assert torch.equal(onepass.largest(scores_NV, k)[0], scores_NV.sort(dim=-1, descending=True, stable=True)[1][:, :k])


@pytest.mark.parametrize("rows", [640, 643, 151_936, 151_939])
@pytest.mark.parametrize("k", [1, 11, 64, 640])
def test_the_largest_of_rows_with_ties_infinities_and_fewer_blocks_than_k(rows, k):
    """Also where a row beside them is NaN somewhere, and where the largest lie behind the last whole block."""
    scores_NV = torch.cat([scores(8, rows, kind, 2) for kind in ("peaked", "flat", "ties", "masked")])
    scores_NV[2, :5], scores_NV[3, 5:] = INF, -INF
    scores_NV[1, -2:] = 100.0
    wanted = scores_NV.sort(dim=-1, descending=True, stable=True)
    scores_NV = torch.cat((scores_NV, torch.full((1, rows), 3.0)))
    scores_NV[-1, rows // 2] = math.nan
    ids_NK, values_NK = (found[:-1] for found in onepass.largest(scores_NV, k))
    assert torch.equal(ids_NK, wanted.indices[:, :k]) and torch.equal(values_NK, wanted.values[:, :k])


def asked(scores_NV, ask, ids_N=None, stop_ids=(), rows=None, shared=None, unread_N=None, given_NK=None):
    ids_N = torch.zeros(len(scores_NV), dtype=torch.long) if ids_N is None else ids_N
    rows = scores_NV.shape[-1] if rows is None else rows
    vocabulary = Vocabulary(rows, shared or rows, stop_ids)
    merged_N = merge_ids(ids_N, stop_ids)
    return onepass.answer(scores_NV.clone(), unread_N, ids_N, merged_N, ask, vocabulary, given_NK or {})


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([640, 1003, 5000]),
    KINDS,
    st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0, 1, 5, 100, 9999]),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_the_set_sampled_from_is_that_of_a_full_sort(seed, rows, kind, temperature, top_p, top_k, min_p):
    """Its least element and mass, by way of the log-probability of every token that was sampled; where the mass before a token is
    within rounding of top_p, either side is right."""
    scores_NV = scores(seed, rows, kind)
    how = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    logprobs_NV = distributions.log_probabilities(scores_NV.clone())
    clear_N = torch.tensor([_clear(row_V, how) for row_V in logprobs_NV])
    places = torch.tensor([0, 1, 2, 4, 5, 30, 63, 64, 65, 99, 100, 300, rows - 1])
    ids_N = scores_NV.argsort(dim=-1, descending=True)[:, places].flatten()
    each = torch.arange(len(scores_NV)).repeat_interleave(len(places))
    found = asked(scores_NV[each], Ask(sampling=how), ids_N)
    wanted_N, outside_N = distributions.sampling_logprobs(logprobs_NV[each].double(), ids_N, **how)
    here_N = clear_N[each]
    assert torch.equal(found["outside"][here_N], outside_N[here_N])
    torch.testing.assert_close(found["behaviour_logprobs"][here_N], wanted_N[here_N].float(), atol=2e-5, rtol=1e-6)


def _clear(logprobs_V: torch.Tensor, how: dict[str, float]) -> bool:
    """No cumulative mass of the sorted set is close to top_p."""
    if how["temperature"] == 0 or how["top_p"] == 1:
        return True
    scaled_V = (logprobs_V / how["temperature"]).sort(descending=True).values.double()
    least = scaled_V[0] + math.log(how["min_p"]) if how["min_p"] else -INF
    if 0 < how["top_k"] < len(scaled_V):
        least = max(least, scaled_V[int(how["top_k"]) - 1])
    mass_V = scaled_V[scaled_V >= least].softmax(-1).cumsum(-1)
    return bool((mass_V - how["top_p"]).abs().min() > 1e-5)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.9999])
@pytest.mark.parametrize(
    ("spread", "most"),
    [
        (10.0, {0.5: 64, 0.9: 64, 0.9999: 2048}),
        (4.0, {0.5: 64, 0.9: 2048, 0.9999: 151_936}),
        (0.3, {0.5: 151_936, 0.9: 151_936, 0.9999: 151_936}),
    ],
    ids=["peaked", "between", "flat"],
)
def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(top_p, spread, most, monkeypatch):
    """Its last member and the first id outside of it, and the mass, in float64; no more candidates are taken than are needed."""
    counts = []
    descending = onepass._descending

    def noted(chunk, rows_S, count):
        counts.append(count)
        return descending(chunk, rows_S, count)

    monkeypatch.setattr(onepass, "_descending", noted)
    scores_NV = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(4)) * spread
    order = scores_NV.sort(dim=-1, descending=True)
    probs_NV = order.values.double().softmax(-1)
    through_NV = probs_NV.cumsum(-1)
    assert ((through_NV - top_p).abs().amin(-1) > 1e-9).all()  # or rounding would decide
    sizes_N1 = (through_NV < top_p).sum(-1, keepdim=True) + 1
    mass_N1 = through_NV.gather(-1, sizes_N1 - 1)
    how = {"temperature": 1.0, "top_p": top_p, "top_k": 0}
    for place_N1, outside in ((torch.zeros_like(sizes_N1), False), (sizes_N1 - 1, False), (sizes_N1, True)):
        counts.clear()
        found = asked(scores_NV, Ask(sampling=how), order.indices.gather(-1, place_N1)[:, 0])
        chosen_N1 = probs_NV.gather(-1, place_N1)
        wanted_N1 = (chosen_N1 / (mass_N1 + chosen_N1 * outside)).log()
        assert (found["outside"] == outside).all() and max(counts) == most[top_p]
        torch.testing.assert_close(found["behaviour_logprobs"].double(), wanted_N1[:, 0], atol=2e-6, rtol=1e-6)


def test_a_nucleus_has_its_definition():
    """Independent of both implementations: token by token, in float64."""
    scores_NV = scores(3, 1003, "peaked", tokens=8)
    for temperature, top_p, top_k in ((1.0, 0.9, 0), (0.7, 0.95, 0), (1.0, 0.9, 20), (3.0, 0.99, 0)):
        wanted_NV = nucleus_logprobs(scores_NV.double(), temperature, top_p, top_k)
        inside_N = wanted_NV.argmin(-1).where(~wanted_NV.isfinite().all(-1), torch.tensor(0))
        for ids_N in (scores_NV.argmax(-1), inside_N):
            how = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
            found = asked(scores_NV, Ask(sampling=how), ids_N)
            naive_N = wanted_NV.gather(-1, ids_N[:, None])[:, 0]
            assert torch.equal(found["outside"], ~naive_N.isfinite())
            here = naive_N.isfinite()
            torch.testing.assert_close(found["behaviour_logprobs"][here].double(), naive_N[here], atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([640, 1003]), KINDS, st.sampled_from([(), (7, 70), (3, 5, 999, 5000)]))
def test_answers_are_those_of_plain_passes(seed, rows, kind, stop_ids):
    """Bit for bit what only takes the normaliser, to rounding what sums differently; with a row that has NaN, one with +inf, and
    one that the model could not read."""
    scores_NV = scores(seed, rows + 9, kind, tokens=7)
    scores_NV[1, 100], scores_NV[2, 3] = math.nan, INF
    unread_N = torch.tensor([False] * 6 + [True])
    ids_N = torch.arange(7) * 60
    chosen_NK = torch.randn(7, rows, generator=torch.Generator().manual_seed(seed)).topk(9).indices
    ask = Ask(True, True, frozenset([2, 6]), frozenset([9]), {"temperature": 0.8, "top_p": 0.9, "top_k": 0})
    shared = rows - 5
    found = asked(scores_NV, ask, ids_N, stop_ids, rows, shared, unread_N, {9: chosen_NK})
    plain_NV = distributions.log_probabilities(scores_NV.clone(), rows, stop_ids)
    plain_NV.masked_fill_(unread_N[:, None], math.nan)
    merged_N1 = merge_ids(ids_N, stop_ids)[:, None]
    same = {"logprobs": distributions.of_tokens(plain_NV, merged_N1)[:, 0]}
    near = {"entropy": distributions.entropy(plain_NV)}
    for k in (2, 6):
        ids_NK, same[f"top{k}_logprobs"], same[f"top{k}_valid"] = distributions.top(plain_NV, k, shared)
        near[f"top{k}_tail"] = distributions.tail_logmass(
            plain_NV, found[f"top{k}_ids"].where(~unread_N[:, None], ids_NK)
        )
        assert (found[f"top{k}_ids"][same[f"top{k}_valid"] > 0] < shared).all()
    same["on9_logprobs"] = distributions.of_tokens(plain_NV, chosen_NK)
    near["on9_tail"] = distributions.tail_logmass(plain_NV, chosen_NK)
    for name, wanted in same.items():
        assert torch.equal(found[name].nan_to_num(9.0), wanted.nan_to_num(9.0)), name
    for name, wanted in near.items():
        torch.testing.assert_close(found[name], wanted, atol=3e-6, rtol=3e-6, equal_nan=True)
    broken = [False, True, True, False, False, False, True]
    for value in found.values():
        if value.is_floating_point():
            assert (
                value.isnan().flatten(1).all(-1).tolist() == broken
                if value.ndim > 1
                else value.isnan().tolist() == broken
            )
    assert found["top6_valid"][torch.tensor(broken)].tolist() == [0, 0, 0]


def test_tails_of_any_size():
    """Of 1e-12, where 1 - sum says nothing; of 1e-60, where exponentials relative to the maximum say nothing; and of nothing."""
    scores_NV = torch.full((3, 1000), -INF)
    scores_NV[:, 500] = 0.0
    scores_NV[0, 10], scores_NV[1, 10] = -27.6, -138.0
    found = asked(scores_NV, Ask(top=frozenset([1]), entropy=True))
    torch.testing.assert_close(found["top1_tail"], torch.tensor([-27.6, -138.0, -INF]))
    torch.testing.assert_close(found["entropy"], torch.tensor([28.6 * math.exp(-27.6), 0.0, 0.0]), atol=0, rtol=0.05)


@pytest.mark.parametrize("rows", [8192, 20_011])
def test_normalisers_have_the_bits_of_logsumexp_whatever_the_blocks(rows, monkeypatch):
    scores_NV = scores(5, rows, "peaked", tokens=13)
    ids_N = scores_NV.argmax(-1)
    wanted_N = scores_NV.gather(-1, ids_N[:, None])[:, 0] - scores_NV.logsumexp(-1)
    everything = Ask(True, True, frozenset([8]), sampling={"temperature": 1.0, "top_p": 0.9, "top_k": 0})
    answers = []
    for size in (1, 2**20, 2**30):
        monkeypatch.setattr(onepass, "_BLOCK_BYTES", size)
        answers.append(asked(scores_NV, everything, ids_N))
        assert torch.equal(answers[-1]["logprobs"], distributions.usable(wanted_N))
    for name, value in answers[0].items():
        assert all(torch.equal(value, other[name]) for other in answers), name


def test_normalised_scores_are_taken_as_they_are():
    """Of a mixture, whose average need not sum to 1 exactly."""
    logprobs_NV = scores(6, 1000, "peaked", tokens=5).log_softmax(-1) - 1e-3
    found = onepass.answer(
        logprobs_NV.clone(),
        None,
        torch.arange(5),
        torch.arange(5),
        Ask(True, True, frozenset([4])),
        Vocabulary(1000, 1000, (1, 2)),
        {},
        normalised=True,
    )
    ids_NK, values_NK, _ = distributions.top(logprobs_NV, 4, 1000)
    assert torch.equal(found["top4_ids"], ids_NK) and torch.equal(found["top4_logprobs"], values_NK)
    assert torch.equal(found["logprobs"], logprobs_NV.diagonal())
    torch.testing.assert_close(found["entropy"], distributions.entropy(logprobs_NV), atol=3e-6, rtol=3e-6)
    torch.testing.assert_close(
        found["top4_tail"], distributions.tail_logmass(logprobs_NV, ids_NK), atol=3e-6, rtol=3e-6
    )
