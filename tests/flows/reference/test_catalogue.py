"""`opd objectives` and the page made of the same catalogue."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from places import CHECKOUT
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.cli.objectives import config_lines
from flows.experiment import load_experiment
from flows.reference.catalogue import catalogue
from flows.reference.pages import objectives
from storage.errors import ConfigError
from tasks.losses.divergences import REGISTRY
from tasks.losses.trust_regions import TRUST_REGIONS

ENTRIES = catalogue()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), ["objectives", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_every_entry_says_what_it_is_and_leads_to_its_code() -> None:
    for entry in ENTRIES:
        path, _, name = entry.code.partition(" ")
        source = (CHECKOUT / path).read_text()
        assert re.search(rf"(class|def) {name}\b", source), f"{entry.name}: no {name} in {path}"
        assert entry.summary and entry.equations and all(entry.equations)
        assert all(field.meaning for field in entry.fields), f"{entry.axis} {entry.name}: a field without a meaning"
        assert not entry.file or (CHECKOUT / entry.file).exists()


def test_every_link_of_the_page_leads_somewhere() -> None:
    page = objectives()
    anchors = set(re.findall(r'<a id="([^"]+)">', page))
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors
    files = set(re.findall(r"\]\(\.\./([^)#]+)\)", page))
    assert files and all((CHECKOUT / file).exists() for file in files)
    assert {f"recipe-{path.stem}" for path in (CHECKOUT / "configs" / "recipes").glob("*.yaml")} <= anchors


def test_recipes_are_listed_alone() -> None:
    result = CliRunner().invoke(make_app(), ["recipes", "--json"], catch_exceptions=False)
    listed = json.loads(result.stdout)
    assert {entry["name"] for entry in listed} == {
        path.stem for path in (CHECKOUT / "configs" / "recipes").glob("*.yaml")
    }
    assert {entry["axis"] for entry in listed} == {"recipe"}


def test_the_list_and_one_method() -> None:
    listed = run()
    assert all(name in listed for name in ("revisiting-opd", "skewed_reverse_kl", "entropy_gate", "teacher_entropy"))
    shown = run("tropd")
    assert "min(q(y)/p(y), 1)" in shown and "2606.01249" in shown and "logprob_min" in shown
    assert "tasks/losses/trust_regions.py, TrOPD" in shown and "configs/recipes/tropd.yaml" in shown
    assert "    objective:\n      estimator: policy_gradient\n" in shown
    assert run("srpo").rstrip().endswith("are the demo's"), "a route has the name too; the recipe's lines come last"
    found = json.loads(run("forward_kl", "--json"))
    assert [(entry["axis"], entry["equations"][0]) for entry in found] == [
        ("divergence", REGISTRY["forward_kl"].equation)
    ]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CHECKOUT / "configs" / "recipes").glob("*.yaml")))
def test_the_lines_that_a_recipe_shows_make_a_config_of_another_task_valid(recipe: str, tmp_path: Path) -> None:
    text = "\n".join(config_lines(recipe))
    shown = yaml.safe_load(text)
    assert "objective" in shown and not {"student", "prompts"} & shown.keys() and "264" not in text
    config = yaml.safe_load((CHECKOUT / "configs/demo.yaml").read_text())
    del config["objective"], config["supervise"]
    config["rollout"]["max_completion_length"] = 48
    if recipe == "multi-teacher":
        config |= {"teachers": {"one": config["teacher"]}, "teacher": None}
    if (shown.get("teacher") or {}).get("source"):
        config["teacher"] = {"warmup": None}
    for name, value in shown.items():
        config[name] = config.get(name, {}) | value if name in ("teacher", "rollout", "train") else value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    objective = load_experiment(tmp_path / "mine.yaml", []).objective
    assert objective.estimator == load_experiment(Path(f"recipe:{recipe}"), []).objective.estimator


def test_a_support_has_the_fields_of_its_own_estimator() -> None:
    """Two estimators have a student_topk each: other defaults, other fields, other code."""
    found = {e.estimator: e for e in ENTRIES if (e.axis, e.name) == ("support", "student_topk")}
    direct, policy = found["direct"], found["policy_gradient"]
    assert {f.name: f.default for f in direct.fields} == {"k": "32", "outside": "bucket"}
    assert {f.name: f.default for f in policy.fields} == {"k": "16", "weights_at": "rollout", "baseline": "none"}
    assert (direct.code, policy.code) == ("tasks/losses/axes.py TopkSupport", "tasks/losses/axes.py StudentCandidates")
    assert direct.anchor != policy.anchor
    shown = run("student_topk")
    assert "(support of direct)" in shown and "(support of policy_gradient)" in shown
    (recipe,) = [e for e in ENTRIES if e.name == "rethinking-opd"]
    assert f"{policy.axis} {policy.label}" in recipe.uses


@pytest.mark.parametrize(
    ("recipe", "equation"),
    [
        ("tropd", "M (-A rho) + (1-M) sum_{v in top-k} q log(q/p), M ~ Bernoulli(min(q(y)/p_old(y), 1))"),
        ("tropd-mask", "M (-A rho), M ~ Bernoulli(min(q(y)/p_old(y), 1))"),
        ("tropd-clip", "M (-A rho) + (1-M) (-max(A, clip_at) rho), M ~ Bernoulli(min(q(y)/p_old(y), 1))"),
        ("reopold", "A = max(A, floor)"),
    ],
)
def test_a_recipe_shows_the_equation_of_the_variant_that_it_sets(recipe: str, equation: str) -> None:
    (entry,) = [e for e in ENTRIES if (e.axis, e.name) == ("recipe", recipe)]
    (shown,) = [text for text in entry.equations if text.startswith("trust region")]
    assert shown.partition(": ")[2] == equation


@pytest.mark.parametrize("kind", TRUST_REGIONS.classes)
def test_every_variant_of_a_trust_region_has_an_equation_of_its_own(kind: str) -> None:
    cls = TRUST_REGIONS.classes[kind]
    choices = {
        name: get_args(info.annotation)
        for name, info in cls.model_fields.items()
        if name != "kind" and get_origin(info.annotation) is Literal
    }
    variants = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    assert len({cls.model_validate(variant).configured for variant in variants}) == len(variants)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tropd'"):
        CliRunner().invoke(make_app(), ["objectives", "tropdd"], catch_exceptions=False)
