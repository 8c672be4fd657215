"""`opd objectives` and the page made of the same catalogue."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.methods import catalogue
from flows.reference import objectives
from storage.errors import ConfigError
from tasks.losses.divergences import REGISTRY

CHECKOUT = Path(__file__).resolve().parent.parent.parent
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


def test_the_list_and_one_method() -> None:
    listed = run()
    assert all(name in listed for name in ("revisiting-opd", "skewed_reverse_kl", "entropy_gate", "teacher_entropy"))
    shown = run("tropd")
    assert "min(q(y)/p(y), 1)" in shown and "2606.01249" in shown and "logprob_min" in shown
    assert "tasks/losses/trust_regions.py, TrOPD" in shown and "configs/recipes/tropd.yaml" in shown
    found = json.loads(run("forward_kl", "--json"))
    assert [(entry["axis"], entry["equations"][0]) for entry in found] == [
        ("divergence", REGISTRY["forward_kl"].equation)
    ]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tropd'"):
        CliRunner().invoke(make_app(), ["objectives", "tropdd"], catch_exceptions=False)
