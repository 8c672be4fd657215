"""The two configs for GPU machines: what they ask of a machine, and how DeepSpeed is set."""

from __future__ import annotations

import pytest
from places import CHECKOUT

from flows.experiment import load_experiment
from storage.errors import ConfigError
from tasks.trainer.engine import deepspeed_config
from tasks.workers import runtime as runtime_module


def load(name: str):
    return load_experiment(CHECKOUT / "configs" / name)


@pytest.mark.parametrize(("name", "gpus"), [("qwen3-gpu.yaml", 1), ("qwen3-8gpu.yaml", 8)])
def test_they_use_all_gpus_of_their_machine_and_no_more(name, gpus, monkeypatch):
    e = load(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(runtime_module, "gpu_count", lambda: gpus)
    for role in ("sampler", "scorer", "trainer"):
        assert e.runtime.gpus(role) == [[str(number)] for number in range(gpus)]
    monkeypatch.setattr(runtime_module, "gpu_count", lambda: gpus - 1)
    with pytest.raises(ConfigError):
        e.runtime.require_gpus()
    assert e.rollout.prompts_per_round // e.rollout.shard_prompts >= gpus  # a shard for every worker
    assert e.train.samples_per_step >= gpus


@pytest.mark.parametrize("name", ["qwen3-gpu.yaml", "qwen3-8gpu.yaml"])
def test_they_train_at_stage_1_without_offload(name):
    e = load(name)
    zero = deepspeed_config(e.runtime.trainer.deepspeed, e.train, 10**9)["zero_optimization"]
    assert zero["stage"] == 1 and not any("offload" in field for field in zero)
    assert {e.rollout.dtype, e.supervise.dtype, e.train.dtype, e.evaluate.dtype} == {"bfloat16"}


def test_both_are_one_experiment():
    assert load("qwen3-gpu.yaml").identity() == load("qwen3-8gpu.yaml").identity()
