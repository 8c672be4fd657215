"""Which GPUs a worker gets. What `WorkerPool` puts into a worker's environment is the assignment's, for every role."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigError
from tasks.workers import runtime as runtime_module
from tasks.workers.devices import assign, visible_gpus
from tasks.workers.pool import WorkerPool
from tasks.workers.runtime import RuntimeConfig

UUIDS = ["GPU-1111aaaa-0000", "GPU-1111bbbb-0000", "GPU-2222cccc-0000", "MIG-3333dddd-0000"]


@pytest.mark.parametrize(
    ("variable", "count", "expected"),
    [
        (None, 3, ["0", "1", "2"]),
        ("4,5", 8, ["4", "5"]),
        (" 4 , 5 ", 8, ["4", "5"]),
        ("", 8, []),
        ("-1", 8, []),
        ("2,-1,3", 8, ["2"]),  # CUDA stops at the first entry that is none
        ("0,9,1", 8, ["0"]),
        ("0,01", 8, ["0", "1"]),
        ("NoDevFiles", 8, []),
        ("0,none,1", 8, ["0"]),
        ("0", 0, ["0"]),  # how many there are is not known everywhere
        ("MIG-3333dddd-0000,GPU-1111aaaa-0000", 0, ["MIG-3333dddd-0000", "GPU-1111aaaa-0000"]),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_show(variable, count, expected):
    assert visible_gpus(variable, count) == expected


def test_a_gpu_listed_twice_is_refused():
    with pytest.raises(ConfigError, match="twice"):
        visible_gpus("0,1,0", 8)
    with pytest.raises(ConfigError, match="twice"):
        assign("sampler", [0, "4"], 2, 1, ["4", "5"])


@pytest.mark.parametrize(
    ("role", "devices", "workers", "width", "visible", "expected"),
    [
        ("sampler", None, 2, 2, ["4", "5", "6", "7"], [["4", "5"], ["6", "7"]]),
        ("sampler", None, 3, 1, ["0", "1", "2", "3"], [["0"], ["1"], ["2"]]),
        ("sampler", [3, 2, 1, 0], 2, 2, ["4", "5", "6", "7"], [["7", "6"], ["5", "4"]]),
        ("scorer", [1], 1, 1, UUIDS, [[UUIDS[1]]]),
        ("scorer", ["GPU-2222", "MIG-3333dddd-0000"], 1, 2, UUIDS, [[UUIDS[2], UUIDS[3]]]),
        ("trainer", None, 4, 1, UUIDS, [[uuid] for uuid in UUIDS]),
        ("trainer", ["6", 0], 2, 1, ["4", "5", "6"], [["6"], ["4"]]),
    ],
)
def test_worker_n_gets_its_part_of_the_list(role, devices, workers, width, visible, expected):
    assert assign(role, devices, workers, width, visible) == expected


@pytest.mark.parametrize(
    ("devices", "workers", "width", "visible", "numbers"),
    [
        (None, 2, 2, ["4", "5", "6"], ("4", "3")),
        ([0, 1], 3, 1, ["4", "5", "6"], ("3", "2")),
        ([2], 1, 1, ["4", "5"], ("2",)),
        (["0"], 1, 1, ["4", "5"], ("0",)),  # an id outside of what this process may use
        (["GPU-1111"], 1, 1, UUIDS, ("2",)),  # fits two
        (["GPU-9999"], 1, 1, UUIDS, ("4",)),
        (["MIG-3333"], 1, 1, UUIDS, ("4",)),  # CUDA shortens no MIG instance
        (None, 1, 1, [], ("1", "0")),
        ([-1], 1, 1, ["4"], ("-1",)),
    ],
)
def test_what_cannot_be_assigned_is_refused_with_the_numbers(devices, workers, width, visible, numbers):
    with pytest.raises(ConfigError) as refused:
        assign("sampler", devices, workers, width, visible)
    assert "runtime.sampler" in str(refused.value) and all(number in str(refused.value) for number in numbers)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 24))
def test_no_gpu_is_shared_and_none_comes_from_elsewhere(workers, width, count):
    visible = [f"GPU-{number}" for number in range(count)]
    if count < workers * width:
        with pytest.raises(ConfigError):
            assign("sampler", None, workers, width, visible)
        return
    parts = assign("sampler", None, workers, width, visible)
    assert [len(part) for part in parts] == [width] * workers
    given_out = [gpu for part in parts for gpu in part]
    assert len(set(given_out)) == len(given_out) and set(given_out) <= set(visible)


def environments(tmp_path, monkeypatch, variable, runtime):
    """(role, number) -> CUDA_VISIBLE_DEVICES of the worker; for the trainer also what its launcher gives the ranks."""
    monkeypatch.setattr(runtime_module, "gpu_count", lambda: 8)
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    config = RuntimeConfig.model_validate({"device": "cuda"} | runtime)
    found = {}
    with WorkerPool(config, tmp_path) as pool:
        for role, workers in (("sampler", config.sampler.workers), ("scorer", config.scorer.workers), ("trainer", 1)):
            for number in range(workers):
                argv, env, _ = pool._command(role, number, {})
                found[role, number] = env["CUDA_VISIBLE_DEVICES"]
        world = [item.removeprefix("--world_info=") for item in argv if item.startswith("--world_info=")]
        # a single rank has no launcher, and what the worker has
        ranks = json.loads(base64.urlsafe_b64decode(world[0]))["localhost"] if world else [env["CUDA_VISIBLE_DEVICES"]]
        assert bool(world) == (config.trainer.processes > 1)
        found["ranks", 0] = ",".join(ranks)
    return found


def test_workers_get_parts_of_the_users_own_list(tmp_path, monkeypatch, own_workers):
    runtime = {
        "sampler": {"workers": 2, "tensor_parallel_size": 2},
        "scorer": {"workers": 2, "devices_per_worker": 2},
        "trainer": {"processes": 3, "devices": [1, 2, 3]},
    }
    assert environments(tmp_path, monkeypatch, "GPU-a,GPU-b,GPU-c,MIG-d", runtime) == {
        ("sampler", 0): "GPU-a,GPU-b", ("sampler", 1): "GPU-c,MIG-d",
        ("scorer", 0): "GPU-a,GPU-b", ("scorer", 1): "GPU-c,MIG-d",
        ("trainer", 0): "GPU-b,GPU-c,MIG-d", ("ranks", 0): "GPU-b,GPU-c,MIG-d",
    }  # fmt: skip
    assert environments(tmp_path, monkeypatch, None, {"sampler": {"workers": 3}}) == {
        ("sampler", 0): "0", ("sampler", 1): "1", ("sampler", 2): "2", ("scorer", 0): "0", ("trainer", 0): "0", ("ranks", 0): "0",
    }  # fmt: skip


def test_a_machine_with_too_few_gpus_is_refused_for_every_role(tmp_path, monkeypatch):
    for runtime in (
        {"sampler": {"workers": 5, "tensor_parallel_size": 2}},
        {"scorer": {"workers": 9}},
        {"trainer": {"processes": 9}},
    ):
        monkeypatch.setattr(runtime_module, "gpu_count", lambda: 8)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(ConfigError, match="8"):
            RuntimeConfig.model_validate({"device": "cuda"} | runtime).require_gpus()


def test_a_process_that_sees_no_gpu_takes_the_cpu(monkeypatch):
    monkeypatch.setattr(runtime_module, "gpu_count", lambda: 8)
    for variable, expected in (
        (None, "cuda"),
        ("3", "cuda"),
        ("GPU-a", "cuda"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("-1,2", "cpu"),
    ):
        if variable is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert RuntimeConfig().device == expected
