"""The samples of each optimizer step, their pairs where an objective compares two completions of a prompt, and the split of a
step over ranks and micro-batches.

All functions are pure: the samples of a step depend on (seed, round, step) alone, the split on their lengths, the world
size and the token budget. Every rank computes the whole plan and takes its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from storage.errors import InputError
from storage.identity import derive_seed
from tasks.behaviours import pair_of


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, as row numbers, in the order of the epochs."""

    rows: tuple[int, ...]
    epoch: int
    """The epoch (from 0) that the step's first sample belongs to."""
    together: int = 1
    """So many samples that follow each other stay in one micro-batch: 2 for pairs."""


@dataclass(frozen=True)
class Micro:
    """One forward and backward of one rank. A filler has weight 0; it gives all ranks equally many micro-batches."""

    places: tuple[int, ...]
    """Samples, as numbers within the step (0 is the step's first)."""
    filler: bool = False


def pairs_of(rollouts: pa.Table) -> np.ndarray:
    """int64 [samples / 2, 2]: by pair the rows of the teacher's and of the student's completion, in the order of the rollouts,
    from their columns `sample_id`, `prompt_id`, `sample_index` and `behaviour`. Each sample is in one pair.

    InputError, naming a sample, where the rollouts are not such pairs."""
    found: dict[tuple[str, int], list[int]] = {}
    for row, (prompt, index) in enumerate(
        zip(rollouts["prompt_id"].to_pylist(), rollouts["sample_index"].to_pylist(), strict=True)
    ):
        found.setdefault((prompt, pair_of(index)), []).append(row)
    writers = rollouts["behaviour"].to_pylist()
    for rows in found.values():
        by = [writers[row] for row in rows]
        if sorted(by) != ["student", "teacher"]:
            alone = "no partner" if len(rows) == 1 else f"partners written by {' and '.join(by)}"
            raise InputError(
                f"rollouts: sample {rollouts['sample_id'][rows[0]].as_py()!r} (written by {by[0]}) has {alone}; the objective"
                " compares a completion of the teacher with one of the student, which rollout.behaviour: pairs writes"
            )
    return np.array([sorted(rows, key=lambda row: writers[row] == "student") for rows in found.values()], np.int64)


def plan_steps(
    seed: int, round: int, rows: int, samples_per_step: int, total_samples: int, pairs: np.ndarray | None = None
) -> list[Step]:
    """Steps of `samples_per_step` samples over seeded permutations of `rows` rows, epoch after epoch. `pairs` [rows / 2, 2] are
    the rows of pairs, which follow each other: the pairs are permuted, not the rows.

    A step may contain the end of one epoch and the start of the next. The last step has the rest if `total_samples` is not a
    multiple of `samples_per_step`."""
    if rows < 1 or samples_per_step < 1 or total_samples < 1:
        raise ValueError(
            f"plan_steps: rows {rows}, samples_per_step {samples_per_step} and total {total_samples} must be >= 1"
        )
    units = np.arange(rows)[:, None] if pairs is None else pairs
    together = units.shape[1]
    if units.size != rows or samples_per_step % together or total_samples % together:
        raise ValueError(
            f"plan_steps: {len(units)} pairs for rows {rows}, samples_per_step {samples_per_step} and total {total_samples}:"
            " a pair would be torn apart"
        )
    epochs = -(-total_samples // rows)
    order = np.concatenate(
        [
            units[
                np.random.Generator(np.random.PCG64(derive_seed(seed, "epoch", round, e))).permutation(len(units))
            ].ravel()
            for e in range(epochs)
        ]
    )[:total_samples]
    return [
        Step(tuple(int(row) for row in order[start : start + samples_per_step]), start // rows, together)
        for start in range(0, total_samples, samples_per_step)
    ]


def split_step(lengths: Sequence[int], world: int, budget: int, together: int = 1) -> list[list[Micro]]:
    """Micro-batches of a step for each rank: `world` lists of equal length.

    `lengths` are the forward tokens of each sample; `together` samples that follow each other are in one micro-batch. A
    micro-batch pads its samples to the longest one and has at most `budget` tokens, padding included, or a single longer sample
    (or pair). Samples are dealt to the ranks by length, back and forth, which balances their work. Ranks with fewer
    micro-batches get fillers of the step's shortest sample."""
    if world < 1 or budget < 1 or not len(lengths) or len(lengths) % together:
        raise ValueError(
            f"split_step: world {world}, budget {budget} and samples {len(lengths)} must be >= 1, samples in units of {together}"
        )
    units = [range(start, start + together) for start in range(0, len(lengths), together)]
    longest = [max(lengths[place] for place in unit) for unit in units]
    by_length = sorted(range(len(units)), key=lambda unit: -longest[unit])  # stable: ties keep the step's order
    mine: list[list[int]] = [[] for _ in range(world)]
    for turn, unit in enumerate(by_length):
        lap, slot = divmod(turn, world)
        mine[slot if lap % 2 == 0 else world - 1 - slot].append(unit)
    ranks = [
        [
            Micro(tuple(place for unit in part for place in units[unit]))
            for part in _by_budget(part, longest, budget // together)
        ]
        for part in mine
    ]
    most = max(len(micros) for micros in ranks)
    filler = Micro((min(units[by_length[-1]], key=lambda place: lengths[place]),), filler=True)
    return [micros + [filler] * (most - len(micros)) for micros in ranks]


def _by_budget(units: list[int], longest: Sequence[int], budget: int) -> list[list[int]]:
    """Greedy, longest first: `units` are sorted by decreasing length; `budget` is what a row of one of each may have."""
    parts: list[list[int]] = []
    for unit in units:
        if not parts or longest[parts[-1][0]] * (len(parts[-1]) + 1) > budget:
            parts.append([])
        parts[-1].append(unit)
    return parts
