"""How the scorer asks a model about tokens: one call, `Teacher.score`, for teacher and student.

A backend is a registered class, which is its own config (`supervise.teacher`). It opens models and declares what these can
answer: an objective that needs more is refused when the config loads. Torch-free; a backend imports its engine in `open`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, cast

import numpy as np
from pydantic import Field

from storage.errors import ConfigError
from storage.identity import omit_at
from tasks.losses.registry import Kind, Registry
from tasks.rollout_config import Dtype
from tasks.signals import Ask, Values, Wanted

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.workers.jobs import ModelRef


QUANTIZATION_NEEDS = (
    "supervise.teacher.quantization: int8 needs the package bitsandbytes, which is not installed (it is in no pinned list:"
    " pip install bitsandbytes); or set quantization: none"
)


@dataclass(frozen=True)
class Passage:
    """A prompt and a completion as one model reads them: token ids, int64."""

    prompt: np.ndarray
    completion: np.ndarray

    @property
    def length(self) -> int:
        """Tokens that are read: all but the last, which predicts nothing that is scored."""
        return len(self.prompt) + max(0, len(self.completion) - 1)

    @property
    def inputs(self) -> np.ndarray:
        """The tokens that are read."""
        return np.concatenate([self.prompt, self.completion[:-1]]).astype(np.int64, copy=False)


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a distribution: it is normalised over the first `rows`; top lists hold only ids below `shared`, which student and
    teacher both have. `stop_ids`: one category, which the first of them stands for (`losses/stop_ids.py`); of these also ids
    past `rows` count."""

    rows: int
    shared: int
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """What a backend can answer about a completion token, beside the log-probability of the token itself, which every one can."""

    entropy: Literal["exact", "list"] = "exact"
    """list: of its own candidates with the rest as one category, at most the exact one"""
    top: int | None = None
    """candidates of its longest list; None: as many as there are ids"""
    given_ids: bool = True
    """log-probabilities of ids that the caller chooses, and the mass of all others"""
    full_distribution: bool = True
    """`Teacher.distributions`: what an exact KL is computed from"""
    merges_stop_ids: bool = False
    """counts `Vocabulary.stop_ids` as one category in all its answers"""

    def lacking(self, wanted: Wanted) -> list[str]:
        """What of `wanted` the backend cannot answer about the teacher."""
        ask, found = wanted.teacher, []
        if self.top is not None and max(ask.top, default=0) > self.top:
            found.append(f"its {max(ask.top)} likeliest tokens (at most {self.top})")
        if ask.on and not self.given_ids:
            found.append("log-probabilities of the student's candidates")
        if wanted.reverse_kl and not self.full_distribution:
            found.append("its whole distribution")
        return found


class Teacher(Protocol):
    """An opened model. The student is asked through the same calls."""

    def check(self, passages: Sequence[Passage], names: Sequence[str]) -> None:
        """InputError, naming the passage, for one that the model cannot read. Completions may have ids that it lacks."""

    def score(
        self,
        passages: Sequence[Passage],
        ask: Ask,
        vocabulary: Vocabulary,
        given: Mapping[int, Sequence[np.ndarray]],
    ) -> Values:
        """What is asked of every completion token, per passage, under the names of `tasks.signals.wanted` without the model's:
        `logprobs`, `entropy`, `top<k>_ids`, `on<k>_tail`, ... . `given`: for every k of `ask.on` the ids (T, K) of each passage.

        A value that the model cannot give is NaN, and a list without usable entries has `valid` 0. That holds for every token
        after one whose id the model lacks; such a token itself has the log-probability -inf."""

    def distributions(self, passages: Sequence[Passage], vocabulary: Vocabulary) -> Iterator[Tensor]:
        """Log-probabilities (N, rows) of the completions' tokens in turn, a chunk of tokens at a time; equal chunks for every
        model of one scorer. Only for backends with `full_distribution`."""

    def close(self) -> None:
        """Free its memory."""


@dataclass(frozen=True)
class Host:
    """Resources that a scorer gives to the models that it opens."""

    device: str
    chunk_tokens: int
    """completion tokens whose logits may exist at once"""
    devices: int = 1
    """GPUs over which a model is spread"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """`runtime.scorer`, for a backend's own part of it, and `threads`"""
    weights: str = ""
    """content digest of the model that is opened"""
    store: Path | None = None
    """root of the job's store, for what a backend must find again"""


class TeacherBackend(Kind):
    """How a teacher is asked. Part of the keys of what is scored with it, unless it is plainly `local`."""

    equation: ClassVar[str] = "as its capabilities say (docs/signals.md)"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities]
    loads_here: ClassVar[bool] = False
    """Whether the scorer loads the teacher with transformers, as it does the student"""
    asked: ClassVar[bool] = True
    """Whether the teacher is asked anything at all"""
    reads_checkpoint: ClassVar[bool] = True
    """Whether it answers with the weights in the folder that it opens. A server that has its own sets this to False, and cannot
    be asked about a teacher that is made by the run."""

    @property
    def entropy_candidates(self) -> int | None:
        """How many of the teacher's likeliest tokens its entropies are computed from; None: from all."""
        return getattr(self, "entropy_k", None) if self.capabilities.entropy == "list" else None

    @abstractmethod
    def rows(self, folder: Path) -> int:
        """Ids of the vocabulary of the model at `folder`. InputError when it cannot be read."""

    @abstractmethod
    def open(self, folder: Path, dtype: str, host: Host) -> Teacher:
        """Open the model at `folder`."""

    def record(self, store: Path, weights: str) -> dict[str, Any]:
        """What signals made with it record in `meta` about the model with this content digest."""
        return {}


TEACHERS: Registry[TeacherBackend] = Registry("teacher backend")
B = TypeVar("B", bound=TeacherBackend)


def register(cls: type[B]) -> type[B]:
    """Add a backend under its `kind`. TypeError where its capabilities are not declared."""
    if not isinstance(getattr(cls, "capabilities", None), Capabilities):
        raise TypeError(f"{cls.__name__}: declare `capabilities = Capabilities(...)`, what it can answer")
    TEACHERS.register(cls)
    return cls


@register
class LocalTeacher(TeacherBackend):
    """transformers loads the checkpoint in the scorer's own process: every quantity, exact."""

    equation = "log q(v) of every id v"
    kind: Literal["local"] = "local"
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8: linear layers in 8 bits by bitsandbytes, which must be installed; about half the memory of"
        " bfloat16, and other values than the checkpoint's",
        json_schema_extra=omit_at("none"),
    )
    capabilities = Capabilities(merges_stop_ids=True)
    loads_here = True

    def rows(self, folder: Path) -> int:
        from tasks.engines.hf_folder import model_rows

        return model_rows(folder)

    def open(self, folder: Path, dtype: str, host: Host) -> Teacher:
        from tasks.engines.local import LocalModel

        return LocalModel(folder, dtype, host, self.quantization)


_LISTS = Capabilities(entropy="list", given_ids=False, full_distribution=False)
_OF_A_LIST = "log q(v) of the K ids with the largest q, and of y; q(rest) = 1 - q(S)"
_ENTROPY_K = Field(20, ge=1, description="candidates of the list that an entropy is computed from")


@register
class VllmTeacher(TeacherBackend):
    """vLLM loads the checkpoint in the scorer's own process: lists of its likeliest tokens, and the sampled one."""

    equation = _OF_A_LIST
    kind: Literal["vllm"] = "vllm"
    entropy_k: int = _ENTROPY_K
    capabilities = _LISTS

    def rows(self, folder: Path) -> int:
        from tasks.engines.hf_folder import model_rows

        return model_rows(folder)

    def open(self, folder: Path, dtype: str, host: Host) -> Teacher:
        from tasks.engines.vllm_teacher import VllmModel

        return VllmModel(folder, cast("Dtype", dtype), host, self.entropy_k)


@register
class ServerTeacher(TeacherBackend):
    """A `vllm serve` that runs elsewhere (`runtime.scorer.server`): as `vllm`, up to the server's --max-logprobs."""

    equation = _OF_A_LIST
    kind: Literal["server"] = "server"
    model: str = Field(min_length=1, description="name under which the server offers the teacher (--served-model-name)")
    dtype: Dtype | None = Field(
        None, description="the server's --dtype: how far its answers may vary; null: that of supervise.dtype"
    )
    entropy_k: int = _ENTROPY_K
    capabilities = _LISTS
    reads_checkpoint = False

    def rows(self, folder: Path) -> int:
        from tasks.engines.hf_folder import model_rows

        return model_rows(folder)

    def open(self, folder: Path, dtype: str, host: Host) -> Teacher:
        from tasks.engines.server import ServerModel

        return ServerModel(folder, self.dtype or dtype, host, self)

    def record(self, store: Path, weights: str) -> dict[str, Any]:
        from tasks.engines.server import recorded

        return {"teacher_server": recorded(store, weights, self)}


@register
class NoTeacher(TeacherBackend):
    """The teacher is not run, for objectives that read nothing of it (rewards alone)."""

    equation = "nothing is asked"
    kind: Literal["none"] = "none"
    capabilities = Capabilities(top=0, given_ids=False, full_distribution=False, merges_stop_ids=True)
    asked = False

    def rows(self, folder: Path) -> int:
        from tasks.engines.hf_folder import model_rows

        return model_rows(folder)

    def open(self, folder: Path, dtype: str, host: Host) -> Teacher:
        raise ConfigError("supervise.teacher: none, so the teacher is not run; choose kind: local")


if TYPE_CHECKING:
    TeacherField = TeacherBackend
else:
    TeacherField = TEACHERS.annotation()
"""The type of a config's field that chooses a backend; a plugin may have registered it later."""


def backend_of(config: Mapping[str, object]) -> TeacherBackend:
    """The backend that a job names. ConfigError for a kind that is not registered."""
    kind = str(config.get("kind"))
    if kind not in TEACHERS.classes:
        raise ConfigError(
            f"supervise.teacher.kind: {kind!r} is not registered; there are {', '.join(TEACHERS.classes)}"
        )
    return TEACHERS.classes[kind].model_validate(config)


def opened(model: ModelRef, dtype: str, backend: TeacherBackend, host: Host) -> Teacher:
    """A job's model. ConfigError for a mixture with a backend that does not compute it."""
    if model.members is None:
        return backend.open(Path(model.path), dtype, host)
    if type(backend) is not LocalTeacher:
        raise ConfigError(
            f"mixture: needs supervise.teacher: {{kind: local}}, which has every teacher's whole distribution;"
            f" found {backend.kind}"
        )
    from tasks.engines.mixture import MixtureModel

    return MixtureModel(model.members, model.average or "", dtype, host, backend.quantization)


class WarmModels:
    """Opened models by content and backend: opened when first asked for, closed when a job no longer names them."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._models: dict[tuple[str, ...], Teacher] = {}
        self._teacher: tuple[str, ...] = ()
        self.loads = 0

    def get(
        self, models: Mapping[str, ModelRef], names: Sequence[str], dtype: str, teacher: TeacherBackend
    ) -> dict[str, Teacher]:
        """Those of a job's models that are named. Opened models that the job does not describe are closed first."""
        keys = self._keys(models, dtype, teacher)
        self._teacher = keys.get("teacher", ())
        self.free(keep=list(keys.values()))
        for name in names:
            if keys[name] not in self._models:
                backend = teacher if name == "teacher" else LocalTeacher()
                host = replace(self.host, weights=models[name].weights)
                self._models[keys[name]] = opened(models[name], dtype, backend, host)
                self.loads += len(models[name].paths)
        return {name: self._models[keys[name]] for name in names}

    def opened(self, models: Mapping[str, ModelRef], dtype: str, teacher: TeacherBackend) -> list[str]:
        """Those of a job's models that are open."""
        return [name for name, key in self._keys(models, dtype, teacher).items() if key in self._models]

    def _keys(self, models: Mapping[str, ModelRef], dtype: str, teacher: TeacherBackend) -> dict[str, tuple[str, ...]]:
        backends = {name: teacher if name == "teacher" else LocalTeacher() for name in models}
        return {
            name: (
                model.weights,
                model.architecture,
                dtype,
                backends[name].model_dump_json(),
                "" if backends[name].loads_here else str(self.host.store),
            )
            for name, model in models.items()
        }

    def rest(self) -> None:
        """Close all but the teacher of the last job."""
        self.free(keep=[self._teacher])

    def close(self, model: Teacher) -> None:
        """Close one model."""
        for key in [key for key, other in self._models.items() if other is model]:
            self._models.pop(key).close()

    def free(self, keep: Sequence[tuple[str, ...]] = ()) -> None:
        """Close all models but these."""
        for key in [key for key in self._models if key not in keep]:
            self._models.pop(key).close()
