"""The config model of a run. Identity determines results, runtime where it runs, policy how long; each has its own type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from flows.config_file import Settled, merge, parse_override, read_layers, refusal, refuse_secrets, validate
from flows.cross_checks import WITH_DTYPE, cross_problems, without_effect
from flows.hooks import Hooks
from flows.trackers import AnyTracker, TrackerConfig
from storage.disk.yaml_text import dump
from storage.errors import ConfigError, IdentityMismatch
from storage.identity import Identity, RunPolicy, omit_at
from storage.upkeep.retention import Retention
from storage.upkeep.stop_rules import StopRules
from tasks.evaluate import EvaluateConfig
from tasks.inputs.contexts import JUDGED, SiblingConfig, columns_of, kept_columns, named_in, per_sample, templates_of
from tasks.inputs.models import ModelSource, vocabulary_rows_of
from tasks.inputs.prompts import PrepareConfig
from tasks.inputs.teachers import SELF_TEACHERS, EmaStudent, SelfTeacher, TeacherSource, is_self
from tasks.inputs.verifiers import verifier_digest
from tasks.judge import JudgeConfig, sources_of
from tasks.losses.config import ObjectiveConfig
from tasks.mixture import MixtureConfig
from tasks.plugins import beside, changed, load_plugins, refuse_hidden, search_in
from tasks.rollout_config import RolloutConfig
from tasks.supervise import SuperviseConfig
from tasks.train import TrainConfig
from tasks.warmup import WarmupConfig
from tasks.workers.runtime import RuntimeConfig

KEPT_STATES = 2
"""Rounds whose trainer_state a new run keeps: the last, which the next round reads, and the one that it was trained from."""


_PLAIN_SIBLING = {"rule": "first", "strip_thinking": True}
CHANGEABLE = ("policy", "trackers", "hooks")
"""Sections that may change between two calls of a run, beside `runtime`."""


class ModelConfig(Identity):
    """Source of a model, and its optional supervised warm-up."""

    source: ModelSource = Field(description="a folder, a pinned Hub revision, or an architecture to initialise")
    warmup: WarmupConfig | None = Field(None, description="supervised fine-tuning before distillation (cold start)")


class TeacherConfig(Identity):
    """The teacher: a model, or the student itself at an earlier time; and what it reads beside the prompt."""

    source: TeacherSource = Field(
        description="a model as for the student, or the student itself: initial, previous_round, ema (docs/teachers.md)"
    )
    warmup: WarmupConfig | None = Field(None, description="supervised fine-tuning before distillation (cold start)")
    context: str | tuple[str, ...] | None = Field(
        None,
        description="a template over {prompt}, {answer}, {solution} and {hint}, and over {sibling}, {feedback} and {verdict},"
        " which only the round knows; it becomes the user's turn which the teacher reads. A list: each sample gets the first"
        " template that it has every column for, and those that get none are left out of the loss. null: the teacher reads what"
        " the student reads. Where prompts are plain text a template ends with {prompt}",
        json_schema_extra=omit_at(None),
    )
    sibling: SiblingConfig = Field(
        SiblingConfig(), description="which completion {sibling} is", json_schema_extra=omit_at(_PLAIN_SIBLING)
    )

    @field_validator("context")
    @classmethod
    def _template(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if value == ():
            raise ValueError("context: an empty list; write a template, or null")
        for template in templates_of(value):
            require_columns(template)
        return value

    @property
    def of_samples(self) -> tuple[str, ...]:
        """The templates, where samples have contexts of their own; else empty."""
        return templates_of(self.context) if per_sample(self.context) else ()

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.warmup is not None and is_self(self.source):
            raise ValueError(
                f"teacher.warmup: a teacher of kind {self.source.kind} is the student itself; set student.warmup, and"
                " teacher.warmup: null"
            )
        return self


class NamedTeacherConfig(ModelConfig):
    """One teacher of several: a model, and what it reads beside the prompt."""

    context: str | None = Field(
        None,
        description="a template over {prompt}, {answer}, {solution} and {hint} for the prompts of this teacher, as that of the"
        " one `teacher`; null: it reads what the student reads",
        json_schema_extra=omit_at(None),
    )

    @field_validator("context", mode="before")
    @classmethod
    def _template(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            raise ValueError(
                "context: a list of templates gives each sample its own, which is there for the one `teacher` only; write one"
                " template over columns of the prompts"
            )
        if isinstance(value, str):
            require_columns(value)
            if of_round := sorted(named_in([value]) & JUDGED):
                raise ValueError(
                    f"context: {' and '.join(f'{{{name}}}' for name in of_round)} are known in the round only, and contexts of"
                    " samples are there for the one `teacher` only; name columns of the prompts, or train with one `teacher`"
                )
        return value


class Policy(RunPolicy):
    """Fields that may change between two calls of the same run."""

    rounds: int = Field(5, ge=0, description="rounds of rollout, supervision and training after the initial evaluation")
    evaluate_every: int = Field(
        1,
        ge=1,
        description="evaluate every so many rounds, and always the last; a round left out can be evaluated later"
        " (`opd evaluate`)",
    )
    retain: Retention = Field(
        default_factory=Retention,
        description=f"what is kept of this run's earlier rounds; without trainer_state: its last {KEPT_STATES}",
    )
    collect: bool = Field(
        True,
        description="after every round remove what `retain` does not keep, as `opd gc --apply` does; off in runs that began"
        " before this field existed",
    )
    keep_rounds: tuple[int, ...] = Field(
        (),
        description="rounds of which everything is kept. Of the best round, and of those where a fork begins, student and"
        " trainer_state are always kept",
    )
    stop: StopRules | None = Field(
        None, description="end before `rounds` where one of these rules holds after a round; null: never"
    )
    allow_mixed_dtypes: bool = Field(
        False,
        description="let a policy gradient train although rollout.dtype, supervise.dtype and train.dtype differ: its importance"
        " ratios are then off by rounding before any update",
    )

    @model_validator(mode="after")
    def _check(self) -> Policy:
        if any(number < 0 for number in self.keep_rounds):
            raise ValueError(f"policy.keep_rounds: {list(self.keep_rounds)} must be numbers of rounds, from 0 on")
        chosen = self.retain.model_fields_set
        if "trainer_state" not in chosen:
            values = self.retain.model_dump() | {"trainer_state": KEPT_STATES}
            self.retain = Retention.model_construct(_fields_set=set(chosen), **values)
        return self

    def evaluates(self, round: int, last: int) -> bool:
        """Whether a round is evaluated in a call that ends with the round `last`."""
        return round % self.evaluate_every == 0 or round in (last, self.rounds)


class Fork(BaseModel):
    """The round of another run from which this one started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    round: int = Field(ge=0)
    experiment: dict[str, Any]


class Experiment(BaseModel):
    """A run's whole config. Fields above `runtime` are identity; `runtime` and the fields below it may change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, description="makes every other seed")
    student: ModelConfig
    teacher: TeacherConfig | None = Field(None, description="the model to learn from; or several: `teachers`")
    teachers: dict[str, NamedTeacherConfig] = Field(
        {},
        description="several models to learn from, by name, instead of `teacher`: each prompt's `teacher_id` names its own, or a"
        " `mixture` of all teaches every prompt. null leaves out what a base config has (one of them, or all)",
    )
    mixture: MixtureConfig | None = Field(
        None, description="let all `teachers` teach every prompt, by an average of their distributions"
    )
    prompts: PrepareConfig
    rollout: RolloutConfig
    judge: JudgeConfig | None = Field(
        None,
        description="verifiers that give the rollouts rewards, for objectives and teachers' contexts that need them; null: none",
    )
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
    trackers: tuple[AnyTracker, ...] = Field(
        (), description="where metrics go beside the store: tensorboard, wandb, mlflow, trackio, or a plugin's"
    )
    hooks: Hooks = Field(default_factory=Hooks)

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        """One tracker stands for a list of it."""
        return [value] if isinstance(value, str | dict) else () if value is None else value

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: tuple[TrackerConfig, ...]) -> tuple[TrackerConfig, ...]:
        kinds = [tracker.kind for tracker in value]
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise ValueError(f"{twice[0]} is there twice; name each tracker once")
        return value

    @model_validator(mode="before")
    @classmethod
    def _whole_vocabulary(cls, data: Any) -> Any:
        """A full support without `k` takes the smaller vocabulary of the two models, where it is known before loading."""
        objective = data.get("objective") if isinstance(data, dict) else None
        beside = objective.get("beside") if isinstance(objective, dict) else None
        holder = beside if isinstance(beside, dict) else objective
        support = holder.get("support") if isinstance(holder, dict) else None
        if not isinstance(objective, dict) or not isinstance(holder, dict) or not isinstance(support, dict):
            return data
        if support.get("kind") != "full" or "k" in support:
            return data
        several, one = _without_nulls(data.get("teachers")), data.get("teacher")
        models = [data.get("student")]
        if isinstance(several, dict) and several:
            models += several.values()
        elif not _is_students(one):
            models.append(one)
        rows = [_rows(model) for model in models]
        if None in rows:
            return data
        filled = {**holder, "support": {**support, "k": min(filter(None, rows))}}
        return data | {"objective": filled if holder is objective else {**objective, "beside": filled}}

    @field_validator("teachers", mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        """Null takes out what a base config has: one of its teachers, or all."""
        return _without_nulls({} if value is None else value)

    @model_validator(mode="after")
    def _cross_checks(self) -> Experiment:
        problems = list(cross_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def identity(self) -> dict[str, Any]:
        """The part that determines results, as JSON; of a fork's parent too."""
        return _determining(self.model_dump(mode="json"))

    def at(self, round: int) -> Experiment:
        """The experiment that applies to a round: the parent's for rounds up to a fork, and with the behaviour that holds at the
        round's first optimizer step (of rounds of `steps_per_round`, also where max_drift ended some early)."""
        if self.fork is not None and self.parent is not None and round <= self.fork.round:
            return self.parent.at(round)
        step = max(round - 1, 0) * self.steps_per_round
        return self.model_copy(update={"rollout": self.rollout.at(step)})

    @functools.cached_property
    def parent(self) -> Experiment | None:
        """The experiment that this one was forked from."""
        if self.fork is None:
            return None
        return Experiment.model_validate(self.fork.experiment).model_copy(update={"runtime": self.runtime})

    def draft_plan(self, round: int) -> tuple[RolloutConfig, int | None]:
        """The rollout's config whose drafts a round reads, with its schedules, and the last round that reads them (None where no
        round is the last, 0 without any)."""
        if self.fork is not None and self.parent is not None and round <= self.fork.round:
            return self.parent.draft_plan(round)
        behaviour, number = self.rollout.behaviour, 1
        if "drafts" in behaviour.at(behaviour.last_change).reads:
            return self.rollout, None
        while number * self.steps_per_round < behaviour.last_change:
            number += 1
        while number and "drafts" not in self.at(number).rollout.behaviour.reads:
            number -= 1
        return self.rollout, number

    def source_of(self, model: ModelConfig | TeacherConfig) -> ModelSource:
        """Where a model's weights come from when the run begins: those of a teacher that is the student, from the student's."""
        return cast(ModelSource, self.student.source if is_self(model.source) else model.source)

    @property
    def self_teacher(self) -> SelfTeacher | None:
        """The teacher's source, if the teacher is the student itself."""
        source = None if self.teacher is None else self.teacher.source
        return source if isinstance(source, SelfTeacher) else None

    @property
    def averaged(self) -> EmaStudent | None:
        """What the trainer keeps for a teacher that is the student's average."""
        return self.self_teacher if isinstance(self.self_teacher, EmaStudent) else None

    @property
    def contexts(self) -> dict[str, str | dict[str, str]]:
        """Split -> template of what the teacher reads, where it is the same for all samples of a prompt; with several teachers
        those of each that has one. The held-out prompts have one if the evaluation asks the teacher."""
        splits = ("train", "eval") if self.evaluate.generations("kl") else ("train",)
        sources = self.prompts.sources()
        named = {name: model.context for name, model in sorted(self.teachers.items()) if model.context is not None}
        template = named or (None if self.teacher is None else self.teacher.context)
        if not isinstance(template, str | dict) or not template or self.sample_contexts:
            return {}
        return {split: template for split in splits if split in sources}

    @property
    def sample_contexts(self) -> tuple[str, ...]:
        """The teacher's templates, where the samples of a round have contexts of their own; else empty."""
        return () if self.teacher is None else self.teacher.of_samples

    @property
    def context_columns(self) -> dict[str, bool] | None:
        """What `prepare` keeps of the prompts for the contexts of samples; None where samples have none of their own."""
        return kept_columns(self.sample_contexts) if self.sample_contexts else None

    @property
    def taught_by(self) -> dict[str | None, ModelConfig | TeacherConfig]:
        """The teachers by name; None: the only one."""
        if self.teacher is not None:
            return {None: self.teacher}
        return {name: model for name, model in self.teachers.items()}  # noqa: C416  (for its wider types)

    @property
    def routed(self) -> bool:
        """Whether each prompt names its own teacher."""
        return bool(self.teachers) and self.mixture is None

    @property
    def steps_per_round(self) -> int:
        samples = self.rollout.prompts_per_round * self.rollout.num_generations * self.train.epochs_per_round
        return samples // self.train.samples_per_step

    def to_yaml(self) -> str:
        """The resolved config; `opd run` on it gives the same run."""
        return dump(self.model_dump(mode="json"))


def require_columns(template: str) -> None:
    """ValueError for a template of a context that names no column, or an unknown one."""
    if not columns_of(template):
        raise ValueError(
            f"context: {template!r} names no column; write {{prompt}}, {{answer}}, {{solution}}, {{hint}}, {{sibling}},"
            " {feedback} or {verdict}, or null"
        )


def _rows(model: Any) -> int | None:
    """The vocabulary of a model's section that is not validated yet; None where it is not known, or the section is invalid."""
    try:
        source = TypeAdapter(ModelSource).validate_python(model.get("source") if isinstance(model, dict) else None)
    except ValidationError:
        return None
    return vocabulary_rows_of(source)


def _without_nulls(value: Any) -> Any:
    """A mapping without the entries that are null; anything else as it is."""
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


def _is_students(teacher: Any) -> bool:
    """Whether a teacher's section, not validated yet, names the student itself."""
    source = teacher.get("source") if isinstance(teacher, dict) else None
    return isinstance(source, dict) and source.get("kind") in SELF_TEACHERS


Begun = Callable[["Experiment"], bool]
"""Whether an experiment is in the store already, so that it goes on with what is refused in a new one."""


def not_begun(experiment: Experiment) -> bool:
    """A config that is read for no run."""
    return False


def load_experiment(
    path: str | Path,
    overrides: list[str] | None = None,
    folder: str | Path | None = None,
    begun: Begun = not_begun,
) -> Experiment:
    """Read, override and validate a config. Paths in a file are relative to it, those of overrides to `folder` (default: the
    working directory). `begun`: asked where a field of the objective has no effect (`refuse_without_effect`).

    ConfigError names file and field, what was found, and what to do."""
    layers = read_layers(Path(path))
    given = [(f"--set {text}", parse_override(text)) for text in overrides or []]
    parts = [(data, file.parent, str(file)) for file, data in layers] + [
        (data, Path.cwd() if folder is None else Path(folder), where) for where, data in given
    ]
    return assembled(parts, str(path), [file.parent for file, _ in reversed(layers)], begun)


Part = tuple[dict[str, Any], Path, str]
"""Some fields of an experiment, the folder that their relative paths start from, and their place for errors."""


def assembled(parts: Sequence[Part], where: str, folders: Sequence[Path], begun: Begun) -> Experiment:
    """The experiment of `parts`, later ones merged over earlier ones. Modules are looked for in `folders` too, in this order.

    ConfigError as for `load_experiment`."""
    runtime = [
        settle({"runtime": data["runtime"]}, folder, place) for data, folder, place in parts if "runtime" in data
    ]
    raw = merged([*(data for data, _, _ in parts), *runtime])
    modules = import_plugins(raw, where, folders)  # they may register choices, whose fields are settled below
    found = experiment_of(merged([settle(*part) for part in parts]), where, modules)
    refuse_without_effect(found, where, begun)
    return found


def refuse_without_effect(experiment: Experiment, where: str, begun: Begun) -> None:
    """ConfigError for fields of the objective that nothing reads, in a config that has not begun. Those that a fork has from its
    parent stay: earlier versions accepted them."""
    accepted = () if experiment.parent is None else without_effect(experiment.parent)
    unread = [line for line in without_effect(experiment) if line not in accepted]
    if unread and not begun(experiment):
        raise ConfigError(refusal(where, unread))


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All parts, later ones merged over earlier ones."""
    nothing: dict[str, Any] = {}
    return functools.reduce(merge, parts, nothing)


def settle(data: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Some fields of an experiment in their long form, with absolute paths. The plugins that they need are imported."""
    return dict(Settled(folder, where).fields(data, [Experiment]))


def overridden(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A resolved config with overrides, whose paths are relative to the working directory."""
    for text in overrides:
        data = merge(data, settle(parse_override(text), Path.cwd(), f"--set {text}"))
    return data


def experiment_of(data: dict[str, Any], where: str, modules: Sequence[Path] = ()) -> Experiment:
    """The validated experiment. Its plugins are imported first, because they may register choices that it names. `modules`:
    folders for `runtime.modules`, beside those that it has.

    ConfigError lists every invalid field, after `where`, or names the missing plugin."""
    import_plugins(data, where)
    data = settle(data, Path.cwd(), where)
    if modules:
        runtime: Any = data.get("runtime") or {}
        known = [str(folder) for folder in runtime.get("modules") or ()]
        added = [str(folder) for folder in modules if str(folder) not in known]
        data = data | {"runtime": {**runtime, "modules": [*known, *added]}}
    return validate(Experiment, data, where)


def import_plugins(data: dict[str, Any], where: str, folders: Sequence[Path] = ()) -> list[Path]:
    """Imports the plugins of a config and of its parent, and returns those of `folders` that hold a module which the config
    names (a plugin, a verifier's function). Modules are looked for there, in `runtime.modules` and on the import path.

    ConfigError for a missing module, and for secrets in the config."""
    refuse_secrets(data, where)
    runtime = data.get("runtime")
    listed = runtime.get("modules") if isinstance(runtime, dict) else None
    stored = (
        [Path(item) for item in listed if isinstance(item, (str, Path))] if isinstance(listed, list | tuple) else []
    )
    parent = data["fork"].get("experiment") if isinstance(data.get("fork"), dict) else None
    plugins = [_names(part) for part in (parent, data) if isinstance(part, dict)]
    wanted = [*plugins[-1], *_functions(data)]
    used = list(dict.fromkeys(folder for name in wanted for folder in [beside(name, [*folders, *stored])] if folder))
    for folder in [*used, *stored]:
        search_in(folder)
    for name in wanted:
        refuse_hidden(name, [*folders, *stored])
    for names in plugins:
        load_plugins(names)
    return [folder for folder in used if folder in folders]


def _functions(data: dict[str, Any]) -> list[str]:
    """The modules of the functions that verifiers name, of a config that is not validated yet."""
    evaluate, judge = (data.get(section) for section in ("evaluate", "judge"))
    listed = judge.get("verifiers") if isinstance(judge, dict) else None
    verifiers = [
        evaluate.get("verifier") if isinstance(evaluate, dict) else None,
        *(listed if isinstance(listed, list | tuple) else ()),
    ]
    targets = [verifier.get("target") for verifier in verifiers if isinstance(verifier, dict)]
    return [target.partition(":")[0] for target in targets if isinstance(target, str)]


def _names(data: dict[str, Any]) -> list[str]:
    names = data.get("plugins")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list | tuple) else []


def _determining(data: dict[str, Any]) -> dict[str, Any]:
    """A config without the sections that may change between two calls, its own and those of the runs it was forked from."""
    kept = {name: value for name, value in data.items() if name not in ("runtime", *CHANGEABLE)}
    if kept.get("fork"):
        kept["fork"] = kept["fork"] | {"experiment": _determining(kept["fork"]["experiment"])}
    return kept


def as_stored(data: dict[str, Any]) -> dict[str, Any]:
    """A run's stored config. Fields that it lacks are younger than the run, and mean what the run did: where a new config has
    another default, that is set here."""
    stored = _younger_fields(data)
    policy = dict(data.get("policy") or {})
    if "collect" not in policy:  # it keeps what it kept
        policy["collect"] = False
        policy["retain"] = {"trainer_state": None} | (policy.get("retain") or {})
    if "allow_mixed_dtypes" not in policy:  # it trained with them
        policy["allow_mixed_dtypes"] = len({(data.get(section) or {}).get("dtype") for section in WITH_DTYPE}) > 1
    return stored | {"policy": policy}


def _younger_fields(data: dict[str, Any]) -> dict[str, Any]:
    train, fork = data.get("train"), data.get("fork")
    stored = dict(data)
    if isinstance(train, dict):
        stored["train"] = {"drift_estimator": "log_ratio"} | train
    if isinstance(fork, dict) and isinstance(fork.get("experiment"), dict):
        stored["fork"] = fork | {"experiment": _younger_fields(fork["experiment"])}
    return stored


def with_plugins(experiment: Experiment, name: str = "NAME") -> Experiment:
    """The experiment with its plugins imported, its verifiers' functions found, and the digests of the plugins' sources set,
    if it had none.

    ConfigError for a missing plugin or function, IdentityMismatch if a plugin has changed since the run `name` began."""
    if experiment.evaluate.verifier is not None:
        verifier_digest(experiment.evaluate.verifier)
    if experiment.judge is not None:
        sources_of(experiment.judge)
    now = load_plugins(experiment.plugins)
    if not experiment.plugin_sources:
        return experiment.model_copy(update={"plugin_sources": now})
    refuse_other_plugins(experiment.plugin_sources, now, name)
    return experiment


def refuse_other_plugins(then: dict[str, str], now: dict[str, str], name: str) -> None:
    """IdentityMismatch, naming the file, if a plugin differs from the one the run began with: with other keys the run would
    silently restart under its old name."""
    for plugin, digest in now.items():
        if then.get(plugin) != digest:
            raise IdentityMismatch(
                f"{changed(plugin)} since the run began (sha256 {then.get(plugin, 'none')[:12]} then,"
                f" {digest[:12]} now). Restore the old file and `opd resume {name}`; to use the new one, run the config"
                f" under another --name, or fork: `opd fork {name}@ROUND --name NEW`. Stages that do not depend on it are"
                " found in the store"
            )
