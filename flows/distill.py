"""The main path: what follows what. `do` decides whether a stage runs, is already in the store, or is only planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from flows.cross_checks import needs_judge
from flows.experiment import Experiment, ModelConfig, TeacherConfig
from flows.run.executor import Executor, Made
from storage.store import Artifact
from tasks.behaviours.drafts import ReadsDrafts
from tasks.context import context_work
from tasks.draft import draft_work
from tasks.evaluate import EvaluationSet, evaluate_work
from tasks.harness import harness_work
from tasks.inputs.harness import HarnessTask
from tasks.inputs.models import model_work
from tasks.inputs.teachers import EmaStudent, PreviousRound, SelfTeacher, is_self
from tasks.judge import EarlierRewards, judge_work
from tasks.mixture import mixture_work
from tasks.prepare import prepare_work
from tasks.rollout import rollout_work
from tasks.rollout_config import RolloutConfig
from tasks.routing import teacher_label
from tasks.stage import Contexts, Drafts, Judged, Prompts, Rollouts, Student, Teacher, TrainerState, same_models
from tasks.supervise import supervise_work
from tasks.train import train_work
from tasks.warmup import warmup_work


@dataclass(frozen=True)
class FurtherSet:
    """A named evaluation set that the config does not have, and the rounds to measure on it."""

    name: str
    set: EvaluationSet
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class FurtherTasks:
    """Tasks of lm-eval, which no config has, and the rounds to measure on them."""

    tasks: tuple[HarnessTask, ...]
    rounds: tuple[int, ...]


Further = FurtherSet | FurtherTasks
"""What is measured of a run that exists, beside what its config says."""


def distill(
    experiment: Experiment,
    do: Executor,
    rounds: int,
    evaluated: Callable[[int], bool] | None = None,
    further: Further | None = None,
) -> Student:
    """Round 0 prepares and evaluates the student; every further round makes it a little more like its teacher.
    `evaluated`: which rounds are; by default those of policy.evaluate_every, and the last."""
    evaluated = evaluated or partial(experiment.policy.evaluates, last=rounds)
    student, teacher, prompts, sets = begin(experiment, do, evaluated, further)
    state: TrainerState | None = None
    earlier = EarlierRewards(do.store)
    for number in range(1, rounds + 1):
        now = experiment.at(number)
        with do.round(number) as round:
            seed, plugins = now.seed, now.plugin_sources
            drafts = drafted(experiment, number, teacher=teacher, prompts=prompts, do=do)
            made = do(
                "rollout", rollout_work, now.rollout,
                student=student, prompts=prompts, seed=seed, round=number,
                teacher=read_by(now.rollout, teacher), drafts=drafts, plugins=plugins,
            )  # fmt: skip
            rollouts = Rollouts(made["rollout"])
            judged = rewarded(now, rollouts=rollouts, prompts=prompts, earlier=earlier, do=do)
            contexts = contextual(
                now, rollouts=rollouts, student=student, teacher=teacher, prompts=prompts, judged=judged, do=do
            )
            signals = {
                label: do(
                    label, supervise_work, now.supervise,
                    rollouts=rollouts, student=student, teacher=one, prompts=prompts, names=names,
                    needs=now.objective.needs().signals, sampling=now.rollout, store=do.store, plugins=plugins,
                    contexts=contexts,
                )
                for label, one, names in one_by_one(teacher)
            }  # fmt: skip
            made = do(
                "train", train_work, now.train,
                objective=now.objective, student=student, state=state, rollouts=rollouts, signals=signals, prompts=prompts,
                seed=seed, round=number, source=now.student.source, average=now.averaged, plugins=plugins,
                routed=isinstance(teacher, Mapping), judged=judged, contexts=contexts,
            )  # fmt: skip
            student, state = Student(made["student"]), TrainerState(made["trainer_state"])
            measure(now, number, student, teacher, prompts, sets, evaluated, do, further)
            round.ends_with(student)
            teacher = next_teacher(now.self_teacher, teacher, made)
        if do.enough(number):
            break
    return student


Taught = Teacher | Mapping[str, Teacher]
"""The teacher of all prompts, or by name those that have prompts of their own."""


def read_by(rollout: RolloutConfig, teacher: Taught) -> Teacher | None:
    """The teacher, if this round's behaviour reads it: what is not read is neither loaded, nor restored when it was evicted.
    With several teachers none does (`flows.cross_checks`)."""
    return None if isinstance(teacher, Mapping) or "teacher" not in rollout.behaviour.reads else teacher


def drafted(e: Experiment, round: int, *, teacher: Taught, prompts: Prompts, do: Executor) -> Drafts | None:
    """The completions that the teacher writes once for all rounds, where this round's behaviour reads them."""
    now = e.at(round)
    rollout, rounds = e.draft_plan(round)
    behaviour = rollout.behaviour
    if (
        isinstance(teacher, Mapping)
        or not isinstance(behaviour, ReadsDrafts)
        or "drafts" not in now.rollout.behaviour.reads
    ):
        return None
    made = do(
        "draft", draft_work, behaviour.drafts,
        rollout=rollout, teacher=teacher, prompts=prompts, seed=now.seed, rounds=rounds, plugins=now.plugin_sources,
    )  # fmt: skip
    return Drafts(made["draft"])


def rewarded(
    now: Experiment, *, rollouts: Rollouts, prompts: Prompts, earlier: EarlierRewards, do: Executor
) -> Judged | None:
    """The rewards of a round's rollouts, where something reads them."""
    if now.judge is None or not needs_judge(now):
        return None
    made = do(
        "judge", judge_work, now.judge,
        rollouts=rollouts, prompts=prompts, plugins=now.plugin_sources, earlier=earlier,
    )  # fmt: skip
    return Judged(made["judge"])


def contextual(
    now: Experiment,
    *,
    rollouts: Rollouts,
    student: Student,
    teacher: Taught,
    prompts: Prompts,
    judged: Judged | None,
    do: Executor,
) -> Contexts | None:
    """What the teacher reads of each sample, where its context is not the same for all samples of a prompt."""
    if not now.sample_contexts or now.teacher is None or isinstance(teacher, Mapping):
        return None
    made = do(
        "context", context_work, now.sample_contexts,
        sibling=now.teacher.sibling, prepare=now.prompts, rollouts=rollouts, student=student, teacher=teacher, prompts=prompts,
        judged=judged, seed=now.seed, success_threshold=None if now.judge is None else now.judge.success_threshold,
    )  # fmt: skip
    return Contexts(made["context"])


def one_by_one(teacher: Taught) -> Iterator[tuple[str, Teacher, tuple[str, ...]]]:
    """(label of its stage, teacher, names whose prompts it has) of each pass of supervision; names of one checkpoint share it."""
    if not isinstance(teacher, Mapping):
        yield "supervise", teacher, ()
        return
    for names in same_models(dict(sorted(teacher.items()))):  # a config may list them in another order later
        yield teacher_label("supervise", names[0]), teacher[names[0]], names


def next_teacher(source: SelfTeacher | None, teacher: Taught, made: Made) -> Taught:
    """The teacher of the round after one that was scored by `teacher` and whose training made `made`. `source`: of a teacher that
    is the student itself."""
    if isinstance(source, PreviousRound):
        return Teacher(made["student"])
    return Teacher(made["teacher_ema"]) if isinstance(source, EmaStudent) else teacher


Sets = Mapping[str, tuple[EvaluationSet, Prompts, Callable[[int], bool]]]
"""By name: an evaluation set, its prompts, and which rounds are measured on it."""


def begin(
    experiment: Experiment, do: Executor, evaluated: Callable[[int], bool], further: Further | None = None
) -> tuple[Student, Taught, Prompts, Sets]:
    """Round 0: the models, the prompts, the warm-ups, and the student's metrics before distillation."""
    first = experiment.at(0)
    with do.round(0) as round:
        student_model, teacher_models, prompts = inputs(first, do)
        sets = {
            name: (one, set_prompts(first, name, one, student_model, teacher_models, do), evaluated)
            for name, one in experiment.evaluate.sets.items()
        }
        if isinstance(further, FurtherSet):
            own = set_prompts(first, further.name, further.set, student_model, teacher_models, do)
            sets[further.name] = (further.set, own, further.rounds.__contains__)
        do.inspect(experiment, student_model, teacher_models, prompts)
        warm = {
            name: warmed(teacher_label("warmup_teacher", name), config, teacher_models[name], prompts, first, do, name)
            for name, config in first.taught_by.items()
        }
        student = Student(warmed("warmup", first.student, student_model, prompts, first, do))
        teacher = Teacher(student) if first.self_teacher is not None else together(first, warm, do)
        measure(first, 0, student, teacher, prompts, sets, evaluated, do, further)
        round.ends_with(student)
    return student, teacher, prompts, sets


def measure(
    now: Experiment, number: int, student: Student, teacher: Taught, prompts: Prompts, sets: Sets,
    evaluated: Callable[[int], bool], do: Executor, further: Further | None = None,
) -> None:  # fmt: skip
    """The round's student on the held-out prompts, on each named set, and on the tasks of lm-eval that this call is about."""
    evaluate = do if evaluated(number) else do.stored
    evaluate(
        "evaluate", evaluate_work, now.evaluate.main,
        student=student, teacher=teacher, prompts=prompts, seed=now.seed, plugins=now.plugin_sources,
    )  # fmt: skip
    unnamed = next(iter(teacher.values())) if isinstance(teacher, Mapping) else teacher  # sets measure no KL to several
    for name, (one, own, wanted) in sets.items():
        evaluate = do if wanted(number) else do.stored
        evaluate(
            set_label("evaluate", name), evaluate_work, now.evaluate.on(one),
            student=student, teacher=unnamed, prompts=own, seed=now.seed, plugins=now.plugin_sources,
        )  # fmt: skip
    if isinstance(further, FurtherTasks):
        evaluate = do if number in further.rounds else do.stored
        for task in further.tasks:
            evaluate(set_label("harness", task.config.task), harness_work, task, student=student)


def set_label(stage: str, name: str) -> str:
    """What the stage of a named evaluation set, or of a task of lm-eval, is called in a round."""
    return f"{stage}_{name}"


def set_prompts(
    first: Experiment, name: str, one: EvaluationSet, student: Artifact, teachers: dict[str | None, Artifact], do: Executor
) -> Prompts:  # fmt: skip
    """The prompts of a named evaluation set, rendered as the held-out ones are. Where each prompt names its teacher, those of
    a set name none, and no teacher reads them."""
    named = {who: model for who, model in teachers.items() if who is not None}
    read = None if first.routed else named or teachers[None]
    template = (
        first.contexts.get("train") if one.kl_prompts != 0 else None
    )  # contexts of samples: none, as held-out prompts
    prepared = do(
        set_label("prepare", name), prepare_work, first.prompts.only(one.prompts),
        student_model=student, teacher_model=read, mixed=first.mixture is not None,
        memo=do.store.memo, store=do.store, contexts={"eval": template} if isinstance(template, str) else {},
    )  # fmt: skip
    return Prompts(prepared["prepare"])


def together(first: Experiment, warm: Mapping[str | None, Artifact], do: Executor) -> Taught:
    """The only teacher, several by name, or the mixture of several."""
    named = {name: Teacher(model) for name, model in warm.items() if name is not None}
    if not named:
        return Teacher(warm[None])
    if first.mixture is None:
        return named
    return Teacher(do("mixture", mixture_work, first.mixture, teachers=named)["mixture"])


def inputs(first: Experiment, do: Executor) -> tuple[Artifact, dict[str | None, Artifact], Prompts]:
    """Student model, teacher models by name (None: the only one) and prompts, before anything is trained. A teacher that is the
    student has no other model."""
    memo, seed = do.store.memo, first.seed
    student_model = do("model", model_work, first.student.source, seed=seed, memo=memo)["model"]
    teacher_models = {
        name: student_model
        if is_self(config.source)
        else do(teacher_label("model_teacher", name), model_work, first.source_of(config), seed=seed, memo=memo)[
            "model"
        ]
        for name, config in first.taught_by.items()
    }
    named = {name: model for name, model in teacher_models.items() if name is not None}
    prepared = do(
        "prepare", prepare_work, first.prompts,
        student_model=student_model, teacher_model=named or teacher_models[None], mixed=first.mixture is not None,
        memo=memo, store=do.store, contexts=first.contexts, context_columns=first.context_columns,
    )  # fmt: skip
    return student_model, teacher_models, Prompts(prepared["prepare"])


def warmed(
    label: str,
    config: ModelConfig | TeacherConfig,
    model: Artifact,
    prompts: Prompts,
    e: Experiment,
    do: Executor,
    name: str | None = None,
) -> Artifact:
    """The model after its warm-up, or as it came. `name`: of one teacher of several."""
    if config.warmup is None:
        return model
    made = do(
        label, warmup_work, config.warmup,
        model=model, prompts=prompts, seed=e.seed, source=e.source_of(config), plugins=e.plugin_sources,
        teacher=name if e.routed else None,
    )  # fmt: skip
    return made["student"]
