"""Failpoints: what is declared is what there is, and an armed one does what it says."""

import ast
import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from places import CHECKOUT

from storage.disk import failpoints
from storage.disk.failpoints import LOG, NAMES, SPEC, arm, failpoint
from storage.errors import ConfigError, NotEnoughSpace


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def test_every_declared_failpoint_is_in_the_code_once_and_no_other() -> None:
    found: Counter[str] = Counter()
    for path in [p for folder in ("storage", "tasks", "flows") for p in (CHECKOUT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "failpoint":
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: a failpoint's name is a literal"
                found[node.args[0].value] += 1
    assert found == Counter(list(NAMES))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("shard.after_renam=kill", "did you mean 'shard.after_rename'"),
        ("shard.after_rename", "not NAME=ACTION"),
        ("shard.after_rename=kill@0", "not NAME=ACTION"),
        ("shard.after_rename=explode", "no action 'explode'"),
        ("shard.after_rename=kill:now", "no action 'kill:now'"),
        ("shard.after_rename=sleep:long", "'long' is not a number"),
        ("shard.after_rename=raise:NoSuchError", "no exception of that name"),
        ("shard.after_rename=raise:Path", "no exception of that name"),
        ("shard.after_rename=raise:OSError(ENOSPACE)", "no errno 'ENOSPACE'"),
    ],
)
def test_what_is_not_understood_is_refused(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        arm({SPEC: spec})
    result = subprocess.run(
        [sys.executable, "-c", "import storage.disk.failpoints"],
        env=os.environ | {SPEC: spec}, cwd=CHECKOUT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode != 0 and "ConfigError" in result.stderr


def test_a_name_that_is_not_declared_is_refused_in_code_too() -> None:
    failpoint("no.such")  # off: not even looked at
    arm({SPEC: "shard.after_rename=raise:ValueError"})
    with pytest.raises(ConfigError, match=r"no failpoint 'no\.such'"):
        failpoint("no.such")


def test_actions_happen_at_the_hit_that_is_named() -> None:
    arm({SPEC: "shard.after_rename=raise:OSError(ENOSPC)@2; lock.held=raise:NotEnoughSpace(no room)"})
    failpoint("shard.after_rename")
    with pytest.raises(OSError) as caught:
        failpoint("shard.after_rename")
    assert caught.value.errno == errno.ENOSPC
    failpoint("shard.after_rename")
    for _ in range(2):
        with pytest.raises(NotEnoughSpace, match="no room"):
            failpoint("lock.held")


def test_a_torn_file_and_a_pause_and_a_gate(tmp_path: Path) -> None:
    path, gate = tmp_path / "file", tmp_path / "gate"
    path.write_bytes(b"0123456789")
    arm({SPEC: f"shard.after_rename=torn+sleep:0.05;shard.after_sidecar=wait:{gate}"})
    started = time.monotonic()
    failpoint("shard.after_rename", path)
    assert path.read_bytes() == b"01234" and time.monotonic() - started >= 0.05
    child = os.fork()
    if child == 0:
        failpoint("shard.after_sidecar")
        os._exit(7)
    time.sleep(0.05)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    gate.touch()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_with_a_log_hits_are_counted_over_all_processes(tmp_path: Path) -> None:
    arm({SPEC: "lock.held=exit:3@3", LOG: str(tmp_path / "hits")})
    codes = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            failpoint("lock.before")
            failpoint("lock.held")
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert codes == [0, 0, 3, 0]
    assert [line.split()[0] for line in (tmp_path / "hits").read_text().splitlines()] == [
        "lock.before",
        "lock.held",
    ] * 4


TREE = """
import os, subprocess, sys, time
from storage.disk.failpoints import failpoint
if len(sys.argv) == 1:
    print(os.getpid(), flush=True)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print(bystander.pid, flush=True)
    worker = subprocess.Popen([sys.executable, "-c", sys.stdin.read(), "worker"], start_new_session=True)
    time.sleep(600)
print(os.getpid(), flush=True)
failpoint("lock.held")
"""


def test_killtree_in_a_worker_kills_its_supervisor_and_its_siblings() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
        env=os.environ | {SPEC: "lock.held=killtree", "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    pids = [int(line) for line in parent.communicate(TREE, timeout=60)[0].split()]
    assert parent.returncode == -signal.SIGKILL and len(pids) == 3
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_an_unarmed_failpoint_costs_next_to_nothing() -> None:
    assert failpoints._armed is None
    started = time.perf_counter()
    for _ in range(100_000):
        failpoint("shard.after_rename")
    assert time.perf_counter() - started < 1  # 10 microseconds each, on a machine that is busy elsewhere
