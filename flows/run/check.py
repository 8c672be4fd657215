"""`opd check`: all checks of an experiment that need no engine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flows.cross_checks import dtype_warning, needs_judge
from flows.distill import inputs
from flows.experiment import Experiment, with_plugins
from flows.run.checked import Known
from flows.run.dates import with_date
from flows.run.executor import Maker
from flows.run.further_set import check_rows
from flows.run.preflight import findings, require
from flows.run.progress import SilentReporter
from flows.run.runner import bytes_of_run, bytes_per_round
from storage.errors import RELATIVE, ConfigError, InputError, OpdError
from storage.runs import Run
from storage.store import Artifact, Store
from storage.text import counted, size_text
from tasks.context import examples
from tasks.engines.verifier_process import NoVerdict, VerifierProcess, reason_of
from tasks.evaluate import Prompt, plan_shards
from tasks.inputs.contexts import DEFAULT_THRESHOLD
from tasks.inputs.judging import JudgeConfig, Outcome, Unusable, name_of, summed
from tasks.inputs.models import CheckpointModel, ModelSource, model_work, parameter_count
from tasks.inputs.sources import FileSource
from tasks.inputs.tokenizers import load_tokenizer
from tasks.inputs.verifiers import FunctionVerifier, function_place, verify
from tasks.judge import sources_of
from tasks.losses.token_credit.told import sentence
from tasks.plugins import source_place
from tasks.prepare import audited, require_audit
from tasks.routing import teacher_field
from tasks.stage import Context, same_models
from tasks.workers.cluster import require as require_cluster
from tasks.workers.metrics import StageProgress
from tasks.workers.pool import WorkerPool

EXAMPLE_CHARACTERS = 600
"""How much of a rendered prompt is shown."""


def check_experiment(experiment: Experiment, root: str | Path) -> Iterator[str]:
    """Read both models' configs and tokenizers and all prompts into a scratch store; yield report lines.

    Raises ConfigError or InputError for the first problem."""
    experiment.runtime.tell_libraries()
    mixed = dtype_warning(experiment)
    given, experiment = experiment, with_date(with_plugins(experiment), "", root)
    yield "config: valid"
    if mixed:
        yield f"warning: {mixed}"
    try:
        experiment.runtime.require_gpus()
    except ConfigError as error:  # a config may be checked on another machine than it will run on
        yield f"warning: not on this machine: {error}"
    if (cluster := require_cluster(experiment.runtime, root)) is not None:
        yield f"cluster: {cluster}"
    _require_files(experiment)
    for plugin in experiment.plugins:
        yield f"plugin: {plugin} ({source_place(plugin)})"
    if experiment.prompts.date != given.prompts.date:
        yield (
            "note: the chat template reads the clock. A run renders its prompts at the date on which it begins (today:"
            f" {experiment.prompts.date}) and keeps it; set prompts.date to choose one, or to share prompts between runs"
        )
    with tempfile.TemporaryDirectory(prefix="opd-check-") as scratch:
        store = Store(scratch)
        run = Run.create(scratch, "check", {}, {})
        with WorkerPool(experiment.runtime, Path(scratch) / "logs") as workers:

            def context(progress: StageProgress) -> Context:
                return Context(store, experiment.runtime, workers, progress, lambda line: None)

            maker = Maker(store, run, run.state, context, SilentReporter())
            student = maker_model(experiment, maker, "student", experiment.student.source)
            teachers = {
                name: maker_model(experiment, maker, teacher_field(name), experiment.source_of(config))
                for name, config in experiment.taught_by.items()
            }
            yield from _same_model(experiment, student, teachers)
            folders = {name: store.materialize(teacher) for name, teacher in teachers.items()}
            blended = experiment.mixture is not None
            policy = experiment.prompts.tokenizers
            for who, audit in audited(store.materialize(student), folders, policy, blended).items():
                yield str(audit) if who is None else f"teachers.{who}: {audit}"
                require_audit(who, audit)
            _, _, prompts = inputs(experiment, maker)
            yield from _prompts(prompts)
            rows = store.read_table(prompts, "prompts")
            yield from _routes(experiment, rows)
            readers = {name: load_tokenizer(folder) for name, folder in folders.items()}
            yield from _lengths_and_example(rows, load_tokenizer(store.materialize(student)), readers)
            yield from _contexts(experiment, store, student, teachers, prompts)
            yield from _verifier(experiment, rows)
            yield from _judge(experiment, rows, load_tokenizer(store.materialize(student)))
            yield from (check_rows(one, f"evaluate.sets.{name}") for name, one in experiment.evaluate.sets.items())
            parameters = parameter_count(store.materialize(student))
            found = findings(Known.of(experiment, store, student, teachers, prompts))
            yield from (f"note: {finding.text}" for finding in found if not finding.refused)
            require(found)
    yield (
        f"a round: {experiment.rollout.prompts_per_round * experiment.rollout.num_generations:,} completions,"
        f" {experiment.steps_per_round:,} optimizer steps, at most {size_text(bytes_per_round(experiment))} of"
        " rollouts and signals before compression"
    )
    yield from _disk(experiment, parameters, Path(root))


def _require_files(experiment: Experiment) -> None:
    """InputError that lists every model folder and prompt file that is not there, if there are several; reading stops at the
    first."""
    sources: dict[str, Any] = {"student.source": experiment.student.source}
    sources |= {f"{teacher_field(name)}.source": model.source for name, model in experiment.taught_by.items()}
    sources |= {f"prompts.{split}": getattr(experiment.prompts, split) for split in ("train", "eval", "warmup")}
    sources |= {f"evaluate.sets.{name}.prompts": one.prompts for name, one in experiment.evaluate.sets.items()}
    paths = {f"{field}.path": s.path for field, s in sources.items() if isinstance(s, CheckpointModel | FileSource)}
    missing = [f"{field}: {path}" for field, path in paths.items() if not Path(path).exists()]
    if len(missing) > 1:
        raise InputError("\n".join([f"{len(missing)} files or folders do not exist; {RELATIVE}", *missing]))


def _same_model(experiment: Experiment, student: Artifact, teachers: Mapping[str | None, Artifact]) -> Iterator[str]:
    if experiment.self_teacher is not None:
        yield f"teacher: the student itself ({experiment.self_teacher.kind}); no other model is loaded"
        return
    own = student.content.get("weights")
    for name, teacher in teachers.items():
        same = own is not None and own == teacher.content.get("weights")
        rewarded = experiment.objective.estimator == "credit" and not experiment.objective.distils
        if same and not rewarded and experiment.student.warmup == experiment.taught_by[name].warmup:
            yield (
                f"warning: student and {teacher_field(name)} are the same model, so there is nothing to distil (every loss"
                " is 0)"
            )

    alike = same_models(
        {name: teacher for name, teacher in teachers.items() if experiment.taught_by[name].warmup is None}
    )
    for names in alike:
        if len(names) > 1:
            yield f"note: {' and '.join(map(teacher_field, names))} are one checkpoint; it scores their prompts in one pass"


def _routes(experiment: Experiment, rows: pa.Table) -> Iterator[str]:
    """How many prompts each teacher has; or that the column is not used."""
    for split in ("train", "eval"):
        named = rows.filter(pc.equal(rows["split"], split))["teacher_id"].drop_null()
        counts = {item["values"]: item["counts"] for item in pc.value_counts(named).to_pylist()}
        if counts and experiment.routed:
            shown = ", ".join(f"{counts.get(name, 0):,} of {name}" for name in experiment.teachers)
            yield f"teachers: {split} has {shown} prompts"
        elif counts:
            why = "`mixture` lets all teach every prompt" if experiment.teachers else "there is one `teacher`"
            yield f"note: {sum(counts.values()):,} prompts of {split} have a teacher_id, which is not used: {why}"


def _lengths_and_example(rows: pa.Table, tokenizer: Any, readers: Mapping[str | None, Any]) -> Iterator[str]:
    """Per split the lengths in tokens, and the first prompt as the models read it, special tokens included. `readers`: the
    teachers' tokenizers by name."""
    for split in dict.fromkeys(rows["split"].to_pylist()):
        found = rows.filter(pc.equal(rows["split"], split))
        for column, reader in (("token_ids", ""), ("teacher_token_ids", " as the teacher reads them")):
            lengths = pc.list_value_length(found[column]).drop_null()
            if len(lengths):
                middle, high = (round(q) for q in pc.quantile(lengths, [0.5, 0.95]).to_pylist())
                most = pc.max(lengths).as_py()
                yield f"lengths of {split}{reader}: p50 {middle:,}, p95 {high:,}, max {most:,} tokens"
        teacher = found["teacher_id"][0].as_py()
        its = readers.get(teacher) or next(iter(readers.values()))  # a mixture's teachers have one tokenizer
        for column, reader, own in (
            ("token_ids", "", tokenizer),
            ("teacher_token_ids", " as the teacher reads it", its),
        ):
            if (ids := found[column][0].as_py()) is not None:
                text = own.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                yield f"first prompt of {split}{reader}, {len(ids):,} tokens: {_shortened(repr(text))}"


def _contexts(
    experiment: Experiment, store: Store, student: Artifact, teachers: Mapping[str | None, Artifact], prompts: Artifact
) -> Iterator[str]:
    """What the teacher reads of a sample, where samples have contexts of their own."""
    if not experiment.sample_contexts:
        return
    shown = examples(experiment.sample_contexts, experiment.prompts, student, teachers[None], prompts, store)
    for number, text in enumerate(shown, 1):
        yield f"context {number} of a sample, as the teacher reads it: {_shortened(repr(text))}"


def _shortened(text: str) -> str:
    if len(text) <= EXAMPLE_CHARACTERS:
        return text
    half = EXAMPLE_CHARACTERS // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def _verifier(experiment: Experiment, rows: pa.Table) -> Iterator[str]:
    """Tries the verifier on the first held-out prompt, with the prompt's own answer in place of a completion."""
    config = experiment.evaluate.verifier
    columns = ["prompt_id", "token_ids", "teacher_token_ids", "answer", "teacher_id"]
    held_out = [Prompt(**row) for row in rows.filter(pc.equal(rows["split"], "eval")).select(columns).to_pylist()]
    plan = plan_shards(held_out, experiment.evaluate, experiment.seed)
    judged = [prompt for shard in plan if shard.mode != "kl" for prompt in shard.prompts]
    if config is None or not judged:
        return
    without = [prompt.prompt_id for prompt in judged if prompt.answer is None]
    if without and not isinstance(config, FunctionVerifier):
        raise InputError(
            f"prompts.eval: {len(without):,} of {len(judged):,} evaluated prompts have no answer (the first has the id"
            f" {without[0]!r}), which the verifier {config.kind} needs; add answers, or set evaluate.verifier: null (no accuracy)"
            " or a function of yours"
        )
    chosen = next((prompt for prompt in judged if prompt.answer is not None), judged[0])
    try:
        verdict = verify(config, chosen.answer or "", chosen.answer)
    except OpdError as error:
        raise ConfigError(str(error)) from error
    name = f"{config.target} ({function_place(config)[1]})" if isinstance(config, FunctionVerifier) else config.kind
    if chosen.answer is None:
        yield f"verifier: {name}; it judges an empty completion as {_judged(verdict)} (no prompt has an answer)"
        return
    hint = "" if verdict else "; that is right if it expects more than the bare answer, a marker for example"
    yield (
        f"verifier: {name}; it judges the completion {_shortened(repr(chosen.answer))}, the answer of prompt"
        f" {chosen.prompt_id!r} alone, as {_judged(verdict)}{hint}"
    )


def _judge(experiment: Experiment, rows: pa.Table, tokenizer: Any) -> Iterator[str]:
    """Tries the judge's verifiers on the first training prompt that has an answer, with that in place of a completion."""
    if experiment.judge is None or not needs_judge(experiment):
        return
    train = rows.filter(pc.equal(rows["split"], "train"))
    known = train.filter(pc.is_valid(train["answer"]))
    prompt = (known if known.num_rows else train).slice(0, 1).to_pylist()
    if not prompt:
        return
    text = prompt[0]["answer"] or ""
    ids = tokenizer.encode(text, add_special_tokens=False)
    question = {
        "completion": text, "answer": prompt[0]["answer"], "length": len(ids), "prompt": prompt[0]["text"],
        "token_ids": ids, "tokens": [tokenizer.decode([index]) for index in ids],
    }  # fmt: skip
    judge = experiment.judge
    yield from _judge_config(experiment, judge)
    process = VerifierProcess(judge, sources_of(judge))
    outcomes: list[Outcome] = []
    try:
        for place, (verifier, names) in enumerate(zip(judge.verifiers, process.given(), strict=True)):
            asked = {name: question[name] for name in ("completion", "answer", "length", *names)}
            try:
                outcomes.append(process.ask(place, asked))
                found = f"the reward {outcomes[-1].reward:g}"
            except NoVerdict as error:
                found = f"no reward: {reason_of(str(error))}"
            yield (
                f"judge: {name_of(verifier)} (weight {verifier.weight:g}) gives the completion {_shortened(repr(text))}, the"
                f" answer of prompt {prompt[0]['prompt_id']!r} alone, {found}"
            )
    finally:
        process.close()
    if len(outcomes) == len(judge.verifiers) > 1:
        try:
            yield f"judge: its reward is {summed(judge, outcomes).reward:g}, the weighted sum"
        except Unusable as error:
            yield f"judge: no reward: {error}"


def _judge_config(experiment: Experiment, judge: JudgeConfig) -> Iterator[str]:
    """What is trained on, who judges, and from which reward a completion is correct."""
    objective, threshold = experiment.objective, judge.success_threshold
    if objective.estimator == "credit":
        yield f"objective: {sentence(objective)}"
    verifiers = ", ".join(f"{name_of(verifier)} (weight {verifier.weight:g})" for verifier in judge.verifiers)
    correct = "1 (where all are 0 or 1)" if threshold is None else f"{threshold:g} or more"
    yield (
        f"judge: {verifiers}; at most {judge.timeout:g} s per verifier and completion (judge.timeout); a reward of {correct} is"
        " correct"
    )
    asked = objective.reward.threshold if objective.estimator == "credit" else None
    if (
        asked is not None and threshold is None and asked != DEFAULT_THRESHOLD
    ):  # others are refused when the config loads
        yield (
            f"warning: objective.reward.success_threshold is {asked:g}, but judge.success_threshold is not set, so metrics and"
            f" contexts take rewards of 0 and 1 from {DEFAULT_THRESHOLD:g} on for correct, and no others; give both the same"
        )


def _judged(verdict: bool) -> str:
    return "correct" if verdict else "wrong"


def _disk(experiment: Experiment, parameters: int, root: Path) -> Iterator[str]:
    """What a whole run leaves on the disk, beside what is free there."""
    needed = sum(bytes_of_run(experiment, parameters).values())
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    rounds = experiment.policy.rounds
    yield (
        f"disk: at most {size_text(needed)} for {counted(rounds, 'round')} (students, optimizer states, rollouts,"
        f" signals); {size_text(free)} free at {place}"
    )
    if needed > free:
        yield (
            "warning: all rounds may not fit on this disk; set policy.retain and policy.collect (what is kept of earlier"
            " rounds), or another --root"
        )


def maker_model(experiment: Experiment, maker: Maker, side: str, source: ModelSource) -> Artifact:
    """One side's model in the scratch store."""
    result: Artifact = maker(f"model_{side}", model_work, source, seed=experiment.seed)["model"]
    return result


def _prompts(prompts: Artifact) -> Iterator[str]:
    counts = prompts.meta.get("prompts") or {}
    for split, count in counts.items():
        dropped = (prompts.meta.get("filtered") or {}).get(split) or {}
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number)
        if not count and not left_out:  # this split has no source
            continue
        yield f"prompts: {count:,} for {split}" + (f" (left out: {left_out})" if left_out else "")
    for note in (prompts.meta.get("changed_since_0_1") or {}).values():
        yield f"note: {note}"
    for warning in prompts.meta.get("warnings") or []:
        yield f"warning: {warning}"
