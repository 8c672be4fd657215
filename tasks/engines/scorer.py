"""The scorer: student and teacher read the same completions, and their answers become signals.

Jobs (`op`), all with `student` and `teacher` ({path, weights, architecture}: a local folder and content digests) and
`dtype`:

- `supervise_shard`: `store`, `rollouts` and `prompts` ({stage, key}), `shard`, `outputs` ({table, stage, key, and for
  top-K lists k and encoding} list), `sampling` (temperature, top_p, top_k of the rollouts), `mask` (rules, see
  `tasks.signals.mask`), `flags` ({stage, key} of a committed `sampled`, which shows invalid values; or null),
  `backend` (the teacher's, see `tasks.engines.teacher`). Writes one shard of each output. Returns outside_nucleus: sampled
  tokens that by this student's rounding lie outside the set sampled from.
- `reverse_kl`: `samples` ({prompt, teacher_prompt or null, completion} list, token ids). Writes nothing. Returns sums:
  per sample the sum over its tokens of the exact full-vocabulary KL(student || teacher), null where it is not finite.

A distribution is a softmax over all rows that a model has, tokenizer or not: that is what the sampler samples from and
what the trainer trains. Teacher rows past the student's are padding that the student cannot write: they do not exist
here. Student rows past the teacher's have no probability for the teacher: no top-K list holds them, and the KL leaves
them out of both."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from storage.errors import ConfigError, CorruptArtifact, InputError
from storage.store import Artifact, Store
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
from tasks.signals import Shard, Values, Wanted, signal_named

Progress = Callable[[int, int], None]
LOCAL = LocalTeacher()


@dataclass(frozen=True)
class Sample:
    """One completion to score. `teacher_prompt` is what the teacher reads where that differs from `prompt`."""

    name: str
    prompt: list[int]
    completion: list[int]
    teacher_prompt: list[int] | None = None


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
        self.models = WarmModels(Host("cuda" if cuda else "cpu", int(settings.get("head_chunk_tokens", 1024))))
        self._stores: dict[str, Store] = {}
        self._vocabularies: dict[tuple[str, str], int] = {}
        self._teacher_prompts: tuple[str, dict[str, list[int]]] = ("", {})

    def handle(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Do one job (see the module's description). Raises InputError for samples that a model cannot read and for
        checkpoints that do not load, ConfigError for what a backend cannot answer, CorruptArtifact, StoreError."""
        if job.get("op") == "supervise_shard":
            return self._supervise_shard(job, progress)
        if job.get("op") == "reverse_kl":
            return self._reverse_kl(job, progress)
        raise ConfigError(f"scorer: no operation {job.get('op')!r}; there are supervise_shard and reverse_kl")

    def close(self) -> None:
        """Free the models."""
        self.models.free()

    # --- jobs ----------------------------------------------------------------------------------------------------

    def _supervise_shard(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        store = self._stores.get(job["store"]) or self._stores.setdefault(job["store"], Store(job["store"]))
        rollouts = store.read_shard(_artifact(store, job["rollouts"]), "rollouts", job["shard"])
        signals = {output["table"]: signal_named(output["table"]) for output in job["outputs"]}
        flagged = job["flags"] is not None  # then the mask needs no model
        wants = [
            signals[output["table"]].wanted(output["k"], job["sampling"])
            for output in job["outputs"]
            if not (flagged and output["table"] == "mask")
        ]
        wanted = functools.reduce(operator.or_, wants, Wanted())
        values: Values = {}
        if wanted.models:
            samples = self._samples(store, job["prompts"], rollouts)
            values = self.score(job, samples, wanted, progress, backend_of(job["backend"]))
        flags = store.read_shard(_artifact(store, job["flags"]), "sampled", job["shard"]) if flagged else None
        for output in job["outputs"]:
            signal = signals[output["table"]]
            rows = signal.table(Shard(rollouts, values, output["k"], output["encoding"], job["mask"] or {}, flags))
            writer = store.shard_writer(output["stage"], output["key"])
            writer.write_shard(output["table"], job["shard"], rows, signal.schema)
        return {"outside_nucleus": int(sum(array.sum() for array in values.get("student_outside", [])))}

    def _reverse_kl(self, job: dict[str, Any], progress: Progress) -> dict[str, Any]:
        samples = [
            Sample(f"sample {number}", sample["prompt"], sample["completion"], sample.get("teacher_prompt"))
            for number, sample in enumerate(job["samples"])
        ]
        values = self.score(job, samples, Wanted(reverse_kl=True), progress)
        sums = [float(array.sum()) for array in values["reverse_kl"]]
        return {"sums": [value if math.isfinite(value) else None for value in sums]}

    def _samples(self, store: Store, prompts: dict[str, str], rollouts: pa.Table) -> list[Sample]:
        names = ("sample_id", "prompt_id", "prompt_token_ids", "completion_token_ids")
        rows = zip(*(rollouts[name].to_pylist() for name in names), strict=True)
        other = self._other_prompts(store, prompts)
        return [Sample(name, prompt, completion, other.get(prompt_id)) for name, prompt_id, prompt, completion in rows]

    def _other_prompts(self, store: Store, prompts: dict[str, str]) -> dict[str, list[int]]:
        """By prompt_id the teacher's tokens, of the prompts where they are not the student's."""
        if self._teacher_prompts[0] != prompts["key"]:
            table = store.read_table(_artifact(store, prompts), "prompts", columns=["prompt_id", "teacher_token_ids"])
            table = table.filter(table["teacher_token_ids"].is_valid())
            found = dict(zip(table["prompt_id"].to_pylist(), table["teacher_token_ids"].to_pylist(), strict=True))
            self._teacher_prompts = (prompts["key"], found)
        return self._teacher_prompts[1]

    # --- scoring -------------------------------------------------------------------------------------------------

    def score(
        self,
        job: Mapping[str, Any],
        samples: Sequence[Sample],
        wanted: Wanted,
        progress: Progress,
        backend: TeacherBackend = LOCAL,
    ) -> Values:
        """What is wanted of the samples, in their order. Both models read the same batches: how a batch is padded decides the
        last bits of what is computed."""
        if lacking := backend.capabilities.lacking(wanted):
            raise ConfigError(f"supervise.teacher: {backend.kind} cannot give {' and '.join(lacking)}")
        student_rows, teacher_rows = self._rows(job["student"], LOCAL), self._rows(job["teacher"], backend)
        shared = min(student_rows, teacher_rows)
        if wanted.largest > shared:
            raise InputError(
                f"objective.support.k: {wanted.largest} candidates, but student and teacher share a vocabulary of"
                f" {shared} ids"
            )
        described = {name: job[name] for name in ("student", "teacher")}
        models = self.models.get(described, wanted.models, job["dtype"], backend)
        vocabularies = {"student": Vocabulary(student_rows, shared), "teacher": Vocabulary(shared, shared)}
        read = {name: [_passage(name, sample) for sample in samples] for name in models}
        for name, model in models.items():
            if name == "student":
                _refuse_foreign(samples, student_rows)
            model.check(read[name], [f"{name}, {sample.name}" for sample in samples])
        values: Values = {}
        done = 0
        lengths = [max(len(passages[index].inputs) for passages in read.values()) for index in range(len(samples))]
        for batch in plan_batches(lengths, self.batch_tokens):
            passages = {name: [found[index] for index in batch] for name, found in read.items()}
            for name, arrays in _answers(models, passages, vocabularies, wanted).items():
                column = values.setdefault(name, [np.empty(0)] * len(samples))
                for index, array in zip(batch, arrays, strict=True):
                    column[index] = array
            done += len(batch)
            progress(done, len(samples))
        return values

    def _rows(self, model: Mapping[str, str], backend: TeacherBackend) -> int:
        key = (model["architecture"], backend.model_dump_json())
        if key not in self._vocabularies:
            self._vocabularies[key] = backend.rows(Path(model["path"]))
        return self._vocabularies[key]


def _answers(
    models: Mapping[str, Teacher],
    passages: Mapping[str, Sequence[Passage]],
    vocabularies: Mapping[str, Vocabulary],
    wanted: Wanted,
) -> Values:
    """What is wanted of one batch: first of the student, then of the teacher, who may be asked about the student's lists."""
    found: Values = {}
    for name, ask in (("student", wanted.student), ("teacher", wanted.teacher)):
        if ask:
            given = {k: found[f"student_top{k}_ids"] for k in ask.on}
            answers = models[name].score(passages[name], ask, vocabularies[name], given)
            found |= {f"{name}_{quantity}": arrays for quantity, arrays in answers.items()}
    for k in wanted.teacher.on:  # a list of which the teacher knows nothing has no usable entries
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


def _refuse_foreign(samples: Sequence[Sample], rows: int) -> None:
    """InputError for a completion whose student reads an id that it does not have."""
    for sample in samples:
        if (largest := max(sample.completion[:-1], default=0)) >= rows:
            raise InputError(f"student, {sample.name}: token id {largest}, but the student has {rows} rows")


def _artifact(store: Store, reference: dict[str, str]) -> Artifact:
    artifact = store.get(reference["stage"], reference["key"])
    if artifact is None:
        name = f"{reference['stage']}/{reference['key']}"
        raise CorruptArtifact(f"{name}: not committed in {store.root}, or damaged; run again")
    return artifact
