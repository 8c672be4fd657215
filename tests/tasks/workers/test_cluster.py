"""What is said of a Ray cluster before a run: fields, room for the groups, differences between nodes, the store's folder."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys

import pytest
from places import CHECKOUT
from pydantic import ValidationError

from storage.errors import ConfigError
from tasks.workers.actor import look
from tasks.workers.cluster import Group, Node, bridge_command, differences, plan, require, shortages
from tasks.workers.one_machine import refuse_launchers
from tasks.workers.runtime import RuntimeConfig
from tasks.workers.span import Span

RAY = {"device": "cpu", "threads": 2, "cluster": {"kind": "ray", "address": "127.0.0.1:1"}}


def runtime(**fields) -> RuntimeConfig:
    return RuntimeConfig.model_validate(RAY | fields)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"device": "auto"}, "device: auto looks at this machine"),
        ({"sampler": {"devices": [0]}}, "sampler.devices: with runtime.cluster: ray"),
        ({"cluster": {"kind": "ray", "address": "ray://head:10001"}}, "is no address of a Ray head"),
        ({"cluster": {"kind": "ray", "address": "head"}}, "write auto or HOST:PORT"),
        ({"cluster": {"kind": "slurm"}}, "'local', 'ray'"),
        (
            {"sampler": {"engine_nodes": 2, "tensor_parallel_size": 2}},
            "sampler.engine_nodes: vLLM has no engine over several",
        ),
        (
            {"device": "cuda", "sampler": {"engine_nodes": 2, "tensor_parallel_size": 3}},
            "cannot share the 3 GPUs of an engine",
        ),
        (
            {"device": "cuda", "scorer": {"teacher_engine": {"nodes": 2}}},
            "scorer.teacher_engine.nodes: 2 nodes cannot share the 1",
        ),
    ],
)
def test_fields_that_mean_nothing_on_a_cluster_are_refused(fields, found):
    with pytest.raises(ValidationError, match=r"cluster|devices|nodes") as error:
        runtime(**fields)
    assert found in str(error.value)


def test_what_a_role_needs_of_a_cluster():
    on_gpus = runtime(device="cuda", sampler={"workers": 3, "tensor_parallel_size": 4}, trainer={"processes": 8})
    assert on_gpus.group("sampler") == Group("sampler", 3, cpus=2, gpus=4)
    assert on_gpus.group("trainer") == Group("trainer", 1, cpus=2, gpus=1, world=8)
    assert runtime(scorer={"workers": 2}).group("scorer") == Group("scorer", 2, cpus=2)
    assert runtime().group("judge") == Group("judge", 1)


def test_an_engine_over_nodes_has_its_gpus_beside_the_worker():
    found = runtime(
        device="cuda",
        sampler={"workers": 2, "tensor_parallel_size": 8, "pipeline_parallel_size": 2, "engine_nodes": 2},
        scorer={"devices_per_worker": 2, "teacher_engine": {"tensor_parallel_size": 4, "nodes": 4}},
    )
    assert found.group("sampler") == Group("sampler", 2, cpus=2, engine=Span(2, 8))
    assert found.group("scorer") == Group("scorer", 1, cpus=2, gpus=2, engine=Span(4, 1))
    assert found.group("harness") == Group("harness", 1, cpus=2, gpus=2)
    # a pipeline of one node is of its GPUs alone
    assert runtime(device="cuda", sampler={"pipeline_parallel_size": 4}).group("sampler") == Group("sampler", 1, 2, 4)


def test_an_engine_over_nodes_needs_a_cluster():
    with pytest.raises(ValidationError, match=r"sampler\.engine_nodes: 2 nodes are of a Ray cluster, and .* is local"):
        RuntimeConfig.model_validate({"device": "cuda", "sampler": {"engine_nodes": 2, "tensor_parallel_size": 2}})
    with pytest.raises(
        ValidationError, match=r"scorer\.teacher_engine: on one node the engine is on the scorer's own 1"
    ):
        RuntimeConfig.model_validate({"device": "cuda", "scorer": {"teacher_engine": {"tensor_parallel_size": 2}}})


def node(name: str, cpus: float = 4, gpus: float = 0, **more) -> Node:
    return Node(name, cpus, gpus, {"python": "3.11.1", "torch": "2"}, **more)


def test_groups_that_nodes_have_no_room_for_are_named_with_the_room_that_there_is():
    samplers = Group("sampler", 2, cpus=1, gpus=4)
    ranks = Group("trainer", 1, cpus=1, gpus=1, world=8)
    both = [node("a", gpus=4), node("b", gpus=4)]
    assert shortages([samplers, ranks], both, together=False) == []
    [line] = shortages([samplers, ranks], both[:1], together=False)[:1]
    assert line.startswith("runtime.sampler.workers: 2 are asked for") and "a: 4 CPUs, 4 GPUs" in line
    # six GPUs on a node hold one engine of four
    split = shortages([samplers], [node("a", gpus=6), node("b", gpus=2)], together=False)
    assert "have room for 1 " in split[0]
    # one after the other they fit; side by side not
    [warm] = shortages([samplers, ranks], both, together=True)
    assert warm.startswith("runtime.keep_warm: true") and "runtime.trainer.processes 8 x" in warm


def test_the_plan_says_on_which_nodes_engines_fit():
    engines = Group("sampler", 2, cpus=1, engine=Span(2, 4))
    three = [node("a", gpus=4), node("b", gpus=8), node("c", gpus=4)]
    assert shortages([engines], three, together=True) == []
    assert plan([engines], three, together=True) == [
        "sampler: an engine of 4 GPUs on each of 2 nodes (b, a)",
        "sampler: an engine of 4 GPUs on each of 2 nodes (b, c)",
    ]
    # sixteen GPUs, and no second node with four
    [line] = shortages([engines], [node("a", gpus=14), node("b", gpus=2)], together=False)
    assert line.startswith("runtime.sampler.workers: 2 are asked for") and "have room for 0 (" in line
    assert "an engine of 4 GPUs on each of 2 nodes" in line
    # the worker itself needs a CPU on a node of its engine
    assert shortages([engines], [node("a", cpus=0, gpus=8), node("b", cpus=0, gpus=8)], together=False)


def test_nodes_that_differ_are_named_with_both_versions():
    mine = {"python": "3.11.1", "torch": "2", "vllm": None}
    nodes = [
        node("same"),
        Node("other", 1, 0, {"python": "3.11.1", "torch": "1"}),
        node("lost", problem="no answer within 5 s"),
        node("apart", root="/s is not there", missing=("runtime.trainer.deepspeed",)),
    ]
    found = differences(mine, nodes)
    assert [line.partition(" ")[0] for line in found] == [
        "runtime.cluster:",
        "runtime.cluster:",
        "root:",
        "runtime.trainer.deepspeed:",
    ]
    assert "node other has torch 1, this machine 2" in found[0]
    assert "node lost: no answer" in found[1] and "node apart: /s is not there" in found[2]


def test_a_node_looks_at_the_folder_of_the_store(tmp_path):
    path = tmp_path / "probe"
    path.write_text("token")

    def problem(name: str = "probe", token: str = "token") -> object:
        return look(str(tmp_path / name), token, {})["root"]

    assert "do not hold" in str(problem())  # nobody has locked it, as if locks were the other node's alone
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert problem() is None
        assert "another folder" in str(problem(token="other")) and "another folder" in str(problem("absent"))
    assert "is not there" in str(problem("none/probe"))
    there = look(str(path), "token", {"runtime.modules.0": str(tmp_path), "runtime.trainer.deepspeed": "/none.json"})
    assert there["missing"] == ["runtime.trainer.deepspeed"]
    assert there["versions"]["opdflow"].startswith("0.1.0 (")


def test_no_cluster_at_the_address_is_refused_by_field(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked = runtime(cluster={"kind": "ray", "address": f"127.0.0.1:{port}"})
    with pytest.raises(ConfigError, match=rf"^runtime\.cluster\.address: no Ray cluster answers at 127.0.0.1:{port}; "):
        require(asked, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_package_is_named(tmp_path):
    script = (
        "import sys; sys.modules['ray'] = None\n"
        "from tasks.workers.cluster import require; from tasks.workers.runtime import RuntimeConfig\n"
        f"require(RuntimeConfig.model_validate({RAY!r}), {str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True)
    assert "ConfigError: runtime.cluster: ray is not installed" in done.stderr and "opdflow[ray]" in done.stderr


def test_a_root_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^root: /proc cannot be written"):
        require(runtime(), "/proc/none/store")


def test_one_machine_is_not_asked(tmp_path):
    assert require(RuntimeConfig(device="cpu"), tmp_path) is None


def test_a_bridge_gets_no_secret_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TEACHER_API_KEY", "not for others")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("HOME_OF_MINE", "/home")
    config = runtime()
    _, more = bridge_command(config.cluster, config.group("scorer"), "cpu", tmp_path / "log", ["-m", "x"], {}, None)
    [text] = more.values()
    assert '"VLLM_LOGGING_LEVEL":"ERROR"' in text and "not for others" not in text and "HOME_OF_MINE" not in text


def test_an_allocation_of_several_machines_is_for_a_cluster():
    allocation = {"SLURM_JOB_NUM_NODES": "4"}
    refuse_launchers(allocation, cluster=True)
    with pytest.raises(ConfigError, match=r"runtime\.cluster: ray"):
        refuse_launchers(allocation)
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS=4"):  # four times the same run
        refuse_launchers(allocation | {"SLURM_STEP_NUM_TASKS": "4"}, cluster=True)


def test_nothing_imports_ray_where_it_is_not_asked_for(tmp_path):
    script = (
        "import sys, flows.run.runner, flows.run.check, tasks.workers.main, tasks.workers.actor\n"
        "from tasks.workers.runtime import RuntimeConfig\n"
        f"RuntimeConfig.model_validate({RAY!r})\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, check=True, env=dict(os.environ))
