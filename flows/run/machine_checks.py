"""What a run needs of this machine and of servers."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys

import pyarrow.compute as pc

from flows.run.checked import Finding, Found, Known, ours, prompt_lengths
from storage.errors import ConfigError, OpdError
from tasks.engines.teacher import QUANTIZATION_NEEDS, ServerTeacher
from tasks.inputs.models import parameter_count
from tasks.rollout_config import BYTES_OF
from tasks.signals import signal_named
from tasks.trainer.deepspeed_file import deepspeed_config
from tasks.workers.devices import gpu_memory

_WEIGHTS_SHARE = 0.75
"""Of the memory that vLLM leaves, what the weights of models beside it may take; the rest is for their KV and distributions."""


def installed(known: Known) -> Found:
    """Packages that the workers import."""
    extra = known.experiment.runtime.device.replace("cuda", "gpu")
    for package, role in (
        ("vllm", "sampler"),
        ("transformers", "scorer"),
        ("deepspeed", "trainer"),
        ("torch", "scorer"),
    ):
        if ours(role) and importlib.util.find_spec(package) is None:
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
    longest = (pc.max(prompt_lengths(rows, "teacher")).as_py() or 0) + e.rollout.max_completion_length + 1
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
    needed = BYTES_OF[e.rollout.dtype] * sum(parameter_count(model.path) for model in (known.student, *known.teachers))
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
