"""The dtypes in which the student is sampled, scored and trained; lists that no column could count."""

from __future__ import annotations

import pytest
from places import TINY

from flows.cross_checks import dtype_warning
from flows.experiment import load_experiment
from flows.run.check import check_experiment
from flows.run.runner import fork_experiment, plan, resume_experiment, run_experiment, with_policy_of
from storage.errors import ConfigError
from storage.runs import Run
from tasks.signals import signal_named
from tasks.train import mismatch_warning

SAMPLED = ["objective={estimator: policy_gradient}", "rollout.top_p=1", "rollout.temperature=1"]
BFLOAT = ["rollout.dtype=bfloat16", "supervise.dtype=bfloat16", "train.dtype=bfloat16"]


@pytest.mark.parametrize("odd", range(3))
def test_a_policy_gradient_is_refused_where_one_dtype_differs(tmp_path, odd):
    mixed = [*SAMPLED, *(text for at, text in enumerate(BFLOAT) if at != odd)]
    experiment = load_experiment(TINY, mixed)
    for start in (
        lambda: plan(experiment, tmp_path),
        lambda: list(check_experiment(experiment, tmp_path)),
        lambda: run_experiment(experiment, name="run", root=tmp_path, prefect=False),
    ):
        with pytest.raises(ConfigError, match=r"policy\.allow_mixed_dtypes"):
            start()
    assert not any((tmp_path / "runs").glob("*"))
    accepted = load_experiment(TINY, [*mixed, "policy.allow_mixed_dtypes=true"])
    assert "train.dtype" in (dtype_warning(accepted) or "")
    assert accepted.identity() == experiment.identity()


def test_a_run_that_began_before_the_refusal_goes_on(tmp_path):
    """By resume, by its config, in a plan and a fork; a run of one dtype gets no permission by its age."""
    experiment = load_experiment(TINY, [*SAMPLED, *BFLOAT[:2], "policy.rounds=0"])
    for name, stored in (("mixed", experiment), ("equal", load_experiment(TINY, [*SAMPLED, "policy.rounds=0"]))):
        data = stored.model_dump(mode="json")
        del data["policy"]["allow_mixed_dtypes"]
        Run.create(tmp_path, name, data, stored.identity())
    assert "train.dtype" in (dtype_warning(resume_experiment("mixed", tmp_path, [])) or "")
    plan(experiment, tmp_path, name="mixed")
    assert with_policy_of("mixed", tmp_path, experiment).policy.allow_mixed_dtypes
    assert fork_experiment("mixed", 0, tmp_path, []).policy.allow_mixed_dtypes
    with pytest.raises(ConfigError, match=r"policy\.allow_mixed_dtypes"):
        plan(load_experiment(TINY, [*SAMPLED, *BFLOAT[:2], "policy.allow_mixed_dtypes=false"]), tmp_path, name="mixed")
    assert not resume_experiment("equal", tmp_path, []).policy.allow_mixed_dtypes


@pytest.mark.parametrize("odd", range(3))
def test_other_objectives_are_warned(tmp_path, odd):
    experiment = load_experiment(TINY, [text for at, text in enumerate(BFLOAT) if at != odd])
    assert all(
        name in (dtype_warning(experiment) or "") for name in ("rollout.dtype", "supervise.dtype", "train.dtype")
    )
    assert any(line.startswith("warning:") and "train.dtype" in line for line in check_experiment(experiment, tmp_path))


@pytest.mark.parametrize("fields", [[], BFLOAT, [*SAMPLED, *BFLOAT], SAMPLED])
def test_one_dtype_is_fine(fields):
    assert dtype_warning(load_experiment(TINY, fields)) is None


@pytest.mark.parametrize("kind", ["teacher_topk", "student_topk"])
def test_lists_longer_than_their_column_counts_are_refused_at_load(kind):
    assert signal_named(kind).problem(32767) is None
    assert "32767" in (signal_named(kind).problem(32768) or "")


def test_k_above_the_columns_limit_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="32767"):
        load_experiment(
            TINY, ["objective={estimator: direct, support: {kind: full, k: 50257, max_bytes_per_token: 1000000}}"]
        )


class Sampled:
    def __init__(self, mean: float | None) -> None:
        self.meta = {"metrics": {"sampler_mismatch_mean": mean, "sampler_mismatch_p99": mean}}


@pytest.mark.parametrize(
    ("mean", "fields", "warned"),
    [
        (0.05, SAMPLED, True),
        (0.01, SAMPLED, False),
        (None, SAMPLED, False),
        (0.05, [], False),  # a direct objective takes no sample for the student's own
        (0.05, [*SAMPLED, "train.importance_correction={kind: truncated}"], False),
    ],
)
def test_a_large_gap_between_sampler_and_student_names_the_correction(mean, fields, warned):
    experiment = load_experiment(TINY, fields)
    warning = mismatch_warning(experiment.train, experiment.objective, [Sampled(mean)])
    assert (warning is not None and "train.importance_correction" in warning) == warned
