"""The main path: what follows what. `do` decides whether a stage runs, is already in the store, or is only planned."""

from __future__ import annotations

from functools import partial

from flows.experiment import Experiment, ModelConfig
from flows.run.executor import Executor, Result
from tasks.evaluate import evaluate_work
from tasks.inputs.models import model_work
from tasks.prepare import prepare_work
from tasks.rollout import rollout_work
from tasks.supervise import supervise_work
from tasks.train import train_work
from tasks.warmup import warmup_work


def distill(experiment: Experiment, do: Executor, rounds: int) -> Result:
    """Round 0 prepares and evaluates the student; every further round makes it a little more like its teacher."""
    student, teacher, prompts = begin(experiment, do)
    state: Result | None = None
    for number in range(1, rounds + 1):
        now = experiment.at(number)
        with do.round(number) as round:
            plugins, seed = now.plugin_sources, now.seed
            rollouts = do("rollout", rollout_work, now.rollout, student, prompts, seed, number, plugins)["rollout"]
            needs = now.objective.needs().signals
            supervise = partial(supervise_work, store=do.store, plugins=plugins)
            signals = do("supervise", supervise, now.supervise, rollouts, student, teacher, prompts, needs, now.rollout)
            train = partial(train_work, plugins=plugins)
            trained = do("train", train, now.train, now.objective, student, state, rollouts, signals, seed, number)
            student, state = trained["student"], trained["trainer_state"]
            do("evaluate", evaluate_work, now.evaluate, student, teacher, prompts, seed, plugins)
            round.ends_with(student)
    return student


def begin(experiment: Experiment, do: Executor) -> tuple[Result, Result, Result]:
    """Round 0: the two models, the prompts, the warm-ups, and the student's metrics before distillation."""
    first = experiment.at(0)
    with do.round(0) as round:
        student_model, teacher_model, prompts = inputs(first, do)
        teacher = warmed("warmup_teacher", first.teacher, teacher_model, prompts, first, do)
        student = warmed("warmup", first.student, student_model, prompts, first, do)
        do("evaluate", evaluate_work, first.evaluate, student, teacher, prompts, first.seed, first.plugin_sources)
        round.ends_with(student)
    return student, teacher, prompts


def inputs(first: Experiment, do: Executor) -> tuple[Result, Result, Result]:
    """Student model, teacher model and prompts, before anything is trained."""
    model, prepare = partial(model_work, memo=do.store.memo), partial(prepare_work, memo=do.store.memo)
    student_model = do("model", model, first.student.source, first.seed)["model"]
    teacher_model = do("model_teacher", model, first.teacher.source, first.seed)["model"]
    prompts = do("prepare", prepare, first.prompts, student_model, teacher_model)["prepare"]
    return student_model, teacher_model, prompts


def warmed(label: str, config: ModelConfig, model: Result, prompts: Result, e: Experiment, do: Executor) -> Result:
    """The model after its warm-up, or as it came."""
    if config.warmup is None:
        return model
    return do(label, warmup_work, config.warmup, model, prompts, e.seed, e.plugin_sources)["student"]
