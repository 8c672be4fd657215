"""A run outside of its stages: what is refused at once, and what is recorded of a failure."""

from __future__ import annotations

import pytest
from opd_cli import in_this_process
from places import CHECKOUT, TINY

from flows.cli.report import print_report, status_json
from flows.experiment import load_experiment
from flows.run import runner
from flows.run.runner import fork_experiment, has_begun, open_run, resume_experiment, run_experiment
from flows.run.shown import failure
from storage.errors import ConfigError, IdentityMismatch, NotEnoughSpace, StoreError
from storage.identity import canonical_json
from storage.runs import RoundState, Run, StageState
from storage.store import Store


def test_a_round_that_would_not_fit_on_the_disk_is_refused_before_it_starts(tmp_path):
    huge = load_experiment(TINY, [f"rollout.prompts_per_round={2**36}"])
    with pytest.raises(NotEnoughSpace):
        run_experiment(huge, name="huge", root=tmp_path, prefect=False)
    assert Store(tmp_path).list() == []


def test_a_name_keeps_its_experiment_whatever_the_runtime(tmp_path):
    open_run(load_experiment(TINY), "base", tmp_path)
    open_run(load_experiment(TINY, ["runtime.threads=2", "policy.rounds=9"]), "base", tmp_path)
    with pytest.raises(IdentityMismatch, match=r"train\.lr: 0\.001 in the run, 0\.5 now"):
        open_run(load_experiment(TINY, ["train.lr=0.5"]), "base", tmp_path)


def test_resume_changes_runtime_and_policy_only(tmp_path):
    open_run(load_experiment(TINY), "base", tmp_path)
    assert resume_experiment("base", tmp_path, ["policy.rounds=7"]).policy.rounds == 7
    with pytest.raises(ConfigError, match="opd fork base@ROUND"):
        resume_experiment("base", tmp_path, ["train.lr=0.5"])


def test_a_fork_needs_a_finished_round(tmp_path):
    Run.create(tmp_path, "base", load_experiment(TINY).model_dump(mode="json"), load_experiment(TINY).identity())
    with pytest.raises(ConfigError, match=r"has finished 0 round"):
        fork_experiment("base", 2, tmp_path, [])
    assert fork_experiment("base", 0, tmp_path, ["train.lr=0.5"]).at(1).train.lr == 0.5


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("teacher={source: {kind: architecture, init_seed: 9}}", "teacher"),
        ("teacher.warmup.steps=9", "teacher"),
        ("prompts.max_prompt_length=77", "prompts"),
        ("student.warmup.lr=0.5", "student"),
    ],
)
def test_a_fork_changes_nothing_that_round_0_made(tmp_path, change, field):
    """Models and prompts come from the parent's round 0, so another teacher would be in the config and in no signal."""
    open_run(load_experiment(TINY), "base", tmp_path)
    with pytest.raises(ConfigError, match=rf"{field}: a fork keeps the {field} of 'base'.* start a run of its own"):
        fork_experiment("base", 0, tmp_path, [change])
    fork_experiment("base", 0, tmp_path, ["train.lr=0.5", "evaluate.prompts=3"])


def test_a_fork_goes_on_whatever_its_parents_rounds_and_runtime_became(tmp_path):
    open_run(load_experiment(TINY), "base", tmp_path)
    open_run(fork_experiment("base", 0, tmp_path, ["train.lr=0.5"]), "fork", tmp_path)
    open_run(fork_experiment("fork", 0, tmp_path, ["train.lr=0.25"]), "second", tmp_path)
    for name in ("base", "fork"):
        changed = resume_experiment(name, tmp_path, ["policy.rounds=7", "runtime.threads=2", "hooks.on_round=date"])
        Run.open(tmp_path, name).save_experiment(changed.model_dump(mode="json"))
    open_run(fork_experiment("base", 0, tmp_path, ["train.lr=0.5"]), "fork", tmp_path)
    open_run(fork_experiment("fork", 0, tmp_path, ["train.lr=0.25"]), "second", tmp_path)
    with pytest.raises(IdentityMismatch) as refused:
        open_run(fork_experiment("base", 0, tmp_path, ["train.lr=0.75"]), "fork", tmp_path)
    assert "policy" not in str(refused.value)


SDPO, UNREAD = CHECKOUT / "configs/recipes/sdpo.yaml", "objective.ratio=none"


def test_a_field_without_effect_is_refused_in_new_runs_and_told_in_one_that_has_it(tmp_path, monkeypatch):
    """Earlier versions accepted it, so that a run has it in its identity."""
    root = tmp_path / "store"
    asked = has_begun("old", root)
    with pytest.raises(ConfigError, match=r"objective\.ratio: none has no effect"):
        load_experiment(SDPO, [UNREAD], begun=asked)
    earlier = load_experiment(SDPO, [UNREAD], begun=lambda _: True)
    run = open_run(earlier, "old", root)
    assert load_experiment(SDPO, [UNREAD], begun=asked) == earlier
    for other, name in ((["seed=9"], "old"), ([], "new")):
        with pytest.raises(ConfigError, match=r"objective\.ratio: none has no effect"):
            load_experiment(SDPO, [UNREAD, *other], begun=has_begun(name, root))
    monkeypatch.setattr(runner, "distill", lambda *args: None)
    run_experiment(earlier, name="old", root=root, prefect=False)
    assert "warning: objective.ratio: none has no effect" in run.log_path("run").read_text()


def test_the_command_line_goes_on_with_such_a_run_under_its_name_alone(tmp_path, monkeypatch, capsys):
    root = tmp_path / "store"
    open_run(load_experiment(SDPO, [UNREAD], begun=lambda _: True), "old", root)
    opd = in_this_process(monkeypatch, capsys, root)
    code, out, _ = opd("run", SDPO, "--name", "old", "--set", UNREAD, "--dry-run")
    assert code == 0 and "plan of old" in out
    code, _, err = opd("run", SDPO, "--name", "new", "--set", UNREAD, "--dry-run")
    assert code == 2 and "objective.ratio: none has no effect" in err


def test_a_fork_with_a_field_without_effect_is_refused_unless_it_has_begun(tmp_path):
    open_run(load_experiment(SDPO), "base", tmp_path)
    with pytest.raises(ConfigError, match=r"fork of base@0: .*\n  objective\.ratio: none has no effect"):
        fork_experiment("base", 0, tmp_path, [UNREAD], has_begun("fork", tmp_path))
    fork = fork_experiment("base", 0, tmp_path, [UNREAD], lambda _: True)
    open_run(fork, "fork", tmp_path)
    assert fork_experiment("base", 0, tmp_path, [UNREAD], has_begun("fork", tmp_path)) == fork


def failed_run(root, error, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(runner, "distill", fail)
    with pytest.raises(type(error)):
        run_experiment(load_experiment(TINY), name="base", root=root, prefect=False)
    return Run.open(root, "base")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StoreError("the disk went away\ncheck the mount"), "the disk went away\ncheck the mount"),
        (ValueError("x"), "ValueError: x"),
    ],
)
def test_a_failure_outside_of_all_stages_is_recorded_and_shown_first(tmp_path, monkeypatch, capsys, error, text):
    run = failed_run(tmp_path, error, monkeypatch)
    assert (run.state.status, run.state.error) == ("failed", text)
    log = run.log_path("run").read_text()
    assert f"failed: {text}" in log and ("Traceback" in log) == isinstance(error, ValueError)
    print_report(run.state, tmp_path)
    _, failed, *_ = capsys.readouterr().out.splitlines()
    assert failed.startswith(f"failed at {run.state.updated}: {text.splitlines()[0]}")
    status = status_json(run.state, tmp_path)
    assert status["error"] == text and any("resume base" in command for command in status["next"])


def test_a_failure_in_a_stage_names_it_and_the_next_call_forgets_it(tmp_path, monkeypatch):
    run = failed_run(tmp_path, StoreError("no"), monkeypatch)
    state = run.state
    state.rounds = [RoundState(round=0, stages={"train": StageState(state="failed", error="no")})]
    assert failure(state) == "round 0 train: no"
    monkeypatch.setattr(runner, "distill", lambda *args: None)
    run_experiment(load_experiment(TINY), name="base", root=tmp_path, prefect=False)
    assert (run.state.status, run.state.error, failure(run.state)) == ("stopped", None, None)


def test_an_interrupted_run_has_no_error_and_a_refused_finished_one_stays_finished(tmp_path, monkeypatch):
    run = failed_run(tmp_path, KeyboardInterrupt(), monkeypatch)
    assert (run.state.status, run.state.error) == ("stopped", None)
    state = run.state
    state.status = "finished"
    run.save(state)

    def full(*args):
        raise NotEnoughSpace("full")

    monkeypatch.setattr(runner, "refuse_full_disk", full)
    with pytest.raises(NotEnoughSpace):
        run_experiment(load_experiment(TINY), name="base", root=tmp_path, prefect=False)
    assert run.state.status == "finished" and "failed: full" in run.log_path("run").read_text()


def test_a_run_of_an_earlier_version_keeps_its_estimator_of_drift(tmp_path):
    """Its stored config has no `drift_estimator`. It goes on with the rule and the keys it began with; the same file is another
    experiment now, and says in what."""
    new = load_experiment(TINY, ["train.max_drift=0.5"])
    old = new.model_dump(mode="json")
    del old["train"]["drift_estimator"]
    Run.create(tmp_path, "old", old, {k: v for k, v in old.items() if k not in ("runtime", "policy")})
    resumed = resume_experiment("old", tmp_path, [])
    assert (resumed.train.drift_estimator, new.train.drift_estimator) == ("log_ratio", "k3")
    assert canonical_json(resumed.train) == canonical_json(new.train).replace('"drift_estimator":"k3",', "")
    assert fork_experiment("old", 0, tmp_path, []).at(0).train == resumed.train
    with pytest.raises(IdentityMismatch, match=r'train\.drift_estimator: absent in the run, "k3" now'):
        open_run(new, "old", tmp_path)


def test_figures_that_a_round_did_not_measure_are_explained(tmp_path, capsys):
    run = open_run(load_experiment(TINY), "base", tmp_path)
    measured = {"train_student_entropy_last": 2.5, "train_teacher_entropy_last": 2.0}
    state = run.state
    state.rounds = [
        RoundState(round=0, student_sha256="0" * 64),
        RoundState(round=1, student_sha256="1" * 64, metrics=measured),
        RoundState(round=2, student_sha256="2" * 64, metrics=measured | {"train_student_entropy_last": None}),
    ]

    def shown():
        print_report(state, tmp_path)
        return capsys.readouterr().out

    assert "overlap and entropy: measured every train.metrics_every steps" in shown()
    state.rounds.pop()
    assert "2.500" in shown() and "metrics_every" not in shown()
