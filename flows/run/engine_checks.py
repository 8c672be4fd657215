"""Which GPUs hold what: engines of vLLM that are spread over GPUs and nodes, and scorers' models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flows.run.checked import Finding, Found, Known, Model
from storage.errors import InputError
from tasks.engines.hf_folder import quantized, text_config
from tasks.engines.teacher import VllmTeacher
from tasks.inputs.models import parameter_count
from tasks.rollout_config import BYTES_OF, Dtype
from tasks.workers.cluster import largest_gpu


@dataclass(frozen=True)
class Engine:
    """An engine of vLLM: its model, section of the runtime, and the GPUs that it is spread over."""

    model: Model
    section: str
    tensor: int
    pipeline: int
    dtype: Dtype
    share: float
    """of a GPU's memory that it takes"""
    share_field: str

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline


def engines(known: Known) -> Iterator[Engine]:
    e = known.experiment
    sampler, scorer = e.runtime.sampler, e.runtime.scorer
    over = (sampler.tensor_parallel_size, sampler.pipeline_parallel_size)
    share = sampler.gpu_memory_utilization
    field = "runtime.sampler.gpu_memory_utilization"
    yield Engine(known.student, "runtime.sampler", *over, e.rollout.dtype, share, field)
    if isinstance(e.supervise.teacher, VllmTeacher):
        engine = scorer.teacher_engine
        over = (engine.tensor_parallel_size or scorer.devices_per_worker, engine.pipeline_parallel_size)
        share, field = scorer.teacher_memory_utilization, "runtime.scorer.teacher_memory_utilization"
        for teacher in known.teachers:
            yield Engine(teacher, "runtime.scorer.teacher_engine", *over, e.supervise.dtype, share, field)


def spread(known: Known) -> Found:
    """Whether vLLM can cut each model into as many parts as its engine has GPUs, and whether a part fits one."""
    runtime = known.experiment.runtime
    if runtime.device != "cuda":
        return
    memory = largest_gpu(runtime)
    for engine in engines(known):
        yield from _cut(engine)
        if quantized(engine.model.config):
            continue  # its bytes are another matter
        needed = BYTES_OF[engine.dtype] * parameter_count(engine.model.path) / engine.gpus
        where = f"{engine.model.side} in {engine.dtype} over {engine.gpus} GPUs, {needed / 2**30:.1f} GiB of weights on each"
        if memory is not None and needed > engine.share * memory:
            fits = math.ceil(engine.gpus * needed / (engine.share * memory))
            yield Finding(
                f"{engine.section}: {where}, but an engine takes {engine.share:.0%} ({engine.share_field}) of the"
                f" {memory / 2**30:.0f} GiB of the largest GPU; spread it over {fits} GPUs or more (tensor_parallel_size,"
                " pipeline_parallel_size; docs/cluster.md)",
                refused=True,
            )
        elif engine.gpus > 1:
            yield Finding(f"{engine.section}: {where}" + (f" of {memory / 2**30:.0f} GiB" if memory else ""))


def _cut(engine: Engine) -> Found:
    try:
        config = text_config(engine.model.config)
    except InputError:
        return  # another check says so
    heads, layers = (getattr(config, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    if heads and heads % engine.tensor:
        yield Finding(
            f"{engine.section}.tensor_parallel_size: {engine.tensor} GPUs cannot share the {heads} attention heads of"
            f" {engine.model.side} evenly; choose a divisor, and pipeline_parallel_size for the rest",
            refused=True,
        )
    if layers and layers < engine.pipeline:
        yield Finding(
            f"{engine.section}.pipeline_parallel_size: {engine.pipeline} parts of the {layers} layers of {engine.model.side};"
            " lower it",
            refused=True,
        )


def over_nodes(known: Known) -> Found:
    """What does not go together with an engine over several nodes."""
    e = known.experiment
    if e.runtime.scorer.teacher_engine.nodes > 1 and not isinstance(e.supervise.teacher, VllmTeacher):
        yield Finding(
            f"runtime.scorer.teacher_engine.nodes: {e.runtime.scorer.teacher_engine.nodes} nodes are for a teacher in vLLM, and"
            f" supervise.teacher is {e.supervise.teacher.kind}; set supervise.teacher: vllm, or 1 node",
            refused=True,
        )
    if e.runtime.sampler.engine_nodes > 1 and "teacher" in e.rollout.behaviour.at(0).reads:
        yield Finding(
            f"runtime.sampler.engine_nodes: with rollout.behaviour {e.rollout.behaviour.kind!r} the sampler holds student and"
            " teacher beside its engine, but one whose engine spans nodes has no GPU of its own; set it 1, or take another"
            " behaviour",
            refused=True,
        )
