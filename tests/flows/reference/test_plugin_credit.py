"""A credit of a plugin is found by config validation, `opd objectives` and both reference pages, without any edit."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import yaml
from places import CHECKOUT, DATA
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.config_file import merge
from flows.experiment import Experiment, experiment_of
from flows.reference import pages
from storage.errors import ConfigError
from storage.identity import canonical_json
from tasks import plugins
from tasks.losses.credit import CREDITS

GOLDEN = merge(
    yaml.safe_load((DATA / "golden.yaml").read_text()),
    {"rollout": {"top_p": 1.0}, "objective": {"estimator": "policy_gradient"}, "plugins": ["extra_credits"]},
)


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imported as by a new process, and forgotten afterwards."""
    monkeypatch.setattr(CREDITS, "classes", dict(CREDITS.classes))
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.delitem(sys.modules, "extra_credits", raising=False)
    monkeypatch.syspath_prepend(str(CHECKOUT / "tests" / "plugins"))
    yield
    sys.modules.pop("extra_credits", None)


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
        ({"advantage": "grouped"}, "judge: this objective needs a reward of each completion"),
        ({"advantage": "decayed", "support": {"kind": "student_topk"}}, "advantage: decayed.*support.kind"),
        ({"advantage": "grouped", "trust_region": {"kind": "tropd"}}, "advantage: grouped and trust_region tropd"),
    ],
    ids=["a reward that nothing gives", "a list of candidates", "two divergences beside it"],
)
def test_what_makes_no_sense_with_it_is_refused(objective: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        experiment_of(merge(GOLDEN, {"objective": objective}), "test")


def test_the_command_line_and_the_pages_show_it() -> None:
    def shown(*arguments: str) -> str:
        command = ["objectives", *arguments, "--plugin", "extra_credits"]
        return CliRunner().invoke(make_app(), command, env={"COLUMNS": "200"}, catch_exceptions=False).stdout

    listed = shown()
    assert "decayed" in listed and "half_life 4.0" in listed
    one = shown("grouped")
    assert "tests/plugins/extra_credits.py, Grouped" in one and "A_r = r - mean of the group" in one
    page = pages.objectives()
    assert "### decayed [experimental]" in page and "| `half_life` | `4.0` | tokens after which" in page
    config = pages.reference()
    assert "## Decayed" in config and "or `decayed` or `grouped`" in config and "[Grouped](#grouped)" in config
