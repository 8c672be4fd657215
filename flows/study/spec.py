"""The YAML of a study: methods compared over seeds, with learning rates from a sweep of equal budget."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.config_file import Settled, merge, read_layers, read_yaml, shipped, validate
from flows.experiment import CHANGEABLE, Begun, Experiment, Part, assembled
from flows.run.runner import has_begun
from storage.errors import ConfigError, did_you_mean
from storage.runs import RUN_NAME

OWN_FIELDS = ("seed", *CHANGEABLE, "runtime", "plugins", "fork")
"""Sections that a method cannot set: the study sets the first two, all runs share workers, and none is a fork."""

Seed = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Part):
    """One method of the comparison."""

    config: Path | None = Field(
        None, description="a recipe, relative to the study; its fields apply to the study's base, not to its own"
    )
    set: dict[str, Any] = Field({}, description="further fields, nested or dotted (objective.advantage: ...)")
    group: str | None = Field(None, description="the group whose learning rate it uses; null: the rate of its config")


class Group(_Part):
    """Methods that share a learning rate."""

    method: str = Field(description="the method that represents the group in the sweep")
    lrs: tuple[Rate, ...] = Field(min_length=1, description="learning rates to try")
    by: Literal["reverse_kl", "accuracy"] = Field(
        "reverse_kl", description="metric of choice: the lowest reverse KL or the highest accuracy after the last round"
    )


class Sweep(_Part):
    """The search for learning rates: every group gets as many candidates, seeds and rounds as any other."""

    seeds: tuple[Seed, ...] = Field(
        min_length=1, description="use other seeds than the study's, so that its results are not tuned on them"
    )
    rounds: int = Field(ge=1, description="rounds of each candidate")
    groups: dict[str, Group] = Field(min_length=1, description="name -> Group; all with equally many learning rates")

    @model_validator(mode="after")
    def _equal_budgets(self) -> Sweep:
        counts = {name: len(group.lrs) for name, group in self.groups.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"groups: learning rates per group are {listed}; give each equally many (equal budgets)")
        twice = [name for name, group in self.groups.items() if len(set(group.lrs)) < len(group.lrs)]
        if twice or len(set(self.seeds)) < len(self.seeds):
            where = f"groups.{twice[0]}.lrs" if twice else "seeds"
            raise ValueError(f"{where}: a value is repeated; it would be the same run")
        return self


class Study(_Part):
    """The YAML of a study."""

    name: str = Field(description="prefix of its runs and name of its folder (default: the file's name)")
    base: Path = Field(description="the experiment that all methods start from, relative to the study")
    set: dict[str, Any] = Field({}, description="fields for all methods, applied after base and recipe")
    seeds: tuple[Seed, ...] = Field(min_length=1, description="every method runs once on each")
    rounds: int = Field(ge=1, description="rounds of every run")
    methods: dict[str, Method] = Field(min_length=1, description="name -> Method, in the order of tables and plot")
    sweep: Sweep | None = Field(None, description="null: every method uses the learning rate of its config")

    @model_validator(mode="after")
    def _cross_checks(self) -> Study:
        problems = [*self._reference_problems(), *self._override_problems()]
        if len(set(self.seeds)) < len(self.seeds):
            problems.append("seeds: a value is repeated; it would be the same run")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _reference_problems(self) -> Iterator[str]:
        groups = self.sweep.groups if self.sweep else {}
        for name, method in self.methods.items():
            if method.group is not None and method.group not in groups:
                yield f"methods.{name}.group: {method.group!r} is not in sweep.groups; {_nearest(method.group, groups)}"
        for name, group in groups.items():
            if group.method not in self.methods:
                yield f"sweep.groups.{name}.method: no {group.method!r} in methods; {_nearest(group.method, self.methods)}"
            elif self.methods[group.method].group != name:
                yield f"sweep.groups.{name}.method: {group.method!r} must belong to the group it represents"

    def _override_problems(self) -> Iterator[str]:
        shared = nested(self.set)
        for field in ("seed", "policy", "fork"):
            if field in shared:
                yield f"set.{field}: a study sets seeds and rounds itself and has no forks; remove it"
        for name, method in self.methods.items():
            own = nested(method.set)
            yield from (f"methods.{name}.set.{f}: equal for all methods; remove it" for f in OWN_FIELDS if f in own)
            if method.group is not None and "lr" in own.get("train", {}):
                yield f"methods.{name}.set.train.lr: the sweep of group {method.group!r} chooses it; remove one of the two"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study. `part`: sweep or study; `lr` None: the rate of its config."""

    part: str
    name: str
    method: str
    group: str | None
    seed: int
    lr: float | None
    rounds: int

    def __str__(self) -> str:
        what = f"sweep of {self.group} with {self.method}" if self.part == "sweep" else self.method
        return f"{what}, seed {self.seed}" + (f", lr {self.lr:g}" if self.lr is not None else "")


class StudyPlan:
    """A study with its configs read and validated. Use `load_study`."""

    def __init__(self, study: Study, where: Path, root: str | Path | None = None) -> None:
        self.study, self.where, self._root = study, where, root
        base = read_layers(where.parent / study.base)
        self._configs = {name: self._parts(base, name, method) for name, method in study.methods.items()}
        self._folders = [where.parent.resolve(), *(file.parent for file, _ in reversed(base))]
        valid = {name: self.experiment(name, study.seeds[0], self._any_lr(m)) for name, m in study.methods.items()}
        first = next(iter(valid.values()))
        self.runtime, self.plugins = first.runtime, first.plugins
        for name, experiment in valid.items():
            if (experiment.runtime, experiment.plugins) != (self.runtime, self.plugins):
                raise ConfigError(
                    f"{where}: methods.{name}: its recipe changes runtime or plugins, but all runs share their workers;"
                    " use the study's own `set` instead"
                )
        for run in (*self.sweep_runs(), *self.method_runs()):
            if not RUN_NAME.fullmatch(run.name):
                raise ConfigError(
                    f"{where}: {run.name!r} is not a valid run name (1 to 64 of letters, digits, dot, underscore, dash);"
                    " choose a shorter or plainer name for the study, the method or the group"
                )

    def _parts(self, base: list[tuple[Path, dict[str, Any]]], name: str, method: Method) -> list[Part]:
        layers = read_layers(self.where.parent / method.config) if method.config else []
        recipe = layers[1:] or layers  # without its outermost base, which the study's replaces
        own = self.where.resolve()
        fields = (("set", self.study.set), (f"methods.{name}.set", method.set))
        return [
            *((data, file.parent, str(file)) for file, data in (*base, *recipe)),
            *((nested(data), own.parent, f"{own}: {field}") for field, data in fields),
            ({"policy": {"rounds": self.study.rounds}}, own.parent, str(own)),
        ]

    def _any_lr(self, method: Method) -> float | None:
        sweep = self.study.sweep
        return sweep.groups[method.group].lrs[0] if sweep is not None and method.group is not None else None

    def experiment(self, method: str, seed: int, lr: float | None) -> Experiment:
        """A method's experiment. ConfigError names the study's file, the method and the field."""
        return self._assembled(method, seed, lr, lambda _: self._begun)

    @functools.cached_property
    def _begun(self) -> bool:
        """Whether a run of the study is in the store as the file has it: then all of them go on, those too that have not begun.
        Runs whose rate the sweep chooses are not asked, because the sweep's begin before them."""
        if self._root is None:
            return False
        settled = (run for run in (*self.sweep_runs(), *self.method_runs()) if run.lr is not None or run.group is None)
        return any(
            has_begun(run.name, self._root)(self._assembled(run.method, run.seed, run.lr, lambda _: True))
            for run in settled
        )

    def _assembled(self, method: str, seed: int, lr: float | None, begun: Begun) -> Experiment:
        chosen: dict[str, Any] = {"seed": seed} | ({"train": {"lr": lr}} if lr is not None else {})
        parts = [*self._configs[method], (chosen, self.where.parent, str(self.where))]
        return assembled(parts, f"{self.where}: methods.{method}", self._folders, begun)

    def sweep_runs(self) -> list[StudyRun]:
        """All candidate learning rates of all groups, on every seed of the sweep."""
        sweep = self.study.sweep
        if sweep is None:
            return []
        return [
            StudyRun("sweep", f"{self._prefix}-sweep-{name}-{lr:g}-s{seed}", group.method, name, seed, lr, sweep.rounds)
            for name, group in sweep.groups.items()
            for lr in group.lrs
            for seed in sweep.seeds
        ]

    def method_runs(self, lrs: Mapping[str, float] | None = None) -> list[StudyRun]:
        """Every method on every seed, seed by seed, with its group's rate from `lrs`.

        Groups without a rate in `lrs` are left out; without `lrs` (not known yet) all are listed, without a rate."""
        known = lrs or {}
        return [
            StudyRun(
                "study",
                f"{self._prefix}-{name}-s{seed}",
                name,
                method.group,
                seed,
                known.get(method.group or ""),
                self.study.rounds,
            )
            for seed in self.study.seeds
            for name, method in self.study.methods.items()
            if lrs is None or method.group is None or method.group in lrs
        ]

    @property
    def _prefix(self) -> str:
        return f"study-{self.study.name}"


def load_study(path: str | Path, root: str | Path | None = None) -> StudyPlan:
    """Read a study and the config of each method. `root`: the store in which it may have begun. ConfigError names the file and
    field, and what to do."""
    path = shipped(Path(path))
    data = {"name": path.stem} | read_yaml(path)
    settled = Settled(path.parent, str(path), keep_untyped=True).fields(data, [Study])
    return StudyPlan(validate(Study, settled, str(path)), path, root)


def nested(overrides: dict[str, Any]) -> dict[str, Any]:
    """`{"train.lr": 1}` as `{"train": {"lr": 1}}`; keys without dots stay as they are. ConfigError for a field that is set
    twice, dotted and nested."""
    result: dict[str, Any] = {}
    for path, value in overrides.items():
        for key in reversed(str(path).split(".")):
            value = {key: value}
        if twice := _common(result, value):
            raise ConfigError(f"set: {twice} is set twice, dotted and nested; remove one of them")
        result = merge(result, value)
    return result


def _common(first: Any, second: Any) -> str:
    """A field that both mappings set, dotted; empty if there is none."""
    for name in first.keys() & second.keys():
        both = isinstance(first[name], dict) and isinstance(second[name], dict)
        below = _common(first[name], second[name]) if both else ""
        if below or not both:
            return f"{name}.{below}" if below else str(name)
    return ""


def _nearest(name: str, known: Iterable[str]) -> str:
    return did_you_mean(name, known, f"there are: {', '.join(known) or 'none'}")
