"""Settings of samplers that decide whether rollouts can be repeated: recorded with a GPU's rollouts, and put to vLLM."""

from __future__ import annotations

import os

import pytest
from pydantic import ValidationError

from tasks.engines.vllm_engine import VllmEngine
from tasks.workers.runtime import RuntimeConfig


def at(runtime: RuntimeConfig, recorded: dict, folder) -> RuntimeConfig:
    """As `opd replay` has it: at recorded numerics, then validated."""
    return RuntimeConfig.model_validate(runtime.with_numerics(recorded, folder))


def test_they_are_recorded_on_a_gpu_alone(tmp_path):
    names = {"sampler_in_process", "sampler_batch_invariant"}
    assert not names & RuntimeConfig(device="cpu").numerics().keys()
    gpu = RuntimeConfig.model_validate({"device": "cuda", "sampler": {"in_process": True, "batch_invariant": True}})
    assert all(gpu.numerics("sampler")[name] is True for name in names)
    assert not names & gpu.numerics("trainer", "scorer").keys()
    assert RuntimeConfig(device="cuda").numerics("sampler")["sampler_in_process"] is False
    again = at(RuntimeConfig(device="cuda"), gpu.numerics(), tmp_path)
    assert again.sampler == gpu.sampler
    assert at(RuntimeConfig(device="cuda"), {"device": "cpu"}, tmp_path).sampler.in_process is True


def test_sizes_of_the_models_beside_a_sampler_are_recorded_where_these_are_read(tmp_path):
    sizes = {"score_batch_tokens": 64, "score_chunk_tokens": 8, "score_cache_gib": 0.5}
    runtime = RuntimeConfig.model_validate({"device": "cpu", "sampler": sizes})
    recorded = runtime.numerics("sampler", "pair")
    assert {name: recorded[f"sampler_{name}"] for name in sizes} == sizes
    assert not any("score_" in name for name in runtime.numerics("sampler"))
    assert at(RuntimeConfig(device="cpu"), recorded, tmp_path).sampler == runtime.sampler


def test_how_an_engine_is_spread_is_recorded_where_it_is_not_the_default(tmp_path):
    ray = {"device": "cuda", "cluster": {"kind": "ray"}}
    plain = RuntimeConfig.model_validate(ray | {"sampler": {"tensor_parallel_size": 4}})
    new = ("sampler_pipeline_parallel_size", "sampler_engine_nodes", "scorer_teacher_engine")
    assert not any(name in plain.numerics() for name in new)
    spread = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "engine_nodes": 2}
    teacher = {"teacher_engine": {"tensor_parallel_size": 2, "nodes": 2}}
    wide = RuntimeConfig.model_validate(ray | {"sampler": spread, "scorer": teacher})
    assert [wide.numerics()[name] for name in new[:2]] == [2, 2]
    assert at(plain, wide.numerics(), tmp_path) == wide
    assert at(wide, plain.numerics(), tmp_path) == plain  # a record without them is of one node
    assert at(wide, {"device": "cuda", "threads": 2}, tmp_path) == wide


def test_batch_invariance_without_a_gpu_is_refused():
    with pytest.raises(ValidationError, match="batch_invariant"):
        RuntimeConfig.model_validate({"device": "cpu", "sampler": {"batch_invariant": True}})


@pytest.mark.parametrize(
    ("settings", "multiprocessing", "invariant"),
    [
        ({"device": "cpu"}, "0", "0"),
        ({"device": "cuda"}, "1", "0"),
        ({"device": "cuda", "in_process": True}, "0", "0"),
        ({"device": "cuda", "in_process": False, "batch_invariant": True}, "1", "1"),
    ],
)
def test_vllm_gets_what_is_recorded_whatever_the_users_environment(settings, multiprocessing, invariant, monkeypatch):
    before = dict(os.environ)
    try:
        for other in ("0", "1"):
            os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": other, "VLLM_BATCH_INVARIANT": other}
            VllmEngine(settings)
            assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == multiprocessing
            assert os.environ["VLLM_BATCH_INVARIANT"] == invariant
    finally:
        os.environ.clear()
        os.environ.update(before)
