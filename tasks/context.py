"""Context: what the teacher reads before each completion of a round, where samples have contexts of their own: a correct sibling,
the judge's feedback, or the first of several templates that a sample has everything for.

No model runs. Texts are rendered and tokenised as `prepare` does it, shard beside shard of the rollouts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.artifacts.shards import read_parquet
from storage.errors import ConfigError, InputError
from storage.identity import Identity, canonical_json
from storage.schemas import schema_for
from storage.store import Artifact, ArtifactSpec, Builder, Store
from tasks.inputs.contexts import (
    DEFAULT_THRESHOLD,
    JUDGED,
    OF_ROUNDS,
    SiblingConfig,
    lacking,
    named_in,
    teacher_prompt,
    without_thinking,
)
from tasks.inputs.prompts import PrepareConfig
from tasks.inputs.rows import PRIVILEGED, Row
from tasks.inputs.siblings import Candidate, Correct, Verdicts, candidates, siblings_of, source_of
from tasks.stage import LOADING, Context, Judged, Prompts, Rollouts, Student, Teacher, Work

if TYPE_CHECKING:
    from tasks.inputs.rendering import Renderer

VERSION = 1
STAGE = "context"
TABLE = "contexts"
COLUMNS = "context_columns"
"""Table and content of `prepare`."""
COMPARED = frozenset(("sibling", "verdict"))
"""Columns that depend on which completions are correct."""
TOO_LONG = "too long"
_RENDERING = (
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "add_special_tokens",
    "date",
    "max_teacher_prompt_length",
)
"""The fields of `prompts` that decide the tokens of a text, and how many there may be."""


class _ContextIdentity(Identity):
    templates: tuple[str, ...]
    sibling: SiblingConfig | None
    success_threshold: float | None
    seed: int | None
    rendering: dict[str, Any]


def context_work(
    templates: Sequence[str],
    sibling: SiblingConfig,
    prepare: PrepareConfig,
    rollouts: Rollouts,
    student: Student,
    teacher: Teacher,
    prompts: Prompts,
    judged: Judged | None,
    seed: int,
    success_threshold: float | None = None,
) -> Work:
    """The contexts of one round's samples. `templates`: a sample gets the first one that it has every column for and that fits
    the teacher: prompt, completion and one token within its positions, and `prepare.max_teacher_prompt_length`. `judged`: rewards
    and feedback of the rollouts; read where a template names a column of `contexts.JUDGED`. `success_threshold`: reward from
    which a completion is correct; None: 0.5, for rewards that are 0 or 1.

    Output "context": table contexts, with the shards of the rollouts. Meta: metrics (samples, how many have a context from each
    source, none, and too_long of those). The key holds what templates name: `sibling` only with {sibling}, the threshold with
    {sibling} or {verdict}, the seed only where siblings are drawn. Raises ConfigError where the rewards are needed and not given;
    when built, InputError for rewards other than 0 and 1 without a threshold."""
    named = named_in(templates)
    if named & JUDGED and judged is None:
        raise ConfigError(
            f"teacher.context: {_braced(named & JUDGED)} come from the judge, but this stage was given no rewards; set `judge`"
        )
    drawn = "sibling" in named and sibling.rule == "draw"
    chosen = prepare.model_dump(mode="json")
    identity = _ContextIdentity(
        templates=tuple(templates),
        sibling=sibling if "sibling" in named else None,
        success_threshold=success_threshold if named & COMPARED else None,
        seed=seed if drawn else None,
        rendering={name: chosen[name] for name in _RENDERING},
    )
    content = prompts.content
    inputs = {
        "rollouts": rollouts.content["rollouts"],
        "prompts": content[COLUMNS],
        "audit": content["audit"],
        "tokenizer": student.content["tokenizer"],
        "teacher:tokenizer": teacher.content["tokenizer"],
        "teacher:architecture": teacher.content["architecture"],
    }
    if named & JUDGED and judged is not None:
        inputs["rewards"] = judged.content["rewards"]
    if LOADING in content:
        inputs[LOADING] = content[LOADING]
    spec = ArtifactSpec.of(STAGE, VERSION, identity, inputs)
    asked = _Asked(
        tuple(templates), sibling, prepare, rollouts, student, teacher, prompts, judged, seed, success_threshold
    )

    def build(builders: dict[str, Builder], ctx: Context) -> None:
        _build(builders[STAGE], ctx, asked)

    return Work(STAGE, {STAGE: spec}, build)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `context_work`."""

    templates: tuple[str, ...]
    sibling: SiblingConfig
    prepare: PrepareConfig
    rollouts: Artifact
    student: Artifact
    teacher: Artifact
    prompts: Artifact
    judged: Artifact | None
    seed: int
    success_threshold: float | None


@dataclass
class _Sample:
    """One sample whose context is being looked for."""

    sample_id: str
    row: Row
    tokens: int
    candidates: Iterator[Candidate]
    reasons: list[str] = field(default_factory=list)
    taken: Candidate | None = None
    ids: list[int] | None = None

    def result(self) -> dict[str, Any]:
        """Its row of the table."""
        taken = self.taken
        return {
            "sample_id": self.sample_id,
            "prompt_token_ids": self.ids,
            "sibling_id": None if taken is None else taken.sibling_id,
            "source": "none" if taken is None else source_of(taken.template),
            "reason": ", ".join(dict.fromkeys(self.reasons)) if taken is None else None,
        }


def _build(builder: Builder, ctx: Context, asked: _Asked) -> None:
    sizes = [record.rows for record in ctx.store.shards(asked.rollouts, "rollouts")]
    missing = builder.missing(TABLE, len(sizes))
    total, done = sum(sizes), sum(size for shard, size in enumerate(sizes) if shard not in missing)
    if missing and done:
        ctx.say(STAGE, f"{done} of {total} samples are there already")
    ctx.progress(done, total, "samples")
    if missing:
        maker = _Maker(ctx.store, asked)
        for shard in missing:
            builder.write_shard(TABLE, shard, maker.shard(shard))
            done += sizes[shard]
            ctx.progress(done, total, "samples")
    meta = {}
    if not builder.repairing:
        meta = {"metrics": _metrics(builder, len(sizes), asked.templates)}
        metrics = meta["metrics"]
        if metrics["none"] == metrics["samples"]:
            ctx.say(STAGE, "warning: no sample of this round has a context, so that its teacher has nothing to say")
        elif metrics["too_long"]:
            ctx.say(STAGE, f"{metrics['too_long']:,} samples have none, because what there is does not fit the teacher")
    builder.commit(meta=meta, tables={TABLE: len(sizes)})


def _metrics(builder: Builder, shards: int, templates: Sequence[str]) -> dict[str, int]:
    """Over all shards, those of an earlier attempt too."""
    columns = ["source", "reason"]
    rows = pa.concat_tables([read_parquet(path, columns) for path in builder.finished(TABLE, shards)])
    counts = Counter(rows["source"].to_pylist())
    reasons = [reason for reason in rows["reason"].to_pylist() if reason is not None]
    return {
        "samples": rows.num_rows,
        **{source: counts[source] for source in dict.fromkeys(map(source_of, templates))},
        "none": counts["none"],
        "too_long": sum(TOO_LONG in reason.split(", ") for reason in reasons),
    }


class _Maker:
    """Makes the rows of a shard. Holds the verdicts of the round and its correct completions."""

    def __init__(self, store: Store, asked: _Asked) -> None:
        from tasks.engines.hf_folder import positions, read_config

        self._store, self._asked = store, asked
        self._renderer, _ = _renderer(store, asked.prepare, asked.student, asked.teacher, asked.prompts)
        self._positions = positions(read_config(store.materialize(asked.teacher)))
        self._rows = _prompts(store, asked.prompts)
        named = named_in(asked.templates)
        self._verdicts = Verdicts({}, {})
        if asked.judged is not None and named & JUDGED:
            self._verdicts = _verdicts(store, asked.judged, asked.success_threshold, bool(named & COMPARED))
        self._readers = store.shard_readers(asked.rollouts, "rollouts")
        self._groups = self._correct() if "sibling" in named else {}

    def shard(self, number: int) -> pa.Table:
        """Rows of `contexts`, in the order of the rollouts."""
        rows = self._readers[number](["sample_id", "prompt_id", "completion_text", "completion_token_ids"])
        lengths = pc.list_value_length(rows["completion_token_ids"]).to_pylist()
        columns = (rows[name].to_pylist() for name in ("sample_id", "prompt_id", "completion_text"))
        samples = [self._sample(*values) for values in zip(*columns, lengths, strict=True)]
        self._fill(samples)
        return pa.Table.from_pylist([sample.result() for sample in samples], schema=schema_for(TABLE))

    def _sample(self, sample_id: str, prompt_id: str, text: str, tokens: int) -> _Sample:
        asked, row = self._asked, self._rows[prompt_id]
        others = siblings_of(sample_id, text, self._groups.get(prompt_id, ()), asked.sibling, asked.seed)
        sample = _Sample(sample_id, row, tokens, iter(()))
        own = self._verdicts.of(sample_id)
        sample.candidates = candidates(row, asked.templates, own, others, sample.reasons)
        return sample

    def _fill(self, samples: Sequence[_Sample]) -> None:
        """Give each sample its first candidate that fits; the next ones of all samples are tokenised together."""
        open = list(samples)
        while open:
            tried = [(sample, found) for sample in open if (found := next(sample.candidates, None)) is not None]
            prompts = [teacher_prompt(sample.row, found.template, found.found) for sample, found in tried]
            names = [canonical_json(prompt) for prompt in prompts]
            distinct = {
                name: Row(f"rollouts, sample {sample.sample_id!r}", sample.row.prompt, teacher_prompt=prompt)
                for (sample, _), name, prompt in zip(tried, names, prompts, strict=True)
            }
            ids = dict(zip(distinct, self._renderer.contexts(list(distinct.values())), strict=True))
            open = []
            for (sample, found), name in zip(tried, names, strict=True):
                if self._fits(len(ids[name]), sample.tokens):
                    sample.taken, sample.ids = found, ids[name]
                else:
                    sample.reasons.append(TOO_LONG)
                    open.append(sample)

    def _fits(self, prompt: int, completion: int) -> bool:
        """Whether every backend can read it: an engine generates one token to answer."""
        longest = self._asked.prepare.max_teacher_prompt_length
        if longest is not None and prompt > longest:
            return False
        return self._positions is None or prompt + completion + 1 <= self._positions

    def _correct(self) -> dict[str, list[Correct]]:
        """By prompt_id its correct completions of the round that have something to show."""
        found: dict[str, list[Correct]] = {}
        columns = ("sample_id", "sample_index", "completion_text", "prompt_id")
        for read in self._readers:
            rows = read([*columns])
            for sample_id, index, text, prompt_id in zip(*(rows[n].to_pylist() for n in columns), strict=True):
                if not self._verdicts.correct(sample_id):
                    continue
                shown = without_thinking(text) if self._asked.sibling.strip_thinking else text
                if shown.strip():
                    found.setdefault(prompt_id, []).append(Correct(sample_id, index, text, shown))
        return found


def _renderer(
    store: Store, prepare: PrepareConfig, student: Artifact, teacher: Artifact, prompts: Artifact
) -> tuple[Renderer, Any]:
    """What renders and tokenises for the teacher as `prepare` does, and the teacher's tokenizer."""
    from tasks.inputs.rendering import Reader, Renderer
    from tasks.inputs.shipped import load_tokenizer
    from tasks.inputs.tokenizers import TokenizerAudit

    own = load_tokenizer(store.materialize(student))
    one = student.content["tokenizer"] == teacher.content["tokenizer"]
    its = own if one else load_tokenizer(store.materialize(teacher))
    audit = TokenizerAudit.model_validate(prompts.meta["audit"])
    return Renderer(prepare, own, {None: Reader(its, audit)}), its


def examples(
    templates: Sequence[str],
    prepare: PrepareConfig,
    student: Artifact,
    teacher: Artifact,
    prompts: Artifact,
    store: Store,
) -> Iterator[str]:
    """For each template what the teacher reads of the first prompt that has its columns, special tokens included; the columns of
    the round are shown by their names."""
    renderer, tokenizer = _renderer(store, prepare, student, teacher, prompts)
    shown = {name: f"{{{name}}}" for name in OF_ROUNDS}
    rows = _prompts(store, prompts).values()
    for template in templates:
        row = next((row for row in rows if not lacking(row, template, shown)), None)
        if row is not None:
            read = Row(row.where, row.prompt, teacher_prompt=teacher_prompt(row, template, shown))
            [ids] = renderer.contexts([read])
            yield tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _prompts(store: Store, prompts: Artifact) -> dict[str, Row]:
    """By prompt_id what templates can name of it."""
    table = store.read_table(prompts, COLUMNS).to_pylist()
    return {
        row["prompt_id"]: Row(
            f"prompt {row['prompt_id']!r}",
            json.loads(row["prompt"]),
            **{name: row[name] for name in ("answer", *PRIVILEGED)},
        )
        for row in table
    }


def _verdicts(store: Store, judged: Artifact, threshold: float | None, compared: bool) -> Verdicts:
    """The judge's rows of a round. `compared`: whether a template asks what is correct. InputError for rewards that are not 0
    or 1 where no threshold says which of them are correct."""
    table = store.read_table(judged, "rewards", columns=["sample_id", "reward", "feedback"])
    names = table["sample_id"].to_pylist()
    rewards = {name: value for name, value in zip(names, table["reward"].to_pylist(), strict=True) if value is not None}
    feedback = {name: text for name, text in zip(names, table["feedback"].to_pylist(), strict=True) if text is not None}
    if compared and threshold is None:
        other = next((name for name, value in rewards.items() if value not in (0, 1)), None)
        if other is not None:
            raise InputError(
                f"judge.success_threshold: missing, but sample {other!r} has the reward {rewards[other]:g}; for rewards other"
                " than 0 and 1 it says from which reward a completion is correct, and can be a {sibling}"
            )
    return Verdicts(rewards, feedback, DEFAULT_THRESHOLD if threshold is None else threshold)


def _braced(names: set[str] | frozenset[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names))
