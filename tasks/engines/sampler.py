"""The sampler: a warm vLLM engine that writes completions. The only module that imports vLLM.

A job (`SampleJob`) is open: the engine gets the next shard's requests as soon as it has free slots, so that it stays full until
the stage has no more shards, and every shard is written when its last completion is there. What one engine decodes from the
start of a job until it is empty is a *batch* (storage/artifacts/batches.py). Its record has the step at which each shard was
added, so that a shard can be sampled again in the same batch.

Every request has its own seed. The requests decoded beside it can change the last bits of its log-probabilities; its tokens were
the same in all measurements. Log-probabilities are of the distribution sampled from (temperature, top-p and top-k applied; at
temperature 0 the model's own)."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import os
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.artifacts.batches import BatchLog
from storage.artifacts.digests import weights_digest
from storage.errors import ConfigError, InputError, OpdError
from storage.identity import derive_seed
from storage.schemas import TableSchema, schema_for
from storage.store import Store
from tasks.behaviours import Answer, Behaviour, Completion, Draw, Drawn, Start, behaviour_of
from tasks.engines.drafts import Drafted, draft_of, load_drafts
from tasks.engines.hf_folder import (
    check_length,
    check_stop_ids,
    model_rows,
    positions,
    read_config,
    stop_token_ids,
    text_config,
)
from tasks.engines.weight_proof import StaleWeights, judge_probes, judge_weights, one_reference
from tasks.engines.writing import Writing, rollout_rows, text_of
from tasks.inputs.tokenizers import load_tokenizer
from tasks.rollout_config import Dtype
from tasks.workers.jobs import SampleJob, SampleResult, SampleShard, Sampling, ShardDone
from tasks.workers.main import Link

if TYPE_CHECKING:
    from tasks.engines.pair import Pair, ScoreQueue

BATCHED_TOKENS = 16384
"""Prompt tokens of one engine step."""
_PROBES = 2
_PROBE_PROMPT = 8
_PROBE_TOKENS = 8


_SHOWN = 5
"""Samples that an error lists."""


class SamplingFailed(OpdError):
    """The engine gave no usable completion for some samples at any try."""


@dataclass
class OpenShard:
    """A shard whose requests are in the engine, with their answers by position."""

    item: SampleShard
    stop_ids: list[int]
    writers: dict[int, Writing] = field(default_factory=dict)
    """Completions under way."""
    completions: dict[int, Completion] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every request has an answer, good or bad."""
        return len(self.completions) + len(self.problems) == self.item.size

    def fail(self, problem: str) -> None:
        """Give every missing answer this problem: none will come."""
        missing = set(range(self.item.size)) - self.completions.keys() - self.problems.keys()
        self.problems |= dict.fromkeys(sorted(missing), problem)

    def error(self) -> SamplingFailed:
        """An error with the samples that failed and the reasons."""
        shown = [
            f"{self.item.requests[at].sample_id} (seed {self.item.requests[at].seed}): {self.problems[at]}"
            for at in sorted(self.problems)[:_SHOWN]
        ]
        more = f", and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
        return SamplingFailed(
            f"{len(self.problems)} of {self.item.size} samples of shard {self.item.shard} failed at every try:"
            f" {', '.join(shown)}{more}"
        )

    def rows(self, prompts: dict[str, list[int]], behaviour: Behaviour, text: Callable[[list[int]], str]) -> pa.Table:
        """Rows of the table `rollouts`. `text` decodes token ids."""
        completions = [self.completions[position] for position in range(self.item.size)]
        return rollout_rows(self.item.requests, prompts, completions, behaviour, text)

    def values(self, table: TableSchema) -> pa.Table:
        """Rows of the behaviour's own table."""
        return pa.Table.from_pylist(
            [
                {"sample_id": request.sample_id, **self.completions[position].values}
                for position, request in enumerate(self.item.requests)
            ],
            schema=table.arrow,
        )


class Intake:
    """Gives a batch its shards: first those to be retried, then the job's. In a repeated batch each is given at its recorded
    step, otherwise as soon as the engine has free slots."""

    def __init__(self, link: Link, slots: int, steps: Sequence[int] | None) -> None:
        self._link, self._slots, self._steps = link, slots, steps
        self._given: list[SampleShard] = []
        """Shards of a repeated batch that the supervisor has given."""
        self._taken = 0
        self._exhausted = False
        self.again: list[SampleShard] = []
        """Shards that failed in an earlier batch of the job."""

    @property
    def empty(self) -> bool:
        """Whether the job has no more shards."""
        return self._exhausted and not self.again

    def take(self, step: int, unfinished: int) -> SampleShard | None:
        """The next shard, if the engine is due one before this step; else None."""
        if self._steps is None and self.again:
            return self.again.pop(0)
        if self._exhausted or (unfinished and not self._due(step, unfinished)):
            return None
        if self._steps is not None and self._taken < len(self._given):
            item: SampleShard | None = self._given[self._taken]
        else:
            item = self._link.next()
            self._exhausted = item is None
            if item is not None and self._steps is not None:
                self._given.append(item)
        self._taken += 1
        return item

    def restart(self) -> None:
        """Give a repeated batch its shards again, from the first."""
        self._taken, self._exhausted = 0, False

    def _due(self, step: int, unfinished: int) -> bool:
        if self._steps is None:
            return unfinished < self._slots
        return self._taken < len(self._steps) and self._steps[self._taken] <= step


class Sampler:
    """Serves sampling jobs from one engine, kept warm between jobs and between weights.

    Settings: device (cpu|cuda), threads, tensor_parallel_size, gpu_memory_utilization, kv_cache_gib (CPU),
    enforce_eager (null: on CPU only), max_num_seqs, verify_weights (full|checksums), batched_tokens, retries, in_process
    (null: on CPU only), batch_invariant, number (of this worker)."""

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
        self._reloads = True
        """Whether weights of this architecture can be reloaded in place, as far as is known."""
        self._stopped_by: list[int] | None = None
        self._pair: Pair | None = None
        self._scores: ScoreQueue | None = None
        self._drafts: Drafted = {}
        within = settings.get("in_process")
        self.in_process = self.on_cpu if within is None else bool(within)
        _prepare_environment(self.on_cpu, self.eager, int(settings.get("threads", 1)))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not self.in_process))
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(bool(settings.get("batch_invariant"))))

    def handle(self, job: SampleJob, link: Link) -> SampleResult:
        """Sample and write shards until the supervisor has no more. Raises InputError for prompts that do not fit the model,
        StaleWeights when the engine does not hold the job's weights, SamplingFailed, BehaviourFailed, StoreError."""
        self._stopped_by = None
        store = Store(job.store)
        writer = store.shard_writer(job.target.stage, job.target.key)
        target = writer.intermediate() if job.intermediate else writer
        values = store.shard_writer(job.values.stage, job.values.key) if job.values is not None else None
        prompts = _prompt_tokens(store, job, "teacher_token_ids" if job.reader == "teacher" else "token_ids")
        self._drafts = load_drafts(store, job)
        teacher_prompts = _prompt_tokens(store, job, "teacher_token_ids") if job.teacher is not None else {}
        behaviour = behaviour_of(json.loads(bytes(job.behaviour)))
        wanted = set(job.write) if job.write is not None else None
        slots = int(self.settings.get("max_num_seqs", 256))
        intake = Intake(link, min(slots, job.share or slots), job.batch)
        tries: Counter[int] = Counter()
        retries = int(self.settings.get("retries", 2))
        done = passes = 0
        while not intake.empty:
            self._prepare(job)
            scores = self._open_scores(job, behaviour, prompts, teacher_prompts)
            log = BatchLog(writer.path, job.log_table) if job.batch is None else None
            failed: list[OpenShard] = []
            passes += 1
            batch = self._batch(job, intake, prompts, behaviour, scores, log, link, done)
            for shard in batch:
                number = shard.item.shard
                if wanted is not None:
                    if shard.problems:
                        failed.append(shard)
                        if number in wanted:
                            break
                    if number not in wanted:
                        continue  # sampled for the batch's sake only, as are its problems
                elif shard.problems:
                    tries[number] += 1
                    if tries[number] > retries:
                        raise shard.error()
                    failed.append(shard)
                    continue
                if log is not None:
                    log.writing(number)
                tables = shard.item.tables or [job.table]
                if job.table in tables:
                    rows = shard.rows(prompts, behaviour, self._text)
                    target.write_shard(job.table, number, rows.select(schema_for(job.table).names))
                own = behaviour.table
                if values is not None and own is not None and own.name in tables:
                    values.write_shard(own.name, number, shard.values(own), own)
                done += shard.item.size
                link.done(ShardDone(number, shard.item.size))
                if wanted is not None:
                    wanted.discard(number)
                    if not wanted:
                        break
            batch.close()
            if wanted is None:
                intake.again += [shard.item for shard in failed]  # whole, in the next batch: a shard is of one batch
            elif not wanted:
                break
            elif failed:  # the whole batch again: in another one its shards would have other bits
                if passes > retries:
                    raise failed[-1].error()
                intake.restart()
        return SampleResult(self._stopped_by, self.proof)

    def close(self) -> None:
        """Shut the engine down explicitly: at the interpreter's exit it may abort the process."""
        llm, self.llm, self._weights, self._tokenizer = self.llm, None, None, None
        pair, self._pair, self._scores = self._pair, None, None
        if pair is not None:
            pair.close()
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    # --- a batch ---------------------------------------------------------------------------------------------------

    def _prepare(self, job: SampleJob) -> None:
        """Load the job's weights into the engine, with room for its longest sequence."""
        path = Path(job.model.path)
        check_length(path, job.longest)
        self._load(path, job.model.weights, job.dtype, job.longest)

    def _open_scores(
        self, job: SampleJob, behaviour: Behaviour, prompts: dict[str, list[int]], teacher: dict[str, list[int]]
    ) -> ScoreQueue | None:
        """The two models beside the engine, where the behaviour reads the teacher. They are freed where it does not."""
        if job.teacher is None:
            if self._pair is not None:
                self._pair.close()
            self._pair = None
            return None
        from tasks.engines.pair import Pair, ScoreQueue  # torch comes with the engine, whose environment is set by now

        self._pair = self._pair or Pair(self.settings)
        with self._outside_engine():
            self._pair.load(job.model, job.teacher, job.dtype)
        return ScoreQueue(self._pair, behaviour, prompts, teacher)

    def _stop_ids(self, job: SampleJob, sampling: Sampling) -> list[int]:
        """The ids that end a completion. InputError for ids that the model does not have."""
        found = stop_token_ids(Path(job.model.path), sampling.stop_token_ids, self._tokenizer.eos_token_id)
        check_stop_ids(found, self._vocabulary, Path(job.model.path), job.target.stage)
        self._stopped_by = found
        return found

    def _batch(
        self,
        job: SampleJob,
        intake: Intake,
        prompts: dict[str, list[int]],
        behaviour: Behaviour,
        scores: ScoreQueue | None,
        log: BatchLog | None,
        link: Link,
        done: int,
    ) -> Generator[OpenShard, None, None]:
        """Samples until the engine is empty and there are no more shards. Yields each shard when it is complete. One with
        `problems` has an unusable completion, or the engine failed while it was unfinished. `done`: samples written before."""
        # the last bits of log-probabilities can depend on cached prefixes: a batch starts with an empty cache
        self.llm.reset_prefix_cache()
        waiting: dict[str, tuple[OpenShard, int]] = {}
        unfinished: dict[int, OpenShard] = {}
        self._scores = scores
        if scores is not None:
            scores.begin()
        step = 0
        try:
            while True:
                while (item := intake.take(step, len(waiting) + self._asked)) is not None:
                    if log is not None:
                        log.add(item.shard, step)
                    shard = unfinished[item.shard] = OpenShard(item, self._stop_ids(job, item.sampling))
                    self._begin(shard, prompts, behaviour, job.longest)
                    waiting |= self._go_on(shard, dict.fromkeys(shard.writers))
                for shard, position, output in self._step(waiting):
                    if (problem := _problem(output, self._vocabulary)) is not None:
                        shard.problems[position] = problem
                    else:
                        waiting |= self._go_on(shard, {position: _drawn(output)})
                if scores is not None and not waiting:
                    for shard, position, scored in scores.answers():
                        waiting |= self._go_on(shard, {position: scored})
                step += 1
                link.progress(done + sum(len(shard.completions) for shard in unfinished.values()), 0)
                for number in [number for number, shard in unfinished.items() if shard.complete]:
                    done += len(unfinished[number].completions)
                    yield unfinished.pop(number)
                if not waiting and not self._asked and intake.empty:
                    return
        except GeneratorExit:
            self.llm.llm_engine.abort_request(list(waiting), internal=True)
            raise
        except OpdError:
            self._abandon()  # it may hold requests whose answers are no longer read
            raise
        except Exception as error:
            traceback.print_exc()
            self._abandon()
            for shard in unfinished.values():
                shard.fail(f"the engine failed: {type(error).__name__}: {error}")
                yield shard

    def _begin(self, shard: OpenShard, prompts: dict[str, list[int]], behaviour: Behaviour, longest: int) -> None:
        """Start the completions of a shard."""
        limit = shard.item.sampling.max_completion_length
        for position, request in enumerate(shard.item.requests):
            prompt = prompts[request.prompt_id]
            if not prompt:
                raise InputError(f"sampler: prompt {request.prompt_id!r} has no tokens; prepare filters these")
            ends = tuple(shard.stop_ids), tuple(self._pair.teacher_stop_ids) if self._pair is not None else ()
            start = Start(tuple(prompt), limit, request.seed, *ends, draft_of(self._drafts, request))
            shard.writers[position] = Writing(behaviour, start, request.sample_id, self._vocabulary, longest)

    @property
    def _asked(self) -> int:
        """Completions that wait for a score."""
        return len(self._scores) if self._scores is not None else 0

    def _go_on(self, shard: OpenShard, answers: Mapping[int, Answer | None]) -> dict[str, tuple[OpenShard, int]]:
        """Let completions of a shard take their next turn; what they ask for goes to the engine. Returns as `_enqueue`."""
        asks: dict[int, Draw] = {}
        for position, answer in answers.items():
            turn = shard.writers[position].turn(answer)
            if isinstance(turn, Draw):
                asks[position] = turn
            elif isinstance(turn, Completion):
                shard.completions[position] = turn
                if self._scores is not None:
                    self._scores.end(shard, position)
            elif self._scores is not None:
                self._scores.add(shard, position, turn)
        return self._enqueue(shard, asks) if asks else {}

    def _enqueue(self, shard: OpenShard, asks: dict[int, Draw]) -> dict[str, tuple[OpenShard, int]]:
        """Give the engine requests of a shard. Returns the engine's name of each -> (shard, position)."""
        sampling, stop_ids = shard.item.sampling, shard.stop_ids
        ends = [[*stop_ids, *(set(ask.stops) - set(stop_ids))] if ask.stops else stop_ids for ask in asks.values()]
        params = [
            self._params(sampling, ask.seed, ask.max_tokens, stops)
            for ask, stops in zip(asks.values(), ends, strict=True)
        ]
        texts = [{"prompt_token_ids": list(ask.tokens)} for ask in asks.values()]
        # an engine in a process of its own begins with the first request: pause it, so that all enter at one step
        pause = not self.in_process and len(asks) > 1
        if pause:
            self.llm.sleep(level=0, mode="keep")
        names = self.llm.enqueue(texts, params, use_tqdm=False)
        if pause:
            self.llm.wake_up(tags=["scheduling"])
        return {str(name): (shard, position) for name, position in zip(names, asks, strict=True)}

    def _step(self, waiting: dict[str, tuple[OpenShard, int]]) -> list[tuple[OpenShard, int, Any]]:
        """One step of the engine: (shard, position, output) of every request that it finished, removed from `waiting`. If the
        engine has no unfinished requests, all that have no answer, with None."""
        engine = self.llm.llm_engine
        if not engine.has_unfinished_requests():
            left = [(shard, position, None) for shard, position in waiting.values()]
            waiting.clear()
            return left
        # the engine makes names unique; its outputs carry the part that it was given
        names = {name.split("-")[0]: name for name in waiting}
        finished = [output for output in engine.step() if output.finished]
        return [(*waiting.pop(names[o.request_id.split("-")[0]]), o.outputs[0]) for o in finished]

    def _params(self, sampling: Sampling, seed: int, max_tokens: int, stop_ids: Sequence[int]) -> Any:
        from vllm import SamplingParams

        greedy = sampling.temperature == 0
        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            seed=None if greedy else seed,
            max_tokens=max_tokens,
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # the stop ids are explicit; the engine adds none of its own
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    def _abandon(self) -> None:
        """Discard an engine that failed; the next batch builds another."""
        try:
            self.close()
        except Exception:  # the engine is discarded; its error does not matter
            traceback.print_exc()

    def _text(self, token_ids: list[int]) -> str:
        return text_of(self._tokenizer, token_ids)

    # --- weights -------------------------------------------------------------------------------------------------

    def _load(self, path: Path, weights: str, dtype: Dtype, length: int) -> None:
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
        self._vocabulary = model_rows(path)
        self._reloads = self._reloads or self._shape != shape
        # an output head tied to the embeddings keeps the old weights when vLLM reloads them in place
        tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, text_config(config)))
        reloaded = same_shape and not tied and self._reloads and self._reload(path, dtype)
        if not reloaded:
            self.close()
            self._build(path, dtype, length)
            self._shape = shape
            self.prove(path, dtype)
        self._tokenizer = load_tokenizer(path)
        self.proof = {"weights": weights, "change": "reloaded" if reloaded else "built", **self.proof}
        self._weights = weights

    def _reload(self, path: Path, dtype: Dtype) -> bool:
        """Reload the weights in place and prove them. False where the engine then does not hold the checkpoint, now and for later
        weights of this architecture: vLLM keeps packed copies of some layers (experts, for example)."""
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
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
        vocabulary = self._vocabulary
        prompts = [[derive_seed("probe", i, j) % vocabulary for j in range(_PROBE_PROMPT)] for i in range(_PROBES)]
        shard = OpenShard(SampleShard(0, Sampling(1.0, 1.0, 0, _PROBE_TOKENS, []), []), [])
        asks = {i: Draw(tuple(prompts[i]), _PROBE_TOKENS, derive_seed("probe", i)) for i in range(_PROBES)}
        waiting = self._enqueue(shard, asks)
        outputs: list[Any] = [None] * _PROBES
        while waiting:
            for _, position, output in self._step(waiting):
                outputs[position] = output
        for output in outputs:
            if (problem := _problem(output, vocabulary)) is not None:
                raise SamplingFailed(f"a probe after a weight change failed: {problem}")
        sequences = [(prompt, [int(t) for t in out.token_ids]) for prompt, out in zip(prompts, outputs, strict=True)]
        with self._outside_engine():
            held = self.proof["params_unproven"] == 0
            result = judge_probes(path, sequences, [_logprobs(output) for output in outputs], dtype, held)
        self.llm.reset_prefix_cache()
        return result

    def _outside_engine(self) -> AbstractContextManager[None]:
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

        _quieten()
        if self.on_cpu and not current_platform.is_cpu():
            raise ConfigError("runtime.device: cpu, but the installed vllm is built for GPUs; see make setup EXTRA=cpu")
        if not self.on_cpu and current_platform.is_cpu():
            raise ConfigError("runtime.device: cuda, but the installed vllm is built for CPU; see make setup EXTRA=gpu")
        setting = self.settings.get
        length = max(32, 1 << (length - 1).bit_length())  # room, so that a later job seldom needs a rebuild
        length = min(length, positions(read_config(path)) or length)
        sequences = int(setting("max_num_seqs", 256))
        machine: dict[str, Any]
        if self.on_cpu:
            # on CPU a seeded prompt that is prefilled in chunks crashes: never split one
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


def _prompt_tokens(store: Store, job: SampleJob, of: str = "token_ids") -> dict[str, list[int]]:
    """prompt_id -> the student's tokens, or the teacher's (`of` teacher_token_ids), of the job's split."""
    artifact = store.require(job.prompts.stage, job.prompts.key)
    columns = list(dict.fromkeys(["prompt_id", "split", "token_ids", of]))
    table = store.read_table(artifact, "prompts", columns=columns)
    table = table.filter(pc.equal(table["split"], job.split))
    tokens = pc.coalesce(table[of], table["token_ids"]).to_pylist()  # null: equal to the student's
    return dict(zip(table["prompt_id"].to_pylist(), tokens, strict=True))


# --- outputs ---------------------------------------------------------------------------------------------------------


def _drawn(output: Any) -> Drawn:
    return Drawn([int(token) for token in output.token_ids], _logprobs(output), output.finish_reason)


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


_HARMLESS = {
    "vllm.renderers.base": "Chat template warmup failed",
    "vllm.v1.worker.cpu_worker": "",
    "vllm.model_executor.model_loader.reload.layerwise": "RotaryEmbedding: Failed to load weights",
}
"""Logger -> part of its warnings that mean nothing here: there is no tokenizer (ids go in and come out), no preloaded allocator,
and no checkpoint holds the tables of rotary embeddings, which are computed."""


def _means_something(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING or _HARMLESS[record.name] not in record.getMessage()


def _quieten() -> None:
    """Silence warnings that mean nothing here. By filters: every engine configures vLLM's logging anew, which resets levels."""
    for name in _HARMLESS:
        logging.getLogger(name).addFilter(_means_something)  # added once, however often it is called


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
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers share cores with others; the count is what matters
        "OMP_NUM_THREADS": str(threads),
    }
    if eager:  # vLLM compiles parts of its sampling even so: seconds at every start, and a C++ compiler, for little
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_gib, and takes whole GiB only

    import torch

    torch.set_num_threads(threads)
