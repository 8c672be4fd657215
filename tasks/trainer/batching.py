"""The samples of each optimizer step, and the split of a step over ranks and micro-batches.

All functions are pure: the samples of a step depend on (seed, round, step) alone, the split on their lengths, the world
size and the token budget. Every rank computes the whole plan and takes its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from storage.identity import derive_seed


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, as row numbers, in the order of the epochs."""

    rows: tuple[int, ...]
    epoch: int
    """The epoch (from 0) that the step's first sample belongs to."""


@dataclass(frozen=True)
class Micro:
    """One forward and backward of one rank. A filler has weight 0; it gives all ranks equally many micro-batches."""

    places: tuple[int, ...]
    """Samples, as numbers within the step (0 is the step's first)."""
    filler: bool = False


def plan_steps(seed: int, round: int, rows: int, samples_per_step: int, total_samples: int) -> list[Step]:
    """Steps of `samples_per_step` samples over seeded permutations of `rows` rows, epoch after epoch.

    A step may contain the end of one epoch and the start of the next. The last step has the rest if `total_samples` is not a
    multiple of `samples_per_step`."""
    if rows < 1 or samples_per_step < 1 or total_samples < 1:
        raise ValueError(
            f"plan_steps: rows {rows}, samples_per_step {samples_per_step} and total {total_samples} must be >= 1"
        )
    epochs = -(-total_samples // rows)
    order = np.concatenate(
        [
            np.random.Generator(np.random.PCG64(derive_seed(seed, "epoch", round, e))).permutation(rows)
            for e in range(epochs)
        ]
    )[:total_samples]
    return [
        Step(tuple(int(row) for row in order[start : start + samples_per_step]), start // rows)
        for start in range(0, total_samples, samples_per_step)
    ]


def split_step(lengths: Sequence[int], world: int, budget: int) -> list[list[Micro]]:
    """Micro-batches of a step for each rank: `world` lists of equal length.

    `lengths` are the forward tokens of each sample. A micro-batch pads its samples to the longest one and has at most `budget`
    tokens, padding included, or a single longer sample. Samples are dealt to the ranks by length, back and forth, which
    balances their work. Ranks with fewer micro-batches get fillers of the step's shortest sample."""
    if world < 1 or budget < 1 or not len(lengths):
        raise ValueError(f"split_step: world {world}, budget {budget} and samples {len(lengths)} must be >= 1")
    by_length = sorted(range(len(lengths)), key=lambda place: -lengths[place])  # stable: ties keep the step's order
    mine: list[list[int]] = [[] for _ in range(world)]
    for turn, place in enumerate(by_length):
        lap, slot = divmod(turn, world)
        mine[slot if lap % 2 == 0 else world - 1 - slot].append(place)
    ranks = [_by_budget(part, lengths, budget) for part in mine]
    most = max(len(micros) for micros in ranks)
    filler = Micro((by_length[-1],), filler=True)
    return [micros + [filler] * (most - len(micros)) for micros in ranks]


def _by_budget(places: list[int], lengths: Sequence[int], budget: int) -> list[Micro]:
    """Greedy, longest first: `places` are sorted by decreasing length."""
    micros: list[Micro] = []
    current: list[int] = []
    for place in places:
        if current and lengths[current[0]] * (len(current) + 1) > budget:
            micros.append(Micro(tuple(current)))
            current = []
        current.append(place)
    return [*micros, Micro(tuple(current))] if current else micros
