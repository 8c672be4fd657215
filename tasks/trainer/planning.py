"""Before each optimizer step: what its tokens' factors are, from stored values of the whole step (`losses/token_credit/plan.py`).

Every rank plans the whole step, as it plans its batches, and takes its part. Rewards and their groups are those of the round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from storage.errors import InputError
from tasks.losses.config import AnyObjective, CreditConfig, PairsConfig
from tasks.losses.token_credit.plan import plan_step, returns_of
from tasks.losses.token_credit.rewards import all_equal, success
from tasks.losses.token_credit.stored import Stored
from tasks.trainer.data import Planned, Samples
from tasks.trainer.pairing import PairPlanner


class StepPlanner(Protocol):
    """Plans the steps of a round in their order."""

    memory: Mapping[str, np.ndarray]
    """What the objective keeps from step to step, after the last planned one."""

    def __call__(self, rows: Sequence[int], step: int) -> Planned:
        """Numbers of the tokens of the samples `rows`, before the optimizer step number `step` of the run, from 0."""

    def repeat(self, rows: Sequence[int], step: int) -> None:
        """Goes on after a step that was done before an interruption."""

    @property
    def metrics(self) -> dict[str, float]:
        """What the round's metrics say of the plan."""


class Planner:
    """Plans the steps of a round in their order. InputError for groups of one, or where nothing was judged."""

    def __init__(self, config: CreditConfig, samples: Samples, memory: Mapping[str, np.ndarray]) -> None:
        self.config, self.samples = config, samples
        self.memory: Mapping[str, np.ndarray] = memory
        """What the objective keeps from step to step, after the last planned one."""
        self._routed = self._planned = 0
        if config.reward.uses_rewards:
            self._refuse()

    def _refuse(self) -> None:
        rewards, groups = self.samples.rewards, self.samples.groups
        assert rewards is not None and groups is not None, "the objective's needs name rewards and groups"
        sizes = np.bincount(groups)
        if (alone := np.flatnonzero(sizes == 1)).size:
            first = self.samples.ids[int(np.flatnonzero(groups == alone[0])[0])]
            raise InputError(
                f"objective.reward: group compares the samples of a prompt, and {len(alone)} of {len(sizes)} prompts have one"
                f" (the first: sample {first!r}); set rollout.num_generations to 2 or more"
            )
        if not np.isfinite(rewards).any():
            raise InputError(
                f"objective.reward: none of the {len(rewards)} samples has a reward, so there is nothing to learn from; see why"
                " the verifier failed (column `failed` of the table rewards)"
            )

    def __call__(self, rows: Sequence[int], step: int) -> Planned:
        """The factors of the tokens of the samples `rows`, before the optimizer step number `step` of the run, from 0."""
        stored = self._remembering(self._stored(rows, step))
        columns = plan_step(self.config, stored, self._returns(rows, step))
        lengths = self.samples.completions.lengths[list(rows)]
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        if "b" in columns:
            self._routed += int((stored.sums(columns["b"] > 0) > 0).sum())
        self._planned += len(lengths)
        return Planned({name: values.numpy().astype(np.float32) for name, values in columns.items()}, offsets)

    def repeat(self, rows: Sequence[int], step: int) -> None:
        """Goes on after a step that was done before an interruption: what it remembers and counts of it."""
        self(rows, step)

    @property
    def metrics(self) -> dict[str, float]:
        """`routed_samples`: share of the planned samples that the divergence counts for; nothing without a divergence."""
        if self.config.beside is None:
            return {}
        return {"routed_samples": self._routed / max(1, self._planned)}

    def _remembering(self, stored: Stored) -> Stored:
        if not self.config.add.remembers:
            return stored
        value, self.memory = self.config.add.remember(self.memory, stored)
        return replace(stored, remembered=value)

    @property
    def _scored(self) -> bool:
        """Whether the teacher was run; where it was not, nothing reads d."""
        return "teacher_logprobs" in self.samples.floats or self.config.reads_teacher

    @cached_property
    def _per_sample(self) -> dict[str, np.ndarray]:
        samples, config = self.samples, self.config
        if not config.reward.uses_rewards:
            return {}
        assert samples.rewards is not None and samples.groups is not None
        rewards = samples.rewards.astype(np.float64)
        rewards = np.where(np.isfinite(rewards), rewards, np.nan)
        judged = ~np.isnan(rewards)
        threshold = config.reward.threshold
        correct = (
            judged & (np.nan_to_num(rewards) >= threshold) if threshold is not None else np.zeros(len(rewards), bool)
        )
        return {
            "advantage_S": config.reward.advantages(rewards, samples.groups),
            "judged_S": judged,
            "correct_S": correct,
            "success_S": success(correct, judged, samples.groups),
            "equal_S": all_equal(rewards, samples.groups),
        }

    def _stored(self, rows: Sequence[int], step: int) -> Stored:
        samples, chosen = self.samples, list(rows)
        of_sample = {name: torch.from_numpy(values[chosen]) for name, values in self._per_sample.items()}
        spans = [slice(*samples.completions.offsets[row : row + 2]) for row in chosen]

        def tokens(values: np.ndarray | None) -> torch.Tensor | None:
            if values is None:
                return None
            found = np.concatenate([values[span] for span in spans])
            return torch.from_numpy(found.astype(np.float64) if found.dtype.kind == "f" else found)

        def given(values: torch.Tensor | None) -> torch.Tensor:
            assert values is not None
            return values

        lengths = samples.completions.lengths[chosen]
        first = np.cumsum(lengths) - lengths
        contexts = np.ones(len(chosen), bool) if samples.contexts is None else samples.contexts[chosen]

        def harmless(name: str) -> torch.Tensor | None:
            values = tokens(samples.floats.get(name))
            return None if values is None else values.nan_to_num(0.0, 0.0, -1e4)

        return Stored(
            step=step,
            sample_N=torch.from_numpy(np.repeat(np.arange(len(chosen)), lengths)),
            position_N=torch.from_numpy(np.arange(int(lengths.sum())) - np.repeat(first, lengths)),
            counted_N=given(tokens(samples.keep)),
            written_N=given(tokens(samples.written)),
            valid_N=given(tokens(samples.valid)),
            log_p_N=given(harmless("student_logprobs")),
            log_q_N=given(harmless("teacher_logprobs" if self._scored else "student_logprobs")),
            teacher_entropy_N=harmless("teacher_entropy"),
            student_entropy_N=harmless("student_entropy"),
            segment_N=tokens(samples.segments),
            span_N=tokens(samples.spans),
            context_S=torch.from_numpy(contexts),
            ended_S=None if samples.ended is None else torch.from_numpy(samples.ended[chosen]),
            advantage_S=of_sample.get("advantage_S"),
            correct_S=of_sample.get("correct_S"),
            judged_S=of_sample.get("judged_S"),
            success_S=of_sample.get("success_S"),
            equal_S=of_sample.get("equal_S"),
        )

    def _returns(self, rows: Sequence[int], step: int) -> torch.Tensor | None:
        """The returns of the step's tokens, relative to those of all samples of their prompts in the round; null where a token's
        return depends on its own completion alone."""
        returns, groups = self.config.returns, self.samples.groups
        if not returns.groups:
            return None
        assert groups is not None
        chosen = np.flatnonzero(np.isin(groups, groups[list(rows)]))
        stored = self._stored(chosen.tolist(), step)
        group_N = torch.from_numpy(np.repeat(groups[chosen], self.samples.completions.lengths[chosen]))
        found = returns.normalise(returns_of(self.config, stored), stored.scored_N, group_N)
        parts = dict(zip(chosen.tolist(), stored.each(), strict=True))
        return torch.cat([found[parts[row]] for row in rows])


def planner_of(objective: AnyObjective, samples: Samples, memory: Mapping[str, np.ndarray]) -> StepPlanner | None:
    """What plans the steps of an objective; null for one whose tokens need no plan. `memory`: of the trainer's state."""
    if isinstance(objective, PairsConfig):
        return PairPlanner(samples)
    return Planner(objective, samples, memory) if isinstance(objective, CreditConfig) else None
