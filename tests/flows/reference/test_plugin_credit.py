"""A credit of a plugin is found by config validation, `opd objectives` and both reference pages, without any edit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml
from places import CHECKOUT, DATA

from flows.config_file import merge
from flows.experiment import Experiment, experiment_of
from storage.errors import ConfigError
from storage.identity import canonical_json
from tasks import plugins
from tasks.losses.credit import CREDITS

GOLDEN = merge(
    yaml.safe_load((DATA / "golden.yaml").read_text()),
    {"rollout": {"top_p": 1.0}, "objective": {"estimator": "policy_gradient"}, "plugins": ["extra_credits"]},
)


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported as by a new process, and forgotten afterwards."""
    monkeypatch.setattr(CREDITS, "classes", dict(CREDITS.classes))
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.delitem(sys.modules, "extra_credits", raising=False)
    monkeypatch.syspath_prepend(str(CHECKOUT / "tests" / "plugins"))


def with_advantage(advantage: object) -> Experiment:
    return experiment_of(merge(GOLDEN, {"objective": {"advantage": advantage}}), "test")


def test_a_config_names_it_and_its_fields_are_identity() -> None:
    named, mapped, other = (
        with_advantage(a) for a in ("decayed", {"kind": "decayed", "half_life": 4}, {"kind": "decayed", "half_life": 5})
    )
    assert named.objective == mapped.objective != other.objective
    assert '"advantage":{"half_life":4.0,"kind":"decayed"}' in canonical_json(named.objective)
    assert Experiment.model_validate(named.model_dump(mode="json")) == named
    for bad, field in (({"kind": "decayed", "half_life": 0}, "half_life"), ({"kind": "decayed", "half": 1}, "half")):
        with pytest.raises(ConfigError, match=rf"objective\.advantage\.{field}"):
            with_advantage(bad)


@pytest.mark.parametrize(
    ("objective", "field"),
    [
        ({"advantage": "grouped"}, "objective.advantage.*`judge`"),
        ({"advantage": "decayed", "support": {"kind": "student_topk"}}, "advantage: decayed.*support.kind"),
        ({"advantage": "grouped", "trust_region": {"kind": "tropd"}}, "advantage: grouped and trust_region tropd"),
    ],
    ids=["a reward that nothing gives", "a list of candidates", "two divergences beside it"],
)
def test_what_makes_no_sense_with_it_is_refused(objective: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        experiment_of(merge(GOLDEN, {"objective": objective}), "test")


def test_the_command_line_and_the_pages_show_it() -> None:
    """In processes of their own, as a user's."""
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "plugins")])

    def shown(*command: str) -> str:
        run = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=CHECKOUT,
            env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout

    listed = shown("flows.cli.app", "objectives", "--plugin", "extra_credits")
    assert "decayed" in listed and "half_life 4.0" in listed
    one = shown("flows.cli.app", "objectives", "grouped", "--plugin", "extra_credits")
    assert "tests/plugins/extra_credits.py, Grouped" in one and "A_r = r - mean of the group" in one
    page = shown("flows.reference.pages", "objectives", "extra_credits")
    assert "### decayed [experimental]" in page and "| `half_life` | `4.0` | tokens after which" in page
    config = shown("flows.reference.pages", "config", "extra_credits")
    assert "## Decayed" in config and "or `decayed` or `grouped`" in config and "[Grouped](#grouped)" in config
