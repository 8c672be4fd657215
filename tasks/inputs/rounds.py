"""Which prompts a round has."""

from __future__ import annotations

from collections.abc import Sequence

from storage.errors import InputError
from storage.identity import derive_seed

SPLIT = "train"
"""The split that rounds take their prompts from."""


def prompts_for_round(prompt_ids: Sequence[str], seed: int, round: int, prompts_per_round: int) -> list[str]:
    """The prompts of a round (from 1), in order: consecutive slices of a seeded permutation, with a new one for each epoch.

    A pure function of its arguments and independent of the order of `prompt_ids`. A round that crosses the end of an
    epoch may have a prompt twice."""
    if round < 1:
        raise ValueError(f"round {round}: rollouts begin with round 1")
    ids = sorted(set(prompt_ids))
    if not ids:
        raise InputError(f"no prompt of the split {SPLIT!r} is left to roll out; see what prepare filtered")
    start = (round - 1) * prompts_per_round
    chosen: list[str] = []
    while len(chosen) < prompts_per_round:
        epoch, offset = divmod(start + len(chosen), len(ids))
        order = [name for _, name in sorted((derive_seed(seed, "prompts", epoch, name), name) for name in ids)]
        chosen += order[offset : offset + prompts_per_round - len(chosen)]
    return chosen
