"""The scorer: student and teacher read the same completions, and what they say becomes signals. Uses transformers.

Jobs: `ScoreJob` (signals of rollouts, one shard of each per item) and `KLJob` (exact KL of an evaluation's completions).

A distribution is a softmax over all rows that a model has, tokenizer or not: that is what the sampler samples from and
what the trainer trains. Teacher rows past the student's are padding that the student cannot write: they do not exist
here. Student rows past the teacher's have no probability for the teacher: no top-K list holds them, and the KL leaves
them out of both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from storage.errors import ConfigError, InputError
from storage.schemas import COMPLETION_KL, schema_for
from storage.store import Store
from tasks.engines import distributions
from tasks.engines.forward import LoadedModel, Passage, WarmModels, plan_batches, vocabulary_rows
from tasks.engines.signals import Values, mask_table, sampled_table, topk_table
from tasks.workers.jobs import ArtifactRef, KLJob, KLShard, ModelRef, ScoreJob, ScoreResult, ScoreShard, ShardDone
from tasks.workers.main import Link

Report = Callable[[int], None]
"""Called with the samples of a shard that are scored."""


@dataclass(frozen=True)
class Sample:
    """One completion to score. `teacher_prompt` is what the teacher reads where that differs from `prompt`."""

    name: str
    prompt: list[int]
    completion: list[int]
    teacher_prompt: list[int] | None = None


@dataclass(frozen=True)
class Wanted:
    """The quantities to compute of every completion token."""

    sampled: bool = False
    teacher_k: int | None = None
    student_k: int | None = None
    reverse_kl: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    """Non-empty (temperature, top_p, top_k): log-probabilities under the sampling distribution are wanted."""

    @property
    def student(self) -> bool:
        """Whether the student must be run."""
        return self.sampled or self.reverse_kl or bool(self.sampling) or self.student_k is not None

    @property
    def teacher(self) -> bool:
        """Whether the teacher must be run."""
        return self.sampled or self.reverse_kl or self.teacher_k is not None or self.student_k is not None


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
        self.chunk_tokens = int(settings.get("head_chunk_tokens", 1024))
        self.models = WarmModels(torch.device("cuda" if cuda else "cpu"))
        self._stores: dict[str, Store] = {}
        self._vocabularies: dict[str, int] = {}
        self._teacher_prompts: tuple[str, dict[str, list[int]]] = ("", {})

    def handle(self, job: ScoreJob | KLJob, link: Link) -> ScoreResult:
        """Score shards until the supervisor has no more. Raises InputError for samples that a model cannot read and for
        checkpoints that do not load, CorruptArtifact, StoreError."""
        done = 0
        while (item := link.next()) is not None:
            progress = functools.partial(_report, link, done)
            if isinstance(job, ScoreJob):
                link.done(self._score_shard(job, item, progress))
            else:
                link.done(self._score_kl(job, item, progress))
            done += item.size
        return ScoreResult()

    def close(self) -> None:
        """Free the models."""
        self.models.free()

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _score_shard(self, job: ScoreJob, item: ScoreShard, progress: Report) -> ShardDone:
        store = self._store(job.store)
        rollouts = store.read_shard(store.require(job.rollouts.stage, job.rollouts.key), "rollouts", item.shard)
        outputs = {output.table: output for output in item.outputs}
        wanted = Wanted(
            sampled="sampled" in outputs or ("mask" in outputs and job.flags is None),
            teacher_k=outputs["teacher_topk"].k if "teacher_topk" in outputs else None,
            student_k=outputs["student_topk"].k if "student_topk" in outputs else None,
            sampling=msgspec.structs.asdict(job.sampling) if "sampled" in outputs else {},
        )
        values: Values = {}
        if wanted.student or wanted.teacher:
            values = self.score(job, self._samples(store, job.prompts, rollouts), wanted, progress)
        tables: dict[str, pa.Table] = {}
        if wanted.sampled:
            tables["sampled"] = sampled_table(rollouts, values)
        elif "mask" in outputs and job.flags is not None:
            tables["sampled"] = store.read_shard(store.require(job.flags.stage, job.flags.key), "sampled", item.shard)
        for name, output in outputs.items():
            if name == "mask" and job.mask is not None:
                tables[name] = mask_table(rollouts, tables["sampled"], msgspec.structs.asdict(job.mask))
            elif name != "sampled":
                tables[name] = topk_table(name, rollouts, values, output.encoding)
            writer = store.shard_writer(output.target.stage, output.target.key)
            writer.write_shard(name, item.shard, tables[name])
        outside = int(sum(array.sum() for array in values.get("outside_nucleus", [])))
        return ShardDone(item.shard, item.size, outside)

    def _score_kl(self, job: KLJob, item: KLShard, progress: Report) -> ShardDone:
        store = self._store(job.store)
        between = store.shard_writer(job.target.stage, job.target.key).intermediate()
        completions = between.require("rollouts", item.shard)
        values = self.score(job, self._samples(store, job.prompts, completions), Wanted(reverse_kl=True), progress)
        sums = [float(array.sum()) for array in values["reverse_kl"]]
        columns = {
            "sample_id": completions["sample_id"].combine_chunks(),
            "reverse_kl_sum": [value if math.isfinite(value) else None for value in sums],
        }
        between.write_shard(COMPLETION_KL, item.shard, pa.table(columns, schema=schema_for(COMPLETION_KL)))
        return ShardDone(item.shard, item.size)

    def _store(self, root: str) -> Store:
        return self._stores.get(root) or self._stores.setdefault(root, Store(root))

    def _samples(self, store: Store, prompts: ArtifactRef, rollouts: pa.Table) -> list[Sample]:
        names = ("sample_id", "prompt_id", "prompt_token_ids", "completion_token_ids")
        rows = zip(*(rollouts[name].to_pylist() for name in names), strict=True)
        other = self._other_prompts(store, prompts)
        return [Sample(name, prompt, completion, other.get(prompt_id)) for name, prompt_id, prompt, completion in rows]

    def _other_prompts(self, store: Store, prompts: ArtifactRef) -> dict[str, list[int]]:
        """By prompt_id the teacher's tokens, of the prompts where they are not the student's."""
        if self._teacher_prompts[0] != prompts.key:
            artifact = store.require(prompts.stage, prompts.key)
            table = store.read_table(artifact, "prompts", columns=["prompt_id", "teacher_token_ids"])
            table = table.filter(table["teacher_token_ids"].is_valid())
            found = dict(zip(table["prompt_id"].to_pylist(), table["teacher_token_ids"].to_pylist(), strict=True))
            self._teacher_prompts = (prompts.key, found)
        return self._teacher_prompts[1]

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(self, job: ScoreJob | KLJob, samples: Sequence[Sample], wanted: Wanted, progress: Report) -> Values:
        """What is wanted of the samples, in their order. One forward per batch and model."""
        names = [name for name in ("student", "teacher") if getattr(wanted, name)]
        described = {"student": job.student, "teacher": job.teacher}
        models = self.models.get(described, names, job.dtype)
        rows = [self._rows(model) for model in described.values()]
        if (k := max(wanted.teacher_k or 0, wanted.student_k or 0)) > min(rows):
            raise InputError(
                f"objective.support.k: {k} candidates, but student and teacher share a vocabulary of {min(rows)} ids"
            )
        read = {name: [_passage(name, sample, rows) for sample in samples] for name in names}
        for name, model in models.items():
            model.check(read[name], [f"{name}, {sample.name}" for sample in samples])
        values: Values = {}
        done = 0
        lengths = [max(len(read[name][index].inputs) for name in names) for index in range(len(samples))]
        for batch in plan_batches(lengths, self.batch_tokens):
            hidden = {name: model.hidden([read[name][index] for index in batch]) for name, model in models.items()}
            edges = np.cumsum([len(samples[index].completion) for index in batch])[:-1]
            tokens = _tokens([samples[index] for index in batch], rows, self.models.device)
            for name, found in self._in_chunks(models, hidden, tokens, min(rows), wanted).items():
                arrays = values.setdefault(name, [np.empty(0)] * len(samples))
                for index, part in zip(batch, np.split(found, edges), strict=True):
                    arrays[index] = part
            done += len(batch)
            progress(done)
        return values

    def _rows(self, model: ModelRef) -> int:
        if model.architecture not in self._vocabularies:
            self._vocabularies[model.architecture] = vocabulary_rows(Path(model.path))
        return self._vocabularies[model.architecture]

    @torch.inference_mode()
    def _in_chunks(
        self,
        models: dict[str, LoadedModel],
        hidden: dict[str, Tensor],
        tokens: tuple[Tensor, Tensor],
        rows: int,
        wanted: Wanted,
    ) -> dict[str, np.ndarray]:
        """Per quantity its values for all N tokens of a batch, with logits of `chunk_tokens` tokens at a time."""
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(tokens[0]), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            logprobs = {}
            for name, model in models.items():
                # in the student's vocabulary: rows past it do not exist for the teacher
                cut = model.rows if name == "student" else rows
                logprobs[name] = distributions.log_probabilities(model.head(hidden[name][chunk]), cut)
            if "teacher" in logprobs:
                logprobs["teacher"].masked_fill_(tokens[1][chunk, None], float("nan"))
            for name, value in _quantities(logprobs, tokens[0][chunk], rows, wanted).items():
                parts.setdefault(name, []).append(value.cpu().numpy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _report(link: Link, before: int, done: int) -> None:
    link.progress(before + done, 0)


def _quantities(logprobs: dict[str, Tensor], ids_N: Tensor, rows: int, wanted: Wanted) -> dict[str, Tensor]:
    """What is wanted of one chunk, named as in `tasks.engines.signals`; `logprobs` are (N, V) by model."""
    found: dict[str, Tensor] = {}
    if wanted.sampled:
        for name, logprobs_NV in logprobs.items():
            found[f"{name}_logprobs"] = distributions.of_tokens(logprobs_NV, ids_N[:, None])[:, 0]
            found[f"{name}_entropy"] = distributions.entropy(logprobs_NV)
    if wanted.sampling:
        found["behaviour_logprobs"], found["outside_nucleus"] = distributions.sampling_logprobs(
            logprobs["student"], ids_N, **wanted.sampling
        )
    if wanted.reverse_kl:
        found["reverse_kl"] = distributions.reverse_kl(logprobs["student"], logprobs["teacher"])
    if wanted.teacher_k is not None:
        teacher_NV = logprobs["teacher"]
        ids_NK, top_NK, valid_N = distributions.top(teacher_NV, wanted.teacher_k, rows)
        found |= {"teacher_ids": ids_NK, "teacher_top": top_NK, "teacher_valid": valid_N}
        found["teacher_tail"] = distributions.tail_logmass(teacher_NV, ids_NK)
    if wanted.student_k is not None:
        ids_NK, top_NK, valid_N = distributions.top(logprobs["student"], wanted.student_k, rows)
        valid_N = valid_N.masked_fill(logprobs["teacher"][:, 0].isnan(), 0)
        found |= {"student_ids": ids_NK, "student_top": top_NK, "student_valid": valid_N}
        found["teacher_on_student"] = distributions.of_tokens(logprobs["teacher"], ids_NK)
        found["student_tail"] = distributions.tail_logmass(logprobs["student"], ids_NK)
        found["teacher_tail_of_student"] = distributions.tail_logmass(logprobs["teacher"], ids_NK)
    return found


def _passage(name: str, sample: Sample, rows: Sequence[int]) -> Passage:
    if name == "student":
        return Passage(sample.prompt, sample.completion)
    prompt = sample.prompt if sample.teacher_prompt is None else sample.teacher_prompt
    # an id that the teacher lacks cannot be read; it stands as 0, and nothing after it counts (see _tokens)
    return Passage(prompt, [token if token < rows[1] else 0 for token in sample.completion])


def _tokens(samples: Sequence[Sample], rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids_N, unread_N) of the packed completions; unread: the teacher could not read a token before this one."""
    ids, unread = [], []
    for sample in samples:
        completion = np.array(sample.completion, np.int64)
        foreign = np.cumsum(completion >= rows[1])
        ids.append(completion)
        unread.append(foreign - (completion >= rows[1]) > 0)
    pair = (torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in (ids, unread))
    ids_N, unread_N = pair
    return ids_N, unread_N
