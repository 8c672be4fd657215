"""`opd deploy` on a real server with a real process worker, with scripted engines: flow runs do what `opd run` does, whatever
happens to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opd_cli import OPD
from places import CHECKOUT, PLUGINS
from registries import plugin_path
from scripted_run import EXPERIMENT, prepare_root
from scripted_run import NAME as TRIAL
from shared_prefect import Api, ask, eventually
from stopping import StoppedRun

from flows.cli.deploy import deploy as command
from storage.errors import ConfigError, OpdError
from storage.runs import Run

PATHS = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests" / "support"), str(PLUGINS)])
POOL = "lab 1"
Pool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> Iterator[None]:
    """A config's plugin takes the place of the pool in the process that reads it, which is this one in some tests."""
    with plugin_path():
        yield


@pytest.fixture(scope="module")
def opd(by_url: Api) -> Pool:
    """The command line, for which the server is the user's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OPD_"))}
    environment |= {"PREFECT_API_URL": by_url.api_url, "PYTHONPATH": PATHS}

    def call(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        command = [str(OPD), *map(str, words)]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120)

    return call


@pytest.fixture(scope="module")
def pool(opd: Pool, by_url: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A work pool, made by `opd deploy`, with a process worker."""
    folder = tmp_path_factory.mktemp("worker")
    root = prepare_root(folder / "store")
    made = opd("deploy", config(root, 1), "--name", "first", "--pool", POOL, "--root", root, "--create-pool", "--json")
    assert made.returncode == 0, made.stdout + made.stderr
    said = json.loads(made.stdout)
    assert (said["name"], said["pool_type"], said["made_pool"], said["workers"]) == (
        "opd-run/first",
        "process",
        True,
        0,
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OPD_"))}
    environment |= {"PREFECT_API_URL": by_url.api_url, "PREFECT_HOME": str(folder / "home"), "PYTHONPATH": PATHS}
    environment |= {
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [str(Path(sys.executable).parent / "prefect"), "worker", "start", "--pool", POOL, "--name", "one"]
    with (folder / "log").open("wb") as log:
        worker = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        yield POOL
        assert worker.poll() is None, (folder / "log").read_text()
    finally:
        worker.terminate()
        try:
            worker.wait(60)
        finally:
            worker.kill()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return prepare_root(tmp_path / "store")


def config(root: Path, rounds: int) -> Path:
    path = root.parent / "config.yaml"
    path.write_text(json.dumps(EXPERIMENT | {"plugins": ["scripted_ticks"], "policy": {"rounds": rounds}}))
    return path


def start(server: Api, name: str, **parameters: Any) -> str:
    """A flow run of a deployment, as the button of Prefect's pages starts it; its id."""
    (deployment,) = ask(server.api_url, "deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    body = {"parameters": deployment["parameters"] | parameters, "state": {"type": "SCHEDULED"}}
    return ask(server.api_url, f"deployments/{deployment['id']}/create_flow_run", body)["id"]


def state_of(server: Api, flow_run: str) -> dict[str, Any]:
    (run,) = ask(server.api_url, "flow_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
    return run["state"]


def ended(server: Api, flow_run: str) -> dict[str, Any]:
    """Its last state."""
    last = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
    return eventually(lambda: (s := state_of(server, flow_run))["type"] in last and s, 120)


def students(root: Path, name: str) -> list[tuple[int, str | None, dict[str, Any]]]:
    """(round, student, keys of its stages) of every round."""
    rounds = Run.open(root, name).state.rounds
    return [(r.round, r.student_sha256, {label: s.artifacts for label, s in r.stages.items()}) for r in rounds]


def begun(root: Path, name: str) -> int:
    """The process of a flow run that waits in its rollout."""
    eventually(lambda: (root / "is-slow").exists(), 120)
    (root / "is-slow").unlink()
    holder = Run.open(root, name).holder_info()
    assert holder is not None
    return holder.pid


@pytest.mark.slow
def test_a_worker_runs_what_opd_run_does_through_a_cancel_a_retry_and_a_kill(
    opd: Pool, pool: str, by_url: Api, root: Path
) -> None:
    made = opd("deploy", config(root, 2), "--name", "nightly", "--pool", pool, "--rounds", 1, "--root", root)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "deployed opd-run/nightly" in made.stdout and "worker start" not in made.stdout

    (root / "slow").write_text("300")
    first = start(by_url, "nightly")
    pid = begun(root, "nightly")
    ask(by_url.api_url, f"flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}})
    assert ended(by_url, first)["type"] == "CANCELLED"
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert Run.open(root, "nightly").state.status == "stopped" and Run.open(root, "nightly").holder() is None

    retry = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    ask(by_url.api_url, f"flow_runs/{first}/set_state", retry)
    again = eventually(lambda: (s := state_of(by_url, first))["type"] == "COMPLETED" and s, 120)
    assert "at round 1 after" in again["message"]

    (root / "slow").write_text("300")
    second = start(by_url, "nightly")
    os.kill(begun(root, "nightly"), signal.SIGKILL)
    assert ended(by_url, second)["type"] == "CRASHED"

    third = start(by_url, "nightly")
    last = ended(by_url, third)
    assert (last["type"], last["name"]) == ("COMPLETED", "Finished")
    assert [number for number, _, _ in students(root, "nightly")] == [0, 1, 2]

    other = prepare_root(root.parent / "other" / "store")
    by_hand = opd("run", config(other, 2), "--name", "nightly", "--root", other, "--no-prefect")
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    assert students(root, "nightly") == students(other, "nightly")


@pytest.mark.slow
def test_a_cancelled_flow_run_leaves_no_worker_behind(opd: Pool, pool: str, by_url: Api, tmp_path: Path) -> None:
    """With worker processes that have families of their own."""
    run = StoppedRun.of(prepare_root(tmp_path / "template" / "store"), tmp_path / "run")
    run.write("trainer")
    made = opd("deploy", run.folder / "config.yaml", "--name", TRIAL, "--pool", pool, "--root", run.root)
    assert made.returncode == 0, made.stdout + made.stderr
    flow_run = start(by_url, TRIAL)
    eventually(lambda: (run.root / "family-ready").exists(), 120)
    family = [int(pid) for pid in (run.root / "family-ready").read_text().split()]
    holder = Run.open(run.root, TRIAL).holder_info()
    assert holder is not None and len(family) == 7
    ask(by_url.api_url, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (*family, holder.pid)))
    assert ended(by_url, flow_run)["type"] == "CANCELLED"
    assert Run.open(run.root, TRIAL).holder() is None and Run.open(run.root, TRIAL).state.status == "stopped"
    run.temporary.rmdir()


def test_a_config_that_is_refused_and_a_stop_are_told_apart(opd: Pool, pool: str, by_url: Api, root: Path) -> None:
    config(root, 1)
    made = opd(
        "deploy",
        root.parent / "config.yaml",
        "--name",
        "stopped",
        "--pool",
        pool,
        "--root",
        root,
        "--cron",
        "0 2 1 1 *",
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (root / "slow").write_text("300")
    flow_run = start(by_url, "stopped")
    begun(root, "stopped")
    assert opd("stop", "stopped", "--root", root).returncode == 0
    last = ended(by_url, flow_run)
    assert last["type"] == "CANCELLED" and "opd resume stopped" in last["message"].replace(str(OPD), "opd")

    bad = start(by_url, "stopped", overrides=["train.samples_per_step=3"])
    last = ended(by_url, bad)
    assert (last["type"], last["name"]) == ("FAILED", "Refused")
    assert "train.samples_per_step" in last["message"]
    (there,) = ask(by_url.api_url, "deployments/filter", {"deployments": {"name": {"any_": ["stopped"]}}})
    assert there["paused"]  # each further flow run of the schedule would be refused too


def refused(by_url: Api, monkeypatch: pytest.MonkeyPatch, config: Path, **options: Any) -> OpdError:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_API_URL", options.pop("url", by_url.api_url))
    monkeypatch.setenv("PREFECT_HOME", str(config.parent / "home"))
    monkeypatch.syspath_prepend(PLUGINS)
    with pytest.raises(OpdError) as caught:
        command(config, **{"name": "first", "pool": POOL} | options)
    assert len(str(caught.value).splitlines()) == 1 or isinstance(caught.value, ConfigError)
    return caught.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "nowhere"}, "--pool 'nowhere': .*there are lab 1.*--create-pool"),
        ({"pool": "lab#1", "create_pool": True}, "--pool 'lab#1': a name without any of"),
        ({"job_variable": ["working_dri=/tmp"]}, "--job-variable working_dri: .*did you mean 'working_dir'"),
        ({"job_variable": ["image"]}, "--job-variable 'image': expected KEY=VALUE"),
        ({"root": Path("/elsewhere")}, "--name 'first': .*for the store"),
        ({"name": "a/b"}, "--name 'a/b'"),
        ({"timezone": "Europe/Berlin"}, "--timezone 'Europe/Berlin': belongs to --cron"),
        ({"cron": "nightly"}, "--cron 'nightly'"),
        ({"cron": "0 2 * * *", "every": "6h"}, "exactly one"),
        ({"set_": ["train.lr=-1"]}, "train.lr"),
    ],
)
def test_what_cannot_be_deployed_is_refused(
    pool: str, by_url: Api, root: Path, monkeypatch, options: dict[str, Any], message: str
) -> None:
    error = refused(by_url, monkeypatch, config(root, 1), **options)
    assert re.search(message, str(error)) and error.exit_code == 2


@pytest.mark.parametrize(
    ("url", "code", "message"), [("", 2, "is not set"), ("http://127.0.0.1:9/api", 1, "no Prefect server answers")]
)
def test_without_a_server_the_command_that_starts_one_is_named(
    by_url: Api, root: Path, monkeypatch, url: str, code: int, message: str
) -> None:
    error = refused(by_url, monkeypatch, config(root, 1), url=url)
    assert message in str(error) and "server start" in str(error) and error.exit_code == code
