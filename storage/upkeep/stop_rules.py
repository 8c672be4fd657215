"""Rules by which a run ends before `policy.rounds`: it is good enough, gains no more, goes wrong, or has used up its budget."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from storage.identity import RunPolicy
from storage.runs import RunState
from storage.upkeep.retention import best_round


class StopRules(RunPolicy):
    """The run ends after the first round at which one of the given rules holds; `opd resume NAME --set policy.stop=null` goes
    on."""

    accuracy: float | None = Field(
        None, gt=0, le=1, description="greedy accuracy (without it the sampled one) at or above this"
    )
    reverse_kl: float | None = Field(None, ge=0, description="reverse KL, nats per token, at or below this")
    rounds_without_gain: int | None = Field(
        None,
        ge=1,
        description="evaluated rounds since the best one (the highest accuracy; among equals and without a verifier the lowest"
        " reverse KL)",
    )
    clipped: float | None = Field(
        None, gt=0, le=1, description="share of evaluated completions that were cut off, at or above this"
    )
    entropy: float | None = Field(
        None, ge=0, description="the student's entropy in training, nats per token, at or below this"
    )
    hours: float | None = Field(None, gt=0, description="time of all stages that this run made, at or above this")
    tokens: int | None = Field(None, ge=1, description="tokens of all rollouts, at or above this")

    def reason(self, state: RunState) -> str | None:
        """Why the run ends after its last trained round; None where no rule holds. Round 0 ends no run."""
        last = state.last_trained
        return next(self._reasons(state), None) if last is not None and last.round > 0 else None

    def _reasons(self, state: RunState) -> Iterator[str]:
        last = state.last_trained
        assert last is not None
        metrics = last.metrics
        accuracy = next(
            (value for name in ("greedy", "sampled") if (value := metrics.get(f"accuracy_{name}")) is not None), None
        )
        if self.accuracy is not None and accuracy is not None and accuracy >= self.accuracy:
            yield f"policy.stop.accuracy: {accuracy:.1%} is at least {self.accuracy:.1%}"
        kl = metrics.get("reverse_kl")
        if self.reverse_kl is not None and kl is not None and kl <= self.reverse_kl:
            yield f"policy.stop.reverse_kl: {kl:.4f} is at most {self.reverse_kl:g}"
        best = best_round(state)
        if self.rounds_without_gain is not None and best is not None:
            since = [r.round for r in state.rounds if r.evaluated and r.round > best]
            if len(since) >= self.rounds_without_gain:
                yield f"policy.stop.rounds_without_gain: {len(since)} evaluated rounds since the best one, round {best}"
        clipped = metrics.get("clipped_ratio")
        if self.clipped is not None and clipped is not None and clipped >= self.clipped:
            yield f"policy.stop.clipped: {clipped:.1%} of the completions were cut off, at least {self.clipped:.1%}"
        entropy = metrics.get("train_student_entropy_last")
        if self.entropy is not None and entropy is not None and entropy <= self.entropy:
            yield f"policy.stop.entropy: {entropy:.4f} nats per token is at most {self.entropy:g}"
        hours = sum(stage.seconds or 0 for r in state.rounds for stage in r.stages.values()) / 3600
        if self.hours is not None and hours >= self.hours:
            yield f"policy.stop.hours: {hours:.2f} h of stages are at least {self.hours:g}"
        tokens = sum(r.metrics.get("rollout_tokens") or 0 for r in state.rounds)
        if self.tokens is not None and tokens >= self.tokens:
            yield f"policy.stop.tokens: {tokens:,.0f} tokens of rollouts are at least {self.tokens:,}"
