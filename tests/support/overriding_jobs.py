"""The trainer's jobs with settings of `runtime.trainer` per job, as tests and the plugin `trainer_with_overrides` send them."""

from __future__ import annotations

from typing import Any

from tasks.workers.jobs import Schema, TrainJob, WarmupJob, register_schema


@register_schema
class TrainWith(TrainJob, kw_only=True):
    overrides: dict[str, Any]
    failpoints: str


@register_schema
class WarmupWith(WarmupJob, kw_only=True):
    overrides: dict[str, Any]
    failpoints: str


@register_schema
class SpoiltGradient(Schema):
    """A job: what the trainer's engines do with a gradient that is not finite."""


@register_schema
class SpoiltGradients(Schema):
    kinds: list[dict[str, Any]]


def overriding(job: TrainJob | WarmupJob, failpoints: str = "", **overrides: Any) -> TrainWith | WarmupWith:
    """The same job at other settings, or with failpoints armed."""
    kind = TrainWith if isinstance(job, TrainJob) else WarmupWith
    fields = {name: getattr(job, name) for name in job.__struct_fields__}
    return kind(**fields, overrides=overrides, failpoints=failpoints)
