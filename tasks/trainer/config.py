"""Settings of weight updates that `train` and `warmup` share (identity). Imports no engine."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from storage.identity import Identity, omit_at


class LrSchedule(Identity):
    """The learning rate over optimizer steps, as a factor of `lr`.

    Linear warm-up over `warmup_steps`, then `constant`, or `linear` / `cosine` down to `final_ratio` at
    `horizon_steps`; past the horizon the final value holds, so adding rounds changes no key."""

    kind: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up; a constant lr without it can collapse first"
    )
    horizon_steps: int | None = Field(None, ge=1, description="step at which linear and cosine reach final_ratio")
    final_ratio: float = Field(0.0, ge=0, le=1, description="final lr as a fraction of lr")

    @model_validator(mode="after")
    def _check(self) -> LrSchedule:
        if self.kind == "constant":
            if self.horizon_steps is not None or self.final_ratio != 0.0:
                raise ValueError(
                    "schedule: horizon_steps and final_ratio have no effect with kind: constant; remove them"
                )
        elif self.horizon_steps is None:
            raise ValueError(
                f"schedule.horizon_steps: kind {self.kind} needs the step at which the lr reaches final_ratio"
            )
        elif self.horizon_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule.horizon_steps: {self.horizon_steps} must be above warmup_steps ({self.warmup_steps})"
            )
        return self

    def factor(self, step: int) -> float:
        """The factor at optimizer step `step` (the first is 1), in [0, 1]."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant" or self.horizon_steps is None:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (self.horizon_steps - self.warmup_steps))
        shape = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final_ratio + (1.0 - self.final_ratio) * shape


class NoCorrection(Identity):
    """No correction: sampler and trainer are assumed to agree."""

    kind: Literal["none"] = "none"


class TruncatedCorrection(Identity):
    """Each token's loss is weighted by min(cap, exp(behaviour_logprob - sampling_logprob)), detached.

    The numerator comes from the transformers student under the sampling distribution, the denominator from the sampling
    engine: this corrects the mismatch of two implementations, not staleness."""

    kind: Literal["truncated"] = "truncated"
    cap: float = Field(2.0, gt=0, description="largest weight of a token")


class BiasedTruncatedCorrection(Identity):
    """Each token's loss is weighted by min(cap, exp(student_logprob - sampling_logprob)), detached: the rollout-time student at
    temperature 1 over the whole vocabulary, against the distribution sampled from.

    For sampled estimators whose rollouts were not drawn from the student itself: cut off by top-p, top-k or min-p, at another
    temperature, or blended (TRB). Biased under a cut: it cannot see the tokens outside the nucleus, which have no samples, so the
    gradient lacks their part; inside, the weights restore the student's proportions. The part of a constant advantage does not
    vanish then, so `objective.center` is required; refused with `opd_plus`, whose advantage holds for exact samples alone."""

    kind: Literal["biased_truncated"] = "biased_truncated"
    cap: float = Field(2.0, gt=0, description="largest weight of a token")


ImportanceCorrection = Annotated[
    NoCorrection | TruncatedCorrection | BiasedTruncatedCorrection, Field(discriminator="kind")
]


class LoraSettings(Identity):
    """Trains low-rank adapters (PEFT) instead of the weights; the exported student has them merged.

    With dtype bfloat16 the forward computes with the merged weight, rounded as in the export, so that the trained student is the
    exported one. A round logs `export_error` and `update_rounded_away` (docs/gpu.md)."""

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale: adapters are multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the linear layers that get adapters",
    )

    @model_validator(mode="after")
    def _check(self) -> LoraSettings:
        refused = {"lm_head", "embed_tokens", "embed_out"} & set(self.target_modules)
        if refused:
            raise ValueError(
                f"lora.target_modules: {sorted(refused)[0]!r} is applied in chunks by the losses and cannot have an adapter"
            )
        return self


class OptimizerSettings(Identity):
    """AdamW and everything else that determines an update."""

    lr: float = Field(ge=0, description="learning rate; 0 trains nothing (a control)")
    schedule: LrSchedule = LrSchedule()
    weight_decay: float = Field(0.0, ge=0, description="decoupled, on matrices only (no norms, no biases)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float | None = Field(1.0, gt=0, description="global norm to clip to; null: no clipping")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights in forward and backward, and of the export; the master is always float32"
    )
    lora: LoraSettings | None = Field(None, description="low-rank adapters instead of all weights")
    dropout: bool = Field(
        False,
        description="dropout that the checkpoint's config.json has (attention_dropout, ...) acts in training; off: it is 0",
        json_schema_extra=omit_at(False),
    )

    @model_validator(mode="after")
    def _check_betas(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {list(self.betas)} must be two numbers in [0, 1)")
        return self


FORWARD = "lora_forward"
"""Field of a training's identity, beside its config."""


def forward_identity(settings: OptimizerSettings) -> dict[str, str]:
    """What enters a training's key beside its config, where the meaning has changed since a release: with LoRA in 16 bits the
    forward computes with the merged and rounded weights, as they are exported (before: with separate adapters)."""
    return {FORWARD: "merged"} if settings.lora is not None and settings.dtype != "float32" else {}


MaskReasonName = Literal["special_token", "truncated", "teacher_prefix", "unmapped"]


class TrainConfig(OptimizerSettings):
    """One round's training on its rollouts."""

    samples_per_step: int = Field(ge=1, description="samples of an optimizer step, whatever the world size")
    epochs_per_round: int = Field(1, ge=1, description="passes over a round's rollouts")
    metrics_every: int = Field(
        10, ge=1, description="steps between those that also log what needs the whole vocabulary (entropy, mass, ...)"
    )
    metrics_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a step's tokens, spread evenly, of which metrics are computed that the loss does not yield itself"
        " (entropies, overlap; with `renormalize` also masses, divergence, drift); 1: all",
        json_schema_extra=omit_at(1.0),
    )
    mask_reasons: tuple[MaskReasonName, ...] = Field(
        ("special_token", "teacher_prefix", "unmapped"),
        description="reasons that take a token out of the loss; an invalid value always does",
    )
    importance_correction: ImportanceCorrection = Field(
        NoCorrection(), description="correction of the mismatch between sampling engine and trainer"
    )
    max_drift: float | None = Field(
        None,
        gt=0,
        description="end the round after a step whose drift is above this: KL(rollout-time student || live student) in nats"
        " per token, estimated over the step's tokens (see drift_estimator)",
    )
    drift_estimator: Literal["k3", "log_ratio"] | None = Field(
        None,
        description="with max_drift; null: k3. k3: the mean of r - 1 - log r, r the ratio of live to rollout-time probability of"
        " a sampled token: never negative, unbiased where rollouts are sampled untruncated at temperature 1, low where top-p or"
        " top-k keep tokens from being sampled. log_ratio: the mean of -log r, which under top-p is no KL and can be negative"
        " (runs begun before 0.2 keep it)",
        json_schema_extra=omit_at(None, "log_ratio"),
    )

    @model_validator(mode="before")
    @classmethod
    def _set_drift_estimator(cls, data: Any) -> Any:
        """k3 where it matters and none is named, none where it does not: keys without max_drift stay as they were."""
        if isinstance(data, dict):
            given = data.get("drift_estimator") or "k3"
            return data | {"drift_estimator": given if data.get("max_drift") is not None else None}
        return data


class WarmupConfig(OptimizerSettings):
    """Supervised fine-tuning on the prompts of split `warmup`, epoch after epoch in a seeded order."""

    steps: int = Field(ge=1, description="optimizer steps")
    samples_per_step: int = Field(32, ge=1, description="samples of an optimizer step, whatever the world size")
    metrics_every: int = Field(50, ge=1, description="steps between those that also log the student's entropy")
    stop_loss: float | None = Field(
        None,
        gt=0,
        description="end after the first step at which the running mean of the loss (the newest step counts 1/10) is"
        " below this; null: do all steps. What a student can do after a fixed number of steps varies between seeds",
    )
