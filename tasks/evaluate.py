"""Evaluate: what the student does on held-out prompts. vLLM samples, a verifier judges, transformers scores the KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from storage.artifacts.shards import read_parquet
from storage.errors import InputError
from storage.identity import Identity, derive_seed, omit_at
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.inputs.verifiers import ExactMatch, FunctionVerifier, VerifierConfig, verifier_digest, verify
from tasks.plugins import NO_PLUGINS, used_plugins
from tasks.rollout_config import StopTokenIds
from tasks.stage import Context, Work, model_inputs
from tasks.workers.pool import WorkerDied

VERSION = 1
STAGE = "evaluate"
TABLE = "evaluations"
SPLIT = "eval"
MODES: tuple[Literal["greedy", "sampled", "kl"], ...] = ("greedy", "sampled", "kl")


class EvaluateConfig(Identity):
    """What is measured of every round's student. Prompts and seeds are the same in every round."""

    prompts: int | None = Field(None, ge=1, description="at most this many held-out prompts; null: all")
    greedy: bool = Field(True, description="one completion per prompt by the likeliest tokens: accuracy_greedy")
    num_generations: int = Field(0, ge=0, description="sampled completions per prompt: accuracy_sampled; 0: none")
    temperature: float = Field(1.0, ge=0.01, le=2, description="of the sampled completions")
    top_p: float = Field(1.0, gt=0, le=1, description="of the sampled completions")
    top_k: int = Field(0, ge=0, description="of the sampled completions; 0: all tokens")
    kl_prompts: int | None = Field(
        None, ge=0, description="prompts whose fresh temperature-1 rollouts give reverse_kl; null: all of them; 0: none"
    )
    kl_generations: int = Field(1, ge=1, description="such rollouts per prompt")
    max_completion_length: int = Field(256, ge=1, description="tokens of a completion; longer ones are cut (clipped)")
    stop_token_ids: StopTokenIds = Field(
        "eos", description="ids that end a completion; eos: those of the student's tokenizer and generation config"
    )
    verifier: VerifierConfig | None = Field(
        ExactMatch(), description="judges greedy and sampled completions; null: no accuracy"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the engine and of the scorer")
    shard_prompts: int = Field(64, ge=1, description="prompts per shard: the unit of redo and of data parallelism")

    @model_validator(mode="after")
    def _something(self) -> EvaluateConfig:
        if not any(self.generations(mode) for mode in MODES):
            raise ValueError("nothing to evaluate: set greedy, or num_generations, or kl_prompts")
        return self

    def generations(self, mode: str) -> int:
        """Completions per prompt in a mode; 0 where it is off."""
        if mode == "greedy":
            return int(self.greedy)
        return self.num_generations if mode == "sampled" else 0 if self.kl_prompts == 0 else self.kl_generations

    def sampling(self, mode: str) -> dict[str, Any]:
        """What the sampler needs of it (see `tasks/engines/sampler.py`), as JSON."""
        shape = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        if mode == "greedy":
            shape["temperature"] = 0.0
        if mode == "sampled":
            shape = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return shape | self.model_dump(mode="json", include={"max_completion_length", "stop_token_ids"})


class _EvaluateIdentity(Identity):
    config: EvaluateConfig
    seed: int
    verifier_source: str | None
    plugins: dict[str, str] = Field({}, json_schema_extra=omit_at({}))


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt. The teacher reads `teacher_token_ids` where there are any."""

    prompt_id: str
    token_ids: list[int]
    teacher_token_ids: list[int] | None
    answer: str | None


@dataclass(frozen=True)
class Shard:
    """The completions of one mode for some prompts, prompt after prompt."""

    mode: str
    prompts: tuple[Prompt, ...]
    generations: int

    @property
    def samples(self) -> list[tuple[Prompt, int]]:
        """(prompt, sample_index) of every completion."""
        return [(prompt, index) for prompt in self.prompts for index in range(self.generations)]


def evaluate_work(
    config: EvaluateConfig,
    student: Artifact,
    teacher: Artifact,
    prompts: Artifact,
    seed: int,
    plugins: Mapping[str, str] = NO_PLUGINS,
) -> Work:
    """The evaluation of one student; its key leaves the round out, so an unchanged student is evaluated once.
    `plugins`: the run's, name -> digest of the source.

    Output "evaluate": table evaluations. Meta: `metrics` accuracy_greedy and accuracy_sampled (shares of the judged
    completions, null where none was judged), reverse_kl (nats per token, exact over the vocabulary, on fresh rollouts
    at temperature 1; null where off), mean_length (tokens) and clipped_ratio of the same rollouts (else of the sampled,
    else of the greedy ones), eval_tokens (all). Raises InputError without held-out prompts."""
    inputs = model_inputs(student, "student:")
    if config.generations("kl"):
        inputs |= {f"teacher:{part}": teacher.content[part] for part in ("weights", "architecture")}
    if f"prompts:{SPLIT}" not in prompts.content:
        raise _nothing_held_out()
    inputs["prompts"] = prompts.content[f"prompts:{SPLIT}"]
    source = None if config.verifier is None else verifier_digest(config.verifier)
    roles = ("sampler", "scorer") if config.generations("kl") else ("sampler",)
    used = used_plugins(plugins, *roles, config=config)
    identity = _EvaluateIdentity(config=config, seed=seed, verifier_source=source, plugins=used)
    spec = ArtifactSpec.of(STAGE, VERSION, identity, inputs)

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders[STAGE], ctx, config, student, teacher, prompts, seed)

    return Work(STAGE, {STAGE: spec}, build)


def plan_shards(prompts: Sequence[Prompt], config: EvaluateConfig, seed: int) -> list[Shard]:
    """All completions to ask for, shard by shard. A limit takes a seeded choice of the prompts, the same in every
    round; that for the KL is part of it."""
    order = sorted(prompts, key=lambda p: (derive_seed(seed, "evaluate", "prompts", p.prompt_id), p.prompt_id))
    chosen = order[: config.prompts]
    shards = []
    for mode in MODES:
        mine = chosen[: config.kl_prompts] if mode == "kl" else chosen
        if count := config.generations(mode):
            size = config.shard_prompts
            shards += [Shard(mode, tuple(mine[i : i + size]), count) for i in range(0, len(mine), size)]
    return shards


def _build(
    builder: Builder,
    ctx: Context,
    config: EvaluateConfig,
    student: Artifact,
    teacher: Artifact,
    prompts: Artifact,
    seed: int,
) -> None:
    shards = plan_shards(_held_out(ctx.store, prompts), config, seed)
    missing = builder.missing(TABLE, len(shards))
    progress = _Progress(ctx, shards, missing)
    ctx.begin_shards(builder, TABLE, missing, len(shards), "sampler", "scorer")
    completions = _sample(builder, ctx, config, student, shards, missing, seed, progress) if missing else []
    written = dict(zip(missing, completions, strict=True))
    for index in missing:
        if shards[index].mode != "kl":
            builder.write_shard(TABLE, index, _rows(shards[index], written[index], config, None))
    scored = [index for index in missing if shards[index].mode == "kl"]
    if scored:
        ctx.workers.stage_done()  # on a GPU the sampler's memory is needed now; warm workers stay
        models = {"student": _model(ctx.store, student), "teacher": _model(ctx.store, teacher)}
        jobs = [
            {"op": "reverse_kl", **models, "dtype": config.dtype, "samples": _to_score(shards[i], written[i])}
            for i in scored
        ]
        results = ctx.workers.run("scorer", jobs, lambda job, done, _: progress(("kl", job), done))
        for index, result in zip(scored, results, strict=True):
            builder.write_shard(TABLE, index, _rows(shards[index], written[index], config, result["sums"]))
    meta = {} if builder.repairing else _meta(builder, len(shards))
    if lost := meta.get("invalid_kl"):
        ctx.log(f"warning: the KL of {lost} completions is not finite; reverse_kl leaves them out")
    builder.commit(meta=meta, tables={TABLE: len(shards)}, provenance=builder.made_at(TABLE, len(shards)))


class _Progress:
    """Counts completions sampled, and those of the KL once more when they are scored."""

    def __init__(self, ctx: Context, shards: Sequence[Shard], missing: Sequence[int]) -> None:
        self._ctx = ctx
        work = [len(shard.samples) * (1 + (shard.mode == "kl")) for shard in shards]
        self._total, self._done = sum(work), sum(work) - sum(work[index] for index in missing)
        self._counts: dict[tuple[str, int], int] = {}
        ctx.progress(self._done, self._total, "samples")

    def __call__(self, job: tuple[str, int], done: int) -> None:
        self._counts[job] = done
        self._ctx.progress(self._done + sum(self._counts.values()), self._total, "samples")


def _held_out(store: Store, prompts: Artifact) -> list[Prompt]:
    columns = ["prompt_id", "token_ids", "teacher_token_ids", "answer"]
    table = store.read_table(prompts, "prompts", columns=[*columns, "split"])
    table = table.filter(pc.equal(table["split"], SPLIT)).select(columns)
    if table.num_rows == 0:
        raise _nothing_held_out()
    return [Prompt(**row) for row in table.to_pylist()]


def _nothing_held_out() -> InputError:
    return InputError("evaluate: no held-out prompts; give prompts.eval a source")


def _model(store: Store, artifact: Artifact) -> dict[str, str]:
    digests = {part: artifact.content[part] for part in ("weights", "architecture")}
    return {"path": str(store.materialize(artifact)), **digests}


def _sample(
    builder: Builder,
    ctx: Context,
    config: EvaluateConfig,
    student: Artifact,
    shards: Sequence[Shard],
    missing: Sequence[int],
    seed: int,
    progress: _Progress,
) -> list[list[dict[str, Any]]]:
    """The sampler's completions of the missing shards. Seeds: H(seed, mode, prompt id, sample index), without the round."""
    path = str(ctx.store.materialize(student))
    place = {"store": str(ctx.store.root), "stage": builder.stage, "key": builder.key, "table": TABLE}
    jobs = [
        {
            "op": "generate_shard",
            "model": path,
            "weights": student.content["weights"],
            "dtype": config.dtype,
            "sampling": config.sampling(shard.mode),
            "prompts": [prompt.token_ids for prompt, _ in shard.samples],
            "seeds": [derive_seed(seed, "evaluate", shard.mode, p.prompt_id, index) for p, index in shard.samples],
            "names": [f"{prompt.prompt_id}/{shard.mode}/{index}" for prompt, index in shard.samples],
            "parts": place | {"shard": number},
        }
        for number, shard in ((number, shards[number]) for number in missing)
    ]
    try:
        results = ctx.workers.run("sampler", jobs, lambda job, done, _: progress(("sample", job), done))
    except WorkerDied as error:
        number = missing[error.job]
        finished = builder.parts(TABLE, number).read()
        raise error.losing(jobs[error.job]["names"], finished, f"shard {number}") from error
    if kept := sum(result.get("kept", 0) for result in results):
        ctx.say("evaluate", f"{kept} completions of workers that ended early were kept")
    return [result["completions"] for result in results]


def _to_score(shard: Shard, completions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt.token_ids, "teacher_prompt": prompt.teacher_token_ids, "completion": completion["token_ids"]}
        for (prompt, _), completion in zip(shard.samples, completions, strict=True)
    ]


def _rows(
    shard: Shard, completions: Sequence[dict[str, Any]], config: EvaluateConfig, sums: Sequence[float | None] | None
) -> pa.Table:
    rows = []
    for number, ((prompt, index), completion) in enumerate(zip(shard.samples, completions, strict=True)):
        correct = None if shard.mode == "kl" else _judge(config, completion["text"], prompt.answer)
        rows.append(
            {
                "prompt_id": prompt.prompt_id,
                "mode": shard.mode,
                "sample_index": index,
                "prompt_token_ids": prompt.token_ids,
                "completion_token_ids": completion["token_ids"],
                "completion_text": completion["text"],
                "finish_reason": completion["finish_reason"],
                "verifier": None if config.verifier is None or correct is None else config.verifier.kind,
                "correct": correct,
                "reverse_kl_sum": None if sums is None else sums[number],
                "tokens": len(completion["token_ids"]),
            }
        )
    return pa.Table.from_pylist(rows, schema=schema_for(TABLE))


def _judge(config: EvaluateConfig, text: str, answer: str | None) -> bool | None:
    """The verdict; null without a verifier, or without the answer that it compares with (a function may do without)."""
    if config.verifier is None or (answer is None and not isinstance(config.verifier, FunctionVerifier)):
        return None
    return verify(config.verifier, text, answer)


def _meta(builder: Builder, shards: int) -> dict[str, Any]:
    """Over all shards, those of an earlier, interrupted attempt too."""
    columns = ["mode", "finish_reason", "correct", "reverse_kl_sum", "tokens"]
    table = pa.concat_tables([read_parquet(path, columns) for path in builder.finished(TABLE, shards)])
    by_mode = {mode: table.filter(pc.equal(table["mode"], mode)) for mode in MODES}
    shape = next((by_mode[mode] for mode in ("kl", "sampled", "greedy") if by_mode[mode].num_rows), table)
    kl = by_mode["kl"].filter(pc.is_valid(by_mode["kl"]["reverse_kl_sum"]))
    tokens = pc.sum(kl["tokens"]).as_py()
    return {
        "metrics": {
            "accuracy_greedy": _share(by_mode["greedy"]["correct"]),
            "accuracy_sampled": _share(by_mode["sampled"]["correct"]),
            "reverse_kl": pc.sum(kl["reverse_kl_sum"]).as_py() / tokens if tokens else None,
            "mean_length": pc.mean(shape["tokens"]).as_py(),
            "clipped_ratio": _share(pc.equal(shape["finish_reason"], "length")),
            "eval_tokens": pc.sum(table["tokens"]).as_py(),
        },
        "invalid_kl": by_mode["kl"].num_rows - kl.num_rows,
        "judged": table.num_rows - table["correct"].null_count,
    }


def _share(verdicts: pa.ChunkedArray) -> float | None:
    """The share of true among those that are not null."""
    share: float | None = pc.mean(verdicts.cast(pa.float64())).as_py()
    return share
