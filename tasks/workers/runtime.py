"""Where and how stages run: devices, memory, processes. Recorded with every artifact, never part of its key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from storage.errors import ConfigError
from storage.identity import Runtime
from tasks.workers.cluster import Cluster, Group, HostfileCluster, LocalCluster, RayCluster
from tasks.workers.devices import Role, assign, gpu_count, visible_gpus
from tasks.workers.span import Span

Devices = list[int | str] | None
"""Of `devices`: places in the list of GPUs that this process may use (its CUDA_VISIBLE_DEVICES), or entries of it."""
_DEVICES = (
    "of the GPUs that CUDA_VISIBLE_DEVICES lists (or of all): places in that list, or its entries (GPU-..., MIG-...);"
)


class SamplerRuntime(Runtime):
    """vLLM workers, which write completions."""

    devices: Devices = Field(None, description=f"{_DEVICES} null means the first workers x an engine's GPUs")
    workers: int = Field(1, ge=1, description="data-parallel engines")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share every layer of an engine")
    pipeline_parallel_size: int = Field(
        1, ge=1, description="parts of an engine's layers that follow each other, each on tensor_parallel_size GPUs"
    )
    engine_nodes: int = Field(
        1,
        ge=1,
        description="nodes over which an engine's GPUs are spread evenly; more than 1 needs runtime.cluster: ray",
    )
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="fraction of a GPU's memory an engine may take")
    kv_cache_gib: float = Field(1, gt=0, description="key-value cache on CPU, GiB")
    enforce_eager: bool | None = Field(None, description="no CUDA graphs; null means: on CPU only")
    max_num_seqs: int = Field(256, ge=1, description="sequences decoded together")
    in_process: bool | None = Field(
        None,
        description="vLLM's engine core in the worker's own process (VLLM_ENABLE_V1_MULTIPROCESSING=0): what is decoded together"
        " then follows from the requests alone, not from timing; null: on CPU only",
    )
    batch_invariant: bool = Field(
        False,
        description="VLLM_BATCH_INVARIANT=1: results do not depend on what is decoded together; slower, GPUs of compute"
        " capability 9.0 or higher. On a GPU rollouts can be replayed and restored with this or with in_process",
    )
    retries: int = Field(
        2,
        ge=0,
        description="times a shard is sampled again, with its seeds, after an unusable completion or a failed engine",
    )
    verify_weights: Literal["full", "checksums"] = Field(
        "full",
        description="proof after a weight change: every parameter is compared, and (full) log-probabilities of probes; these need"
        " the student in float32 on the host, once per machine at a time",
    )
    score_batch_tokens: int = Field(
        8192,
        ge=1,
        description="tokens (padding included) per forward of the two models beside the engine, where a behaviour reads the"
        " teacher (rollout.behaviour: trb); this field and the next two are numerics of such rollouts alone",
    )
    score_chunk_tokens: int = Field(
        1024, ge=1, description="positions whose distributions these two hold at once: bounds positions x vocabulary"
    )
    score_cache_gib: float = Field(
        4,
        gt=0,
        description="key-value caches of these two together, GiB; completions that do not fit are read again from the start",
    )

    @property
    def engine_gpus(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


class TeacherEngineRuntime(Runtime):
    """The engine of `supervise.teacher: {kind: vllm}`. On one node it is on the scorer's GPUs, beside the student; over several
    it has GPUs of its own."""

    tensor_parallel_size: int | None = Field(
        None, ge=1, description="GPUs that share every layer; null: as many as devices_per_worker"
    )
    pipeline_parallel_size: int = Field(
        1, ge=1, description="parts of the layers that follow each other, each on tensor_parallel_size GPUs"
    )
    nodes: int = Field(
        1, ge=1, description="nodes over which its GPUs are spread evenly; more than 1 needs runtime.cluster: ray"
    )


class TeacherServerRuntime(Runtime):
    """How a teacher behind vLLM servers is reached (`supervise.teacher: {kind: server}`)."""

    urls: tuple[str, ...] = Field(
        (),
        description="addresses, for example http://10.0.0.5:8000; those that serve the teacher's name share the requests. No keys"
        " in them",
    )
    key_variable: str = Field(
        "OPD_TEACHER_API_KEY",
        pattern=r"^[A-Za-z_]\w*$",
        description="name of the environment variable with the key of the servers (--api-key); not set: no key is sent",
    )
    concurrency: int = Field(8, ge=1, description="requests of one scorer at once")
    sequences: int = Field(
        4, ge=1, description="sequences of one request; one that fails is halved, down to the sequence that fails"
    )
    timeout: float = Field(300, gt=0, description="seconds without an answer after which a request has failed")
    retries: int = Field(
        6, ge=0, description="times that a request is sent again; waits begin with `backoff` and double, up to 60 s"
    )
    backoff: float = Field(1.0, ge=0, description="seconds before the first repetition")

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is no address of a server; write http://HOST:PORT or https://HOST")
        return tuple(url.rstrip("/").removesuffix("/v1") for url in urls)


class ScorerRuntime(Runtime):
    """transformers workers, which score completions under student and teacher."""

    devices: Devices = Field(None, description=f"{_DEVICES} null means the first workers x devices_per_worker")
    workers: int = Field(1, ge=1, description="data-parallel scorers")
    devices_per_worker: int = Field(
        1, ge=1, description="GPUs per scorer; a model that does not fit one is spread over them, layer by layer"
    )
    passes: Literal[1, 2] | None = Field(
        None,
        description="2: student and teacher are loaded one after the other, for each shard; the first one's hidden states wait on"
        " the host, and results are equal bit for bit. null: 2 where their weights would fill over 3/4 of a worker's GPUs",
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens (padding included) per forward")
    head_chunk_tokens: int = Field(1024, ge=1, description="completion tokens per output-head chunk: bounds T x V")
    teacher_memory_utilization: float = Field(
        0.5, gt=0, le=1, description="fraction of a GPU's memory for the engine of supervise.teacher: {kind: vllm}"
    )
    teacher_engine: TeacherEngineRuntime = TeacherEngineRuntime()
    server: TeacherServerRuntime = TeacherServerRuntime()
    max_invalid: float = Field(
        0.01,
        ge=0,
        le=1,
        description="largest share of a round's tokens without usable values of teacher, student or sampler (NaN, infinite,"
        " out of range); above it supervision and training are refused",
    )

    @property
    def engine_gpus(self) -> int:
        """GPUs of the engine of a teacher in vLLM."""
        engine = self.teacher_engine
        return (engine.tensor_parallel_size or self.devices_per_worker) * engine.pipeline_parallel_size


class TrainerRuntime(Runtime):
    """DeepSpeed ranks, which train the student."""

    devices: Devices = Field(None, description=f"{_DEVICES} null means the first `processes`")
    processes: int = Field(1, ge=1, description="data-parallel ranks")
    micro_batch_tokens: int = Field(8192, ge=1, description="tokens per forward/backward of one rank")
    head_chunk_tokens: int = Field(1024, ge=1, description="completion tokens per output-head chunk")
    deepspeed: Path | None = Field(
        None, description="DeepSpeed JSON (ZeRO stage, offload); null means ZeRO-0, in bfloat16 ZeRO-1 (docs/gpu.md)"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in backward to save memory")
    max_export_error: float = Field(
        0.01,
        ge=0,
        description="with LoRA: largest |exported - trained| / |update| of the weights; above it the training fails. Adapters are"
        " merged before rounding in both, so it is 0 up to the order of sums",
    )
    checkpoint_minutes: float | None = Field(
        10, ge=0, description="minutes of training between checkpoints inside a round; 0: after every step; null: none"
    )


class JudgeRuntime(Runtime):
    """Workers that judge rollouts by verifiers, on the CPU. Each has a process of its own for the verifiers."""

    workers: int = Field(1, ge=1, description="shards that are judged at once")


class HarnessRuntime(Runtime):
    """The worker that runs tasks of lm-eval (`opd evaluate --tasks`). It loads the student as a scorer does, on its GPUs."""

    batch_size: int = Field(8, ge=1, description="requests per forward")


class RuntimeConfig(Runtime):
    """Everything about the machine. Changing it never changes a key; `numerics` of it are recorded."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA when an NVIDIA GPU is visible")
    cluster: Annotated[Cluster, Field(discriminator="kind")] = Field(
        LocalCluster(), description="where workers and the trainer's ranks run (docs/cluster.md)"
    )
    threads: int = Field(2, ge=1, description="CPU threads per worker; pins the order of floating-point sums")
    keep_warm: bool | None = Field(
        None, description="keep workers between stages; null means: on CPU only (on GPUs stages need the memory)"
    )
    stage_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds that one worker may take for its whole part of a stage, all of its shards, before it is stopped"
        " (a retry counts anew); null: no limit. For a worker that hangs see stall_timeout",
    )
    stall_timeout: float | None = Field(
        3600,
        gt=0,
        description="seconds without any message of progress (a finished completion, shard or step) after which a worker"
        " counts as hung and is stopped, however much it has done before; null: never",
    )
    retries: int = Field(
        1,
        ge=0,
        description="times a job is tried again after its worker died, was stopped or hung; what it finished is kept",
    )
    modules: tuple[Path, ...] = Field(
        (),
        description="folders to look in for modules of yours (plugins, a verifier's function), after the import path; a config's"
        " own folder is added where it holds one that the config names",
    )
    sampler: SamplerRuntime = SamplerRuntime()
    scorer: ScorerRuntime = ScorerRuntime()
    trainer: TrainerRuntime = TrainerRuntime()
    judge: JudgeRuntime = JudgeRuntime()
    harness: HarnessRuntime = HarnessRuntime()

    @model_validator(mode="after")
    def _resolve_auto(self) -> RuntimeConfig:
        if isinstance(self.cluster, RayCluster):
            self._refuse_choices_of_one_machine()
        if isinstance(self.cluster, HostfileCluster) and self.trainer.devices is not None:
            raise ValueError(
                "trainer.devices: with runtime.cluster: hostfile ranks fill the slots of each host; leave this field out"
            )
        if self.device == "auto":
            self.device = "cuda" if gpu_visible() else "cpu"
        if self.keep_warm is None:
            self.keep_warm = self.device == "cpu"
        if self.sampler.in_process is None:
            self.sampler.in_process = self.device == "cpu"
        if self.sampler.batch_invariant and self.device == "cpu":
            raise ValueError(
                "sampler.batch_invariant: vLLM has such kernels for GPUs only, and runtime.device is cpu; set it false"
            )
        self._refuse_engines()
        return self

    def _refuse_engines(self) -> None:
        """Engines that no node, or no even share of the nodes, could hold."""
        for role, field, nodes, gpus in self._engines():
            if nodes > 1 and not isinstance(self.cluster, RayCluster):
                raise ValueError(
                    f"{field}: {nodes} nodes are of a Ray cluster, and runtime.cluster is {self.cluster.kind}; set"
                    " runtime.cluster: ray, or 1 node"
                )
            if nodes > 1 and self.device == "cpu":
                raise ValueError(
                    f"{field}: vLLM has no engine over several nodes for CPUs, and runtime.device is cpu; set it 1"
                )
            if gpus % nodes:
                raise ValueError(
                    f"{field}: {nodes} nodes cannot share the {gpus} GPUs of an engine evenly (tensor_parallel_size x"
                    " pipeline_parallel_size)"
                )
            if role == "scorer" and nodes == 1 and gpus > self.scorer.devices_per_worker:
                raise ValueError(
                    f"scorer.teacher_engine: on one node the engine is on the scorer's own {self.scorer.devices_per_worker}"
                    f" GPUs (scorer.devices_per_worker), but has {gpus} (tensor_parallel_size x pipeline_parallel_size); lower"
                    " these, or set more nodes"
                )

    def _engines(self) -> tuple[tuple[Role, str, int, int], ...]:
        """By role: the field that says over how many nodes its engine is, these, and the engine's GPUs."""
        sampler, scorer = self.sampler, self.scorer
        return (
            ("sampler", "sampler.engine_nodes", sampler.engine_nodes, sampler.engine_gpus),
            ("scorer", "scorer.teacher_engine.nodes", scorer.teacher_engine.nodes, scorer.engine_gpus),
        )

    def _refuse_choices_of_one_machine(self) -> None:
        if self.device == "auto":
            raise ValueError(
                "device: auto looks at this machine, and with runtime.cluster: ray the workers are on others; set it cpu or cuda"
            )
        for role in ("sampler", "scorer", "trainer"):
            if getattr(self, role).devices is not None:
                raise ValueError(
                    f"{role}.devices: with runtime.cluster: ray Ray chooses the GPUs; leave this field out"
                )

    @property
    def files(self) -> dict[str, Path]:
        """By field the files and folders of this config that workers read."""
        own = {f"runtime.modules.{number}": folder for number, folder in enumerate(self.modules)}
        return own if self.trainer.deepspeed is None else own | {"runtime.trainer.deepspeed": self.trainer.deepspeed}

    def group(self, role: Role) -> Group:
        """What a worker of a role needs of a cluster, or the ranks of the trainer together."""
        if role == "judge":
            return Group(role, self.judge.workers)
        engine = next(
            (Span(nodes, gpus // nodes) for of, _, nodes, gpus in self._engines() if of == role and nodes > 1), None
        )
        own = self.sampler.engine_gpus if engine is None else 0
        gpus = {"sampler": own, "trainer": 1}.get(role, self.scorer.devices_per_worker)
        gpus = gpus if self.device == "cuda" else 0
        if role == "trainer":
            return Group(role, 1, self.threads, gpus, self.trainer.processes)
        workers = 1 if role == "harness" else getattr(self, role).workers
        return Group(role, workers, self.threads, gpus, engine=engine)

    def gpus(self, role: Role) -> list[list[str]]:
        """The GPUs of each worker of a role (for the trainer: of each rank), as its CUDA_VISIBLE_DEVICES names them. ConfigError
        for too few; empty lists on CPU, and for a role that runs there."""
        if role == "harness":
            return self.gpus("scorer")[:1]
        workers = self.trainer.processes if role == "trainer" else getattr(self, role).workers
        width = {"sampler": self.sampler.engine_gpus, "scorer": self.scorer.devices_per_worker}.get(role, 1)
        if self.device == "cpu" or role == "judge":
            return [[] for _ in range(workers)]
        visible = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), gpu_count())
        return assign(role, getattr(self, role).devices, workers, width, visible)

    def require_gpus(self) -> None:
        """ConfigError where this machine has fewer GPUs than a role needs here. Others are asked by `cluster.require`."""
        here: tuple[Role, ...] = ("sampler", "scorer", "trainer")
        if isinstance(self.cluster, RayCluster):
            here = ()
        elif isinstance(self.cluster, HostfileCluster):
            here = ("sampler", "scorer")
        for role in here:
            self.gpus(role)

    def tell_libraries(self) -> None:
        """Set this process's environment for the device, before a library warns that it found no GPU."""
        if self.device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")

    def numerics(self, *roles: str) -> dict[str, Any]:
        """Settings that change floating-point results, of the workers of these roles (sampler, scorer, trainer; pair: the two
        models beside a sampler; none change what a judge gives) or of all. With equal values (and for sampled shards equal
        batches) outputs are bit-identical."""
        if roles == ("judge",):
            return {}
        found: dict[str, Any] = {"device": self.device, "threads": self.threads}
        if not roles or "trainer" in roles:
            found |= {
                "processes": self.trainer.processes,
                "micro_batch_tokens": self.trainer.micro_batch_tokens,
                "trainer_head_chunk_tokens": self.trainer.head_chunk_tokens,
                "activation_checkpointing": self.trainer.activation_checkpointing,
                "deepspeed": str(self.trainer.deepspeed.name) if self.trainer.deepspeed else None,
                "deepspeed_config": _read_json(self.trainer.deepspeed),
            }
        if not roles or "scorer" in roles:
            found |= {
                "scorer_batch_tokens": self.scorer.batch_tokens,
                "scorer_head_chunk_tokens": self.scorer.head_chunk_tokens,
            }
            if self.scorer.teacher_engine != TeacherEngineRuntime():  # old records lack it
                found["scorer_teacher_engine"] = self.scorer.teacher_engine.model_dump()
        if not roles or "sampler" in roles:
            found |= {
                "sampler_max_num_seqs": self.sampler.max_num_seqs,
                "sampler_tensor_parallel_size": self.sampler.tensor_parallel_size,
                "sampler_enforce_eager": self.sampler.enforce_eager,
                "sampler_kv_cache_gib": self.sampler.kv_cache_gib,
            }
            found |= {  # old records lack both
                f"sampler_{name}": value for name in _SPREAD if (value := getattr(self.sampler, name)) > 1
            }
            if self.device == "cuda":  # on CPU the engine is in process, and old records lack both
                found |= {
                    "sampler_in_process": self.sampler.in_process,
                    "sampler_batch_invariant": self.sampler.batch_invariant,
                }
        if "harness" in roles:
            found["harness_batch_size"] = self.harness.batch_size
        if not roles or "pair" in roles:
            found |= {
                "sampler_score_batch_tokens": self.sampler.score_batch_tokens,
                "sampler_score_chunk_tokens": self.sampler.score_chunk_tokens,
                "sampler_score_cache_gib": self.sampler.score_cache_gib,
            }
        return found

    def with_numerics(self, recorded: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """This runtime at recorded numerics, as a mapping that is not validated yet: recorded settings may need others, of GPUs
        and nodes, that the caller adds. Settings that an old record lacks keep their present values.

        A DeepSpeed configuration is written to `folder`. Raises ConfigError for one that was recorded by name alone and
        is not the one of this runtime."""
        data = self.model_dump(mode="json")
        if recorded.get("device", self.device) != self.device:
            data["sampler"] |= {"in_process": None, "batch_invariant": False}  # those of the other device
        if "sampler_tensor_parallel_size" in recorded:
            data["sampler"] |= dict.fromkeys(_SPREAD, 1)  # recorded where they are larger
        if "scorer_batch_tokens" in recorded:
            data["scorer"]["teacher_engine"] = {}  # the same
        for name, path in _FIELDS.items():
            if name in recorded and name != "deepspeed_config":
                place = data
                for part in path[:-1]:
                    place = place[part]
                place[path[-1]] = recorded[name]
        named, content = recorded.get("deepspeed"), recorded.get("deepspeed_config")
        own = self.trainer.deepspeed
        if content is not None:
            file = folder / "deepspeed.json"
            file.write_text(json.dumps(content))
            data["trainer"]["deepspeed"] = str(file)
        elif named is not None and (own is None or own.name != named):
            raise ConfigError(
                f"the record has the name of the DeepSpeed file {named!r} but not its content; give the file with"
                " --set runtime.trainer.deepspeed=PATH"
            )
        elif "deepspeed" in recorded and named is None:
            data["trainer"]["deepspeed"] = None
        return data

    def training_differs(self, recorded: Mapping[str, Any]) -> list[str]:
        """Settings that change a training's floating-point results and differ from `recorded` (some `numerics`), each with
        both values; settings that an old record lacks are not compared."""
        return [
            f"runtime.{'.'.join(_FIELDS[name])} {json.dumps(recorded[name])}, now {json.dumps(value)}"
            for name, value in self.numerics("trainer").items()
            if name in recorded and name in _FIELDS and recorded[name] != value
        ]


_SPREAD = ("pipeline_parallel_size", "engine_nodes")
"""Of a sampler's engine, and recorded among its numerics where they are more than 1."""
_FIELDS = {
    "device": ("device",),
    "threads": ("threads",),
    "processes": ("trainer", "processes"),
    "micro_batch_tokens": ("trainer", "micro_batch_tokens"),
    "trainer_head_chunk_tokens": ("trainer", "head_chunk_tokens"),
    "activation_checkpointing": ("trainer", "activation_checkpointing"),
    "deepspeed_config": ("trainer", "deepspeed"),
    "scorer_batch_tokens": ("scorer", "batch_tokens"),
    "scorer_head_chunk_tokens": ("scorer", "head_chunk_tokens"),
    "scorer_teacher_engine": ("scorer", "teacher_engine"),
    "sampler_max_num_seqs": ("sampler", "max_num_seqs"),
    "sampler_tensor_parallel_size": ("sampler", "tensor_parallel_size"),
    "sampler_pipeline_parallel_size": ("sampler", "pipeline_parallel_size"),
    "sampler_engine_nodes": ("sampler", "engine_nodes"),
    "sampler_enforce_eager": ("sampler", "enforce_eager"),
    "sampler_kv_cache_gib": ("sampler", "kv_cache_gib"),
    "sampler_in_process": ("sampler", "in_process"),
    "sampler_batch_invariant": ("sampler", "batch_invariant"),
    "sampler_score_batch_tokens": ("sampler", "score_batch_tokens"),
    "sampler_score_chunk_tokens": ("sampler", "score_chunk_tokens"),
    "sampler_score_cache_gib": ("sampler", "score_cache_gib"),
}
"""Recorded numerics -> the fields that they came from."""


def _read_json(path: Path | None) -> Any:
    """A file's JSON; None where it cannot be read (the trainer refuses it, with the reason)."""
    try:
        return json.loads(path.read_text()) if path is not None else None
    except (OSError, ValueError):
        return None


def gpu_visible() -> bool:
    """Whether this machine has an NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide."""
    count = gpu_count()
    return bool(count and visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), count))
