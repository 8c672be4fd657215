"""The date at which a run's prompts are rendered (`prompts.date`): fixed when the run begins, kept ever after."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path

from flows.experiment import Experiment, experiment_of
from storage.errors import ConfigError, CorruptArtifact, OpdError
from storage.runs import Run


def with_date(experiment: Experiment, name: str, root: str | Path, others: Iterable[str] = ()) -> Experiment:
    """The experiment with `prompts.date` set if its chat template reads the clock and the config sets none.

    It is the date of the run `name`, else of the first of the runs `others`, else today's. An existing run keeps having none
    where it began without one, because another text would make it another run."""
    if experiment.prompts.date is not None or experiment.fork is not None:  # a fork has its parent's
        return experiment
    runs = {run.name: run for run in Run.list(root)} if Path(root).is_dir() else {}
    for known in (name, *others):
        held = _held(runs[known]) if known in runs else None
        if held is not None and (known == name or held.prompts.date is not None):
            return _dated(experiment, held.prompts.date)
    return _dated(experiment, date.today().isoformat()) if reads_clock(experiment) else experiment


def reads_clock(experiment: Experiment) -> bool:
    """Whether the rendering of the prompts depends on the time: that of the student's template, or of the teacher's where the
    teacher reads its own."""
    from tasks.inputs import templates
    from tasks.inputs.models import tokenizer_folder
    from tasks.inputs.shipped import load_tokenizer

    prompts = experiment.prompts
    sources = [experiment.student.source]
    if prompts.tokenizers.on_template_mismatch == "teacher":
        sources += [experiment.source_of(model) for model in experiment.taught_by.values()]
    for source in sources:
        with suppress(OpdError):  # what is wrong with the folder is reported by the stage that reads it
            folder = tokenizer_folder(source)
            if folder is not None and templates.reads_clock(load_tokenizer(folder), prompts.chat_template_kwargs):
                return prompts.chat_template or _has_messages(experiment)
    return False


def _has_messages(experiment: Experiment) -> bool:
    """Whether some prompt is a conversation, which is rendered also with `chat_template: false`."""
    from tasks.inputs.sources import read_rows

    return any(
        not isinstance(row.prompt, str)
        for source in experiment.prompts.sources().values()
        for row in read_rows(source)[0]
    )


def _dated(experiment: Experiment, day: str | None) -> Experiment:
    return experiment.model_copy(update={"prompts": experiment.prompts.model_copy(update={"date": day})})


def _held(run: Run) -> Experiment | None:
    """The run's experiment from whichever of its records is whole."""
    for record in ("experiment", "identity"):
        with suppress(CorruptArtifact, ConfigError):
            return experiment_of(getattr(run, record), f"run {run.name}")
    return None
