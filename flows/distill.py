"""The main path: what follows what. `do` decides whether a stage runs, is already in the store, or is only planned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flows.experiment import Experiment, ModelConfig, TeacherConfig
from flows.run.executor import Executor, Made
from storage.store import Artifact
from tasks.behaviours.drafts import ReadsDrafts
from tasks.draft import draft_work
from tasks.evaluate import evaluate_work
from tasks.inputs.models import model_work
from tasks.inputs.teachers import EmaStudent, PreviousRound, TeacherSource, is_self
from tasks.prepare import prepare_work
from tasks.rollout import rollout_work
from tasks.rollout_config import RolloutConfig
from tasks.stage import Drafts, Prompts, Rollouts, Student, Teacher, TrainerState
from tasks.supervise import supervise_work
from tasks.train import train_work
from tasks.warmup import warmup_work


def distill(
    experiment: Experiment, do: Executor, rounds: int, evaluated: Callable[[int], bool] | None = None
) -> Student:
    """Round 0 prepares and evaluates the student; every further round makes it a little more like its teacher.
    `evaluated`: which rounds are; by default those of policy.evaluate_every, and the last."""
    evaluated = evaluated or partial(experiment.policy.evaluates, last=rounds)
    student, teacher, prompts = begin(experiment, do, evaluated)
    state: TrainerState | None = None
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
            signals = do(
                "supervise", supervise_work, now.supervise,
                rollouts=rollouts, student=student, teacher=teacher, prompts=prompts,
                needs=now.objective.needs().signals, sampling=now.rollout, store=do.store, plugins=plugins,
            )  # fmt: skip
            made = do(
                "train", train_work, now.train,
                objective=now.objective, student=student, state=state, rollouts=rollouts, signals=signals, prompts=prompts,
                seed=seed, round=number, source=now.student.source, average=now.teacher.average, plugins=plugins,
            )  # fmt: skip
            student, state = Student(made["student"]), TrainerState(made["trainer_state"])
            evaluate = do if evaluated(number) else do.stored
            evaluate(
                "evaluate", evaluate_work, now.evaluate,
                student=student, teacher=teacher, prompts=prompts, seed=seed, plugins=plugins,
            )  # fmt: skip
            round.ends_with(student)
            teacher = next_teacher(now.teacher.source, teacher, made)
    return student


def read_by(rollout: RolloutConfig, teacher: Teacher) -> Teacher | None:
    """The teacher, if this round's behaviour reads it: what is not read is neither loaded, nor restored when it was evicted."""
    return teacher if "teacher" in rollout.behaviour.reads else None


def drafted(e: Experiment, round: int, *, teacher: Teacher, prompts: Prompts, do: Executor) -> Drafts | None:
    """The completions that the teacher writes once for all rounds, where this round's behaviour reads them."""
    now = e.at(round)
    rollout, rounds = e.draft_plan(round)
    behaviour = rollout.behaviour
    if not isinstance(behaviour, ReadsDrafts) or "drafts" not in now.rollout.behaviour.reads:
        return None
    made = do(
        "draft", draft_work, behaviour.drafts,
        rollout=rollout, teacher=teacher, prompts=prompts, seed=now.seed, rounds=rounds, plugins=now.plugin_sources,
    )  # fmt: skip
    return Drafts(made["draft"])


def next_teacher(source: TeacherSource, teacher: Teacher, made: Made) -> Teacher:
    """The teacher of the round after one that was scored by `teacher` and whose training made `made`."""
    if isinstance(source, PreviousRound):
        return Teacher(made["student"])
    return Teacher(made["teacher_ema"]) if isinstance(source, EmaStudent) else teacher


def begin(experiment: Experiment, do: Executor, evaluated: Callable[[int], bool]) -> tuple[Student, Teacher, Prompts]:
    """Round 0: the two models, the prompts, the warm-ups, and the student's metrics before distillation."""
    first = experiment.at(0)
    with do.round(0) as round:
        student_model, teacher_model, prompts = inputs(first, do)
        do.inspect(experiment, student_model, teacher_model, prompts)
        given = warmed("warmup_teacher", first.teacher, teacher_model, prompts, first, do)
        student = Student(warmed("warmup", first.student, student_model, prompts, first, do))
        teacher = Teacher(student if is_self(first.teacher.source) else given)
        evaluate = do if evaluated(0) else do.stored
        evaluate(
            "evaluate", evaluate_work, first.evaluate,
            student=student, teacher=teacher, prompts=prompts, seed=first.seed, plugins=first.plugin_sources,
        )  # fmt: skip
        round.ends_with(student)
    return student, teacher, prompts


def inputs(first: Experiment, do: Executor) -> tuple[Artifact, Artifact, Prompts]:
    """Student model, teacher model and prompts, before anything is trained. A teacher that is the student has no other model."""
    memo, seed = do.store.memo, first.seed
    student_model = teacher_model = do("model", model_work, first.student.source, seed=seed, memo=memo)["model"]
    if not is_self(first.teacher.source):
        teacher_model = do("model_teacher", model_work, first.teacher_source, seed=seed, memo=memo)["model"]
    prepared = do(
        "prepare", prepare_work, first.prompts,
        student_model=student_model, teacher_model=teacher_model, memo=memo, store=do.store, contexts=first.contexts,
    )  # fmt: skip
    return student_model, teacher_model, Prompts(prepared["prepare"])


def warmed(
    label: str, config: ModelConfig | TeacherConfig, model: Artifact, prompts: Prompts, e: Experiment, do: Executor
) -> Artifact:
    """The model after its warm-up, or as it came."""
    if config.warmup is None:
        return model
    source = e.teacher_source if isinstance(config, TeacherConfig) else config.source
    made = do(
        label, warmup_work, config.warmup,
        model=model, prompts=prompts, seed=e.seed, source=source, plugins=e.plugin_sources,
    )  # fmt: skip
    return made["student"]
