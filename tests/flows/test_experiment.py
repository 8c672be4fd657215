"""Configs: what is refused, with which message, and what belongs to identity."""

from __future__ import annotations

import pytest
import yaml
from places import CHECKOUT, TINY

from flows.config_file import parse_override, read_config
from flows.experiment import Experiment, load_experiment
from flows.reference.pages import PAGES
from storage.errors import ConfigError


def refused(*changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(TINY, list(changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ("rollout.top_pp=0.9", "rollout.top_pp", "did you mean 'top_p'"),
        ("trian.lr=1e-4", "trian", "did you mean 'train'"),
        ("objective.support.kk=3", "objective.support.kk", "did you mean 'k'"),
        ("teacher.source.confg={}", "teacher.source.confg", "did you mean 'config'"),
        ("rollout.top_p=0", "rollout.top_p", "greater than 0"),
        ("rollout.top_p=1.5", "rollout.top_p", "less than or equal to 1"),
        ("train.lr=-1", "train.lr", "greater than or equal to 0"),
        ("objective.divergence.kind=revers_kl", "objective.divergence.kind", "did you mean 'reverse_kl'"),
        ("objective.support.k=1000", "objective.support.k", "above the vocabulary"),
        ("rollout.max_completion_length=64", "rollout.max_completion_length", "max_position_embeddings, 64"),
        ("train.samples_per_step=15", "train.samples_per_step", "does not divide"),
        ("objective={estimator: sft}", "objective.estimator", "student.warmup"),
        ("prompts.warmup=null", "teacher.warmup", "needs prompts.warmup"),
    ],
)
def test_bad_values_are_refused_by_field_and_with_a_way_out(change, field, says):
    message = refused(change)
    assert field in message and says in message


def test_a_sampled_estimator_is_refused_with_a_nucleus_and_accepted_without():
    change = "objective={estimator: policy_gradient, divergence: {kind: reverse_kl}}"
    assert "rollout.top_p is 0.9" in refused(change)
    load_experiment(TINY, [change, "rollout.top_p=1"])


def test_renormalising_one_category_is_refused_with_its_reason():
    assert "identically" in refused("objective.support={kind: teacher_topk, k: 1, outside: renormalize}")


def test_full_support_below_the_vocabulary_is_refused():
    full = "objective.support={kind: full, k: %d}"
    assert "k is 263 and the vocabulary has 264 rows; set k: 264" in refused(full % 263)
    load_experiment(TINY, [full % 264])
    # a teacher of fewer rows: both models share these, and no more can be asked for
    narrow = "teacher.source.config.vocab_size=262"
    load_experiment(TINY, [full % 262, narrow])
    assert "set k: 262" in refused(full % 261, narrow)


def test_every_problem_is_listed_at_once():
    message = refused("rollout.top_p=0", "train.lr=-1")
    assert "2 problem(s)" in message and "rollout.top_p" in message and "train.lr" in message


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1"])
def test_a_malformed_override_shows_the_form(text):
    with pytest.raises(ConfigError, match=r"FIELD\.FIELD=VALUE"):
        load_experiment(TINY, [text])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("-1E5", -1e5), (".5e3", 500.0), ("2.e-3", 2e-3), ("'1e-5'", "1e-5"), ("3e4f", "3e4f")],
)
def test_numbers_in_scientific_notation_are_numbers(text, value, tmp_path):
    (tmp_path / "config.yaml").write_text(f"a: [{text}]")
    assert read_config(tmp_path / "config.yaml") == {"a": [value]}
    assert parse_override(f"a={text}") == {"a": value}


def test_a_changed_variant_does_not_inherit_the_old_ones_fields():
    changed = load_experiment(
        TINY, ["objective.divergence={kind: jsd, beta: 0.3}", "objective.divergence.kind=reverse_kl"]
    )
    assert changed.objective.divergence.kind == "reverse_kl"


def test_runtime_and_policy_are_no_identity():
    base = load_experiment(TINY)
    other = load_experiment(TINY, ["runtime.threads=2", "policy.rounds=9", "runtime.trainer.processes=2"])
    assert other.identity() == base.identity()
    assert load_experiment(TINY, ["seed=1"]).identity() != base.identity()


def test_the_resolved_config_makes_the_same_experiment(tmp_path):
    base = load_experiment(TINY)
    path = tmp_path / "resolved.yaml"
    path.write_text(base.to_yaml())
    assert load_experiment(path) == base


def test_a_config_laid_over_a_base_changes_only_what_it_says(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": str(TINY), "train": {"lr": 0.5}}))
    mine, base = load_experiment(path), load_experiment(TINY)
    assert mine.train.lr == 0.5
    assert mine.train.samples_per_step == base.train.samples_per_step and mine.rollout == base.rollout


def test_a_fork_is_governed_by_its_parent_up_to_the_fork():
    parent = load_experiment(TINY)
    data = load_experiment(TINY, ["train.lr=0.5"]).model_dump(mode="json")
    fork = Experiment.model_validate(
        data | {"fork": {"run": "p", "round": 2, "experiment": parent.model_dump(mode="json")}}
    )
    assert [fork.at(r).train.lr for r in (0, 1, 2, 3)] == [1e-3, 1e-3, 1e-3, 0.5]


EXPERIMENTS = sorted(set((CHECKOUT / "configs").rglob("*.yaml")) - {CHECKOUT / "configs" / "study.yaml"})


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_config_in_the_repository_loads(path, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    load_experiment(path)


@pytest.mark.parametrize("page", PAGES)
def test_the_reference_pages_are_what_the_code_says(page):
    written = (CHECKOUT / "docs" / f"{page}.md").read_text()
    assert written == PAGES[page](), f"python -m flows.reference.pages {page} > docs/{page}.md"
