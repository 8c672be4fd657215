"""What can be known about a run before an engine starts. `opd check` reports all of it; a run does the same checks before its
first stage that needs a worker.

A check is a function from `Known` to the texts of what it found. A plugin that serves a role itself is not checked for it."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from flows.cross_checks import size_problems
from flows.experiment import Experiment
from flows.run.given import given_problems
from storage.errors import ConfigError, CorruptArtifact, InputError, OpdError
from storage.store import Artifact, Store
from tasks.engines.hf_folder import (
    attention,
    changed_logits,
    check_stop_ids,
    check_weights,
    dropout_fields,
    model_rows,
    positions,
    quantized,
    read_config,
    stop_token_ids,
    text_config,
)
from tasks.engines.teacher import QUANTIZATION_NEEDS, ServerTeacher, VllmTeacher
from tasks.evaluate import rank_of
from tasks.inputs.models import ServedModel, parameter_count
from tasks.inputs.rounds import prompts_for_round
from tasks.inputs.tokenizers import load_tokenizer
from tasks.routing import taught_by, teacher_field
from tasks.signals import signal_named
from tasks.stage import merged_stop_ids
from tasks.trainer.config import LoraSettings, OptimizerSettings, WarmupConfig
from tasks.trainer.deepspeed_file import deepspeed_config
from tasks.workers import jobs
from tasks.workers.devices import gpu_memory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM's attention on CPU (`CPUAttentionBackend.get_supported_head_sizes`)."""
_WEIGHTS_SHARE = 0.75
"""Of the memory that vLLM leaves, what the weights of models beside it may take; the rest is for their KV and distributions."""
_SHOWN = 8
_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """Something that a check found. `refused`: the run would fail."""

    text: str
    refused: bool = False


@dataclass(frozen=True)
class Model:
    """The checkpoint folder of the student or of a teacher."""

    side: str
    """Its section of the config: student, teacher or teachers.NAME"""
    path: Path
    warmup: WarmupConfig | None = None
    teacher: str | None = None
    """Its name where prompts name their teachers."""

    @cached_property
    def config(self) -> PretrainedConfig:
        return read_config(self.path)

    @cached_property
    def rows(self) -> int:
        return model_rows(self.path)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model's modules without weights. InputError where transformers cannot build them."""
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self.config, attn_implementation=attention(self.config), trust_remote_code=False
                )
        except Exception as error:  # whatever the architecture's own code raises for these fields
            raise InputError(
                f"{self.path}: config.json describes no model ({type(error).__name__}: {error})"
            ) from error
        return model

    @cached_property
    def linear_layers(self) -> set[str]:
        """Last parts of the names of the layers that can have an adapter, the output head not among them."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        head = self.skeleton.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel
        layers = ((n, m) for n, m in self.skeleton.named_modules() if isinstance(m, nn.Linear | Conv1D))
        return {name.rpartition(".")[2] for name, layer in layers if layer is not head}


@dataclass(frozen=True)
class Known:
    """The models, before any warm-up, and the prepared prompts."""

    experiment: Experiment
    student: Model
    teachers: tuple[Model, ...]
    prompts: pa.Table
    """Columns prompt_id, split, teacher_id, token_ids, teacher_token_ids, completion_token_ids."""
    merged: tuple[int, ...] = ()
    """The stop ids that are one category for both models."""

    @property
    def models(self) -> tuple[Model, ...]:
        """The models that transformers loads: teachers with the local backend, and for the exact KL of evaluations."""
        e = self.experiment
        here = not any(isinstance(model.source, ServedModel) for model in e.taught_by.values())
        for_kl = here and e.evaluate.generations("kl") > 0
        return (self.student, *(self.teachers if e.supervise.teacher.loads_here or for_kl else ()))

    @property
    def in_vllm(self) -> tuple[Model, ...]:
        """The models that vLLM loads."""
        teacher = self.experiment.supervise.teacher
        return (self.student, *(self.teachers if isinstance(teacher, VllmTeacher) else ()))

    def of_split(self, split: str) -> pa.Table:
        return self.prompts.filter(pc.equal(self.prompts["split"], split))

    def read_by(self, model: Model, split: str) -> pa.Table:
        """The prompts of a split that a model reads: of several teachers each its own, and for its warm-up those of none."""
        return _read_by(model, self.of_split(split))

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        store: Store,
        student: Artifact,
        teachers: Mapping[str | None, Artifact],
        prompts: Artifact,
    ) -> Known:
        columns = ["prompt_id", "split", "teacher_id", "token_ids", "teacher_token_ids", "completion_token_ids"]
        return cls(
            experiment,
            Model("student", store.materialize(student), experiment.student.warmup),
            tuple(
                Model(
                    teacher_field(name),
                    store.materialize(teacher),
                    experiment.taught_by[name].warmup,
                    name if experiment.routed else None,
                )
                for name, teacher in teachers.items()
            ),
            store.read_table(prompts, "prompts", columns=columns),
            tuple(merged_stop_ids(prompts)),
        )


Found = Iterator[Finding]


# --- the machine -----------------------------------------------------------------------------------------------------


def installed(known: Known) -> Found:
    """Packages that the workers import."""
    extra = known.experiment.runtime.device.replace("cuda", "gpu")
    for package, role in (
        ("vllm", "sampler"),
        ("transformers", "scorer"),
        ("deepspeed", "trainer"),
        ("torch", "scorer"),
    ):
        if _ours(role) and importlib.util.find_spec(package) is None:
            yield Finding(f"{package} is not installed, the {role} needs it: make setup EXTRA={extra}", refused=True)
    quantization = getattr(known.experiment.supervise.teacher, "quantization", "none")
    if quantization == "int8" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(QUANTIZATION_NEEDS, refused=True)


def teacher_server(known: Known) -> Found:
    """What the teacher's server can give, against what the objective needs. Asks every server, with a short timeout."""
    e, backend = known.experiment, known.experiment.supervise.teacher
    if not isinstance(backend, ServerTeacher):
        return
    from tasks.engines.server import offers

    [teacher] = known.teachers  # several are refused when the config loads
    try:
        found = offers(backend, e.runtime.scorer.server, teacher.rows, brief=True)
    except OpdError as error:
        yield Finding(str(error), refused=True)
        return
    needs = [(need, signal_named(need.name).wanted(need.k, {}).teacher) for need in e.objective.needs().signals]
    rows = known.of_split("train")
    longest = (pc.max(_prompt_lengths(rows, "teacher")).as_py() or 0) + e.rollout.max_completion_length + 1
    for offer in found:
        yield Finding(f"teacher: {offer}")
        for need, ask in needs:
            k = max([*ask.top, backend.entropy_k if ask.entropy else 0], default=0)
            if offer.longest is not None and min(k, teacher.rows) > offer.longest:
                yield Finding(
                    f"supervise.teacher: {offer.url} gives {offer.longest} candidates, but the signal {need.name!r} needs {k}"
                    f" ({'supervise.teacher.entropy_k' if k not in ask.top else 'the objective'}); start it with --max-logprobs"
                    f" {k} (or -1)",
                    refused=True,
                )
        if offer.length is not None and longest > offer.length:
            yield Finding(
                f"supervise.teacher: {offer.url} reads {offer.length:,} tokens, but the longest prompt with a whole completion"
                f" and the one token that a server generates has {longest:,}; start it with --max-model-len {longest}, or lower"
                " rollout.max_completion_length or prompts.max_prompt_length",
                refused=True,
            )


def programs(known: Known) -> Found:
    """What vLLM starts on CPU: lscpu always, a C++ compiler for its graphs. Without graphs nothing is compiled there."""
    runtime = known.experiment.runtime
    if runtime.device != "cpu":
        return
    if sys.platform == "linux" and shutil.which("lscpu") is None:
        yield Finding("lscpu is not installed, vLLM on CPU needs it; install the package util-linux", refused=True)
    compiler = os.environ.get("CXX", "g++")
    if runtime.sampler.enforce_eager is False and shutil.which(compiler) is None:
        yield Finding(
            f"runtime.sampler.enforce_eager: false compiles on this machine, but there is no {compiler}; install it, or set"
            " enforce_eager: true",
            refused=True,
        )


def beside_sampler(known: Known) -> Found:
    """Whether the two models that a behaviour reads beside vLLM fit what that leaves of a GPU."""
    e = known.experiment
    if e.runtime.device != "cuda" or "teacher" not in e.rollout.behaviour.at(0).reads:
        return
    memory = min(gpu_memory(), default=None)
    if memory is None:
        return
    width = 4 if e.rollout.dtype == "float32" else 2
    needed = width * sum(parameter_count(model.path) for model in (known.student, *known.teachers))
    left = memory * (1 - e.runtime.sampler.gpu_memory_utilization)
    if needed > _WEIGHTS_SHARE * left:
        fits = max(0.0, 1 - needed / _WEIGHTS_SHARE / memory)
        yield Finding(
            f"rollout.behaviour: {e.rollout.behaviour.kind!r} holds student and teacher beside the engine,"
            f" {needed / 2**30:.1f} GiB of weights in {e.rollout.dtype}, but runtime.sampler.gpu_memory_utilization"
            f" {e.runtime.sampler.gpu_memory_utilization:g} leaves {left / 2**30:.1f} GiB of a GPU, of which"
            f" {_WEIGHTS_SHARE:.0%} may be weights; "
            + (
                f"set it to {math.floor(fits * 100) / 100:g} or less"
                if fits >= 0.1
                else "take smaller models or a larger GPU"
            ),
            refused=True,
        )


def deepspeed_file(known: Known) -> Found:
    """`runtime.trainer.deepspeed`, as the trainer reads it."""
    path = known.experiment.runtime.trainer.deepspeed
    try:
        deepspeed_config(str(path) if path else None, known.experiment.train, 1)
    except ConfigError as error:
        yield Finding(str(error), refused=True)


# --- the models ------------------------------------------------------------------------------------------------------


def architecture(known: Known) -> Found:
    """Whether scorer and trainer can compute with the models."""
    if method := quantized(known.student.config):
        yield Finding(
            f"student: {known.student.path / 'config.json'} has a quantization_config ({method}); quantized weights cannot be"
            " trained, take the checkpoint that they were made from",
            refused=True,
        )
    for model in known.models:
        if changed := changed_logits(model.config):
            yield Finding(
                f"{model.side}: {changed} in {model.path / 'config.json'} changes the logits after the output head; scoring and"
                " training in chunks do not compute that, take another model",
                refused=True,
            )
        try:
            head, whole = model.skeleton.get_output_embeddings(), model.skeleton  # type: ignore[operator]
        except InputError as error:
            yield Finding(f"{model.side}: {error}", refused=True)
            continue
        if type(head).__name__ != "Linear" or whole.base_model is whole:
            yield Finding(
                f"{model.side}: {type(whole).__name__} in {model.path} has no linear output head over a backbone; take a causal"
                " language model",
                refused=True,
            )


def weights(known: Known) -> Found:
    """Whether the files hold the tensors that config.json describes, of names and shapes; their values are not read."""
    for model in known.models:
        try:
            model.skeleton  # noqa: B018 (raises what `architecture` reports)
        except InputError:
            continue
        try:
            unused = check_weights(model.path)
        except (InputError, CorruptArtifact) as error:
            yield Finding(f"{model.side}: {error}", refused=True)
            continue
        if unused:
            more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
            yield Finding(
                f"{model.side}: tensors of {model.path} that its architecture does not use, and that no student will have:"
                f" {', '.join(unused[:_NAMED])}{more}"
            )


def engine(known: Known) -> Found:
    """Whether vLLM has the student's architecture, or can run transformers' own class of it. Reads the names in vLLM's registry
    without importing it, which takes a quarter of a minute."""
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        return  # `installed` reports it
    registry = Path(package.origin).with_name("model_executor") / "models" / "registry.py"
    for model in known.in_vllm:
        try:
            whole = model.skeleton
        except InputError as error:
            if model not in known.models:  # else `architecture` reports it
                yield Finding(f"{model.side}: {error}", refused=True)
            continue
        name = type(whole).__name__
        if has_vision(model.config) and importlib.util.find_spec("torchvision") is None:
            yield Finding(
                f"{model.side}: {name} ({model.path}) reads images too, and vLLM imports torchvision for it, which is not"
                " installed; take the text model of this family, or install torchvision",
                refused=True,
            )
        if registry.is_file():
            models, _, former = registry.read_text().partition("\n_PREVIOUSLY_SUPPORTED_MODELS")
            runs = f'"{name}"' in models or whole.is_backend_compatible()  # type: ignore[operator]
            if not runs or f'"{name}"' in former.partition("}")[0]:
                yield Finding(f"{model.side}: vLLM has no {name} ({model.path}); take another model", refused=True)
        if known.experiment.runtime.device == "cpu" and getattr(whole, "_is_stateful", False):
            yield Finding(
                f"{model.side}: {name} ({model.path}) keeps a recurrent state, which vLLM on CPU cannot run with prompts in one"
                " piece; take a model with attention only, or a GPU",
                refused=True,
            )


def has_vision(config: PretrainedConfig) -> bool:
    """Whether a model has a part that reads images."""
    return getattr(config, "vision_config", None) is not None


def head_size(known: Known) -> Found:
    """vLLM's attention on CPU has kernels for some head sizes only."""
    if known.experiment.runtime.device != "cpu":
        return
    for model in known.in_vllm:
        config = text_config(model.config)
        width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        size = getattr(config, "head_dim", None)
        if size is None and isinstance(width, int) and isinstance(heads, int):
            size = width // heads
        latent = getattr(config, "kv_lora_rank", None)  # attention of another kind, with other kernels
        if not latent and isinstance(size, int) and size not in CPU_HEAD_SIZES:
            yield Finding(
                f"{model.side}: heads of {size} in {model.path / 'config.json'}, but vLLM on CPU has attention for"
                f" {', '.join(map(str, CPU_HEAD_SIZES))} only; take another model, or a GPU",
                refused=True,
            )


def dropout(known: Known) -> Found:
    """Dropout of the checkpoint's config is off in training unless a field turns it on."""
    e = known.experiment
    trained: dict[str, tuple[Model, OptimizerSettings]] = {"train.dropout": (known.student, e.train)}
    trained |= {
        f"{model.side}.warmup.dropout": (model, model.warmup)
        for model in (known.student, *known.teachers)
        if model.warmup is not None
    }
    for name, (model, settings) in trained.items():
        if fields := dropout_fields(model.config):
            shown = ", ".join(f"{field}: {value:g}" for field, value in fields.items())
            acts = "acts in training" if settings.dropout else f"is off in training ({name}: true turns it on)"
            yield Finding(f"{model.side}: {shown} of config.json {acts}")


def adapters(known: Known) -> Found:
    """Which layers LoRA trains."""
    e = known.experiment
    warmed = [(f"{model.side}.warmup", model, model.warmup) for model in (known.student, *known.teachers)]
    for name, model, settings in (("train", known.student, e.train), *warmed):
        if settings is not None and settings.lora is not None:
            try:
                yield from _adapters(f"{name}.lora.target_modules", model, settings.lora)
            except InputError:
                return  # `architecture` reports it


def _adapters(name: str, model: Model, lora: LoraSettings) -> Found:
    there = model.linear_layers
    trained = sorted(set(lora.target_modules) & there)
    missing = sorted(set(lora.target_modules) - there)
    available = ", ".join(sorted(there)[: 2 * _SHOWN])
    if not trained:
        yield Finding(
            f"{name}: no layer of {model.path} has one of these names; its layers are {available}", refused=True
        )
    elif missing:
        yield Finding(
            f"{name}: only {', '.join(trained)} train; no layer of {model.path} is named {', '.join(missing)} (its layers are"
            f" {available})"
        )


def export(known: Known) -> Found:
    """Whether transformers can save the config that it read: every round's student has it."""
    with tempfile.TemporaryDirectory(prefix="opd-check-") as folder:
        try:
            known.student.config.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            path = known.student.path / "config.json"
            yield Finding(f"student: transformers reads {path}, but cannot save it ({error})", refused=True)


# --- models and prompts ----------------------------------------------------------------------------------------------


def sizes(known: Known) -> Found:
    """Lengths and list sizes of the config against the models."""
    rows = [teacher.rows for teacher in known.teachers]
    for text in size_problems(known.experiment, known.student.rows, positions(known.student.config), *rows):
        yield Finding(text, refused=True)


def prompts_of_each(known: Known) -> Found:
    """Teachers that no prompt names: they would be loaded for nothing, and those with a warm-up have nothing to learn."""
    for teacher in known.teachers:
        if teacher.warmup is not None and known.read_by(teacher, "warmup").num_rows == 0:
            yield Finding(
                f"{teacher.side}.warmup: no prompt of warmup has the teacher_id {teacher.teacher!r}, or none, so there is nothing"
                " to learn; add such rows, or remove the warm-up",
                refused=True,
            )
        if teacher.teacher is not None and known.read_by(teacher, "train").num_rows == 0:
            yield Finding(f"{teacher.side}: no prompt of train has the teacher_id {teacher.teacher!r}")


def stop_ids(known: Known) -> Found:
    """The ids that end a completion, in both sections that sample."""
    e, path = known.experiment, known.student.path
    eos = load_tokenizer(path).eos_token_id
    for section, policy in (("rollout", e.rollout.stop_token_ids), ("evaluate", e.evaluate.stop_token_ids)):
        try:
            check_stop_ids(stop_token_ids(path, policy, eos), known.student.rows, path, section)
        except InputError as error:
            yield Finding(str(error), refused=True)
    if inner := sorted(set(known.merged) & set(e.objective.needs().credit.segment_ends)):
        yield Finding(
            f"objective.advantage: {inner} end segments inside of completions and are among the merged stop ids"
            f" {list(known.merged)}; take other delimiters, or prompts.tokenizers.stop_ids: mask",
            refused=True,
        )
    if gone := sorted(set(known.merged[1:]) & set(getattr(e.objective, "support_exclude_ids", ()))):
        yield Finding(
            f"objective.support_exclude_ids: {gone} are merged with the stop id {known.merged[0]}, so no list has them; remove"
            " them, or set prompts.tokenizers.stop_ids: mask",
            refused=True,
        )


def lengths(known: Known) -> Found:
    """Prompts with their completions against the positions of the models."""
    e = known.experiment
    for model in known.models:
        limit = positions(model.config)
        if limit is None:
            continue
        for section, split, room in (
            ("rollout", "train", e.rollout.max_completion_length),
            ("evaluate", "eval", e.evaluate.max_completion_length),
        ):
            # the last token of a completion is sampled, and read by no model
            last = 0 if model.side == "student" else 1
            every, rows = known.of_split(split), known.read_by(model, split)
            long = rows.filter(pc.greater(_prompt_lengths(rows, model.side), limit - room + last))
            if drawn := _drawn(known, split, every["prompt_id"].to_pylist(), set(long["prompt_id"].to_pylist())):
                yield Finding(
                    f"{section}.max_completion_length: {len(drawn)} prompts of {split} (first: {drawn[0]}) with {room} tokens of"
                    f" completion are longer than the {limit} positions of the {model.side}; lower it, or leave such prompts out"
                    f" (prompts.{'max_teacher_prompt_length' if last else 'max_prompt_length'}: {limit - room + last})",
                    refused=True,
                )
        if model.warmup is not None:
            rows = known.read_by(model, "warmup")
            whole = pc.add(_prompt_lengths(rows, "student"), _list_lengths(rows["completion_token_ids"]))
            if count := pc.sum(pc.greater(whole, limit)).as_py():
                yield Finding(
                    f"{model.side}.warmup: {count} prompts with their completions are longer than the {limit} positions of the"
                    " model; shorten or remove these rows",
                    refused=True,
                )


def ids_within_rows(known: Known) -> Found:
    """Token ids of prompts that a model has no row for: its tokenizer may have more ids than it has rows."""
    for model in known.models:
        rows = _read_by(model, known.prompts)
        columns = {"prompt": _token_ids(rows, model.side)}
        if model.warmup is not None:
            columns["completion"] = rows["completion_token_ids"]
        for what, lists in columns.items():
            flat = pc.list_flatten(lists)
            beyond = pc.greater_equal(flat, model.rows)
            if pc.any(beyond).as_py():
                at = pc.index(beyond, True).as_py()
                prompt = rows["prompt_id"][pc.list_parent_indices(lists)[at].as_py()]
                yield Finding(
                    f"{model.side}: {what} {prompt} of split"
                    f" {rows['split'][pc.list_parent_indices(lists)[at].as_py()]} has the token id {flat[at]}, but"
                    f" {model.path} has {model.rows} rows; remove the token from the text, or the row",
                    refused=True,
                )


def given_completions(known: Known) -> Found:
    """Completions of the prompts that rollouts take as they are."""
    for text in given_problems(known.experiment, known.prompts, known.student.path, known.student.rows):
        yield Finding(text, refused=True)


def self_teacher(known: Known) -> Found:
    """A teacher that is the student and reads the same prompts."""
    source, rows = known.experiment.self_teacher, known.of_split("train")
    if source is not None and rows["teacher_token_ids"].null_count == rows.num_rows:
        yield Finding(
            f"teacher: it is the student itself ({source.kind}) and reads what the student reads, so there is nothing to distil;"
            " give it more with teacher.context"
        )


def _read_by(model: Model, rows: pa.Table) -> pa.Table:
    if model.teacher is None:
        return rows
    unnamed = pc.and_(pc.equal(rows["split"], "warmup"), pc.is_null(rows["teacher_id"]))
    return rows.filter(pc.or_(unnamed, taught_by([model.teacher], rows)))


def _token_ids(rows: pa.Table, side: str) -> pa.ChunkedArray:
    """What a side reads of the prompts."""
    return rows["token_ids"] if side == "student" else pc.coalesce(rows["teacher_token_ids"], rows["token_ids"])


def _prompt_lengths(rows: pa.Table, side: str) -> pa.ChunkedArray:
    return _list_lengths(_token_ids(rows, side))


def _list_lengths(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.list_value_length(lists), 0)


def _drawn(known: Known, split: str, every: list[str], long: set[str]) -> list[str]:
    """Those of the prompts `long` that the run reads: training prompts that its rounds draw, held-out ones that it evaluates."""
    e = known.experiment
    if not long:
        return []
    if split == "eval":
        return [
            name for name in sorted(every, key=lambda name: rank_of(name, e.seed))[: e.evaluate.prompts] if name in long
        ]
    found: dict[str, None] = {}
    for round in range(1, e.policy.rounds + 1):
        for name in prompts_for_round(every, e.seed, round, e.rollout.prompts_per_round):
            if name in long:
                found[name] = None
    return list(found)


CHECKS: tuple[tuple[Callable[[Known], Found], str], ...] = (
    (installed, "sampler"),
    (teacher_server, "scorer"),
    (programs, "sampler"),
    (beside_sampler, "sampler"),
    (deepspeed_file, "trainer"),
    (architecture, "scorer"),
    (weights, "scorer"),
    (engine, "sampler"),
    (head_size, "sampler"),
    (dropout, "trainer"),
    (adapters, "trainer"),
    (export, "trainer"),
    (sizes, "sampler"),
    (prompts_of_each, "scorer"),
    (stop_ids, "sampler"),
    (lengths, "sampler"),
    (ids_within_rows, "scorer"),
    (given_completions, "sampler"),
    (self_teacher, "scorer"),
)
"""Every check, with the role that it is about."""


def any_check() -> bool:
    """Whether a role is served by a worker of this program, so that there is something to check."""
    return any(_ours(role) for role in jobs.ROLES)


def _ours(role: str) -> bool:
    return jobs.ROLES[role].startswith("tasks.")


def findings(known: Known) -> list[Finding]:
    """What all checks found."""
    return [finding for check, role in CHECKS if _ours(role) for finding in check(known)]


def require(found: list[Finding]) -> None:
    """InputError with every finding that refuses the run."""
    if refused := [finding.text for finding in found if finding.refused]:
        raise InputError("\n".join(refused))


def preflight(known: Known, say: Callable[[str], None]) -> None:
    """All checks; what refuses nothing is said. InputError with everything that refuses the run."""
    found = findings(known)
    for finding in found:
        if not finding.refused:
            say(finding.text)
    require(found)
