"""One warm vLLM engine, kept between jobs and between weights: loads a checkpoint, proves that the engine computes with it, takes
requests and steps. Only this module and
`vllm_teacher.py` import vLLM (`weight_proof.py` runs inside its workers)."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import os
import traceback
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.artifacts.digests import weights_digest
from storage.errors import ConfigError, InputError, OpdError
from storage.identity import derive_seed
from tasks.behaviours import Draw, Drawn
from tasks.engines.hf_folder import model_rows, other_architecture, positions, read_config, text_config
from tasks.engines.weight_proof import StaleWeights, judge_probes, judge_weights, one_reference
from tasks.inputs.tokenizers import load_tokenizer
from tasks.rollout_config import Dtype
from tasks.workers.jobs import Sampling

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BATCHED_TOKENS = 16384
"""Prompt tokens of one engine step."""
_PROBES = 2
_PROBE_PROMPT = 8
_PROBE_TOKENS = 8


class SamplingFailed(OpdError):
    """The engine gave no usable completion for some samples at any try."""


class VllmEngine:
    """Settings: device (cpu|cuda), threads, tensor_parallel_size, pipeline_parallel_size, engine_nodes, gpu_memory_utilization,
    kv_cache_gib (CPU), enforce_eager (null: on CPU only), max_num_seqs, verify_weights (full|checksums), batched_tokens,
    in_process (null: on CPU only), batch_invariant, number (of this worker)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.on_cpu = settings.get("device", "cpu") == "cpu"
        eager = settings.get("enforce_eager")
        self.eager = self.on_cpu if eager is None else bool(eager)
        within = settings.get("in_process")
        self.in_process = self.on_cpu if within is None else bool(within)
        self.llm: Any = None
        self.tokenizer: Any = None
        """Of the loaded checkpoint."""
        self.vocabulary = 0
        """Token ids of the loaded checkpoint."""
        self.proof: dict[str, Any] = {}
        """What proves the loaded weights."""
        self._weights: str | None = None
        self._shape: dict[str, Any] = {}
        self._reloads = True
        """Whether weights of this architecture can be reloaded in place, as far as is known."""
        prepare_environment(self.on_cpu, self.eager, int(settings.get("threads", 1)))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not self.in_process))
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(bool(settings.get("batch_invariant"))))

    def close(self) -> None:
        """Shut the engine down explicitly: at the interpreter's exit it may abort the process."""
        llm, self.llm, self._weights, self.tokenizer = self.llm, None, None, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def rest(self) -> None:
        """Give memory back before other weights come: the engine where they need a new one, else its weights and the pages of its
        cache."""
        if self.llm is None:
            return
        if not self._reloads:
            self.close()
        elif self.on_cpu and self.clear_cache():
            self._weights = None
            self.llm.collective_rpc("opd_give_back")

    def abandon(self) -> None:
        """Discard an engine that failed; the next `load` builds another."""
        try:
            self.close()
        except Exception:  # the engine is discarded; its error does not matter
            traceback.print_exc()

    # --- requests --------------------------------------------------------------------------------------------------

    def clear_cache(self) -> bool:
        """Forget cached prefixes. False where vLLM keeps them, because a request is not finished."""
        return bool(self.llm.reset_prefix_cache())

    def enqueue(self, asks: Sequence[Draw], sampling: Sampling, stop_ids: Sequence[int]) -> list[str]:
        """Give the engine these requests. Returns its name of each."""
        ends = [sorted({*stop_ids, *ask.stops}) for ask in asks]
        params = [
            self._params(sampling, ask.seed, ask.max_tokens, stops) for ask, stops in zip(asks, ends, strict=True)
        ]
        texts = [{"prompt_token_ids": list(ask.tokens)} for ask in asks]
        # an engine in a process of its own begins with the first request: pause it, so that all enter at one step
        pause = not self.in_process and len(asks) > 1
        if pause:
            self.llm.sleep(level=0, mode="keep")
        names = self.llm.enqueue(texts, params, use_tqdm=False)
        if pause:
            self.llm.wake_up(tags=["scheduling"])
        return [str(name) for name in names]

    def step(self, waiting: Iterable[str]) -> dict[str, Any]:
        """One step of the engine. Returns the outputs of those `waiting` that it finished; if it has no unfinished requests, all
        `waiting` with None."""
        engine = self.llm.llm_engine
        if not engine.has_unfinished_requests():
            return dict.fromkeys(waiting)
        # the engine makes names unique; its outputs carry the part that it was given
        names = {name.split("-")[0]: name for name in waiting}
        return {names[o.request_id.split("-")[0]]: o.outputs[0] for o in engine.step() if o.finished}

    def abort(self, names: Iterable[str]) -> None:
        """Drop requests."""
        self.llm.llm_engine.abort_request(list(names), internal=True)

    def _params(self, sampling: Sampling, seed: int, max_tokens: int, stop_ids: Sequence[int]) -> Any:
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            min_p=0.0 if greedy else sampling.min_p,
            seed=None if greedy else seed,
            max_tokens=max_tokens,
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # the stop ids are explicit; the engine adds none of its own
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    # --- weights -------------------------------------------------------------------------------------------------

    def load(self, path: Path, weights: str, dtype: Dtype, length: int) -> None:
        """Load the checkpoint: reload in place, or rebuild the engine where that would be wrong; then prove the weights. A reload
        that fails or leaves other weights is followed by one rebuild."""
        config = read_config(path)
        architecture = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        shape = {"dtype": dtype, "architecture": architecture}
        same_shape = self.llm is not None and self._shape == shape and length <= self.llm.model_config.max_model_len
        if same_shape and self._weights == weights:
            return
        actual = weights_digest(path)
        if actual != weights:
            raise InputError(f"{path}: the weights' digest is {actual[:16]}…, the job asks for {weights[:16]}…")
        self._weights = None
        self.vocabulary = model_rows(path)
        self._reloads = self._reloads or self._shape != shape
        tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, text_config(config)))
        reloaded = same_shape and self._reloads and self._reload(path, dtype, tied)
        if not reloaded:
            self.close()
            self._build(path, dtype, length)
            self._shape = shape
            self.prove(path, dtype)
        self.tokenizer = load_tokenizer(path)
        self.proof = {"weights": weights, "change": "reloaded" if reloaded else "built", **self.proof}
        self._weights = weights

    def _reload(self, path: Path, dtype: Dtype, tied: bool) -> bool:
        """Reload the weights in place and prove them. False where the engine then does not hold the checkpoint, now and for later
        weights of this architecture: vLLM keeps packed copies of some layers (experts, for example)."""
        try:
            self.llm.collective_rpc("opd_reload_weights", args=(str(path), tied))
            self.prove(path, dtype)
        except InputError:
            raise
        except StaleWeights as error:
            print(f"a new engine is built, because the reloaded one is stale: {error}", flush=True)
            self._reloads = False
        except Exception:  # whatever vLLM raises: a new engine decides
            traceback.print_exc()
            self._reloads = False
        return self._reloads

    def prove(self, path: Path, dtype: str) -> None:
        """Prove that the engine computes with the checkpoint in `path`; sets `proof`. Raises StaleWeights."""
        full = self.settings.get("verify_weights", "full") == "full"
        reports = self.llm.collective_rpc("opd_compare_weights", args=(str(path),))
        self.proof = {"method": "full" if full else "checksums", **judge_weights(reports, path, need_all=not full)}
        self.llm.reset_prefix_cache()  # its contents were computed with the old weights
        if full and (int(self.settings.get("number", 0)) == 0 or self.proof["params_unproven"]):
            with one_reference(path):
                self.proof |= self._probe(path, dtype)

    def _probe(self, path: Path, dtype: str) -> dict[str, Any]:
        vocabulary = self.vocabulary
        prompts = [[derive_seed("probe", i, j) % vocabulary for j in range(_PROBE_PROMPT)] for i in range(_PROBES)]
        asks = [Draw(tuple(prompts[i]), _PROBE_TOKENS, derive_seed("probe", i)) for i in range(_PROBES)]
        names = self.enqueue(asks, Sampling(1.0, 1.0, 0, _PROBE_TOKENS, []), [])
        answers: dict[str, Any] = {}
        while waiting := [name for name in names if name not in answers]:
            answers |= self.step(waiting)
        outputs = [answers[name] for name in names]
        for output in outputs:
            if (problem := problem_of(output, vocabulary)) is not None:
                raise SamplingFailed(f"a probe after a weight change failed: {problem}")
        sequences = [(prompt, [int(t) for t in out.token_ids]) for prompt, out in zip(prompts, outputs, strict=True)]
        with self.outside():
            held = self.proof["params_unproven"] == 0
            result = judge_probes(path, sequences, [logprobs_of(output) for output in outputs], dtype, held)
        self.llm.reset_prefix_cache()
        return result

    def outside(self) -> AbstractContextManager[None]:
        """In the block transformers' models can be built in this process: for architectures without a model of its own vLLM
        decorates transformers' class, which then needs a vLLM config, here one that compiles nothing."""
        from vllm.config import CompilationConfig, CompilationMode, set_current_vllm_config

        config = copy.copy(self.llm.llm_engine.vllm_config)
        config.compilation_config = CompilationConfig(mode=CompilationMode.NONE)
        context: AbstractContextManager[None] = set_current_vllm_config(config)
        return context

    def _build(self, path: Path, dtype: Dtype, length: int) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        quieten()
        if self.on_cpu and not current_platform.is_cpu():
            raise ConfigError("runtime.device: cpu, but the installed vllm is built for GPUs; see make setup EXTRA=cpu")
        if not self.on_cpu and current_platform.is_cpu():
            raise ConfigError("runtime.device: cuda, but the installed vllm is built for CPU; see make setup EXTRA=gpu")
        setting = self.settings.get
        length = max(32, 1 << (length - 1).bit_length())  # room, so that a later job seldom needs a rebuild
        config = read_config(path)
        length = min(length, positions(config) or length)
        sequences = int(setting("max_num_seqs", 256))
        machine = self._machine()
        if name := other_architecture(config):
            machine["hf_overrides"] = {"architectures": [name]}
        elif self.on_cpu:
            import_model(config)
        self.llm = LLM(
            model=str(path),
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="safetensors",  # auto would fall back to pickles
            dtype=dtype,
            seed=0,
            max_model_len=length,
            max_num_seqs=sequences,
            max_num_batched_tokens=max(int(setting("batched_tokens", BATCHED_TOKENS)), length, sequences),
            enforce_eager=self.eager,
            generation_config="vllm",  # a checkpoint's own defaults would change the sampling
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            worker_extension_cls="tasks.engines.weight_proof.EngineWeights",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **machine,
        )

    def _machine(self) -> dict[str, Any]:
        """The part of vLLM's arguments that depends on the device."""
        setting = self.settings.get
        if self.on_cpu:
            # on CPU a seeded prompt that is prefilled in chunks crashes: never split one
            return {
                "kv_cache_memory_bytes": int(float(setting("kv_cache_gib", 1)) * 2**30),
                "enable_chunked_prefill": False,
            }
        over = (setting(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size", "engine_nodes"))
        return {"gpu_memory_utilization": float(setting("gpu_memory_utilization", 0.85)), **spread(*over)}


def spread(tensor: int, pipeline: int, nodes: int) -> dict[str, Any]:
    """What tells vLLM over which GPUs an engine is spread."""
    found = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    if nodes == 1:
        return found
    from tasks.engines.over_nodes import OverNodes

    return found | {"distributed_executor_backend": OverNodes}


def import_model(config: PretrainedConfig) -> None:
    """Import vLLM's class of the model, and register it as imported. Of a class that is not, vLLM asks a process of its own what
    it can do, so that CUDA is not initialised here, and keeps the answer in ~/.cache/vllm. Where that is empty, the process takes
    about 12 s. On a CPU nothing is initialised by an import."""
    from vllm import ModelRegistry

    for name in config.architectures or ():
        if (known := ModelRegistry.models.get(name)) is not None:
            with contextlib.suppress(ImportError):  # vLLM names what is missing
                ModelRegistry.register_model(name, known.load_model_cls())


# --- outputs ---------------------------------------------------------------------------------------------------------


def drawn(output: Any) -> Drawn:
    return Drawn([int(token) for token in output.token_ids], logprobs_of(output), output.finish_reason)


def logprobs_of(output: Any) -> list[float]:
    """The log-probability of each sampled token: with logprobs=0 the engine reports this one alone."""
    flat = output.logprobs
    values = [float(flat.logprobs[start]) for start in flat.start_indices]
    if [flat.token_ids[start] for start in flat.start_indices] != list(output.token_ids):
        raise SamplingFailed("the engine's log-probabilities are not of the tokens that it sampled")
    return values


def problem_of(output: Any, vocabulary: int) -> str | None:
    """Why a request's output cannot be used; None when it can."""
    if output is None:
        return "it ended without an output"
    if output.finish_reason not in ("stop", "length"):
        return f"it ended as {output.finish_reason!r}"
    if not output.token_ids:
        return "the completion is empty"
    if not 0 <= min(output.token_ids) <= max(output.token_ids) < vocabulary:
        return f"a token is not among the {vocabulary} of the vocabulary"
    if output.logprobs is None or len(output.logprobs) != len(output.token_ids):
        return "log-probabilities are missing"
    if not all(math.isfinite(value) for value in logprobs_of(output)):
        return "a log-probability is not finite"
    return None


_HARMLESS = {
    "vllm.renderers.base": ("Chat template warmup failed",),
    "vllm.v1.worker.cpu_worker": ("",),
    "vllm.model_executor.model_loader.reload.layerwise": tuple(
        f"{layer}: Failed to load weights" for layer in ("RotaryEmbedding", "Model", "ParallelLMHead")
    ),
}
"""Logger -> parts of its warnings that mean nothing here: there is no tokenizer (ids go in and come out) and no preloaded
allocator; no checkpoint holds the tables of rotary embeddings and a model's own scales (Gemma's), which are computed, nor a head
that is tied to the embeddings, which gets them afterwards. Every weight is compared."""


def _means_something(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING or not any(part in record.getMessage() for part in _HARMLESS[record.name])


def quieten() -> None:
    """Silence warnings that mean nothing here. By filters: every engine configures vLLM's logging anew, which resets levels."""
    for name in _HARMLESS:
        logging.getLogger(name).addFilter(_means_something)  # added once, however often it is called


def prepare_environment(on_cpu: bool, eager: bool, threads: int) -> None:
    """Must come before the first import of vLLM, which reads these once."""
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not on_cpu:
        return
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers share cores with others; the count is what matters
        "OMP_NUM_THREADS": str(threads),
    }
    if eager:  # vLLM compiles parts of its sampling even so: seconds at every start, and a C++ compiler, for little
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_gib, and takes whole GiB only

    import torch

    torch.set_num_threads(threads)
