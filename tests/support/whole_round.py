"""The samples of a whole round from tables in memory, as training reads them shard by shard from files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import pyarrow as pa

from storage.schemas import MaskReason
from tasks.losses.needs import Needs
from tasks.trainer.data import Samples, of_samples, part_of_round, with_width


def from_rollouts(
    rollouts: pa.Table,
    signals: Mapping[str, pa.Table],
    needs: Needs,
    mask_reasons: Iterable[MaskReason],
    seed: int = 0,
    rows: int | None = None,
    cut: Collection[str] = (),
    rewards: pa.Table | None = None,
) -> Samples:
    """The samples of a whole round that fits into memory: see `part_of_round`, `of_samples`, `with_width`."""
    part = part_of_round(rollouts, signals, needs, mask_reasons, seed, rows)
    return with_width(replace(part, **of_samples(rollouts, needs.credit, rewards)), needs, cut)
