"""A run before any stage starts: what is refused at once."""

from __future__ import annotations

import pytest
from places import TINY

from flows.experiment import load_experiment
from flows.run.runner import fork_experiment, open_run, resume_experiment, run_experiment
from storage.errors import ConfigError, IdentityMismatch, NotEnoughSpace
from storage.identity import canonical_json
from storage.runs import Run
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
