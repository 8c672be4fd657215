"""ZeRO-3: a model is in pieces from the start, on two real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_world import tiny_model

from tasks.workers.pool import CHECKOUT

WORLD = 2


def load(tmp_path: Path, base: Path, dtype: str, zero: str, name: str) -> list[dict]:
    """What each rank reports (tests/support/partitioned_load.py)."""
    out, meeting = tmp_path / name, tmp_path / f"meeting-{name}"
    out.mkdir()
    meeting.mkdir()
    script = CHECKOUT / "tests" / "support" / "partitioned_load.py"
    config = CHECKOUT / "configs" / "deepspeed" / f"{zero}.json"
    ranks = []
    for rank in range(WORLD):
        env = dict(os.environ) | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "OPD_WORKER_SOCKET": str(meeting / "s"),
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support")]),
            "LOCAL_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CROSS_RANK": "0", "CROSS_SIZE": "1",
        }  # fmt: skip
        command = [sys.executable, str(script), str(base), str(config), dtype, str(out)]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_model(1)
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    state = tmp_path / "base" / "state"
    state.mkdir()
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        tensors = {f"{kind}/{name}": torch.randn(p.shape) for name, p in model.named_parameters()}
        save_file(tensors, state / f"{kind}.safetensors")
    return tmp_path / "base"


def test_no_rank_holds_a_whole_model_and_every_value_is_the_checkpoints(tmp_path, base):
    tensors = load_file(base / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    for report in load(tmp_path, base, "bfloat16", "zero3", "plain"):
        assert report["held"] == 0  # parameters are empty until they are gathered
        assert report["pieces"] == {name: -(-tensor.numel() // WORLD) for name, tensor in tensors.items()}
        assert sum(report["pieces"].values()) < 0.51 * total
        assert report["shapes"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
        assert report["equal"] == dict.fromkeys(tensors, True)
        assert report["buffers"] and all(report["buffers"].values())  # rotary frequencies stay float32
        assert report["loaded"] == dict.fromkeys(tensors, True)


@pytest.mark.slow
def test_below_stage_3_and_with_adapters_nothing_is_lost(tmp_path, base):
    tensors = load_file(base / "model.safetensors")
    for report in load(tmp_path, base, "float32", "zero2", "whole"):
        assert report["held"] == sum(tensor.numel() for tensor in tensors.values()) and report["pieces"] == {}
        assert report["equal"] == dict.fromkeys(tensors, True)
    (base / "state" / "master.safetensors").unlink()
    for path in (base / "state").iterdir():
        path.unlink()
    (base / "state").rmdir()
    for report in load(tmp_path, base, "float32", "zero3", "lora"):
        assert report["held"] == 0 and len(report["pieces"]) == len(tensors) and all(report["equal"].values())
        adapters = {name: shape for name, shape in report["shapes"].items() if "lora_" in name}
        assert adapters and all(4 in shape for shape in adapters.values())
