"""What an installation without the checkout has: every config and recipe, found by the names that the documentation uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
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

    installed = tmp_path / "site" / "opdflow" / "configs"
    for file in (
        "recipes/gkd.yaml",
        "deepspeed/zero3.json",
        "quickstart.yaml",
        "deploy/Dockerfile.gpu",
        "deploy/slurm.sh",
        "deploy/kuberay-job.yaml",
    ):
        assert (installed / file).is_file(), file
    assert "opdflow" in opd("version")
    assert "topk-bucket" in opd("objectives") and "configs/recipes/gkd.yaml" in opd("objectives", "gkd")
    assert "tokenizers: identical" in opd("check", "configs/recipes/opd.yaml")
    assert "study-objectives-opd-s0" in opd(
        "study", "configs/study.yaml", "--dry-run", "--root", str(tmp_path / "store")
    )
