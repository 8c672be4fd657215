"""The one config model. Identity decides what is computed, runtime where, policy how long; they are apart by type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.config_file import merge, parse_override, read_config, refuse_secrets, validate
from storage.errors import IdentityMismatch
from storage.identity import Identity, RunPolicy
from storage.upkeep.retention import Retention
from tasks.evaluate import EvaluateConfig
from tasks.inputs.models import ModelSource, declared_sizes
from tasks.losses.config import FullSupport, ObjectiveConfig
from tasks.plugins import changed, load_plugins
from tasks.prepare import PrepareConfig
from tasks.rollout import RolloutConfig
from tasks.supervise import SuperviseConfig, signal_problems
from tasks.train import TrainConfig
from tasks.warmup import WarmupConfig
from tasks.workers.runtime import RuntimeConfig


class ModelConfig(Identity):
    """Where a model comes from, and the supervised warm-up it gets first, if any."""

    source: ModelSource = Field(description="a folder, a pinned Hub revision, or an architecture to initialise")
    warmup: WarmupConfig | None = Field(None, description="supervised fine-tuning before distillation (cold start)")


class Policy(RunPolicy):
    """What may change between two calls of the same run."""

    rounds: int = Field(5, ge=0, description="rounds of rollout, supervision and training after the initial evaluation")
    retain: Retention = Field(default_factory=Retention, description="what `opd gc` keeps of this run's earlier rounds")


class Fork(BaseModel):
    """The point in another run from which this one started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    round: int = Field(ge=0)
    experiment: dict[str, Any]


class Experiment(BaseModel):
    """Everything a run needs. Fields above `runtime` are identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, description="makes every other seed")
    student: ModelConfig
    teacher: ModelConfig
    prompts: PrepareConfig
    rollout: RolloutConfig
    supervise: SuperviseConfig = Field(default_factory=SuperviseConfig)
    objective: ObjectiveConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    plugins: tuple[str, ...] = Field((), description="modules of yours that register engines, objectives, verifiers")
    plugin_sources: dict[str, str] = Field(
        {}, description="set when a run begins: SHA-256 of each plugin's source, which enters the keys of what uses it"
    )
    fork: Fork | None = Field(None, description="set by `opd fork`")
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    policy: Policy = Field(default_factory=Policy)

    @model_validator(mode="after")
    def _cross_checks(self) -> Experiment:
        problems = list(cross_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def identity(self) -> dict[str, Any]:
        """The parts that decide what is computed, as JSON."""
        return self.model_dump(mode="json", exclude={"runtime", "policy"})

    def at(self, round: int) -> Experiment:
        """The experiment that governs a round: up to the point of a fork, the parent's."""
        if self.fork is not None and round <= self.fork.round:
            parent = Experiment.model_validate(self.fork.experiment)
            return parent.model_copy(update={"runtime": self.runtime}).at(round)
        return self

    @property
    def steps_per_round(self) -> int:
        samples = self.rollout.prompts_per_round * self.rollout.num_generations * self.train.epochs_per_round
        return samples // self.train.samples_per_step

    def to_yaml(self) -> str:
        """The resolved config: `opd run` on it makes the same run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def cross_problems(e: Experiment) -> list[str]:
    """Combinations of fields that cannot work, each with what to do; checked before anything starts."""
    found: list[str] = []
    samples = e.rollout.prompts_per_round * e.rollout.num_generations * e.train.epochs_per_round
    if samples % e.train.samples_per_step:
        found.append(
            f"train.samples_per_step: {e.train.samples_per_step} does not divide the {samples} samples of a round"
            " (rollout.prompts_per_round x rollout.num_generations x train.epochs_per_round)"
        )
    if e.objective.estimator == "sft":
        found.append("objective.estimator: 'sft' trains on given text and belongs to student.warmup; choose another")
    if e.objective.needs().credit.reward:
        found.append(
            "objective.advantage: this one needs a reward of each sample, and rewards come with the stage `judge`, which is"
            " not built yet; use an advantage that needs none (`opd objectives` lists them)"
        )
    truncated = [
        f"rollout.{name} is {value}"
        for name, value, plain in (
            ("top_p", e.rollout.top_p, 1.0),
            ("top_k", e.rollout.top_k or 0, 0),
            ("temperature", e.rollout.temperature, 1.0),
        )
        if value != plain
    ]
    if truncated and e.objective.requires_untruncated_sampling:
        found.append(
            f"objective: a sampled estimator needs exact samples of the student, but {' and '.join(truncated)}; set"
            " rollout.top_p: 1, top_k: 0, temperature: 1 (no importance weight restores tokens that were cut off)"
        )
    for name, model in (("student", e.student), ("teacher", e.teacher)):
        if model.warmup is not None and e.prompts.warmup is None:
            found.append(f"{name}.warmup: needs prompts.warmup (prompts with a `completion` to learn)")
    rows, positions = declared_sizes(e.student.source)
    for section, length in (
        ("rollout", e.rollout.max_completion_length),
        ("evaluate", e.evaluate.max_completion_length),
    ):
        if positions and length >= positions:
            found.append(
                f"{section}.max_completion_length: {length} leaves no room for a prompt in the student's"
                f" max_position_embeddings, {positions}"
            )
    found += signal_problems(e.supervise, e.objective.needs().signals)
    for need in e.objective.needs().signals:
        if rows and need.k and need.k > rows:
            side = getattr(e.objective, "side", None)
            where = "trust_region" if side is not None and side.support.k == need.k else "support"
            found.append(f"objective.{where}.k: {need.k} is above the vocabulary of {rows}")
    support, sizes = getattr(e.objective, "support", None), (rows, declared_sizes(e.teacher.source)[0])
    if isinstance(support, FullSupport) and all(sizes) and support.k < (least := min(filter(None, sizes))):
        found.append(
            f"objective.support.k: full support means every id, but k is {support.k} and the vocabulary has {least}"
            f" rows; set k: {least}, or take kind: teacher_topk with outside: bucket"
        )
    return found


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read, override and validate a config; ConfigError says which file and field, what was found, what to do."""
    data = read_config(Path(path))
    for text in overrides or []:
        data = merge(data, parse_override(text))
    return experiment_of(data, str(path))


def experiment_of(data: dict[str, Any], where: str) -> Experiment:
    """The experiment that a config's fields make; its plugins are imported first, for they may bring what it names.

    ConfigError lists every bad field, after `where`, or names the plugin that is not there."""
    refuse_secrets(data, where)
    parent = data["fork"].get("experiment") if isinstance(data.get("fork"), dict) else None
    for part in (parent, data):
        names = part.get("plugins") if isinstance(part, dict) else None
        if isinstance(names, list | tuple):
            load_plugins(name for name in names if isinstance(name, str))
    return validate(Experiment, _absolute(data), where)


def _absolute(value: Any, key: str = "") -> Any:
    """Paths in a config are relative to the current directory, as in a shell; a run must not depend on it later."""
    if isinstance(value, dict):
        return {k: _absolute(v, k) for k, v in value.items()}
    if key in ("path", "deepspeed") and isinstance(value, str):
        return str(Path(value).expanduser().absolute())
    return value


def with_plugins(experiment: Experiment, name: str = "NAME") -> Experiment:
    """Its plugins are imported, and the digests of their sources in it: those of now where it has none yet.

    ConfigError for a plugin that is not there, IdentityMismatch when one is not what the run `name` began with."""
    now = load_plugins(experiment.plugins)
    if not experiment.plugin_sources:
        return experiment.model_copy(update={"plugin_sources": now})
    refuse_other_plugins(experiment.plugin_sources, now, name)
    return experiment


def refuse_other_plugins(then: dict[str, str], now: dict[str, str], name: str) -> None:
    """A run keeps the plugins that it began with: with others its stages would have other keys, and it would silently
    begin anew under its old name. IdentityMismatch names the file."""
    for plugin, digest in now.items():
        if then.get(plugin) != digest:
            raise IdentityMismatch(
                f"{changed(plugin)} since the run began (sha256 {then.get(plugin, 'none')[:12]} then,"
                f" {digest[:12]} now). Put the old file back and `opd resume {name}`; to use the new one, run the config"
                f" under another --name, or fork: `opd fork {name}@ROUND --name NEW`. What does not depend on it is found"
                " in the store"
            )
