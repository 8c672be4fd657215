"""The keys of every stage as a pure function of a config, without anything being made; and every field changed once."""

from __future__ import annotations

import hashlib
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError

from flows.config_file import DISCRIMINATORS
from flows.distill import distill
from flows.experiment import Experiment
from storage.store import Artifact, Store

PARTS = (
    "model", "weights", "architecture", "tokenizer", "generation", "prompts", "vocabulary", "audit", "prompts:train",
    "prompts:eval", "prompts:warmup", "drafts", "rollouts", "rewards", "sampled", "mask", "teacher_topk", "student_topk",
    "teacher_margin", "state", "contexts", "context_columns",
)  # fmt: skip
TEACHERS = ("add", "subtract")
SEVERAL = (
    *(f"teachers:{split}" for split in ("train", "eval", "warmup")),
    *(f"teacher:{name}:{split}" for name in TEACHERS for split in ("train", "eval", "warmup")),
    *(f"{part}:{name}" for name in TEACHERS for part in ("audit", "vocabulary", "warmup")),
)
"""What prompts have beside, where they name one of two teachers."""


RENDERING = (
    "chat_template", "chat_template_kwargs", "add_generation_prompt", "add_special_tokens", "date", "max_teacher_prompt_length",
)  # fmt: skip
"""Fields of `prompts` that decide what the teacher reads of a sample's context."""
SIGNALS = {"sampled", "mask", "teacher_topk", "student_topk"}
DEPENDS: dict[str, set[str]] = {
    "seed": {"model", "model_teacher", "warmup", "warmup_teacher", "draft", "rollout", "context", "train", "evaluate"},
    "student.source": {"model"},
    "student.warmup": {"warmup"},
    "teacher.source": {"model_teacher"},
    "teacher.source.decay": {"train"},
    "teacher.source.per": {"train"},
    "teacher.warmup": {"warmup_teacher"},
    "teacher.context": {"prepare", "context"},
    "teacher.sibling": {"context"},
    "prompts": {"prepare"},
    **{f"prompts.{name}": {"prepare", "context"} for name in RENDERING},
    "judge": {"judge"},
    "judge.success_threshold": {"judge", "context"},
    "rollout": {"rollout"},
    "rollout.dtype": {"draft", "rollout"},
    "rollout.shard_prompts": {"draft", "rollout"},
    "rollout.max_completion_length": {"draft", "rollout"},
    "rollout.behaviour.drafts": {"draft", "rollout"},
    "rollout.temperature": {"rollout", "sampled"},
    "rollout.top_p": {"rollout", "sampled"},
    "rollout.top_k": {"rollout", "sampled"},
    "rollout.min_p": {"rollout", "sampled"},
    "supervise.dtype": SIGNALS,
    "supervise.encoding": {"teacher_topk", "student_topk"},
    "supervise.tail_mass": {"teacher_topk"},
    "supervise.special_tokens": {"mask"},
    "supervise.student": {"sampled", "mask"},  # lists of the teacher are the same without it
    "supervise.teacher": {"sampled", "mask", "teacher_topk"},  # those that ask the teacher something
    "objective": {"train"},
    "train": {"train"},
    "evaluate": {"evaluate"},
    "plugins": set(),  # a name alone: what it brings is in the fields that use it, and in its source
    "plugin_sources": set(),  # of a plugin that brings nothing; of others see PLUGGED
    "fork": set(),  # decides which experiment governs a round, not what a stage makes of it
}
"""Longest matching field -> stages (of supervise: its signals) whose own key must change, and no other's."""

PLUGGED: dict[str, set[str]] = {
    "sampler": {"draft", "rollout", "evaluate"},
    "scorer": SIGNALS | {"evaluate"},
    "trainer": {"train", "warmup"},
    "divergence": {"train"},
    "credit": {"train"},
    "trust_region": {"train"},
    "token_weight": {"train"},
    "verifier": {"evaluate"},
    "nothing": set(),
}
"""What a plugin brings -> stages whose own key must change with its source, and no other's."""


class Keys:
    """An executor that takes every stage for made, with contents that depend on its place alone: what a key depends on
    beside them is the config. `found`: "round/label/output" -> key. `prepared`: further contents of `prepare`."""

    def __init__(self, store: Store, prepared: dict[str, str] | None = None) -> None:
        self.store, self.found, self._round = store, dict[str, str](), 0
        self._prepared = prepared or {}

    def __call__(self, label: str, make: Any, *args: Any, **inputs: Any) -> dict[str, Artifact]:
        made = {}
        for name, spec in make(*args, **inputs).outputs.items():
            place = f"{self._round}/{label}/{name}"
            self.found[place] = spec.key
            content = {part: hashlib.sha256(f"{place}:{part}".encode()).hexdigest() for part in (*PARTS, *SEVERAL)}
            content |= self._prepared if label == "prepare" else {}
            if label.startswith("model_teacher_"):  # of several teachers: one tokenizer, which a mixture must have
                content["tokenizer"] = hashlib.sha256(b"tokenizer").hexdigest()
            made[name] = Artifact(
                stage=spec.stage, key=spec.key, content=content, rows={}, identity=spec.identity, inputs=spec.inputs,
                created="", seconds=0,
            )  # fmt: skip
        return made

    stored = __call__

    @contextmanager
    def round(self, number: int) -> Iterator[Keys]:
        self._round = number
        yield self

    def ends_with(self, student: Any) -> None: ...

    def enough(self, number: int) -> bool:
        return False

    def inspect(self, *inputs: Any) -> None: ...


def keys_of(experiment: Experiment, store: Store, rounds: int = 2, **prepared: str) -> dict[str, str]:
    """Every stage's keys, also of stages that read what nobody made yet."""
    keys = Keys(store, prepared)
    distill(experiment, keys, rounds)
    return keys.found


Path = tuple[str | int, ...]


def fields(model: BaseModel, path: Path = ()) -> Iterator[tuple[Path, BaseModel, str]]:
    """(path, model, field) of every field of a model and of the models in it; a field that holds one counts too."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        yield (*path, name), model, name
        for part, item in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if isinstance(item, BaseModel):
                yield from fields(item, (*path, name) if part is None else (*path, name, part))


def reachable(annotation: Any) -> set[type[BaseModel]]:
    """All models that a value of this type may hold, at any depth."""
    found: set[type[BaseModel]] = set()
    waiting = list(_models(annotation))
    while waiting:
        model = waiting.pop()
        if model not in found:
            found.add(model)
            waiting += [m for info in model.model_fields.values() for m in _models(info.annotation)]
    return found


def other_values(model: BaseModel, name: str) -> Iterator[Any]:
    """Values unlike the present one that the field's type admits; a validator may still refuse one."""
    value = getattr(model, name)
    annotation = type(model).model_fields[name].annotation
    for option in _leaves(annotation):
        if typing.get_origin(option) is Literal:
            yield from (choice for choice in typing.get_args(option) if choice != value)
        elif isinstance(option, type) and issubclass(option, BaseModel) and not isinstance(value, option):
            yield {d: option.model_fields[d].default for d in DISCRIMINATORS if d in option.model_fields}
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, max(0, value - 1), value + 16)
    elif isinstance(value, float):
        yield from (value / 2, value * 2, value + 0.5, value * 0.9)
    elif isinstance(value, str | PurePath):
        yield f"{value}x"
    elif isinstance(value, tuple) and value and not isinstance(value[0], BaseModel):
        yield from (value[:-1], (*value, 1), (value[0] / 2, *value[1:]) if isinstance(value[0], float) else value)
    elif isinstance(value, tuple):
        yield from ((1,), ("x",))
    elif value is None:
        kinds = {option for option in _leaves(annotation) if isinstance(option, type)}
        yield from (sample for kind, sample in ((int, 1), (float, 0.5), (str, "x"), (bool, True)) if kind in kinds)
    if value is not None and types.NoneType in set(_leaves(annotation)):
        yield None


def changed(data: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """The nested mapping with one place replaced. A string on the way is the short form of a choice."""
    data = {"kind": data} if isinstance(data, str) else data
    copy: Any = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = value if len(path) == 1 else changed(copy[path[0]], path[1:], value)
    return copy


def _leaves(annotation: Any) -> Iterator[Any]:
    """A type's alternatives, unions and `Annotated` taken apart."""
    if typing.get_origin(annotation) is Annotated:
        yield from _leaves(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _leaves(part)
    else:
        yield annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for leaf in _leaves(annotation):
        if isinstance(leaf, type) and issubclass(leaf, BaseModel):
            yield leaf
        elif typing.get_origin(leaf) in (tuple, list, dict):
            for part in typing.get_args(leaf):
                yield from _models(part)


def validated(data: dict[str, Any]) -> Experiment | None:
    try:
        return Experiment.model_validate(data)
    except ValidationError:
        return None


def expected(path: tuple[str | int, ...]) -> set[str]:
    words = [str(part) for part in path]
    while ".".join(words) not in DEPENDS:
        words.pop()
        assert words, f"{path}: say in DEPENDS which stages depend on it"
    return DEPENDS[".".join(words)]
