"""The scorer: student and teacher score the same completions, and the results become signals.

Jobs: `ScoreJob` (signals of rollouts, one shard of each per item) and `KLJob` (exact KL of an evaluation's completions).

A distribution is a softmax over all rows of a model, also those without a token: the sampler samples from it and the trainer
trains it. Teacher rows past the student's are padding that the student cannot write, so they are left out. Student rows past
the teacher's have no teacher probability: top-K lists do not contain them, and the KL leaves them out of both models."""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from storage.errors import ConfigError, InputError
from storage.schemas import COMPLETION_KL, schema_for
from storage.store import Store
from tasks.engines import distributions
from tasks.engines.forward import plan_batches
from tasks.engines.teacher import (
    Host,
    LocalTeacher,
    Passage,
    Teacher,
    TeacherBackend,
    Vocabulary,
    WarmModels,
    backend_of,
)
from tasks.inputs.models import parameter_count
from tasks.rollout_config import BYTES_OF, Dtype
from tasks.routing import teacher_of_prompts
from tasks.signals import Shard, Values, Wanted, signal_named
from tasks.signals.stop_ids import merge_stop_ids
from tasks.signals.tables import arrays_of
from tasks.workers.jobs import ArtifactRef, KLJob, KLShard, ModelRef, ScoreJob, ScoreResult, ScoreShard, ShardDone
from tasks.workers.main import Link

if TYPE_CHECKING:
    from tasks.engines.local import LocalModel
    from tasks.engines.mixture import MixtureModel

Report = Callable[[int], None]
"""Called with the samples of a shard that are scored."""
LOCAL = LocalTeacher()
_WEIGHTS_SHARE = 0.75


@dataclass(frozen=True)
class Sample:
    """One completion to score, in token ids. `teacher_prompt` is the teacher's prompt where it differs from `prompt`."""

    name: str
    prompt: np.ndarray
    completion: np.ndarray
    teacher_prompt: np.ndarray | None = None


class Scorer:
    """Serves scoring jobs; both models stay warm until a job names others.

    Settings: device (cpu|cuda), threads, batch_tokens (per forward, padding included), head_chunk_tokens (completion
    tokens whose logits exist at once)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(int(settings.get("threads", 1)))
        cuda = settings.get("device", "cpu") == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ConfigError("runtime.device: cuda, but this torch finds no GPU; see make setup EXTRA=gpu")
        self.batch_tokens = int(settings.get("batch_tokens", 8192))
        self.passes: int | None = settings.get("passes")
        host = Host(
            "cuda" if cuda else "cpu",
            int(settings.get("head_chunk_tokens", 1024)),
            int(settings.get("devices_per_worker", 1)),
            settings,
        )
        self.models = WarmModels(host)
        self._stores: dict[str, Store] = {}
        self._vocabularies: dict[tuple[str, str], int] = {}
        self._teacher_prompts: tuple[str, dict[str, np.ndarray]] = ("", {})
        self._teacher_of: tuple[str, dict[str, str | None]] = ("", {})

    def handle(self, job: ScoreJob | KLJob, link: Link) -> ScoreResult:
        """Score shards until the supervisor has no more. Raises InputError for samples that a model cannot read and for
        checkpoints that do not load, ConfigError for what a backend cannot answer, CorruptArtifact, StoreError."""
        done = 0
        writing: Future[ShardDone] | None = None
        with ThreadPoolExecutor(1) as thread:  # a shard's tables are written while the next one is computed
            while (item := link.next()) is not None:
                progress = functools.partial(_report, link, done)
                if isinstance(job, ScoreJob):
                    write = self._score_shard(job, item, progress)
                else:
                    write = self._score_kl(job, item, progress)
                if writing is not None:
                    link.done(writing.result())
                writing = thread.submit(write)
                done += item.size
            if writing is not None:
                link.done(writing.result())
        return ScoreResult()

    def rest(self) -> None:
        """Free the student."""
        self.models.rest()

    def close(self) -> None:
        """Free the models."""
        self.models.free()

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _score_shard(self, job: ScoreJob, item: ScoreShard, progress: Report) -> Callable[[], ShardDone]:
        """What writes the shard, with all that the models are needed for done."""
        store = self._store(job.store)
        rollouts = store.read_shard(store.require(job.rollouts.stage, job.rollouts.key), "rollouts", item.shard)
        if job.names is not None:
            mine = {name for name, teacher in self._routes(store, job.prompts).items() if teacher in job.names}
            rollouts = rollouts.filter(pc.is_in(rollouts["prompt_id"], value_set=pa.array(sorted(mine), pa.string())))
        signals = {output.table: signal_named(output.table) for output in item.outputs}
        backend = backend_of(json.loads(bytes(job.backend)))
        sampling = msgspec.structs.asdict(job.sampling)
        wants = [
            signals[output.table].asked(output.k, sampling, job.run_student, backend.asked)
            for output in item.outputs
            if job.flags is None or output.table != "mask"  # with flags, the mask needs no model
        ]
        wanted = functools.reduce(operator.or_, wants, Wanted())
        values: Values = {}
        if wanted.models and rollouts.num_rows:
            samples = _in_context(store, job, item.shard, self._samples(store, job.prompts, rollouts))
            values = self.score(job, samples, wanted, progress, backend)
        flags = None
        if job.flags is not None:
            flags = store.read_shard(store.require(job.flags.stage, job.flags.key), "sampled", item.shard)
        rules = msgspec.structs.asdict(job.mask) if job.mask is not None else {}
        rollouts = merge_stop_ids(rollouts, job.stop_ids)

        def write() -> ShardDone:
            for output in item.outputs:
                signal = signals[output.table]
                shard = Shard(rollouts, values, output.k, output.encoding, rules, flags, output.tail_mass)
                rows = signal.table(shard) if rollouts.num_rows else signal.schema.arrow.empty_table()
                writer = store.shard_writer(output.target.stage, output.target.key)
                writer.write_shard(output.table, item.shard, rows, signal.schema)
            outside = sum(array.sum() for array in values.get("student_outside", []))
            return ShardDone(item.shard, item.size, int(outside))

        return write

    def _score_kl(self, job: KLJob, item: KLShard, progress: Report) -> Callable[[], ShardDone]:
        store = self._store(job.store)
        between = store.shard_writer(job.target.stage, job.target.key).intermediate()
        completions = between.require("rollouts", item.shard)
        values = self.score(job, self._samples(store, job.prompts, completions), Wanted(reverse_kl=True), progress)
        sums = [float(array.sum()) for array in values["reverse_kl"]]
        columns = {
            "sample_id": completions["sample_id"].combine_chunks(),
            "reverse_kl_sum": [value if math.isfinite(value) else None for value in sums],
        }
        rows = pa.table(columns, schema=schema_for(COMPLETION_KL))

        def write() -> ShardDone:
            between.write_shard(COMPLETION_KL, item.shard, rows)
            return ShardDone(item.shard, item.size)

        return write

    def _store(self, root: str) -> Store:
        return self._stores.get(root) or self._stores.setdefault(root, Store(root))

    def _samples(self, store: Store, prompts: ArtifactRef, rollouts: pa.Table) -> list[Sample]:
        names = (rollouts[name].to_pylist() for name in ("sample_id", "prompt_id"))
        ids = (token_arrays(rollouts[name]) for name in ("prompt_token_ids", "completion_token_ids"))
        other = self._other_prompts(store, prompts)
        rows = zip(*names, *ids, strict=True)
        return [Sample(name, prompt, completion, other.get(prompt_id)) for name, prompt_id, prompt, completion in rows]

    def _routes(self, store: Store, prompts: ArtifactRef) -> dict[str, str | None]:
        """By prompt_id the name of its teacher."""
        if self._teacher_of[0] != prompts.key:
            self._teacher_of = (prompts.key, teacher_of_prompts(store, store.require(prompts.stage, prompts.key)))
        return self._teacher_of[1]

    def _other_prompts(self, store: Store, prompts: ArtifactRef) -> dict[str, np.ndarray]:
        """By prompt_id the teacher's tokens, of the prompts where they are not the student's."""
        if self._teacher_prompts[0] != prompts.key:
            artifact = store.require(prompts.stage, prompts.key)
            table = store.read_table(artifact, "prompts", columns=["prompt_id", "teacher_token_ids"])
            table = table.filter(table["teacher_token_ids"].is_valid())
            ids = token_arrays(table["teacher_token_ids"])
            found = dict(zip(table["prompt_id"].to_pylist(), ids, strict=True))
            self._teacher_prompts = (prompts.key, found)
        return self._teacher_prompts[1]

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(
        self,
        job: ScoreJob | KLJob,
        samples: Sequence[Sample],
        wanted: Wanted,
        progress: Report,
        backend: TeacherBackend = LOCAL,
    ) -> Values:
        """What is wanted of the samples, in their order. Both models read the same batches, because padding changes
        the last bits of the results."""
        if lacking := backend.capabilities.lacking(wanted):
            raise ConfigError(f"supervise.teacher: {backend.kind} cannot give {' and '.join(lacking)}")
        student_rows = self._rows(job.student, LOCAL)
        teacher_rows = self._rows(job.teacher, backend) if backend.asked else student_rows
        shared = min(student_rows, teacher_rows)
        if wanted.largest > shared:
            raise InputError(
                f"objective.support.k: {wanted.largest} candidates, but student and teacher share a vocabulary of"
                f" {shared} ids"
            )
        described = {"student": job.student, "teacher": job.teacher}
        self.models.host = replace(self.models.host, store=Path(job.store))
        alike = (job.student.weights, job.student.architecture) == (job.teacher.weights, job.teacher.architecture)
        two = len(wanted.models) == 2 and backend.loads_here and not alike
        apart = two and self._passes(job) == 2
        first = (self.models.opened(described, job.dtype, backend) or ["student"])[0]
        if apart and job.teacher.members is not None:
            first = "teacher"  # its members come one by one, each into all of the memory
            self.models.free()
        models = self.models.get(described, [first] if apart else wanted.models, job.dtype, backend)
        stops = tuple(job.stop_ids)
        vocabularies = {
            "student": Vocabulary(student_rows, shared, stops),
            "teacher": Vocabulary(shared, shared, stops),
        }
        read = {name: [_passage(name, sample) for sample in samples] for name in wanted.models}
        lengths = [max(passages[index].length for passages in read.values()) for index in range(len(samples))]
        batches = plan_batches(lengths, self.batch_tokens)
        if "student" in read:
            _refuse_foreign(samples, student_rows)
        for name, model in models.items():
            model.check(read[name], [f"{name}, {sample.name}" for sample in samples])
        if apart:
            # the one that is open reads all first, so that every shard loads one model
            ahead = cast("LocalModel | MixtureModel", models[first])
            ahead.read_ahead([[read[first][index] for index in batch] for batch in batches])
            [second] = set(wanted.models) - {first}
            models |= self.models.get(described, [second], job.dtype, backend)
            models[second].check(read[second], [f"{second}, {sample.name}" for sample in samples])
        values: Values = {}
        done = 0
        for batch in batches:
            passages = {name: [found[index] for index in batch] for name, found in read.items()}
            for name, arrays in _answers(models, passages, vocabularies, wanted).items():
                column = values.setdefault(name, [np.empty(0)] * len(samples))
                for index, array in zip(batch, arrays, strict=True):
                    column[index] = array
            done += len(batch)
            progress(done)
        if apart:
            self.models.close(models[first])
        return values

    def _passes(self, job: ScoreJob | KLJob) -> int:
        """How often a shard is read: 2 where student and teacher are not to be in memory together."""
        if self.passes is not None or self.models.host.device == "cpu":
            return self.passes or 1
        memory = sum(torch.cuda.get_device_properties(at).total_memory for at in range(torch.cuda.device_count()))
        sizes = [parameter_count(Path(path)) for model in (job.student, job.teacher) for path in model.paths]
        return 1 if fit_together(sizes, job.dtype, memory) else 2

    def _rows(self, model: ModelRef, backend: TeacherBackend) -> int:
        key = (model.architecture, backend.model_dump_json())
        if key not in self._vocabularies:
            self._vocabularies[key] = min(backend.rows(Path(path)) for path in model.paths)
        return self._vocabularies[key]


def fit_together(parameters: Sequence[int], dtype: Dtype, memory: int) -> bool:
    """Whether models of these sizes leave a quarter of `memory` (bytes) for activations and logits."""
    return sum(parameters) * BYTES_OF[dtype] <= _WEIGHTS_SHARE * memory


def _report(link: Link, before: int, done: int) -> None:
    link.progress(before + done, 0)


def _answers(
    models: Mapping[str, Teacher],
    passages: Mapping[str, Sequence[Passage]],
    vocabularies: Mapping[str, Vocabulary],
    wanted: Wanted,
) -> Values:
    """The wanted quantities of one batch: the student's first, because the teacher may be asked about the student's lists."""
    found: Values = {}
    for name, ask in (("student", wanted.student), ("teacher", wanted.teacher)):
        if ask:
            given = {k: found[f"student_top{k}_ids"] for k in ask.on}
            answers = models[name].score(passages[name], ask, vocabularies[name], given)
            found |= {f"{name}_{quantity}": arrays for quantity, arrays in answers.items()}
    for k in wanted.teacher.on:  # a list without any teacher value has no usable entries
        pairs = zip(found[f"student_top{k}_valid"], found[f"teacher_on{k}_logprobs"], strict=True)
        found[f"student_top{k}_valid"] = [np.where(np.isnan(of).all(axis=1), 0, valid) for valid, of in pairs]
    if wanted.reverse_kl:
        chunks = zip(
            *(models[name].distributions(passages[name], vocabularies[name]) for name in ("student", "teacher")),
            strict=True,
        )
        with torch.inference_mode():
            parts = [distributions.reverse_kl(student, teacher).cpu().numpy() for student, teacher in chunks]
        edges = np.cumsum([len(passage.completion) for passage in passages["student"]])[:-1]
        found["reverse_kl"] = np.split(np.concatenate(parts), edges)
    return found


def _passage(name: str, sample: Sample) -> Passage:
    other = sample.teacher_prompt if name == "teacher" else None
    return Passage(sample.prompt if other is None else other, sample.completion)


def _in_context(store: Store, job: ScoreJob, shard: int, samples: list[Sample]) -> list[Sample]:
    """The samples of a shard of the rollouts, with what the teacher reads before each completion. InputError for contexts that
    lack a sample."""
    if job.contexts is None:
        return samples
    rows = store.read_shard(store.require(job.contexts.stage, job.contexts.key), "contexts", shard)
    known = set(rows["sample_id"].to_pylist())
    if lacking := [sample.name for sample in samples if sample.name not in known]:
        raise InputError(f"{job.contexts.stage}/{job.contexts.key}: shard {shard} has no row of sample {lacking[0]!r}")
    rows = rows.filter(rows["prompt_token_ids"].is_valid())
    own = dict(zip(rows["sample_id"].to_pylist(), token_arrays(rows["prompt_token_ids"]), strict=True))
    return [replace(sample, teacher_prompt=own.get(sample.name, sample.teacher_prompt)) for sample in samples]


def token_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Lists of token ids as int64, one array per row; no row is null."""
    return [np.asarray(row, np.int64) for row in arrays_of(column)]


def _refuse_foreign(samples: Sequence[Sample], rows: int) -> None:
    """InputError for a completion with an id that the student would read but does not have."""
    for sample in samples:
        if (largest := np.max(sample.completion[:-1], initial=0)) >= rows:
            raise InputError(f"student, {sample.name}: token id {largest}, but the student has {rows} rows")
