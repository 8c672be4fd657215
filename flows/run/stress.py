"""`opd evaluate NAME --stress`: how often a run's verifiers change their verdict where only the form of a completion changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from flows.experiment import as_stored, experiment_of, overridden
from flows.run.further_set import parse_verifier
from storage.errors import InputError
from storage.query.catalog import Catalog
from storage.query.figures import Figure, figure, sums
from storage.runs import Run
from storage.store import Store
from tasks.engines.verifier_process import NoVerdict, VerifierProcess
from tasks.inputs.judging import AnyVerifier, JudgeConfig, JudgeExactMatch, JudgeFunction, JudgeMathVerify, name_of
from tasks.inputs.transformations import TRANSFORMATIONS
from tasks.judge import sources_of

SAMPLES = 200
"""Completions that each verifier is asked about, where no number is given."""
AGAIN = "again"
"""The same text a second time: what a verifier changes here it changes by itself."""
_KINDS: dict[str, type[AnyVerifier]] = {
    "exact_match": JudgeExactMatch, "math_verify": JudgeMathVerify, "function": JudgeFunction,
}  # fmt: skip
_SECONDS = 600
"""Limit of the query for completions."""
_TOKENS = ("token_ids", "tokens")


@dataclass(frozen=True)
class Stressed:
    """One verifier under one transformation. Shares and differences are over the completions that have both verdicts; `_se` are
    standard errors clustered by prompt, null for a single prompt; null values: no completion."""

    verifier: str
    completions: str
    """held-out, or rollouts"""
    transformation: str
    n: int
    prompts: int
    unchanged: int
    """completions that the transformation leaves as they are: it does not apply, or might change what is said"""
    no_verdict: int
    """completions of which one of the two verdicts is missing: the verifier failed"""
    reward: float | None
    """mean reward before the change; of verdicts the share that is right"""
    changed: float | None
    changed_se: float | None
    higher: float | None
    """share whose reward rose; of a verdict, from wrong to right"""
    lower: float | None
    reward_change: float | None
    """mean of the reward after minus before"""
    reward_change_se: float | None


@dataclass(frozen=True)
class Stress:
    """What `stress` found in a round. `notes`: what was left out, and why."""

    run: str
    round: int
    rows: tuple[Stressed, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"run": self.run, "round": self.round, "rows": [asdict(row) for row in self.rows], "notes": self.notes}


@dataclass(frozen=True)
class _Asked:
    """Verifiers, and the SELECT of the completions that they are asked about."""

    name: str
    config: JudgeConfig
    completions: str


_HELD_OUT = """
SELECT prompt_id || '/' || mode || '/' || sample_index AS sample_id, prompt_id, completion_text AS completion,
  prompts.answer, prompts.text AS prompt, tokens AS length
FROM evaluations JOIN prompts USING (run, prompt_id)
WHERE round = {round} AND mode <> 'kl' AND split = 'eval'
"""
_ROLLOUTS = """
SELECT sample_id, prompt_id, completion_text AS completion, prompts.answer, prompts.text AS prompt,
  len(rollouts.completion_token_ids) AS length
FROM rollouts JOIN prompts USING (run, prompt_id)
WHERE round = {round} AND split = 'train'
"""
_CHOSEN = "SELECT *, count(*) OVER () AS completions FROM ({}) ORDER BY sha256(sample_id) LIMIT {}"


def stress(run: Run, round: int, store: Store, verifier: str | None = None, limit: int | None = None) -> Stress:
    """Asks the run's verifier of evaluations about the round's held-out completions, and those of its judge about its rollouts:
    about the text, about the same text again, and about every transformation of it (`tasks.inputs.transformations`).

    `verifier`: KIND[:ARG], another one, which is asked about both. At most `limit` completions (`SAMPLES`) of each kind, those
    whose ids have the smallest sha256. Nothing is stored. Raises InputError where there is no verifier or no completion for it,
    ConfigError for a verifier that is not valid or a function that is not found, Evicted for rollouts that `opd gc` removed."""
    wanted = list(_wanted(run, verifier))
    if not wanted:
        raise InputError(
            f"run {run.name!r} has no verifier to test: evaluate.verifier is null, and there is no judge; name one with"
            " --verifier"
        )
    rows: list[Stressed] = []
    notes: list[str] = []
    for asked in wanted:
        select = _CHOSEN.format(asked.completions.format(round=round), limit or SAMPLES)
        samples = Catalog(store, run).query(select, limit_seconds=_SECONDS).to_pylist()
        if not samples:
            notes.append(f"{', '.join(asked.config.names)}: round {round} has no {asked.name} completions")
            continue
        if len(samples) < samples[0]["completions"]:
            notes.append(
                f"{asked.name}: {len(samples):,} of {samples[0]['completions']:,} completions, those whose ids have the smallest"
                " sha256"
            )
        found, left_out = _asked(asked, samples)
        rows += found
        notes += left_out
    if not rows:
        raise InputError(f"run {run.name!r}: nothing to test: {'; '.join(notes)}")
    return Stress(run.name, round, tuple(rows), tuple(notes))


def _wanted(run: Run, verifier: str | None) -> Iterator[_Asked]:
    """The verifier of evaluations, and those of the judge; or the one that is named, for both."""
    data = as_stored(run.experiment)
    if verifier is not None:
        given = json.dumps(parse_verifier(verifier))
        data = overridden(
            data, ["evaluate.verifier=null", f"evaluate.verifier={given}"]
        )  # no field of the run's own stays
    experiment = experiment_of(data, f"run {run.name}" if verifier is None else f"--verifier {verifier}")
    judge, own = experiment.judge, experiment.evaluate.verifier
    if own is not None:
        one = _KINDS[own.kind].model_validate(own.model_dump())
        single = JudgeConfig.model_validate(
            {"verifiers": (one,)} | ({} if judge is None else {"timeout": judge.timeout})
        )
        yield _Asked("held-out", single, _HELD_OUT)
        if verifier is not None:
            yield _Asked("rollouts", single, _ROLLOUTS)
    if judge is not None and verifier is None:
        yield _Asked("rollouts", judge, _ROLLOUTS)


def _asked(asked: _Asked, samples: Sequence[Mapping[str, Any]]) -> tuple[list[Stressed], list[str]]:
    """The rows of every verifier, and which are left out."""
    process, rows, left_out = VerifierProcess(asked.config, sources_of(asked.config)), [], []
    try:
        for place, (verifier, given) in enumerate(zip(asked.config.verifiers, process.given(), strict=True)):
            name = name_of(verifier)
            if tokens := [part for part in given if part in _TOKENS]:
                left_out.append(f"{name}: left out, it reads {' and '.join(tokens)}, and a changed text has no tokens")
                continue
            verdict = partial(_verdict, process, place, given)
            before = [verdict(sample, sample["completion"]) for sample in samples]
            for how, change in ({AGAIN: str} | TRANSFORMATIONS).items():
                texts = [change(sample["completion"]) for sample in samples]
                after = [None if text is None else verdict(of, text) for of, text in zip(samples, texts, strict=True)]
                applies = [text is not None for text in texts]
                rows.append(_row((name, asked.name, how), samples, applies, before, after))
    finally:
        process.close()
    return rows, left_out


def _verdict(
    process: VerifierProcess, place: int, given: Sequence[str], sample: Mapping[str, Any], text: str
) -> float | None:
    """The reward of a text in the place of the sample's; None where the verifier gives none. Places of segments and spans count
    for nothing here: any number of tokens that the text can have is accepted."""
    length = max(sample["length"], len(text.encode()) + 1)
    question = {"answer": sample["answer"], "prompt": sample["prompt"], "completion": text, "length": length}
    try:
        return process.ask(place, {name: question[name] for name in ("completion", "answer", "length", *given)}).reward
    except NoVerdict:
        return None


def _row(
    names: tuple[str, str, str],
    samples: Sequence[Mapping[str, Any]],
    applies: Sequence[bool],
    before: Sequence[float | None],
    after: Sequence[float | None],
) -> Stressed:
    told = [
        (sample["prompt_id"], old, new)
        for sample, old, new in zip(samples, before, after, strict=True)
        if old is not None and new is not None
    ]
    prompts = pa.chunked_array([pa.array([prompt for prompt, _, _ in told], pa.string())])
    first = np.array([old for _, old, _ in told], float)
    change = np.array([new for _, _, new in told], float) - first

    def of(values: np.ndarray) -> Figure:
        return figure([sums(prompts, pa.chunked_array([pa.array(values, pa.float64())]))])

    moved, changed = of(change), of(change != 0)
    return Stressed(
        *names,
        n=len(told),
        prompts=moved.prompts,
        unchanged=len(samples) - sum(applies),
        no_verdict=sum(applies) - len(told),
        reward=of(first).value,
        changed=changed.value,
        changed_se=changed.se,
        higher=of(change > 0).value,
        lower=of(change < 0).value,
        reward_change=moved.value,
        reward_change_se=moved.se,
    )
