"""Completions that came with the prompts and that a run's rollouts take (`rollout.behaviour` with `completions: prompts`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from flows.experiment import Experiment
from tasks.behaviours.mixture import Mixture
from tasks.inputs.rounds import SPLIT, prompts_for_round
from tasks.inputs.tokenizers import load_tokenizer
from tasks.prepare import places

_SHOWN = 3
_LOOKED_AT = 10_000
"""Rounds whose prompts are looked at before the start; a run may be given any number of rounds."""
NOTHING: Mapping[str, str] = {}


def given_problems(e: Experiment, prompts: pa.Table, student: Path, rows: int) -> Iterator[str]:
    """What is wrong with the completions of the prompts that the run's rounds draw, with file and line. `prompts`: columns
    prompt_id, split, completion_token_ids; `rows`: ids that the student has."""
    train = prompts.filter(pc.equal(prompts["split"], SPLIT))
    given = dict(zip(train["prompt_id"].to_pylist(), train["completion_token_ids"].to_pylist(), strict=True))
    drawn: dict[str, None] = {}
    whole = 0
    for number in range(1, min(e.policy.rounds, _LOOKED_AT) + 1):
        if len(drawn) == len(given) > 0:
            break
        now = e.at(number)
        if "completions" not in now.rollout.behaviour.reads:
            continue
        drawn |= dict.fromkeys(prompts_for_round(list(given), now.seed, number, now.rollout.prompts_per_round))
        if isinstance(now.rollout.behaviour, Mixture):
            whole = now.rollout.max_completion_length
    if not drawn:
        return
    end = [load_tokenizer(student).eos_token_id] if e.prompts.append_eos else []
    without = [name for name in drawn if given[name] is None]
    empty = [name for name in drawn if given[name] is not None and given[name] in ([], end)]
    foreign = {name: max(given[name]) for name in drawn if given[name] and max(given[name]) >= rows}
    long = {name: len(given[name]) for name in drawn if whole and given[name] and len(given[name]) > whole}
    if not any((without, empty, foreign, long)):
        return
    lines = dict(places(e.prompts, SPLIT, student))
    what = f"rollout.behaviour: {e.rollout.behaviour.kind!r} takes the completions of prompts.train, but"
    if without:
        yield (
            f"{what} {_count(without, len(drawn))} have none ({_at(without, lines)}); give each row a `completion`"
            " (prompts.train.columns: {completion: NAME} names another column), or take completions: teacher"
        )
    if empty:
        yield f"{what} {_count(empty, len(drawn))} have an empty one ({_at(empty, lines)}); remove these rows"
    if foreign:
        ids = {name: f": id {index}" for name, index in foreign.items()}
        yield (
            f"{what} {_count(foreign, len(drawn))} have one with ids that the student lacks ({_at(foreign, lines, ids)});"
            f" {student} has {rows} rows; remove such tokens from the text, or the rows"
        )
    if long:
        sizes = {name: f": {count} tokens" for name, count in long.items()}
        yield (
            f"{what} {_count(long, len(drawn))} have a longer one than rollout.max_completion_length, {whole}"
            f" ({_at(long, lines, sizes)}); set it to {max(long.values())}, or shorten or remove these rows"
        )


def _count(names: Collection[str], total: int) -> str:
    return f"{len(names):,} of {total:,} prompts that rounds draw"


def _at(names: Collection[str], lines: Mapping[str, str], found: Mapping[str, str] = NOTHING) -> str:
    """The first of these prompts, with what was found there."""
    shown = [f"{lines.get(name, name)}{found.get(name, '')}" for name in [*names][:_SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > _SHOWN else "")
