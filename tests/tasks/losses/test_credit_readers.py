"""Which term reads which field of `estimator: credit`: the table against the loss itself, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from credit_configs import CONFIGURED, DAPO, GROUP, K, Row
from credit_rows.toy import toys
from credited import gradients_of, loss_of
from places import CHECKOUT
from pydantic import BaseModel, ValidationError

from flows.config_file import merge
from flows.experiment import experiment_of, load_experiment
from storage.errors import ConfigError
from tasks.losses.token_credit.config import CreditConfig
from tasks.losses.token_credit.readers import READERS, without_effect

TOP = {"support": {"kind": "student_topk", "k": K, "outside": "bucket"}}
OTHER: dict[str, Any] = {
    "reward": {**GROUP, "std": False},
    "reward.center": "leave_one_out",
    "reward.std": False,
    "reward.eps": 0.5,
    "reward.success_threshold": 0.9,
    "scale": {"kind": "rlsd"},
    "add": {"kind": "log_ratio", "coef": 0.3},
    "add.eps": 1.0,
    "add.rise": 0.9,
    "returns": {"kind": "discounted", "gamma": 0.5},
    "returns.eps": 1.0,
    "route": {"kind": "divergence"},
    "beside": {**TOP, "coef": 0.7},
    "beside.tail_logmass_min": -0.5,
    "likelihood": {"coef": 0.7},
    "reference": {"coef": 0.7},
    "ratio": "none",
    "clip": {"low": 0.01, "high": 0.01, "dual": None},
    "advantage_at": "live",
    "log_ratio_clip": 0.05,
    "log_rho_clip": 0.001,
    "last_token": False,
    "denominator": "own",
    "normalisation": "sequence",
    "normalisation_length": 11,
}
"""Another value of every field in the table."""
MORE = [
    Row("one segment", {"reward": GROUP, "add": "sod", "clip": DAPO}, contexts=False),
    Row("graded", {"reward": GROUP | {"success_threshold": 0.3}, "route": "srpo", "beside": TOP}),
]


def changed(config: dict[str, Any], field: str, value: Any) -> dict[str, Any] | None:
    """The config with another value of a field; None where it has no such field."""
    full = json.loads(CreditConfig.model_validate(config).model_dump_json())
    *sections, name = field.split(".")
    holder = full
    for section in sections:
        if isinstance(holder.get(section), str):
            holder[section] = {"kind": holder[section]}
        if holder.get(section) is None:
            return None
        holder = holder[section]
    holder[name] = value
    return full


def test_the_table_has_every_field() -> None:
    top = {reader.field for reader in READERS if "." not in reader.field}
    assert top == set(CreditConfig.model_fields) - {"estimator"} and set(OTHER) == {r.field for r in READERS}


def test_the_page_has_the_table() -> None:
    page = (CHECKOUT / "docs" / "rewards.md").read_text()
    for reader in READERS:
        assert f"| `{reader.field}` | {reader.by} |\n" in page


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.field)
def test_a_field_changes_the_loss_where_the_table_says_so_and_nowhere_else(reader: Any) -> None:
    """Over all rows of the family. `there` false: loss and gradients are the same bits, and the field is refused."""
    seen = set()
    for row in [*CONFIGURED, *MORE]:
        data = changed(row.config, reader.field, OTHER[reader.field])
        if data is None:
            continue
        try:
            other = CreditConfig.model_validate(data)
        except ValidationError:
            continue
        if other == row.objective:
            continue
        there = reader.there(other)
        toy = row.of(toys(11, graded=row.name == "graded"))
        before, after = (loss_of(c, toy, step=row.step, contexts=row.contexts) for c in (row.objective, other))
        pairs = zip(gradients_of(before, toy), gradients_of(after, toy), strict=True)
        same = torch.equal(before.detach(), after.detach()) and all(torch.equal(a, b) for a, b in pairs)
        refused = any(line.startswith(f"objective.{reader.field}:") for line in without_effect(other))
        assert there or same, row
        assert refused == (not there), row
        seen.add((there, same))
    assert (True, False) in seen, "no row shows that it is read"


SDPO = {"reward": "none", "route": "contexts", "beside": TOP}


@pytest.mark.parametrize(
    ("config", "field", "why"),
    [
        (SDPO | {"clip": DAPO}, "objective.clip: this section has no effect", "route contexts has no policy gradient"),
        (SDPO | {"ratio": "none"}, "objective.ratio: none", "set it to ppo"),
        (SDPO | {"advantage_at": "live"}, "objective.advantage_at: live", "read by scale and add alone"),
        ({"reward": GROUP}, "objective.reward.success_threshold: 0.5", "set it to null"),
        ({"reward": "group", "advantage_at": "live"}, "objective.advantage_at: live", "scale and add"),
        ({"reward": {"kind": "group", "std": False, "eps": 1e-3}}, "objective.reward.eps", "reward.std"),
        ({"beside": TOP, "log_rho_clip": 3.0}, "objective.log_rho_clip", "without reward and add"),
        ({"reward": "group", "add": {"kind": "sod", "rise": 0.5}}, "objective.add.rise", "segments"),
        (
            {"reward": GROUP, "route": "divergence", "scale": "rlsd", "beside": TOP | {"weight": {"kind": "success_rate"}}},
            "objective.scale: rlsd",
            "set it to none",
        ),
    ],
)  # fmt: skip
def test_a_field_without_effect_is_named(config: dict[str, Any], field: str, why: str) -> None:
    [line] = without_effect(CreditConfig.model_validate(config))
    assert line.startswith(field) and why in line and "\n" not in line


def test_it_is_refused_in_a_config_and_read_in_a_stored_run(tmp_path: Path) -> None:
    recipe = CHECKOUT / "configs/recipes/sdpo.yaml"
    overrides = ["objective.clip={low: 0.2, high: 0.2}", "objective.ratio=none"]
    with pytest.raises(ConfigError, match=r"1 problem.*\n  objective\.ratio: none has no effect"):
        load_experiment(recipe, ["objective.ratio=none"])
    with pytest.raises(ConfigError, match="clip: bounds the ratio, and ratio is none"):
        load_experiment(recipe, overrides)
    stored = load_experiment(recipe).model_dump(mode="json")
    old = experiment_of(merge(stored, {"objective": {"clip": {"low": 0.2}}}), "run old")
    assert old.objective.clip is not None


def test_a_penalty_for_leaving_the_rollouts_student_needs_a_second_step() -> None:
    recipe = CHECKOUT / "configs/recipes/sdpg.yaml"
    e = load_experiment(recipe)
    samples = e.rollout.prompts_per_round * e.rollout.num_generations * e.train.epochs_per_round
    assert e.steps_per_round > 1
    with pytest.raises(ConfigError, match=r"objective\.reference\.to: rollout, but a round has one optimizer step"):
        load_experiment(recipe, [f"train.samples_per_step={samples}"])


@pytest.mark.parametrize("file", sorted(CHECKOUT.glob("configs/recipes/*.yaml")), ids=lambda file: file.stem)
def test_no_recipe_has_a_field_without_effect(file: Path) -> None:
    assert isinstance(load_experiment(file), BaseModel)
