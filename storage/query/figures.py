"""Standard errors of what an evaluation measures, and paired differences between evaluations.

Several completions of one prompt are not independent, so the prompt is the unit: a mean over samples is a ratio of two sums
over prompts, R = sum_c y_c / sum_c w_c (y_c: the prompt's correct answers, KL or tokens; w_c: its judged completions or
tokens). By the delta method prompt c moves it by d_c = (y_c - R w_c) / sum w, and

    se = sqrt( G / (G - 1) * sum_c d_c^2 )        for G prompts,

the cluster-robust standard error. With one completion per prompt it is s / sqrt(n). The difference of two evaluations on the
same prompts is paired: its d_c is the difference of the two, so that what both find hard cancels. Sources: Miller 2024, "Adding
Error Bars to Evals", arXiv:2411.00640 (clustered and paired errors); Cochran 1977, "Sampling Techniques", chapter 6 (ratio of
sums). Intervals are value +- 1.96 se. They hold from some 30 prompts on; at a share of 0 or 1 the error is 0 and says nothing
(with n prompts all right, the share is above 1 - 3/n at 95%).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.artifacts.shards import read_parquet
from storage.errors import OpdError
from storage.runs import RoundState, RunState
from storage.store import Artifact, Store

MODES = ("kl", "sampled", "greedy")
"""Modes of an evaluation's samples; length and truncation are those of the first that there is."""
FIGURES = ("accuracy_greedy", "accuracy_sampled", "reverse_kl", "mean_length", "clipped_ratio")
"""Metrics with a standard error. A metric NAME has it as NAME_se, beside the samples NAME_n of NAME_prompts prompts."""
PARTS = ("se", "n", "prompts")
"""What NAME_PART says of a metric NAME."""
COLUMNS = ("prompt_id", "mode", "finish_reason", "correct", "reverse_kl_sum", "tokens")
"""The columns of `evaluations` that figures are computed from."""
Z95 = 1.959963984540054
"""Half the width of a 95% interval, in standard errors."""


@dataclass(frozen=True)
class Sums:
    """One metric of one evaluation, prompt by prompt; the metric is sum(total) / sum(weight)."""

    prompts: tuple[str, ...]
    total: np.ndarray
    weight: np.ndarray
    samples: int

    def only(self, prompts: set[str]) -> Sums:
        """The sums of these prompts. `samples` stays."""
        kept = [place for place, prompt in enumerate(self.prompts) if prompt in prompts]
        return Sums(tuple(self.prompts[place] for place in kept), self.total[kept], self.weight[kept], self.samples)

    @property
    def value(self) -> float | None:
        """None where nothing was counted."""
        weight = float(self.weight.sum())
        return float(self.total.sum()) / weight if weight > 0 else None


@dataclass(frozen=True)
class Figure:
    """A value with its standard error. `se` is None for fewer than two prompts; `value` where there is no sample."""

    value: float | None
    se: float | None
    n: int
    """Samples."""
    prompts: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%."""
        if self.value is None or self.se is None:
            return None
        return self.value - Z95 * self.se, self.value + Z95 * self.se

    @property
    def told_apart(self) -> bool:
        """Of a difference: whether its 95% interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def sums_of(table: pa.Table) -> dict[str, Sums]:
    """By metric of `FIGURES`, from rows of `evaluations` (at least `COLUMNS`); without metrics that no sample has."""
    by_mode = {mode: table.filter(pc.equal(table["mode"], mode)) for mode in MODES}
    shape = next((rows for rows in by_mode.values() if rows.num_rows), table)
    kl = by_mode["kl"].filter(pc.is_finite(by_mode["kl"]["reverse_kl_sum"]))
    clipped = pc.equal(shape["finish_reason"], "length")
    found = {
        "accuracy_greedy": _judged(by_mode["greedy"]),
        "accuracy_sampled": _judged(by_mode["sampled"]),
        "reverse_kl": sums(kl["prompt_id"], kl["reverse_kl_sum"], kl["tokens"]),
        "mean_length": sums(shape["prompt_id"], shape["tokens"]),
        "clipped_ratio": sums(shape["prompt_id"], clipped),
    }
    return {name: of for name, of in found.items() if of.samples}


def figure(evaluations: Sequence[Sums]) -> Figure:
    """The mean of one metric over evaluations of different students (seeds, say), usually of a single one.

    With several, prompts and students are both clusters: the squared errors over each are added (Cameron, Gelbach, Miller
    2011, without the term that they subtract, so the result is rather too large)."""
    values = [of.value for of in evaluations]
    return _clustered(values, [_influence(of) for of in evaluations], sum(of.samples for of in evaluations))


def difference(pairs: Sequence[tuple[Sums, Sums]]) -> Figure:
    """First minus second, on the prompts that both have, as the mean over pairs (one per seed, say). `n` counts prompts."""
    values: list[float | None] = []
    moved: list[dict[str, float]] = []
    for one, other in pairs:
        shared = set(one.prompts) & set(other.prompts)
        one, other = one.only(shared), other.only(shared)
        first, second = one.value, other.value
        values.append(None if first is None or second is None else first - second)
        minus = _influence(other)
        moved.append({prompt: by - minus.get(prompt, 0.0) for prompt, by in _influence(one).items()})
    return _clustered(values, moved, len({prompt for by in moved for prompt in by}))


def errors_of(evaluation: Mapping[str, Sums]) -> dict[str, float | None]:
    """The metrics NAME_se, NAME_n and NAME_prompts of one evaluation."""
    found: dict[str, float | None] = {}
    for name, counted in evaluation.items():
        of = figure([counted])
        found |= {f"{name}_se": of.se, f"{name}_n": float(of.n), f"{name}_prompts": float(of.prompts)}
    return found


def evaluation_of(store: Store, round: RoundState) -> Artifact | None:
    """The committed evaluation of a round; None where it was not evaluated."""
    stage = round.stages.get("evaluate")
    if stage is None or not round.evaluated or stage.key is None:
        return None
    return store.get("evaluate", stage.key)


def read_sums(store: Store, evaluation: Artifact) -> dict[str, Sums]:
    """`sums_of` an evaluation's shards; page checksums are verified. Raises OpdError or OSError where they cannot be read."""
    shards = store.shard_files(evaluation, "evaluations")
    return sums_of(pa.concat_tables([read_parquet(path, COLUMNS) for path in shards])) if shards else {}


def with_errors(store: Store, evaluation: Artifact, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """An evaluation's metrics with their errors, which earlier versions did not record: these are computed from the rows, and
    are missing where the rows are."""
    if all(metrics.get(name) is None or f"{name}_n" in metrics for name in FIGURES):
        return dict(metrics)
    try:
        return dict(metrics) | errors_of(read_sums(store, evaluation))
    except (OpdError, OSError, pa.ArrowException):
        return dict(metrics)


def completed(store: Store, state: RunState) -> RunState:
    """The state with the errors of every evaluated round."""
    state = state.model_copy(deep=True)
    for round in state.rounds:
        evaluation = evaluation_of(store, round)
        if evaluation is not None:
            round.metrics = with_errors(store, evaluation, round.metrics)
    return state


def _judged(rows: pa.Table) -> Sums:
    rows = rows.filter(pc.is_valid(rows["correct"]))
    return sums(rows["prompt_id"], rows["correct"])


def sums(prompts: pa.ChunkedArray, values: pa.ChunkedArray, weights: pa.ChunkedArray | None = None) -> Sums:
    """By prompt, from one value per sample (no nulls) and its weight (by default 1)."""
    encoded = pc.dictionary_encode(prompts.combine_chunks())
    total = values.cast(pa.float64()).to_numpy()
    weight = np.ones(len(total)) if weights is None else weights.cast(pa.float64()).to_numpy()
    places, names = encoded.indices.to_numpy(), tuple(encoded.dictionary.to_pylist())
    totals, counts = (np.bincount(places, weights=of, minlength=len(names)) for of in (total, weight))
    return Sums(names, totals, counts, len(total))


def _influence(of: Sums) -> dict[str, float]:
    """By how much each prompt moves the metric: (y_c - R w_c) / sum w."""
    value = of.value
    if value is None:
        return {}
    moved = (of.total - value * of.weight) / of.weight.sum()
    return dict(zip(of.prompts, moved.tolist(), strict=True))


def _clustered(values: Sequence[float | None], moved: Sequence[Mapping[str, float]], n: int) -> Figure:
    """The mean of the values, and its error from the influences of their prompts."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Figure(None, None, n, 0)
    seeds = len(known)
    by_prompt: dict[str, float] = {}
    for influences in moved:
        for prompt, by in influences.items():
            by_prompt[prompt] = by_prompt.get(prompt, 0.0) + by / seeds
    count, mean = len(by_prompt), sum(known) / seeds
    if count < 2:
        return Figure(mean, None, n, count)
    square = count / (count - 1) * math.fsum(by * by for by in by_prompt.values())
    if seeds > 1:
        square += math.fsum((value - mean) ** 2 for value in known) / (seeds * (seeds - 1))
    return Figure(mean, math.sqrt(square), n, count)
