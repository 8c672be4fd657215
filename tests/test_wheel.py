"""What an installation without the checkout has: every config and recipe, found by the names that the documentation uses."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from places import CHECKOUT

from flows import config_file


def package_data(name: str) -> list[str]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][name]


def test_what_a_page_is_made_of_is_in_the_package():
    page = CHECKOUT / "flows" / "page"
    packed = {path for pattern in package_data("flows") for path in (CHECKOUT / "flows").glob(pattern)}
    files = {path for path in page.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packed == files and page / "vendor" / "chart.LICENSE.md" in packed


def test_every_config_is_in_the_package():
    patterns = package_data("opdflow")
    package = CHECKOUT / "opdflow"
    packed = {path.relative_to(package).as_posix() for pattern in patterns for path in package.glob(pattern)}
    assert packed == {
        path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "configs").rglob("*") if path.is_file()
    }


def test_a_path_of_the_documentation_names_the_installed_config_unless_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Path("configs/recipes/opd.yaml")
    assert config_file.shipped(recipe) == config_file.CONFIGS / "recipes" / "opd.yaml"
    assert config_file.shipped(Path("configs/none.yaml")) == Path("configs/none.yaml")
    assert config_file.shipped(Path("recipes/opd.yaml")) == Path("recipes/opd.yaml")
    (tmp_path / "configs" / "recipes").mkdir(parents=True)
    (tmp_path / recipe).write_text("seed: 1")
    assert config_file.shipped(recipe) == recipe


def pinned(name: str) -> dict[str, str]:
    """Package -> version of a list of requirements/."""
    lines = (CHECKOUT / "requirements" / name).read_text().splitlines()
    found = (line.split("#")[0].split(";")[0].strip().partition("==") for line in lines if "==" in line)
    return {canonicalize_name(package): version for package, _, version in found}


def as_metadata_says(site: Path) -> None:
    """What pip reads of the installed package is what the documents and the pinned lists say."""
    (found,) = importlib.metadata.distributions(path=[str(site)])
    python = SpecifierSet(found.metadata["Requires-Python"])
    assert [minor for minor in range(9, 16) if f"3.{minor}" in python] == [11, 12, 13]
    requirements = [Requirement(text) for text in found.requires or ()]
    extras = {"gcs", "gpu", "lm-eval", "mlflow", "ray", "remote", "tensorboard", "trackers", "trackio", "wandb"}
    assert set(found.metadata.get_all("Provides-Extra")) == extras
    # what samples is asked for by one extra alone: elsewhere `opd check` says how to install it
    assert [str(r) for r in requirements if r.name.startswith("vllm")] == ['vllm==0.32.0; extra == "gpu"']
    of_extra = {
        extra: {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": extra})} for extra in extras
    }
    base = {r.name for r in requirements if r.marker is None}
    assert {name for names in of_extra.values() for name in names}.isdisjoint(base)
    assert (
        of_extra["trackers"] == of_extra["mlflow"] | of_extra["tensorboard"] | of_extra["trackio"] | of_extra["wandb"]
    )
    for name in ("cpu.txt", "gpu.txt"):
        pins = pinned(name)
        for r in requirements:
            if r.marker is None or (name == "gpu.txt" and r.name == "vllm"):
                assert r.specifier.contains(pins[canonicalize_name(r.name)]), f"{name}: {r}"
    (command,) = found.entry_points.select(group="console_scripts")
    assert (command.name, command.value) == ("opd", "opdflow:main")


@pytest.mark.slow
def test_a_wheel_has_recipes_and_checks_one(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    wheel = ["wheel", str(CHECKOUT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    left = CHECKOUT / "build"
    clean = not left.exists()
    try:
        subprocess.run([*pip, *wheel], check=True, env=environment)
    finally:
        if clean:
            shutil.rmtree(left, ignore_errors=True)
    (built,) = tmp_path.glob("opdflow-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(built)], check=True, env=environment
    )

    def opd(*args: str) -> str:
        script = (
            "import sys, flows; assert flows.__file__.startswith(sys.argv.pop(1)); from opdflow import main; main()"
        )
        command = [sys.executable, "-P", "-c", script, str(tmp_path / "site"), *args]
        settings = environment | {"PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(command, check=True, cwd=tmp_path, env=settings, capture_output=True, text=True).stdout

    as_metadata_says(tmp_path / "site")
    installed = tmp_path / "site" / "opdflow" / "configs"
    for file in (
        "recipes/gkd.yaml",
        "deepspeed/zero3.json",
        "demo.yaml",
        "quickstart.yaml",
        "deploy/Dockerfile.gpu",
        "deploy/slurm.sh",
        "deploy/kuberay-job.yaml",
    ):
        assert (installed / file).is_file(), file
    assert "opdflow" in opd("version")
    recipes = {path.stem for path in (CHECKOUT / "configs" / "recipes").glob("*.yaml")}
    assert {entry["name"] for entry in json.loads(opd("recipes", "--json"))} == recipes
    plan = json.loads(opd("run", "recipe:gkd", "--dry-run", "--json", "--root", str(tmp_path / "store")))
    assert plan["config"]["objective"] and {line["state"] for line in plan["plan"]} == {"run", "pending"}
    assert not list((tmp_path / "store").glob("runs/*"))
    assert "topk-bucket" in opd("objectives") and "configs/recipes/gkd.yaml" in opd("objectives", "gkd")
    assert "tokenizers: identical" in opd("check", "configs/recipes/opd.yaml")
    assert "study-objectives-opd-s0" in opd(
        "study", "configs/study.yaml", "--dry-run", "--root", str(tmp_path / "store")
    )
