"""The config model of a run. Identity determines results, runtime where it runs, policy how long; each has its own type."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from flows.config_file import Settled, merge, parse_override, read_layers, refuse_secrets, validate
from storage.disk.yaml_text import dump
from storage.errors import ConfigError, IdentityMismatch
from storage.identity import Identity, RunPolicy, omit_at
from storage.upkeep.retention import Retention
from tasks.engines.teacher import ServerTeacher
from tasks.evaluate import EvaluateConfig
from tasks.inputs.contexts import columns_of
from tasks.inputs.models import ModelSource, ServedModel, declared_sizes, vocabulary_rows_of
from tasks.inputs.teachers import SELF_TEACHERS, EmaStudent, InitialStudent, TeacherSource, is_self
from tasks.inputs.verifiers import verifier_digest
from tasks.losses.config import FullSupport, ObjectiveConfig
from tasks.plugins import beside, changed, load_plugins, refuse_hidden, search_in
from tasks.prepare import PrepareConfig
from tasks.rollout_config import RolloutConfig
from tasks.supervise import SuperviseConfig, signal_problems
from tasks.train import TrainConfig
from tasks.warmup import WarmupConfig
from tasks.workers.runtime import RuntimeConfig

KEPT_STATES = 2
"""Rounds whose trainer_state a new run keeps: the last, which the next round reads, and the one that it was trained from."""


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
    context: str | None = Field(
        None,
        description="a template over {prompt}, {answer}, {solution} and {hint} that becomes the user's turn which the teacher"
        " reads; null: it reads what the student reads. Where prompts are plain text it ends with {prompt}",
        json_schema_extra=omit_at(None),
    )

    @field_validator("context")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None and not columns_of(value):
            raise ValueError("context: it names no column; write {prompt}, {answer}, {solution} or {hint}, or null")
        return value

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.warmup is not None and is_self(self.source):
            raise ValueError(
                f"teacher.warmup: a teacher of kind {self.source.kind} is the student itself; set student.warmup, and"
                " teacher.warmup: null"
            )
        return self

    @property
    def average(self) -> EmaStudent | None:
        """What the trainer keeps for this teacher."""
        return self.source if isinstance(self.source, EmaStudent) else None


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
    """A run's whole config. Fields above `runtime` are identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, description="makes every other seed")
    student: ModelConfig
    teacher: TeacherConfig
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

    @model_validator(mode="before")
    @classmethod
    def _whole_vocabulary(cls, data: Any) -> Any:
        """A full support without `k` takes the smaller vocabulary of the two models, where it is known before loading."""
        objective = data.get("objective") if isinstance(data, dict) else None
        support = objective.get("support") if isinstance(objective, dict) else None
        if not isinstance(objective, dict) or not isinstance(support, dict):
            return data
        if support.get("kind") != "full" or "k" in support:
            return data
        sides = ("student",) if _is_students(data.get("teacher")) else ("student", "teacher")
        rows = [_rows(data.get(side)) for side in sides]
        if None in rows:
            return data
        return data | {"objective": {**objective, "support": {**support, "k": min(filter(None, rows))}}}

    @model_validator(mode="after")
    def _cross_checks(self) -> Experiment:
        problems = list(cross_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def identity(self) -> dict[str, Any]:
        """The part that determines results, as JSON."""
        return self.model_dump(mode="json", exclude={"runtime", "policy"})

    def at(self, round: int) -> Experiment:
        """The experiment that applies to a round: the parent's for rounds up to a fork, and with the behaviour that holds at the
        round's first optimizer step (of rounds of `steps_per_round`, also where max_drift ended some early)."""
        if self.fork is not None and round <= self.fork.round:
            return self._parent.at(round)
        step = max(round - 1, 0) * self.steps_per_round
        return self.model_copy(update={"rollout": self.rollout.at(step)})

    @functools.cached_property
    def _parent(self) -> Experiment:
        assert self.fork is not None
        return Experiment.model_validate(self.fork.experiment).model_copy(update={"runtime": self.runtime})

    def draft_plan(self, round: int) -> tuple[RolloutConfig, int | None]:
        """The rollout's config whose drafts a round reads, with its schedules, and the last round that reads them (None where no
        round is the last, 0 without any)."""
        if self.fork is not None and round <= self.fork.round:
            return self._parent.draft_plan(round)
        behaviour, number = self.rollout.behaviour, 1
        if "drafts" in behaviour.at(behaviour.last_change).reads:
            return self.rollout, None
        while number * self.steps_per_round < behaviour.last_change:
            number += 1
        while number and "drafts" not in self.at(number).rollout.behaviour.reads:
            number -= 1
        return self.rollout, number

    @property
    def teacher_source(self) -> ModelSource:
        """Where the teacher's weights come from when the run begins."""
        source: Any = self.student.source if is_self(self.teacher.source) else self.teacher.source
        return cast(ModelSource, source)

    @property
    def contexts(self) -> dict[str, str]:
        """Split -> template of what the teacher reads. The held-out prompts have one if the evaluation asks the teacher."""
        splits = ("train", "eval") if self.evaluate.generations("kl") else ("train",)
        template, sources = self.teacher.context, self.prompts.sources()
        return {} if template is None else {split: template for split in splits if split in sources}

    @property
    def steps_per_round(self) -> int:
        samples = self.rollout.prompts_per_round * self.rollout.num_generations * self.train.epochs_per_round
        return samples // self.train.samples_per_step

    def to_yaml(self) -> str:
        """The resolved config; `opd run` on it gives the same run."""
        return dump(self.model_dump(mode="json"))


def _rows(model: Any) -> int | None:
    """The vocabulary of a model's section that is not validated yet; None where it is not known, or the section is invalid."""
    try:
        source = TypeAdapter(ModelSource).validate_python(model.get("source") if isinstance(model, dict) else None)
    except ValidationError:
        return None
    return vocabulary_rows_of(source)


def _is_students(teacher: Any) -> bool:
    """Whether a teacher's section, not validated yet, names the student itself."""
    source = teacher.get("source") if isinstance(teacher, dict) else None
    return isinstance(source, dict) and source.get("kind") in SELF_TEACHERS


def cross_problems(e: Experiment) -> list[str]:
    """Invalid combinations of fields, each with what to do. Checked before anything starts."""
    problems: list[str] = []
    samples = e.rollout.prompts_per_round * e.rollout.num_generations * e.train.epochs_per_round
    if samples % e.train.samples_per_step:
        problems.append(
            f"train.samples_per_step: {e.train.samples_per_step} does not divide the {samples} samples of a round"
            " (rollout.prompts_per_round x rollout.num_generations x train.epochs_per_round)"
        )
    if e.objective.estimator == "sft":
        problems.append("objective.estimator: 'sft' trains on given text and belongs to student.warmup; choose another")
    if e.objective.needs().credit.reward:
        problems.append(
            "objective.advantage: this one needs a reward of each sample, and rewards come with the stage `judge`, which is"
            " not built yet; use an advantage that needs none (`opd objectives` lists them)"
        )
    truncated = [
        f"rollout.{name} is {value}"
        for name, value, plain in (
            ("top_p", e.rollout.top_p, 1.0),
            ("top_k", e.rollout.top_k or 0, 0),
            ("min_p", e.rollout.min_p, 0),
            ("temperature", e.rollout.temperature, 1.0),
        )
        if value != plain
    ]
    problems += sampling_problems(e, truncated)
    problems += _stop_problems(e)
    problems += prefix_problems(e)
    for name, model in (("student", e.student), ("teacher", e.teacher)):
        if model.warmup is not None and e.prompts.warmup is None:
            problems.append(f"{name}.warmup: needs prompts.warmup (prompts with a `completion` to learn)")
    problems += signal_problems(e.supervise, e.objective.needs().signals)
    problems += served_problems(e)
    problems += size_problems(e, *declared_sizes(e.student.source), declared_sizes(e.teacher_source)[0])
    problems += teacher_problems(e)
    return problems


def teacher_problems(e: Experiment) -> list[str]:
    """What of the teacher does not fit the rest."""
    problems: list[str] = []
    own, context = is_self(e.teacher.source), e.teacher.context
    if own and not e.supervise.teacher.reads_checkpoint:
        problems.append(
            f"supervise.teacher: kind {e.supervise.teacher.kind} answers with weights of its own, but teacher.source"
            f" {e.teacher.source.kind} is this run's student; choose kind: local"
        )
    if own and not isinstance(e.teacher.source, InitialStudent) and "drafts" in e.rollout.behaviour.reads:
        problems.append(
            f"rollout.behaviour: {e.rollout.behaviour.kind!r} reads completions that the teacher writes once for all rounds, but"
            f" teacher.source {e.teacher.source.kind} is another model in every round; set teacher.source: {{kind: initial}}, or"
            " take a behaviour that reads no drafts"
        )
    if context is not None and not e.prompts.chat_template and not context.endswith("{prompt}"):
        problems.append(
            "teacher.context: with prompts.chat_template: false a completion continues the text itself, so the template must end"
            f" with {{prompt}}, and it is {context!r}"
        )
    if e.fork is not None:
        before = TeacherConfig.model_validate(e.fork.experiment.get("teacher"))
        if before != e.teacher:
            problems.append(
                f"teacher: a fork keeps the teacher of {e.fork.run!r}: prompts, and the average of an ema, come from its rounds;"
                " start a run of its own for another one (finished stages that it shares are found in the store)"
            )
    return problems


def _stop_problems(e: Experiment) -> list[str]:
    """What cannot be with merged stop ids."""
    if e.prompts.tokenizers.stop_ids != "merge":
        return []
    problems = [
        f"{section}.stop_token_ids: with prompts.tokenizers.stop_ids: merge completions end with the ids of both models; leave it"
        " at eos"
        for section, ids in (("rollout", e.rollout.stop_token_ids), ("evaluate", e.evaluate.stop_token_ids))
        if ids != "eos"
    ]
    if not e.supervise.teacher.capabilities.merges_stop_ids:
        problems.append(
            f"supervise.teacher: kind {e.supervise.teacher.kind} cannot count several stop ids as one, which"
            " prompts.tokenizers.stop_ids: merge asks for; choose kind: local, or stop_ids: mask"
        )
    return problems


def sampling_problems(e: Experiment, truncated: Sequence[str]) -> list[str]:
    """What does not fit together of how rollouts are drawn (`truncated`: fields that cut the student's distribution off) and an
    estimator that takes the samples for the student's own."""
    problems, behaviour, objective = [], e.rollout.behaviour, e.objective
    correction = e.train.importance_correction.kind
    weighted = correction == "biased_truncated" and behaviour.weighable
    if not objective.requires_untruncated_sampling:
        if correction == "biased_truncated":
            problems.append(
                "train.importance_correction: biased_truncated weights samples for a sampled estimator, and this objective is"
                " none: an expectation needs no weights; take kind: none or truncated"
            )
        return problems
    if weighted:
        if not getattr(objective, "center", True):
            problems.append(
                "objective.center: false, but train.importance_correction: biased_truncated cannot see outside the nucleus, so"
                " that the part of a constant advantage does not vanish; set center: true"
            )
        if objective.exact_samples:
            problems.append(
                "objective.advantage: opd_plus is unbiased for exact samples of the student alone, which the weights of"
                " train.importance_correction: biased_truncated are not; take advantage: stop_gradient, or rollout.top_p: 1"
            )
        return problems
    if not behaviour.exact:
        weigh = ", or weight the tokens with train.importance_correction: {kind: biased_truncated}"
        problems.append(
            f"rollout.behaviour: with {behaviour.kind!r} the student does not draw every token, but this objective's"
            " sampled estimator needs exact samples of the student; use behaviour: student, or a direct objective"
            + (weigh if behaviour.weighable else "")
        )
    if truncated:
        problems.append(
            f"objective: a sampled estimator needs exact samples of the student, but {' and '.join(truncated)}; set"
            " rollout.top_p: 1, top_k: 0, temperature: 1 (no importance weight restores tokens that were cut off;"
            " train.importance_correction: {kind: biased_truncated} accepts that)"
        )
    return problems


def served_problems(e: Experiment) -> list[str]:
    """What cannot be done with a model whose weights are not on this machine."""
    problems: list[str] = []
    if isinstance(e.student.source, ServedModel):
        problems.append(
            "student.source: kind served is for a teacher; the student is trained, so its weights must be here"
        )
    if isinstance(e.teacher.source, ServedModel):
        if not isinstance(e.supervise.teacher, ServerTeacher):
            problems.append(
                f"teacher.source: kind served has no weights, which supervise.teacher: {e.supervise.teacher.kind} reads; set"
                " supervise.teacher: {kind: server, model: NAME}, or give a checkpoint"
            )
        if e.teacher.warmup is not None:
            problems.append("teacher.warmup: kind served has no weights to train; leave the warm-up out")
        if e.rollout.behaviour.reads & {"teacher", "drafts"}:
            problems.append(
                f"rollout.behaviour: with {e.rollout.behaviour.kind!r} the sampler loads the teacher, but teacher.source kind"
                " served has no weights; give a checkpoint, or take behaviour: student"
            )
        if e.evaluate.generations("kl"):
            problems.append(
                "evaluate.kl_prompts: the exact reverse KL reads the teacher's whole distribution from its weights, which"
                " teacher.source kind served does not have; set evaluate.kl_prompts: 0 (then it is not measured), or give a"
                " checkpoint as teacher.source"
            )
    return problems


def prefix_problems(e: Experiment) -> list[str]:
    """Whether tokens that the student did not write are trained on by an objective that cannot use them, or not at all."""
    behaviour = e.rollout.behaviour
    if not behaviour.prefixes or e.objective.needs().takes_prefixes:
        return []
    left_out = "teacher_prefix" in e.train.mask_reasons
    if left_out and not behaviour.draws:
        return [
            "train.mask_reasons: teacher_prefix leaves out every token of these rollouts, none of which the student writes; take"
            " it out of the list"
        ]
    if not left_out and e.objective.estimator == "policy_gradient":
        return [
            "objective.estimator: a policy gradient needs the probability with which the student drew each token, but with"
            f" rollout.behaviour {behaviour.kind!r} others wrote some; put teacher_prefix into train.mask_reasons, take a trust"
            " region with a term for prefixes (tropd), or use estimator: direct"
        ]
    return []


def size_problems(e: Experiment, rows: int | None, positions: int | None, teacher_rows: int | None) -> list[str]:
    """What does not fit models of these sizes: the student's vocabulary rows and positions, the teacher's rows; None: unknown."""
    problems: list[str] = []
    for section, length in (
        ("rollout", e.rollout.max_completion_length),
        ("evaluate", e.evaluate.max_completion_length),
    ):
        if positions and length >= positions:
            problems.append(
                f"{section}.max_completion_length: {length} leaves no room for a prompt in the student's"
                f" max_position_embeddings, {positions}"
            )
    for need in e.objective.needs().signals:
        if rows and need.k and need.k > rows:
            side = getattr(e.objective, "side", None)
            where = "trust_region" if side is not None and side.support.k == need.k else "support"
            problems.append(f"objective.{where}.k: {need.k} is above the vocabulary of {rows}")
    support, sizes = getattr(e.objective, "support", None), (rows, teacher_rows)
    if isinstance(support, FullSupport) and all(sizes) and support.k < (least := min(filter(None, sizes))):
        problems.append(
            f"objective.support.k: full support means every id, but k is {support.k} and the vocabulary has {least}"
            f" rows; set k: {least}, or take kind: teacher_topk with outside: bucket"
        )
    return problems


_WITH_DTYPE = ("rollout", "supervise", "train")


def dtype_warning(e: Experiment) -> str | None:
    """What differs between the dtypes of the student as it is sampled, scored and trained, and why it matters; None if nothing.

    Raises ConfigError for a policy gradient, unless `policy.allow_mixed_dtypes`: the ratio of the live to the rollout-time
    student would have noise before any update."""
    dtypes = {section: getattr(e, section).dtype for section in _WITH_DTYPE}
    if len(set(dtypes.values())) == 1:
        return None
    shown = ", ".join(f"{section}.dtype {dtype}" for section, dtype in dtypes.items())
    text = (
        f"{shown}: the student that is sampled, scored and trained is not one and the same; its log-probabilities differ by"
        " rounding before any update"
    )
    if e.objective.estimator == "policy_gradient" and not e.policy.allow_mixed_dtypes:
        raise ConfigError(
            f"{text}, which a policy gradient takes for an importance ratio. Set one dtype for all three, or accept it with"
            " policy.allow_mixed_dtypes: true"
        )
    return text


def load_experiment(path: str | Path, overrides: list[str] | None = None) -> Experiment:
    """Read, override and validate a config. Paths in a file are relative to it, those of overrides to the working directory.

    ConfigError names file and field, what was found, and what to do."""
    layers = read_layers(Path(path))
    given = [(f"--set {text}", parse_override(text)) for text in overrides or []]
    parts = [(data, file.parent, str(file)) for file, data in layers] + [
        (data, Path.cwd(), where) for where, data in given
    ]
    return assembled(parts, str(path), [file.parent for file, _ in reversed(layers)])


Part = tuple[dict[str, Any], Path, str]
"""Some fields of an experiment, the folder that their relative paths start from, and their place for errors."""


def assembled(parts: Sequence[Part], where: str, folders: Sequence[Path]) -> Experiment:
    """The experiment of `parts`, later ones merged over earlier ones. Modules are looked for in `folders` too, in this order.

    ConfigError as for `load_experiment`."""
    runtime = [
        settle({"runtime": data["runtime"]}, folder, place) for data, folder, place in parts if "runtime" in data
    ]
    raw = merged([*(data for data, _, _ in parts), *runtime])
    modules = import_plugins(raw, where, folders)  # they may register choices, whose fields are settled below
    return experiment_of(merged([settle(*part) for part in parts]), where, modules)


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
    runtime, evaluate = data.get("runtime"), data.get("evaluate")
    verifier = evaluate.get("verifier") if isinstance(evaluate, dict) else None
    target = verifier.get("target") if isinstance(verifier, dict) else None
    listed = runtime.get("modules") if isinstance(runtime, dict) else None
    stored = (
        [Path(item) for item in listed if isinstance(item, (str, Path))] if isinstance(listed, list | tuple) else []
    )
    parent = data["fork"].get("experiment") if isinstance(data.get("fork"), dict) else None
    plugins = [_names(part) for part in (parent, data) if isinstance(part, dict)]
    wanted = [*plugins[-1], *([target.partition(":")[0]] if isinstance(target, str) else [])]
    used = list(dict.fromkeys(folder for name in wanted for folder in [beside(name, [*folders, *stored])] if folder))
    for folder in [*used, *stored]:
        search_in(folder)
    for name in wanted:
        refuse_hidden(name, [*folders, *stored])
    for names in plugins:
        load_plugins(names)
    return [folder for folder in used if folder in folders]


def _names(data: dict[str, Any]) -> list[str]:
    names = data.get("plugins")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list | tuple) else []


def as_stored(data: dict[str, Any]) -> dict[str, Any]:
    """A run's stored config. Fields that it lacks are younger than the run, and mean what the run did: where a new config has
    another default, that is set here."""
    stored = _younger_fields(data)
    policy = dict(data.get("policy") or {})
    if "collect" not in policy:  # it keeps what it kept
        policy["collect"] = False
        policy["retain"] = {"trainer_state": None} | (policy.get("retain") or {})
    if "allow_mixed_dtypes" not in policy:  # it trained with them
        policy["allow_mixed_dtypes"] = len({(data.get(section) or {}).get("dtype") for section in _WITH_DTYPE}) > 1
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
    """The experiment with its plugins imported, its verifier's function found, and the digests of the plugins' sources set, if it
    had none.

    ConfigError for a missing plugin or function, IdentityMismatch if a plugin has changed since the run `name` began."""
    if experiment.evaluate.verifier is not None:
        verifier_digest(experiment.evaluate.verifier)
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
