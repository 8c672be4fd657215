"""The date at which prompts are rendered is the run's: kept by its later calls, its forks and its study."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import DATA
from shipped_tokenizers import folder, small_bpe

from flows.config_file import merge
from flows.experiment import Experiment
from flows.run import dates
from flows.run.dates import with_date
from flows.run.runner import fork_experiment, open_run, resume_experiment, stored_experiment
from storage.runs import RoundState, Run, StageState

GOLDEN = yaml.safe_load((DATA / "golden.yaml").read_text())
CLOCK, PLAIN = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}", "{{ messages[0].content }}"


class Calendar:
    """`date.today()` on a chosen day."""

    day = date(2026, 3, 1)

    @classmethod
    def today(cls) -> date:
        return cls.day


@pytest.fixture(autouse=True)
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[Calendar]:
    monkeypatch.setattr(dates, "date", Calendar)
    monkeypatch.setattr(Calendar, "day", date(2026, 3, 1))
    return Calendar


def experiment(place: Path, template: str = CLOCK, **over: Any) -> Experiment:
    model = place / ("clock" if template == CLOCK else "plain")
    if not model.exists():
        folder(model, {}, {"eos_token": "<|end|>"}, "qwen3")
        small_bpe().save(str(model / "tokenizer.json"))
        (model / "chat_template.jinja").write_text(template)
    source = {"source": {"kind": "checkpoint", "path": str(model)}}
    base = {key: value for key, value in GOLDEN.items() if key not in ("student", "teacher")}
    return Experiment.model_validate(merge(base | {"student": source, "teacher": source}, over))


def begin(wanted: Experiment, name: str, root: Path) -> Experiment:
    dated = with_date(wanted, name, root)
    open_run(dated, name, root)
    return dated


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, calendar):
    wanted, root = experiment(tmp_path), tmp_path / "store"
    assert begin(wanted, "a", root).prompts.date == "2026-03-01"
    calendar.day = date(2026, 3, 2)
    assert begin(wanted, "a", root).prompts.date == "2026-03-01"  # the same config again
    assert with_date(resume_experiment("a", root, []), "a", root).prompts.date == "2026-03-01"
    assert stored_experiment(Run.open(root, "a")).prompts.date == "2026-03-01"
    assert begin(wanted, "b", root).prompts.date == "2026-03-02"  # a run of its own
    assert with_date(wanted, "c", root, ["none", "a"]).prompts.date == "2026-03-01"  # one of a study


def test_a_fork_has_its_parents_day(tmp_path, calendar):
    root = tmp_path / "store"
    begin(experiment(tmp_path), "a", root)
    run = Run.open(root, "a")
    state = run.state
    state.rounds = [RoundState(round=0, student_sha256="0" * 64, stages={"evaluate": StageState(state="done")})]
    run.save(state)
    calendar.day = date(2026, 3, 9)
    forked = with_date(fork_experiment("a", 0, root, ["train.lr=1e-4"]), "b", root)
    assert (forked.prompts.date, forked.at(0).prompts.date) == ("2026-03-01", "2026-03-01")


@pytest.mark.parametrize("lost", ["experiment.yaml", "identity.json"])
def test_either_record_of_the_run_is_enough(tmp_path, calendar, lost):
    wanted, root = experiment(tmp_path), tmp_path / "store"
    begin(wanted, "a", root)
    (root / "runs" / "a" / lost).unlink()
    calendar.day = date(2026, 3, 2)
    assert with_date(wanted, "a", root).prompts.date == "2026-03-01"


def test_a_run_that_began_without_a_day_gets_none(tmp_path):
    """A run of 0.1.0: with a date its prompts would be other ones."""
    wanted, root = experiment(tmp_path), tmp_path / "store"
    open_run(wanted, "a", root)
    assert with_date(wanted, "a", root).prompts.date is None


def test_a_day_of_the_config_is_kept_and_other_templates_get_none(tmp_path):
    root = tmp_path / "store"
    chosen = experiment(tmp_path, prompts={"date": "2020-02-02"})
    assert with_date(chosen, "a", root).prompts.date == "2020-02-02"
    plain = experiment(tmp_path, PLAIN)
    assert with_date(plain, "a", root) is plain
    fixed = experiment(tmp_path, prompts={"chat_template": False})  # additions are plain prompts, which nothing renders
    assert with_date(fixed, "a", root) is fixed
