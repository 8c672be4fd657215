"""The sampler: writes completions with a warm vLLM engine (vllm_engine.py).

A job (`SampleJob`) is open: the engine gets the next shard's requests as soon as it has free slots, so that it stays full until
the stage has no more shards, and every shard is written when its last completion is there. What one engine decodes from the
start of a job until it is empty is a *batch* (storage/artifacts/batches.py). Its record has the step at which each shard was
added, so that a shard can be sampled again in the same batch. Shards are written by a thread, because the engine would wait for
the disk at every one.

Every request has its own seed. The requests decoded beside it can change the last bits of its log-probabilities; its tokens were
the same in all measurements. Log-probabilities are of the distribution sampled from (temperature, top-p and top-k applied; at
temperature 0 the model's own)."""

from __future__ import annotations

import json
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.artifacts.batches import BatchLog
from storage.errors import InputError, OpdError
from storage.schemas import TableSchema, schema_for
from storage.store import ShardWriter, Store
from tasks.behaviours import Answer, Behaviour, Completion, Draw, Start, behaviour_of
from tasks.engines.drafts import Drafted, draft_of, load_drafts
from tasks.engines.hf_folder import check_length, check_stop_ids, stop_token_ids
from tasks.engines.vllm_engine import SamplingFailed, VllmEngine, drawn, problem_of
from tasks.engines.writing import Writing, rollout_rows, text_of
from tasks.workers.jobs import SampleJob, SampleResult, SampleShard, Sampling, ShardDone
from tasks.workers.main import Link

if TYPE_CHECKING:
    from tasks.engines.pair import Pair, ScoreQueue

_SHOWN = 5
"""Samples that an error lists."""
_UNWRITTEN = 2
"""Complete shards that may wait for the disk; at more the engine waits too."""


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
        return rollout_rows(
            self.item.requests,
            prompts,
            completions,
            behaviour,
            lambda made: text(_written_on(made, self.item.sampling)),
        )

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


class Disk(AbstractContextManager["Disk"]):
    """Does what it is given one after the other, in a thread. The block ends when all is done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._pending: deque[Future[None]] = deque()

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def submit(self, write: Callable[[], None]) -> None:
        """Do this next. Raises the first error of an earlier one; waits where too many are pending."""
        self.check(_UNWRITTEN - 1)
        self._pending.append(self._thread.submit(write))

    def check(self, pending: int = 0) -> None:
        """Wait until at most so many are pending. Raises the first error of one that is done."""
        while self._pending and (len(self._pending) > pending or self._pending[0].done()):
            self._pending.popleft().result()


Part = tuple[ShardWriter, str, pa.Table, TableSchema | None]
"""Rows of a shard: where they are written, their table, and its declaration where it is not this program's own."""


def _write(item: SampleShard, parts: Sequence[Part], log: BatchLog | None, link: Link) -> None:
    """Write a shard, after the record of its batch, and report it."""
    if log is not None:
        log.writing(item.shard)
    for writer, table, rows, schema in parts:
        writer.write_shard(table, item.shard, rows, schema)
    link.done(ShardDone(item.shard, item.size))


class Sampler:
    """Serves sampling jobs from one engine, kept warm between jobs and between weights.

    Settings: retries, max_num_seqs, and those of the engine (vllm_engine.py)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.engine = VllmEngine(settings)
        self._stopped_by: list[int] | None = None
        self._pair: Pair | None = None
        self._scores: ScoreQueue | None = None
        self._drafts: Drafted = {}

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
        with Disk() as disk:
            while not intake.empty:
                self._prepare(job)
                self._scores = self._open_scores(job, behaviour, prompts, teacher_prompts)
                log = BatchLog(writer.path, job.log_table) if job.batch is None else None
                failed: list[OpenShard] = []
                passes += 1
                batch = self._batch(job, intake, prompts, behaviour, log, link, done)
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
                    tables, parts = shard.item.tables or [job.table], list[Part]()
                    if job.table in tables:
                        rows = shard.rows(prompts, behaviour, self._text)
                        parts.append((target, job.table, rows.select(schema_for(job.table).names), None))
                    own = behaviour.table
                    if values is not None and own is not None and own.name in tables:
                        parts.append((values, own.name, shard.values(own), own))
                    done += shard.item.size
                    disk.submit(partial(_write, shard.item, parts, log, link))
                    if wanted is not None:
                        wanted.discard(number)
                        if not wanted:
                            break
                batch.close()
                if wanted is None:
                    intake.again += [
                        shard.item for shard in failed
                    ]  # whole, in the next batch: a shard is of one batch
                elif not wanted:
                    break
                elif failed:  # the whole batch again: in another one its shards would have other bits
                    if passes > retries:
                        raise failed[-1].error()
                    intake.restart()
            disk.check()
        return SampleResult(self._stopped_by, self.engine.proof)

    def rest(self) -> None:
        """Free the student beside the engine, and what the engine does not need for the next one."""
        self._scores = None
        if self._pair is not None:
            self._pair.rest()
        self.engine.rest()

    def close(self) -> None:
        """Shut the engine down, and free the models beside it."""
        self._free_pair()
        self.engine.close()

    # --- a batch ---------------------------------------------------------------------------------------------------

    def _prepare(self, job: SampleJob) -> None:
        """Load the job's weights into the engine, with room for its longest sequence."""
        path = Path(job.model.path)
        check_length(path, job.longest)
        self.engine.load(path, job.model.weights, job.dtype, job.longest)

    def _open_scores(
        self, job: SampleJob, behaviour: Behaviour, prompts: dict[str, list[int]], teacher: dict[str, list[int]]
    ) -> ScoreQueue | None:
        """The two models beside the engine, where the behaviour reads the teacher. They are freed where it does not."""
        if job.teacher is None:
            self._free_pair()
            return None
        from tasks.engines.pair import Pair, ScoreQueue  # torch comes with the engine, whose environment is set by now

        self._pair = self._pair or Pair(self.settings)
        with self.engine.outside():
            self._pair.load(job.model, job.teacher, job.dtype)
        return ScoreQueue(self._pair, behaviour, prompts, teacher, job.unmapped)

    def _free_pair(self) -> None:
        pair, self._pair, self._scores = self._pair, None, None
        if pair is not None:
            pair.close()

    def _stop_ids(self, job: SampleJob, sampling: Sampling) -> list[int]:
        """The ids that end a completion. InputError for ids that the model does not have."""
        found = stop_token_ids(Path(job.model.path), sampling.stop_token_ids, self.engine.tokenizer.eos_token_id)
        if sampling.merged:  # the teacher's may be past the student's rows
            found = [index for index in found if index < self.engine.vocabulary]
        check_stop_ids(found, self.engine.vocabulary, Path(job.model.path), job.target.stage)
        self._stopped_by = found
        return found

    def _batch(
        self,
        job: SampleJob,
        intake: Intake,
        prompts: dict[str, list[int]],
        behaviour: Behaviour,
        log: BatchLog | None,
        link: Link,
        done: int,
    ) -> Generator[OpenShard, None, None]:
        """Samples until the engine is empty and there are no more shards. Yields each shard when it is complete. One with
        `problems` has an unusable completion, or the engine failed while it was unfinished. `done`: samples written before."""
        # the last bits of log-probabilities can depend on cached prefixes: a batch starts with an empty cache
        self.engine.clear_cache()
        waiting: dict[str, tuple[OpenShard, int]] = {}
        unfinished: dict[int, OpenShard] = {}
        scores = self._scores
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
                    if (problem := problem_of(output, self.engine.vocabulary)) is not None:
                        shard.problems[position] = problem
                    else:
                        waiting |= self._go_on(shard, {position: drawn(output)})
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
            self.engine.abort(waiting)
            raise
        except OpdError:
            self.engine.abandon()  # it may hold requests whose answers are no longer read
            raise
        except Exception as error:
            traceback.print_exc()
            self.engine.abandon()
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
            teacher_stops = tuple(self._scores.teacher_stop_ids) if self._scores is not None else ()
            start = Start(
                tuple(prompt),
                limit,
                request.seed,
                tuple(shard.stop_ids),
                teacher_stops,
                draft_of(self._drafts, request, behaviour),
                request.sample_index,
            )
            shard.writers[position] = Writing(behaviour, start, request.sample_id, self.engine.vocabulary, longest)

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
        names = self.engine.enqueue(list(asks.values()), shard.item.sampling, shard.stop_ids)
        return {name: (shard, position) for name, position in zip(names, asks, strict=True)}

    def _step(self, waiting: dict[str, tuple[OpenShard, int]]) -> list[tuple[OpenShard, int, Any]]:
        """One step of the engine: (shard, position, output) of every request that it finished, removed from `waiting`. The output
        is None where the engine lost the request."""
        return [(*waiting.pop(name), output) for name, output in self.engine.step(waiting).items()]

    def _text(self, token_ids: list[int]) -> str:
        return text_of(self.engine.tokenizer, token_ids)


def _prompt_tokens(store: Store, job: SampleJob, of: str = "token_ids") -> dict[str, list[int]]:
    """prompt_id -> the student's tokens, or the teacher's (`of` teacher_token_ids), of the job's split."""
    artifact = store.require(job.prompts.stage, job.prompts.key)
    columns = list(dict.fromkeys(["prompt_id", "split", "token_ids", of]))
    table = store.read_table(artifact, "prompts", columns=columns)
    table = table.filter(pc.equal(table["split"], job.split))
    tokens = pc.coalesce(table[of], table["token_ids"])  # null: equal to the student's
    return dict(zip(table["prompt_id"].to_pylist(), tokens.to_pylist(), strict=True))


def _written_on(completion: Completion, sampling: Sampling) -> list[int]:
    """The tokens of a completion's text: with merged stop ids it ends with the student's own, whichever was sampled."""
    ids = completion.token_ids
    if not (sampling.merged and completion.finish_reason == "stop" and ids[-1] in sampling.stop_token_ids):
        return ids
    return [*ids[:-1], int(sampling.stop_token_ids[0])]
