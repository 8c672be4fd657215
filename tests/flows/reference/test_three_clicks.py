"""From the name of a method to its equation and its code: README's table, then docs/objectives.md, then the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import CHECKOUT
from typer.testing import CliRunner

from flows.cli.app import make_app
from flows.reference import catalogue

README, PAGE = CHECKOUT / "README.md", CHECKOUT / "docs" / "objectives.md"
METHODS = {
    "GRPO": ("2402.03300", "reward-group"),
    "SDPO": ("2601.20802", "route-contexts"),
    "SRPO": ("2604.02288", "route-srpo"),
    "SDFT": ("2601.19897", "term-beside"),
    "OPSD script": ("2601.18734", "term-beside"),
    "OPSD paper": ("2601.18734", "term-beside"),
    "RLRT": ("2605.10781", "scale-rlrt"),
    "RLSD": ("2604.03128", "scale-rlsd"),
    "VISD": ("2605.06094", "scale-visd"),
    "AntiSD": ("2605.11609", "addition-anti-sd"),
    "DASD": ("2605.22263", "addition-dasd"),
    "SOD": ("2605.07725", "addition-sod"),
    "TRACE": ("2605.10194", "route-spans"),
    "PTD-PO": ("2606.07000", "route-failed-groups"),
    "RESD": ("2605.12741", "target-floor"),
    "DistIL": ("2606.05152", "term-sequence-gradient"),
    "IW-OPD": ("2606.22600", "addition-iw"),
    "vOPD": ("2605.07865", "addition-vopd"),
    "PowerOPD": ("2606.17199", "addition-power"),
    "Veto": ("2601.07155", "target-product"),
    "SDAR": ("2605.15155", "term-likelihood"),
    "SDPG": ("2606.04036", "term-reference"),
    "TOP-D return": ("2607.04751", "return-mean-future"),
}
"""A method of the family of SRPO -> its paper, and the entry whose code is what it has of its own."""
NOT_BUILT = {
    "PGPO": "weighs its policy gradient",
    "SocraticPO": "what its discount applies to",
    "RAPS-DA": "selects a teacher",
}
"""A method that is named and not built -> words of the reason."""
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
CODE = re.compile(r"code: \[([^\]]+)\]\(([^)]+)\), `(\w+)`")
ROW = re.compile(r"^\| (.*?) \| (.*) \|$", re.MULTILINE)


def folded(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def sections() -> dict[str, str]:
    """Anchor of docs/objectives.md -> what stands under it, up to the next one or the next axis."""
    parts = re.split(r'<a id="([^"]+)"></a>', PAGE.read_text())
    return {anchor: text.partition("\n## ")[0] for anchor, text in zip(parts[1::2], parts[2::2], strict=True)}


SECTIONS = sections()


def table_of_the_readme() -> dict[str, str]:
    """Folded name of a recipe -> where README's table links it."""
    table = README.read_text().partition("| recipe | method |")[2].partition("\n\n")[0]
    return {folded(name): target for first, _ in ROW.findall(table) for name, target in LINK.findall(first)}


LINKED = table_of_the_readme()


def section_behind(target: str, place: Path) -> tuple[str, str]:
    """(anchor, its section) of a link that stands in the file `place`."""
    path, _, anchor = target.partition("#")
    assert (place.parent / path if path else place).resolve() == PAGE, target
    assert anchor in SECTIONS, f"{place.name} links {target}, and the page has no such anchor"
    return anchor, SECTIONS[anchor]


def equations(section: str) -> list[str]:
    return [line.strip() for line in section.splitlines() if line.startswith("    ") and line.strip()]


def code_behind(section: str) -> Path:
    """The file that the section links as its code; it has what the section names."""
    (found,) = CODE.findall(section)
    path = (PAGE.parent / found[1]).resolve()
    assert path.is_relative_to(CHECKOUT) and re.search(rf"^(class|def) {found[2]}\b", path.read_text(), re.MULTILINE)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_from_a_method_to_its_equation_and_its_code(method: str) -> None:
    paper, own = METHODS[method]
    assert folded(method) in LINKED, f"README's table has no link of {method}"
    anchor, section = section_behind(LINKED[folded(method)], README)
    assert anchor.startswith("recipe-") and equations(section)
    assert f"https://arxiv.org/abs/{paper}" in section
    code_behind(section)
    parts = dict(section_behind(target, PAGE) for _, target in LINK.findall(section) if target.startswith("#"))
    assert own in parts, f"{method} is made of {sorted(parts)}"
    for name, part in parts.items():
        assert equations(part), name
        code_behind(part)


def test_every_recipe_is_linked_and_named_as_its_file_is() -> None:
    recipes = {path.stem for path in (CHECKOUT / "configs" / "recipes").glob("*.yaml")}
    assert {target.partition("#recipe-")[2] for target in LINKED.values()} == recipes
    assert LINKED.keys() == {folded(name) for name in recipes}


def test_the_readme_names_the_family_and_what_is_not_built() -> None:
    after = README.read_text().partition("| recipe | method |")[2].partition("\n\n")[2].partition("\n\n")[0]
    targets = [target for _, target in LINK.findall(after)]
    family, missing = "docs/objectives.md#estimator-credit", "docs/objectives.md#not-built"
    assert family in targets and missing in targets and all(name in after for name in NOT_BUILT)
    assert "2604.02288" in section_behind(family, README)[1]
    assert "\n## Not built\n" in PAGE.read_text()  # a heading's anchor is its name


@pytest.fixture(scope="module", autouse=True)
def _one_catalogue() -> Iterator[None]:
    """Made once: it reads every recipe."""
    entries = catalogue.catalogue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "catalogue", lambda: entries)
        yield


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(make_app(), ["objectives", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    return " ".join(result.stdout.split())


@pytest.mark.parametrize("method", NOT_BUILT)
def test_what_is_not_built_is_named_with_the_reason(method: str) -> None:
    (anchor,) = [name for name in SECTIONS if folded(name) == folded(f"not built {method}")]
    listed = shown().partition("not built")[2]
    for text in (SECTIONS[anchor], shown(method), listed):
        assert "not known from summaries" in text and NOT_BUILT[method] in text
    assert anchor.removeprefix("not-built-") in listed


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_found_by_the_name_that_its_paper_uses(method: str) -> None:
    text = shown(method)
    assert METHODS[method][0] in text and "recipe configs/recipes/" in text
