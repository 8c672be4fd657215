"""Whether models, prompts and lengths fit each other."""

from __future__ import annotations

import pyarrow.compute as pc

from flows.cross_checks import NO_TEACHER_PASS, NOT_JUDGED, needs_judge, reads_entropy, size_problems
from flows.run.checked import Finding, Found, Known, list_lengths, prompt_lengths, read_by, token_ids
from flows.run.further_set import check_rows
from flows.run.given import given_problems
from storage.errors import ConfigError, InputError
from tasks.engines.hf_folder import (
    check_stop_ids,
    positions,
    stop_token_ids,
)
from tasks.evaluate import rank_of
from tasks.inputs.contexts import named_in
from tasks.inputs.judging import JudgeFunction, name_of
from tasks.inputs.rounds import prompts_for_round
from tasks.inputs.tokenizers import load_tokenizer

CHARACTERS = 3
"""Of a token of English text, rather too few."""


def sizes(known: Known) -> Found:
    """Lengths and list sizes of the config against the models."""
    rows = [teacher.rows for teacher in known.teachers]
    for text in size_problems(known.experiment, known.student.rows, positions(known.student.config), *rows):
        yield Finding(text, refused=True)


def evaluation_sets(known: Known) -> Found:
    """Whether what a named evaluation set compares with is there."""
    for name, one in known.experiment.evaluate.sets.items():
        try:
            check_rows(one, f"evaluate.sets.{name}.prompts")
        except (ConfigError, InputError) as error:
            yield Finding(str(error), refused=True)


def warm_ups(known: Known) -> Found:
    """Warm-ups of models that are trained already: `base:` brings those of the demo's recipes along."""
    for model in (known.student, *known.teachers):
        if model.warmup is not None and model.pretrained:
            rows = known.read_by(model, "warmup").num_rows
            yield Finding(
                f"{model.side}.warmup: this checkpoint is trained for up to {model.warmup.steps:,} steps on {rows:,} rows of"
                f" prompts.warmup before round 1; {model.side}.warmup: null leaves that out"
            )


def prompts_of_each(known: Known) -> Found:
    """Teachers that no prompt names: they would be loaded for nothing, and those with a warm-up have nothing to learn."""
    for teacher in known.teachers:
        if teacher.warmup is not None and known.read_by(teacher, "warmup").num_rows == 0:
            yield Finding(
                f"{teacher.side}.warmup: no prompt of warmup has the teacher_id {teacher.teacher!r}, or none, so there is nothing"
                " to learn; add such rows, or remove the warm-up",
                refused=True,
            )
        if teacher.teacher is not None and known.read_by(teacher, "train").num_rows == 0:
            yield Finding(f"{teacher.side}: no prompt of train has the teacher_id {teacher.teacher!r}")


def stop_ids(known: Known) -> Found:
    """The ids that end a completion, in both sections that sample."""
    e, path = known.experiment, known.student.path
    eos = load_tokenizer(path).eos_token_id
    for section, policy in (("rollout", e.rollout.stop_token_ids), ("evaluate", e.evaluate.stop_token_ids)):
        try:
            check_stop_ids(stop_token_ids(path, policy, eos), known.student.rows, path, section)
        except InputError as error:
            yield Finding(str(error), refused=True)
    if inner := sorted(set(known.merged) & set(e.objective.needs().credit.segment_ends)):
        yield Finding(
            f"objective.advantage: {inner} end segments inside of completions and are among the merged stop ids"
            f" {list(known.merged)}; take other delimiters, or prompts.tokenizers.stop_ids: mask",
            refused=True,
        )
    if gone := sorted(set(known.merged[1:]) & set(getattr(e.objective, "support_exclude_ids", ()))):
        yield Finding(
            f"objective.support_exclude_ids: {gone} are merged with the stop id {known.merged[0]}, so no list has them; remove"
            " them, or set prompts.tokenizers.stop_ids: mask",
            refused=True,
        )


def lengths(known: Known) -> Found:
    """Prompts with their completions against the positions of the models."""
    e = known.experiment
    for model in known.models:
        limit = positions(model.config)
        if limit is None:
            continue
        for section, split, room in (
            ("rollout", "train", e.rollout.max_completion_length),
            ("evaluate", "eval", e.evaluate.max_completion_length),
        ):
            # the last token of a completion is sampled, and read by no model
            last = 0 if model.side == "student" else 1
            every, rows = known.of_split(split), known.read_by(model, split)
            long = rows.filter(pc.greater(prompt_lengths(rows, model.side), limit - room + last))
            if drawn := _drawn(known, split, every["prompt_id"].to_pylist(), set(long["prompt_id"].to_pylist())):
                yield Finding(
                    f"{section}.max_completion_length: {len(drawn)} prompts of {split} (first: {drawn[0]}) with {room} tokens of"
                    f" completion are longer than the {limit} positions of the {model.side}; lower it, or leave such prompts out"
                    f" (prompts.{'max_teacher_prompt_length' if last else 'max_prompt_length'}: {limit - room + last})",
                    refused=True,
                )
        if model.warmup is not None:
            rows = known.read_by(model, "warmup")
            whole = pc.add(prompt_lengths(rows, "student"), list_lengths(rows["completion_token_ids"]))
            if count := pc.sum(pc.greater(whole, limit)).as_py():
                yield Finding(
                    f"{model.side}.warmup: {count} prompts with their completions are longer than the {limit} positions of the"
                    " model; shorten or remove these rows",
                    refused=True,
                )


def ids_within_rows(known: Known) -> Found:
    """Token ids of prompts that a model has no row for: its tokenizer may have more ids than it has rows."""
    for model in known.models:
        rows = read_by(model, known.prompts)
        columns = {"prompt": token_ids(rows, model.side)}
        if model.warmup is not None:
            columns["completion"] = rows["completion_token_ids"]
        for what, lists in columns.items():
            flat = pc.list_flatten(lists)
            beyond = pc.greater_equal(flat, model.rows)
            if pc.any(beyond).as_py():
                at = pc.index(beyond, True).as_py()
                prompt = rows["prompt_id"][pc.list_parent_indices(lists)[at].as_py()]
                yield Finding(
                    f"{model.side}: {what} {prompt} of split"
                    f" {rows['split'][pc.list_parent_indices(lists)[at].as_py()]} has the token id {flat[at]}, but"
                    f" {model.path} has {model.rows} rows; remove the token from the text, or the row",
                    refused=True,
                )


def given_completions(known: Known) -> Found:
    """Completions of the prompts that rollouts take as they are."""
    for text in given_problems(known.experiment, known.prompts, known.student.path, known.student.rows):
        yield Finding(text, refused=True)


def self_teacher(known: Known) -> Found:
    """A teacher that is the student and reads the same prompts, or that no loss reads."""
    source, rows = known.experiment.self_teacher, known.of_split("train")
    objective = known.experiment.objective
    if objective.estimator == "credit" and not objective.distils:
        if objective.reference is None or objective.reference.to != "teacher":
            scored = known.experiment.supervise.teacher.asked
            yield Finding(
                "teacher: this objective trains on rewards alone; the teacher is scored for metrics, and is in no loss;"
                " supervise.teacher: none leaves its pass out"
                if scored
                else NO_TEACHER_PASS
            )
        return
    if known.experiment.sample_contexts:  # it reads more of the samples that have one
        return
    if source is not None and rows["teacher_token_ids"].null_count == rows.num_rows:
        yield Finding(
            f"teacher: it is the student itself ({source.kind}) and reads what the student reads, so there is nothing to distil;"
            " give it more with teacher.context",
            refused=objective.needs().pairs,
        )


def entropies(known: Known) -> Found:
    """Entropies of a list, where the objective's are defined over the vocabulary."""
    objective, backend = known.experiment.objective, known.experiment.supervise.teacher
    if backend.capabilities.entropy != "list" or not reads_entropy(objective):
        return
    k = backend.entropy_candidates
    yield Finding(
        "objective: it reads the teacher's entropy, which its paper means over the whole vocabulary, but supervise.teacher kind"
        f" {backend.kind} gives that of {'its list' if k is None else f'its {k} likeliest tokens'} with the rest as one category,"
        " at most the exact one; kind: local gives it exactly, a larger entropy_k comes closer"
    )


def answers(known: Known) -> Found:
    """Answers of the training prompts, for verifiers that compare with them; and a judge that nothing asks."""
    judge = known.experiment.judge
    if judge is None:
        return
    if not needs_judge(known.experiment):
        yield Finding(NOT_JUDGED)
        return
    rows = known.of_split("train")
    without = rows.filter(pc.is_null(rows["answer"]))["prompt_id"]
    compare = [name_of(verifier) for verifier in judge.verifiers if not isinstance(verifier, JudgeFunction)]
    if len(without) and compare:
        yield Finding(
            f"judge.verifiers: {' and '.join(compare)} compare{'s' * (len(compare) == 1)} completions with an answer, but"
            f" {len(without):,} of {rows.num_rows:,} prompts of train have none (the first has the id {without[0].as_py()!r});"
            " add answers (prompts.train.columns), remove these prompts, or judge with a function of yours",
            refused=True,
        )


def sample_contexts(known: Known) -> Found:
    """What the teacher has room for beside prompt and completion, where samples have contexts of their own; and what the
    evaluation compares with then."""
    e = known.experiment
    if not e.sample_contexts:
        return
    longest, limits = e.prompts.max_teacher_prompt_length, []
    for teacher in known.teachers:
        prompt = pc.max(prompt_lengths(known.of_split("train"), teacher.side)).as_py() or 0
        limit = positions(teacher.config)
        limits += [] if limit is None else [limit - 1 - e.rollout.max_completion_length - prompt]
        limits += [] if longest is None else [longest - prompt]
    if limits and (room := min(limits)) < e.rollout.max_completion_length:
        yield Finding(
            f"teacher.context: beside the longest prompt of train and a completion of {e.rollout.max_completion_length} tokens"
            f" the teacher has room for {max(0, room)} tokens (its positions, and prompts.max_teacher_prompt_length); where a"
            " context is longer the next one is taken, or none, and both are counted"
        )
    longest_feedback = 0
    if e.judge is not None and "feedback" in named_in(e.sample_contexts):
        longest_feedback = e.judge.max_feedback or 0
    if limits and longest_feedback > CHARACTERS * max(0, min(limits)):
        yield Finding(
            f"judge.max_feedback: {longest_feedback:,} characters are more than the {max(0, min(limits)):,} tokens hold that the"
            " teacher has room for; a context that does not fit is left out whole and counted, so lower it"
        )
    if e.evaluate.generations("kl"):
        yield Finding(
            "evaluate.kl_prompts: held-out prompts have no siblings and no feedback, so the KL is to the teacher without a"
            " context; evaluate.kl_prompts: 0 leaves it out"
        )


def _drawn(known: Known, split: str, every: list[str], long: set[str]) -> list[str]:
    """Those of the prompts `long` that the run reads: training prompts that its rounds draw, held-out ones that it evaluates."""
    e = known.experiment
    if not long:
        return []
    if split == "eval":
        return [
            name for name in sorted(every, key=lambda name: rank_of(name, e.seed))[: e.evaluate.prompts] if name in long
        ]
    found: dict[str, None] = {}
    for round in range(1, e.policy.rounds + 1):
        for name in prompts_for_round(every, e.seed, round, e.rollout.prompts_per_round):
            if name in long:
                found[name] = None
    return list(found)
