"""The sampler: a warm vLLM engine that writes completions. The only place that imports vLLM.

Jobs (`op`), all with `model` (directory), `weights` (its weights digest), `dtype` and `sampling` (temperature, top_p,
top_k (0: all), max_completion_length, stop_token_ids or "eos"):

- `rollout_shard`: `store`, `stage`, `key`, `shard`, `prompts` ({prompt_id, token_ids} list), `samples` ({sample_id,
  prompt (position in prompts), sample_index, seed} list). Writes one shard of the table `rollouts`.
  Returns samples, kept, tokens, clipped, stop_token_ids, proof.
- `generate_shard`: `prompts` (list of token id lists), `seeds` (one per prompt, ignored at temperature 0), `names` (one
  per prompt) and `parts` ({store, stage, key, table, shard}: the shard that the completions are for). Writes nothing
  but parts. Returns completions ({token_ids, text, finish_reason, logprobs} list in the order of the prompts), kept,
  stop_token_ids, proof. Without names and parts a worker that dies takes its finished completions with it.

Every request has its own seed, so that a completion depends neither on its company nor on the order: what an engine or a
worker that died had finished (`kept`: their number) is taken as it is, and only the rest is asked for again. Log-probabilities
are of the distribution sampled from (temperature, top-p and top-k applied; at temperature 0 the model's own)."""

from __future__ import annotations

import gc
import logging
import math
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from storage.artifacts.digests import weights_digest
from storage.errors import ConfigError, InputError, OpdError
from storage.identity import derive_seed
from tasks.engines.batch import Batch, Completion, SamplingFailed
from tasks.engines.hf_folder import check_lengths, longest_sequence, read_config, stop_token_ids
from tasks.engines.weight_proof import judge_probes, judge_weights
from tasks.inputs.tokenizers import load_tokenizer

Progress = Callable[[int, int], None]

BATCHED_TOKENS = 16384
"""Prompt tokens of one engine step."""
_PROBES = 2
_PROBE_PROMPT = 8
_PROBE_TOKENS = 8


class Sampler:
    """Serves rollout and evaluation jobs from one engine, kept warm between jobs and between weights.

    Settings: device (cpu|cuda), threads, tensor_parallel_size, gpu_memory_utilization, kv_cache_gib (CPU),
    enforce_eager (null: on CPU only), max_num_seqs, verify_weights (full|checksums), batched_tokens, retries."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.on_cpu = settings.get("device", "cpu") == "cpu"
        eager = settings.get("enforce_eager")
        self.eager = self.on_cpu if eager is None else bool(eager)
        self.llm: Any = None
        self.proof: dict[str, Any] = {}
        self._weights: str | None = None
        self._shape: dict[str, Any] = {}
        self._tokenizer: Any = None
        self._vocabulary = 0
        _prepare_environment(self.on_cpu, self.eager, int(settings.get("threads", 1)))

    def handle(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Do one job (see the module's description). Raises InputError for prompts that do not fit the model,
        StaleWeights when the engine could not be brought to the job's weights, SamplingFailed, StoreError."""
        if job.get("op") == "rollout_shard":
            return self._rollout_shard(job, progress)
        if job.get("op") == "generate_shard":
            return self._generate_shard(job, progress)
        raise ConfigError(f"sampler: no operation {job.get('op')!r}; there are rollout_shard and generate_shard")

    def close(self) -> None:
        """End the engine explicitly: left to the interpreter's exit it may abort the process."""
        llm, self.llm, self._weights, self._tokenizer = self.llm, None, None, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _rollout_shard(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        import pyarrow as pa

        from storage.schemas import schema_for
        from storage.store import Store

        prompts, samples = job["prompts"], job["samples"]
        writer = Store(job["store"]).shard_writer(job["stage"], job["key"])
        batch = Batch(
            [sample["sample_id"] for sample in samples],
            [prompts[sample["prompt"]]["token_ids"] for sample in samples],
            [sample["seed"] for sample in samples],
            writer.parts("rollouts", job["shard"]),
        )
        stop_ids = self._complete(job, batch, progress)
        completions = batch.completions()
        rows = [
            {
                "sample_id": sample["sample_id"],
                "prompt_id": prompts[sample["prompt"]]["prompt_id"],
                "sample_index": sample["sample_index"],
                "prompt_token_ids": prompts[sample["prompt"]]["token_ids"],
                "completion_token_ids": completion.token_ids,
                "sampling_logprobs": completion.logprobs,
                "behaviour": "student",
                "prefix_length": 0,
                "finish_reason": completion.finish_reason,
                "seed": sample["seed"],
                "completion_text": completion.text,
                "reward": None,
            }
            for sample, completion in zip(samples, completions, strict=True)
        ]
        writer.write_shard("rollouts", job["shard"], pa.Table.from_pylist(rows, schema=schema_for("rollouts")))
        return {
            "samples": len(completions),
            "kept": batch.kept,
            "tokens": sum(len(completion.token_ids) for completion in completions),
            "clipped": sum(completion.finish_reason == "length" for completion in completions),
            "stop_token_ids": stop_ids,
            "proof": self.proof,
        }

    def _generate_shard(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        from storage.store import Store

        parts, place = None, job.get("parts")
        if place is not None:
            writer = Store(place["store"]).shard_writer(place["stage"], place["key"])
            parts = writer.parts(place["table"], place["shard"])
        names = job.get("names") or [f"number {number}" for number in range(len(job["prompts"]))]
        batch = Batch(names, job["prompts"], job["seeds"], parts)
        stop_ids = self._complete(job, batch, progress)
        completions = [vars(completion) for completion in batch.completions()]
        return {"completions": completions, "kept": batch.kept, "stop_token_ids": stop_ids, "proof": self.proof}

    def _complete(self, job: dict[str, Any], batch: Batch, progress: Progress) -> list[int]:
        """Fills the batch and returns the stop ids. What an engine that failed has left is asked of a new one."""
        for _ in range(1 + int(self.settings.get("retries", 2))):
            stop_ids = self._prepare(job, batch.prompts)
            try:
                self._ask(batch, job["sampling"], stop_ids, progress)
            except OpdError:
                self._abandon()  # it may hold requests that nobody waits for
                raise
            except Exception as error:
                traceback.print_exc()
                batch.refuse(batch.missing, f"the engine failed: {type(error).__name__}: {error}")
                self._abandon()
            if not batch.missing:
                return stop_ids
        raise batch.failed()

    def _prepare(self, job: dict[str, Any], prompts: list[list[int]]) -> list[int]:
        """Bring the engine to the job's weights; returns the ids that end a completion."""
        path = Path(job["model"])
        config = read_config(path)
        length = check_lengths(config, path, prompts, job["sampling"]["max_completion_length"])
        self._load(path, job["weights"], job["dtype"], length)
        stop_ids = stop_token_ids(path, job["sampling"].get("stop_token_ids", "eos"), self._tokenizer.eos_token_id)
        vocabulary = int(config["vocab_size"])
        if not all(0 <= token < vocabulary for token in stop_ids):
            raise InputError(
                f"stop_token_ids: {stop_ids} has ids that {path} (vocabulary of {vocabulary}) cannot write"
            )
        return stop_ids

    # --- sampling ------------------------------------------------------------------------------------------------

    def _ask(self, batch: Batch, sampling: dict[str, Any], stop_ids: list[int], progress: Progress) -> None:
        """Ask once for all that is missing. An aborted, empty or otherwise unusable output stays missing."""
        # the bits of a log-probability may depend on what was computed together: it starts from an empty cache
        self.llm.reset_prefix_cache()
        asked = batch.missing  # nothing, where an earlier worker died between the last sample and the shard
        params = [self._params(sampling, batch.seeds[index], stop_ids) for index in asked]
        progress(batch.done, len(batch))
        unanswered = set(asked)
        for outputs in self._steps([batch.prompts[index] for index in asked], params):
            finished = {}
            for number, output in outputs:
                unanswered.discard(index := asked[number])
                if (problem := _problem(output, self._vocabulary)) is None:
                    finished[index] = self._completion(output)
                else:
                    batch.refuse([index], problem)
            batch.accept(finished)
            progress(batch.done, len(batch))
        batch.refuse(sorted(unanswered), "it ended without an output")

    def _params(self, sampling: dict[str, Any], seed: int, stop_ids: Sequence[int]) -> Any:
        from vllm import SamplingParams

        greedy = sampling["temperature"] == 0
        return SamplingParams(
            n=1,
            temperature=sampling["temperature"],
            top_p=1.0 if greedy else sampling.get("top_p", 1.0),
            top_k=0 if greedy else sampling.get("top_k") or 0,
            seed=None if greedy else seed,
            max_tokens=sampling["max_completion_length"],
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # the stop ids are explicit; the engine adds none of its own
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    def _steps(self, prompts: list[list[int]], params: list[Any]) -> Iterator[list[tuple[int, Any]]]:
        """After every step of the engine, the (number of the prompt, output) pairs that it finished."""
        names = self.llm.enqueue([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        # enqueue answers with names that the engine may have made unique; outputs carry the caller's part of it
        order = {str(name).split("-")[0]: number for number, name in enumerate(names)}
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():
            finished = [output for output in engine.step() if output.finished]
            yield [(order[output.request_id.split("-")[0]], output.outputs[0]) for output in finished]

    def _abandon(self) -> None:
        """Give up an engine that failed; the next job builds another."""
        try:
            self.close()
        except Exception:  # it is of no use any more, whatever it says
            traceback.print_exc()

    def _completion(self, output: Any) -> Completion:
        token_ids = [int(token) for token in output.token_ids]
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(token_ids, text, output.finish_reason, _logprobs(output))

    # --- weights -------------------------------------------------------------------------------------------------

    def _load(self, path: Path, weights: str, dtype: str, length: int) -> None:
        """Bring the engine to the checkpoint: reload in place, or build (anew) where that cannot be right; prove it."""
        architecture = {
            k: v for k, v in read_config(path).items() if k not in ("_name_or_path", "transformers_version")
        }
        shape = {"dtype": dtype, "architecture": architecture}
        same_shape = self.llm is not None and self._shape == shape and length <= self.llm.model_config.max_model_len
        if same_shape and self._weights == weights:
            return
        actual = weights_digest(path)
        if actual != weights:
            raise InputError(f"{path}: the weights' digest is {actual[:16]}…, the job asks for {weights[:16]}…")
        self._weights = None
        # an output head tied to the embeddings keeps the old weights when vLLM reloads them in place
        if same_shape and not architecture.get("tie_word_embeddings", False):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            change = "reloaded"
        else:
            self.close()
            self._build(path, dtype, length)
            self._shape = shape
            change = "built"
        self._tokenizer = load_tokenizer(path)
        self._vocabulary = int(architecture["vocab_size"])
        self.prove(path, dtype)
        self.proof = {"weights": weights, "change": change, **self.proof}
        self._weights = weights

    def prove(self, path: Path, dtype: str) -> None:
        """Prove that the engine computes with the checkpoint in `path`; sets `proof`. Raises StaleWeights."""
        full = self.settings.get("verify_weights", "full") == "full"
        reports = self.llm.collective_rpc("opd_compare_weights", args=(str(path),))
        self.proof = {"method": "full" if full else "checksums", **judge_weights(reports, path, need_all=not full)}
        self.llm.reset_prefix_cache()  # what it holds was computed with the old weights
        if full:
            self.proof |= self._probe(path, dtype)

    def _probe(self, path: Path, dtype: str) -> dict[str, Any]:
        vocabulary = int(read_config(path)["vocab_size"])
        prompts = [[derive_seed("probe", i, j) % vocabulary for j in range(_PROBE_PROMPT)] for i in range(_PROBES)]
        sampling = {"temperature": 1.0, "max_completion_length": _PROBE_TOKENS}
        params = [self._params(sampling, derive_seed("probe", i), ()) for i in range(_PROBES)]
        found = dict(pair for step in self._steps(prompts, params) for pair in step)
        outputs = [found.get(number) for number in range(_PROBES)]
        for output in outputs:
            if (problem := _problem(output, vocabulary)) is not None:
                raise SamplingFailed(f"a probe after a weight change failed: {problem}")
        sequences = [(prompt, [int(t) for t in out.token_ids]) for prompt, out in zip(prompts, outputs, strict=True)]
        result = judge_probes(path, sequences, [_logprobs(output) for output in outputs], dtype)
        self.llm.reset_prefix_cache()
        return result

    def _build(self, path: Path, dtype: str, length: int) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        _quieten()
        if self.on_cpu and not current_platform.is_cpu():
            raise ConfigError("runtime.device: cpu, but the installed vllm is built for GPUs; see make setup EXTRA=cpu")
        if not self.on_cpu and current_platform.is_cpu():
            raise ConfigError("runtime.device: cuda, but the installed vllm is built for CPU; see make setup EXTRA=gpu")
        setting = self.settings.get
        limit = longest_sequence(read_config(path), path)
        length = min(max(32, 1 << (length - 1).bit_length()), limit)  # room, so that a later job seldom needs a rebuild
        sequences = int(setting("max_num_seqs", 256))
        machine: dict[str, Any]
        if self.on_cpu:
            # a seeded prompt that is prefilled in pieces crashes on CPU: never cut one
            machine = {
                "kv_cache_memory_bytes": int(float(setting("kv_cache_gib", 1)) * 2**30),
                "enable_chunked_prefill": False,
            }
        else:
            machine = {
                "gpu_memory_utilization": float(setting("gpu_memory_utilization", 0.85)),
                "tensor_parallel_size": int(setting("tensor_parallel_size", 1)),
            }
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


# --- outputs ---------------------------------------------------------------------------------------------------------


def _logprobs(output: Any) -> list[float]:
    """The log-probability of each sampled token: with logprobs=0 the engine reports this one alone."""
    flat = output.logprobs
    values = [float(flat.logprobs[start]) for start in flat.start_indices]
    if [flat.token_ids[start] for start in flat.start_indices] != list(output.token_ids):
        raise SamplingFailed("the engine's log-probabilities are not of the tokens that it sampled")
    return values


def _problem(output: Any, vocabulary: int) -> str | None:
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
    if not all(math.isfinite(value) for value in _logprobs(output)):
        return "a log-probability is not finite"
    return None


def _quieten() -> None:
    """Silence warnings that mean nothing here: no tokenizer (ids go in and come out), no preloaded allocator, and
    rotary tables that no checkpoint holds ("failed to load"; whether weights arrived is proven, not read in a log)."""
    for name in ("renderers.base", "v1.worker.cpu_worker", "model_executor.model_loader.reload.layerwise"):
        logging.getLogger(f"vllm.{name}").setLevel(logging.ERROR)


def _prepare_environment(on_cpu: bool, eager: bool, threads: int) -> None:
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
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: deterministic, and no second import of 15 s
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers share cores with others; the count is what matters
        "OMP_NUM_THREADS": str(threads),
    }
    if eager:  # vLLM compiles parts of its sampling even so: seconds at every start, and a C++ compiler, for little
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_gib, and takes whole GiB only

    import torch

    torch.set_num_threads(threads)
