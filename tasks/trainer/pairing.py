"""What is planned of pairs of completions, one of the teacher's and one of the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tasks.trainer.data import Planned, Samples


class PairPlanner:
    """Plans the steps of a round whose samples are pairs (`Samples.pairs`). Keeps nothing from step to step."""

    def __init__(self, samples: Samples) -> None:
        assert samples.pairs is not None, "the objective's needs name pairs"
        self.samples = samples
        self.memory: Mapping[str, np.ndarray] = {}
        self._partner = np.empty(len(samples), np.int64)
        self._partner[samples.pairs] = samples.pairs[:, ::-1]
        self._sign = np.empty(len(samples))
        self._sign[samples.pairs] = (1.0, -1.0)
        self._planned = self._left_out = 0

    def __call__(self, rows: Sequence[int], step: int) -> Planned:
        """By token of the samples `rows`, one pair after another: `pair`, its number in the step; `sign`, 1 where the teacher
        wrote the completion and -1 where the student did; `share`, the factor of the pair's loss at the token.

        A pair counts if each of its completions has a token that does; the others have shares of 0. The shares, times the
        trainer's weight of a token (one over the tokens that count in the step), make the mean over the pairs that count."""
        order = np.asarray(rows, np.int64)
        if len(order) % 2 or (self._partner[order[::2]] != order[1::2]).any():
            raise ValueError("the samples of a step are not one pair after another (plan_steps)")
        kept = self.samples.kept[order].reshape(-1, 2)
        whole = np.asarray((kept > 0).all(axis=1))
        self._planned += len(whole)
        self._left_out += int((~whole).sum())
        share = whole * kept.sum() / (np.maximum(kept.sum(axis=1), 1) * max(1, int(whole.sum())))
        lengths = self.samples.completions.lengths[order]
        per_sample = {
            "pair": np.repeat(np.arange(len(whole)), 2),
            "sign": self._sign[order],
            "share": np.repeat(share, 2),
        }
        columns = {name: np.repeat(values, lengths).astype(np.float32) for name, values in per_sample.items()}
        return Planned(columns, np.cumsum(lengths) - lengths)

    def repeat(self, rows: Sequence[int], step: int) -> None:
        """Counts the pairs of a step that was done before an interruption."""
        self(rows, step)

    @property
    def metrics(self) -> dict[str, float]:
        """`pairs`: planned over all steps; `pairs_left_out`: those of them with a completion of which no token counts."""
        return {"pairs": float(self._planned), "pairs_left_out": float(self._left_out)}
