"""Both samplers of trust-region blending draw from mu: whole sequences of a toy vocabulary against their enumeration."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from tasks.behaviours import Completion, Draw, Drawn, Score, Scored, Start, Stops
from tasks.behaviours.student import StudentWrites
from tasks.behaviours.trust_region import TrustRegionBlending, uniform
from tasks.losses import blending
from tasks.rollout_config import RolloutConfig

VOCABULARY, LIMIT, SAMPLES = 4, 3, 4000
STUDENT_STOP, TEACHER_STOP = 3, 2
STOPS = Stops((STUDENT_STOP,), (TEACHER_STOP, STUDENT_STOP))
EPSILONS = (0.01, 0.1, 0.5)


class Toy:
    """Student and teacher over a toy vocabulary, and the driver of one completion."""

    def __init__(self, behaviour: TrustRegionBlending, stops: Stops = STOPS) -> None:
        self.behaviour, self.stops = behaviour, stops
        self.digest = cache(self._digest)

    @staticmethod
    @cache
    def model(who: str, prefix: tuple[int, ...]) -> torch.Tensor:
        draw = random.Random(f"{who}{prefix}")
        return torch.tensor([[draw.gauss(0, 1.2) for _ in range(VOCABULARY)]]).log_softmax(-1)

    def _digest(self, prefix: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return dict(self.behaviour.digest(self.model("student", prefix), self.model("teacher", prefix), self.stops))

    def write(self, seed: int) -> Completion:
        shared = tuple(token for token in self.stops.teacher if token not in self.stops.unmapped)
        start = Start((9,), LIMIT, seed, self.stops.student, shared)
        writer = self.behaviour.write(start)
        answer: Drawn | Scored | None = None
        while True:
            try:
                ask = writer.send(answer)
            except StopIteration as end:
                return end.value
            answer = self._drawn(ask) if isinstance(ask, Draw) else self._scored(ask)

    def _drawn(self, ask: Draw) -> Drawn:
        draw, ids, logprobs = random.Random(ask.seed), list(ask.tokens[1:]), []
        new: list[int] = []
        while len(new) < ask.max_tokens and not {*new} & {STUDENT_STOP, *ask.stops}:
            row = self.model("student", (*ids, *new))[0]
            new.append(draw.choices(range(VOCABULARY), row.exp().tolist())[0])
            logprobs.append(float(row[new[-1]]))
        return Drawn(new, logprobs, "stop" if {*new} & {STUDENT_STOP, *ask.stops} else "length")

    def _scored(self, ask: Score) -> Scored:
        rows = [self.digest(ask.tokens[:at]) for at in range(ask.after, len(ask.tokens) + 1)]
        return Scored({name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    def probabilities(self, prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
        """Every sequence with its probability under mu."""
        if len(prefix) == LIMIT or prefix[-1:] == (STUDENT_STOP,):
            yield prefix, 1.0
            return
        for token, logprob in enumerate(self.digest(prefix)["mu"][0].tolist()):
            if logprob > -math.inf:
                for sequence, rest in self.probabilities((*prefix, token)):
                    yield sequence, math.exp(logprob) * rest


def drawn(
    behaviour: TrustRegionBlending, offset: int = 0, samples: int = SAMPLES, stops: Stops = STOPS
) -> tuple[Toy, list[Completion]]:
    toy = Toy(behaviour, stops)
    return toy, [toy.write(offset + seed) for seed in range(samples)]


def chi2_p(observed: list[float], wanted: list[float], freedom: int) -> float:
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2).double()))


def p_value(toy: Toy, completions: list[Completion]) -> float:
    expected = dict(toy.probabilities())
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    counts = Counter(tuple(completion.token_ids) for completion in completions)
    assert counts.keys() <= expected.keys()
    often = [sequence for sequence, p in expected.items() if p * len(completions) >= 5]
    observed = [counts[sequence] for sequence in often]
    wanted = [expected[sequence] * len(completions) for sequence in often]
    observed.append(len(completions) - sum(observed))
    wanted.append(len(completions) - sum(wanted))
    return chi2_p(observed, wanted, len(observed) - 1)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("how", [{"sampler": "lock_step"}, {"block": 2}, {"block": 16}], ids=str)
def test_whole_sequences_are_distributed_as_mu(epsilon, how):
    toy, completions = drawn(TrustRegionBlending(epsilon=epsilon, **how))
    assert p_value(toy, completions) > 1e-3


APART = {
    "an ordinary id": Stops((3,), (2, 3), (0,)),
    "two ids, one past the vocabulary": Stops((3,), (2, 3), (1, 9)),
    "the teacher's end is an ordinary id of the student": Stops((3,), (2,), (2,)),
    "the student's end is an ordinary id of the teacher": Stops((3,), (2,), (3,)),
    "nothing": STOPS,
    "merged": Stops((2, 3), (2,)),
}
"""Ids 0 to 3. With `stop_ids: merge` the student stops on the teacher's ids too."""


def by_definition(
    student: list[float], teacher: list[float], stops: Stops, epsilon: float
) -> tuple[float, list[float], list[float]]:
    """(b, mu, p) from probabilities: one category of ends on each side, then the teacher without what it lacks."""
    ids, stop, apart = range(VOCABULARY), min(stops.student), set(stops.unmapped)
    ends_student = {*stops.student, *(set(stops.teacher) - apart)}
    ends_teacher = {*stops.teacher, *(set(stops.student) - apart)}
    p = [0.0 if token in ends_student else student[token] for token in ids]
    q = [0.0 if token in ends_teacher | apart else teacher[token] for token in ids]
    p[stop] = sum(student[token] for token in ends_student)
    q[stop] = sum(teacher[token] for token in ends_teacher)
    q = [value / sum(q) for value in q]

    def mixed(b: float) -> tuple[list[float], float]:
        weights = [x ** (1 - b) * y**b if x and y else 0.0 for x, y in zip(p, q, strict=True)]
        mu = [weight / sum(weights) for weight in weights]
        return mu, sum(m * math.log(m / x) for m, x in zip(mu, p, strict=True) if m)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mixed(middle)[1] <= epsilon else (low, middle)
    return low, mixed(low)[0] if low > 1e-12 else p, p


@pytest.mark.parametrize("stops", APART.values(), ids=APART)
def test_the_blend_is_that_of_the_definition(stops):
    betas = []
    for epsilon in (0.01, 0.2, 1.0):
        toy = Toy(TrustRegionBlending(epsilon=epsilon), stops)
        for prefix in ((at, also) for at in range(VOCABULARY) for also in range(8)):
            row = toy.digest(prefix)
            rows = (toy.model(who, prefix)[0].double().exp().tolist() for who in ("student", "teacher"))
            beta, mu, p = by_definition(*rows, stops, epsilon)
            assert float(row["beta"]) == pytest.approx(beta, abs=2e-4) and float(row["kl"]) <= epsilon
            assert row["mu"][0].exp().tolist() == pytest.approx(mu, abs=2e-4)
            assert row["student"][0].exp().tolist() == pytest.approx(p, abs=1e-6)
            betas.append(beta)
    assert min(betas) < 0.5 < max(betas)
    lacking = set(stops.unmapped) & set(range(VOCABULARY)) - {*stops.student}
    assert (min(betas) < 1e-12) == bool(lacking)  # where the student is likely to write such an id, it writes alone


@pytest.mark.parametrize(
    ("name", "how"), [("an ordinary id", {"sampler": "lock_step"}), *((name, {"block": 2}) for name in [*APART][0:4:2])]
)
def test_whole_sequences_are_distributed_as_mu_without_what_the_teacher_lacks(name, how):
    stops = APART[name]
    toy, completions = drawn(TrustRegionBlending(epsilon=0.5, **how), samples=2000, stops=stops)
    assert p_value(toy, completions) > 1e-3
    apart = set(stops.unmapped) - {*stops.student}
    for completion in completions[:200]:
        for beta, token in zip(completion.values["beta"], completion.token_ids, strict=True):
            assert beta == 0 or token not in apart


def test_both_samplers_draw_from_one_distribution():
    found = [
        Counter(tuple(c.token_ids) for c in drawn(TrustRegionBlending(epsilon=0.1, sampler=sampler), offset=10**6)[1])
        for sampler in ("lock_step", "draft_and_verify")
    ]
    often = [sequence for sequence in found[0] | found[1] if found[0][sequence] + found[1][sequence] >= 10]
    totals = [sum(counts[sequence] for sequence in often) for counts in found]
    both = {sequence: (found[0][sequence] + found[1][sequence]) / sum(totals) for sequence in often}
    observed = [counts[sequence] for counts in found for sequence in often]
    wanted = [both[sequence] * total for total in totals for sequence in often]
    assert chi2_p(observed, wanted, len(often) - 1) > 1e-3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("residual", lambda mu, student: mu.double().exp()),
        ("acceptance", lambda mu, student: math.exp(min(0.0, (mu - student) / 2))),
        ("acceptance", lambda mu, student: 1.0),
    ],
)
def test_a_wrong_rule_is_caught(monkeypatch, name, wrong):
    monkeypatch.setattr(blending, name, wrong)
    toy, completions = drawn(TrustRegionBlending(epsilon=0.5))
    assert p_value(toy, completions) < 1e-6


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_a_draft_is_accepted_as_often_as_total_variation_says(epsilon):
    toy, completions = drawn(TrustRegionBlending(epsilon=epsilon, block=1))
    row = toy.digest(())
    expected = float(torch.minimum(row["mu"].exp(), row["student"].exp()).sum())  # 1 - TV
    assert expected >= 1 - math.sqrt(epsilon / 2)
    accepted = sum(completion.values["accepted_lengths"][0] for completion in completions)
    error = math.sqrt(expected * (1 - expected) / SAMPLES)
    assert abs(accepted / SAMPLES - expected) < 4 * error


@pytest.mark.parametrize("sampler", ["lock_step", "draft_and_verify"])
def test_what_a_completion_says_of_itself(sampler):
    toy, completions = drawn(TrustRegionBlending(epsilon=0.1, sampler=sampler, block=2), samples=300)
    for completion in completions:
        prefixes = [tuple(completion.token_ids[:at]) for at in range(len(completion.token_ids))]
        rows = [toy.digest(prefix) for prefix in prefixes]
        assert completion.logprobs == [
            pytest.approx(float(row["mu"][0, token]), abs=1e-6)
            for row, token in zip(rows, completion.token_ids, strict=True)
        ]
        assert completion.values["kl"] == [float(row["kl"]) for row in rows] and max(completion.values["kl"]) <= 0.1
        assert completion.values["beta"] == [float(row["beta"]) for row in rows]
        assert TEACHER_STOP not in completion.token_ids
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == STUDENT_STOP else "length")
        assert completion == toy.write(completions.index(completion))  # nothing but the seed decides
    lengths = [completion.values["accepted_lengths"] for completion in completions]
    if sampler == "lock_step":
        assert lengths == [None] * 300
        return
    assert all(0 <= length <= 2 for row in lengths for length in row)
    summed = [sum(completion.values[name] for completion in completions) for name in ("accepted", "drafted")]
    made = toy.behaviour.metrics([completion.values for completion in completions])
    tokens = sum(len(completion.token_ids) for completion in completions)
    assert made["draft_used"] == summed[0] / summed[1] and made["acceptance"] == summed[0] / tokens
    assert made["draft_tv"] == pytest.approx(0, abs=1e-6)
    assert made["kl_max"] <= 0.1 and 0 < made["beta_mean"] < 1


def test_a_draft_from_another_student_is_measured():
    """Half of the drafted probabilities are said to be e times what they are."""
    toy = Toy(TrustRegionBlending(epsilon=0.1))
    plain = toy._drawn
    toy._drawn = lambda ask: (lambda d: Drawn(d.token_ids, [p + 1 for p in d.logprobs], d.finish_reason))(plain(ask))
    made = toy.behaviour.metrics([toy.write(seed).values for seed in range(50)])
    assert made["draft_tv"] == pytest.approx(1 - math.exp(-1), abs=1e-6)


def test_epsilon_falls_to_the_plain_student():
    behaviour = TrustRegionBlending(epsilon=0.05, anneal_steps=50, start=10, block=8)
    assert [round(behaviour.at(step).epsilon, 6) for step in (0, 10, 35)] == [0.05, 0.05, 0.025]
    assert behaviour.at(35) == TrustRegionBlending(epsilon=0.025, block=8)
    assert behaviour.at(60) == behaviour.at(10**6) == TrustRegionBlending(epsilon=0).at(0) == StudentWrites()
    assert behaviour.at(60).reads == frozenset() and behaviour.at(60).table is None
    lock_step = TrustRegionBlending(sampler="lock_step", block=3)
    assert lock_step.at(0) == TrustRegionBlending(sampler="lock_step")
    plain, annealed = RolloutConfig(), RolloutConfig(behaviour={"kind": "trb", "epsilon": 0.05, "anneal_steps": 5})
    assert annealed.at(5) == plain and annealed.at(4).behaviour.epsilon == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"behaviour": {"kind": "trb", "epsilon": -0.1}}, "epsilon"),
        ({"behaviour": {"kind": "trb", "epsilon": math.inf}}, "epsilon"),
        ({"behaviour": {"kind": "trb", "anneal_steps": 0}}, "anneal_steps"),
        ({"behaviour": {"kind": "trb", "block": 0}}, "block"),
        ({"behaviour": {"kind": "trb", "sampler": "both"}}, "sampler"),
        ({"behaviour": "trb", "top_p": 0.9}, r"rollout\.top_p is 0\.9; set rollout\.top_p: 1"),
        ({"behaviour": "trb", "temperature": 0.7}, r"rollout\.temperature is 0\.7"),
        ({"behaviour": "trb", "top_k": 5}, r"rollout\.top_k is 5; set rollout\.top_k: 0"),
        ({"behaviour": "trb", "min_p": 0.1}, r"rollout\.min_p is 0\.1; set rollout\.min_p: 0"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig.model_validate(fields)


def test_uniform_numbers():
    found = [uniform(seed, "accept", at) for seed in range(40) for at in range(25)]
    assert len({*found}) == 1000 and all(0 <= u < 1 for u in found)
    assert abs(sum(found) / 1000 - 0.5) < 0.04
    assert uniform(1, "accept", 2) != uniform(1, "residual", 2)
