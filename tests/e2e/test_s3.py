"""Push, pull and queries against a real S3 server, with kills on the way (requirements/remote.txt and s3-server.txt)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from opd_cli import OPD
from s3_server import BUCKET, MAKER, S3Server, s3_server

from storage.artifacts.verify import Verified, verify_store
from storage.disk.failpoints import NAMES
from storage.runs import RECORDS, Run
from storage.store import ArtifactSpec, Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        script = f"import s3fs, time\ns3fs.S3FileSystem().mkdir('{BUCKET}')"
        for _ in range(60):  # the gateway answers before the filer does
            made = subprocess.run(
                [sys.executable, "-c", script],
                env=os.environ | server.environment | {"AWS_ACCESS_KEY_ID": MAKER},
                capture_output=True,
            )
            if made.returncode == 0:
                break
            time.sleep(0.5)
        assert made.returncode == 0, made.stderr
        yield server


@pytest.fixture(scope="module")
def large_store(example_store_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with a student of several parts of an upload in it."""
    root = tmp_path_factory.mktemp("large") / "store"
    shutil.copytree(example_store_once, root)
    store = Store(root)
    with store.building(ArtifactSpec.of("student", 1, {"number": "large"}, {})) as builder:
        (builder.directory() / "model.bin").write_bytes(random.Random(0).randbytes(20 << 20))
        artifact = builder.commit()
    run = Run.open(root, "demo")
    with run.lock():
        state = run.state
        state.rounds[2].stages["train"].artifacts["student_large"] = artifact.key
        state.rounds[2].stages["train"].artifacts = {"student": artifact.key}
        run.save(state)
    return root


def opd(server: S3Server, *args: object, root: Path | str, environment: dict[str, str] | None = None):
    given = {k: v for k, v in os.environ.items() if not k.startswith(("OPD_", "AWS_"))} | server.environment
    command = [str(OPD), *map(str, args), "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, env=given | (environment or {}), timeout=120)


def contents(root: Path) -> dict[str, bytes]:
    found = [p for p in (root / "artifacts").rglob("*") if p.is_file() and not p.name.endswith(".sidecar.json")]
    found += [root / "runs" / run.name / name for run in Run.list(root) for name in RECORDS]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_there_and_back_and_read_there(server: S3Server, large_store: Path, tmp_path: Path) -> None:
    remote = f"s3://{BUCKET}/there"
    sent = opd(server, "push", "--all", remote, "--json", root=large_store)
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["bytes"] > 20 << 20
    other = tmp_path / "other"
    fetched = opd(server, "pull", "--all", remote, root=other)
    assert fetched.returncode == 0, fetched.stderr
    there = contents(other)
    assert {name: contents(large_store)[name] for name in there} == there and len(there) > 30
    assert opd(server, "verify", "--all", root=other).returncode == 0
    again = json.loads(opd(server, "push", "--all", remote, "--json", root=large_store).stdout)
    assert (again["artifacts"], again["runs"]) == (0, [])
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for args in (
        ("query", "SELECT run, round, accuracy_greedy FROM rounds ORDER BY ALL", "--json"),
        ("query", "demo", "SELECT sum(teacher_logprob) AS s, count(*) AS n FROM tokens WHERE round = 2", "--json"),
        ("query", "demo", "worst-tokens", "round=2", "--csv"),
        ("ls", "--json"),
        ("compare", "demo", "--json"),
    ):
        here, read = opd(server, *args, root=large_store), opd(server, *args, root=remote, environment=cache)
        assert read.returncode == here.returncode == 0, (args, read.stderr)
        assert read.stdout == here.stdout, args
    refused = opd(server, "resume", "demo", root=remote)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["push", "pull"])
def test_killed_anywhere_and_done_again(server: S3Server, large_store: Path, tmp_path: Path, command: str) -> None:
    """SIGKILL at every failpoint and at random times; then the same command once more: the same bytes, nothing lost."""
    ends = [f"{name}=kill@{1 + i % 2}" for i, name in enumerate(NAMES) if name.startswith(f"{command}.")]
    ends += ["", "", ""]
    whole = contents(large_store)
    wanted = {}
    source = f"s3://{BUCKET}/source-{command}"
    if command == "pull":
        assert opd(server, "push", "demo", source, root=large_store).returncode == 0
    killed = 0
    for number, spec in enumerate(ends):
        remote = f"s3://{BUCKET}/{command}-{number}" if command == "push" else source
        root = large_store if command == "push" else tmp_path / f"pulled-{number}"
        given = {k: v for k, v in os.environ.items() if not k.startswith(("OPD_", "AWS_"))} | server.environment
        process = subprocess.Popen(
            [str(OPD), command, "demo", remote, "--root", str(root)],
            env=given | ({"OPD_FAILPOINTS": spec} if spec else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=60 if spec else random.Random(number).uniform(0.8, 3.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += process.returncode == -signal.SIGKILL
        final = root if command == "pull" else tmp_path / f"check-{number}"
        if command == "pull":
            assert all((root / name).read_bytes() == whole[name] for name in _committed(root))
        done = opd(server, command, "demo", remote, root=root)
        assert done.returncode == 0, (spec, done.stderr)
        if command == "push":
            assert opd(server, "pull", "demo", remote, root=final).returncode == 0
        result = contents(final)
        wanted = wanted or {name: whole[name] for name in result}
        assert result == wanted and len(result) > 30, spec
        found = Verified()
        verify_store(final, found, lambda name: None)
        assert found.problems == []
        assert list(final.rglob(".tmp-*")) == []
        shutil.rmtree(final)
    assert killed > len(ends) // 2


def _committed(root: Path) -> list[str]:
    """Files of committed artifacts, and runs: all of them must be whole after a kill."""
    if not (root / "artifacts").is_dir():
        return []
    folders = [path.parent for path in (root / "artifacts").glob("*/*/manifest.json")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and ".tmp-" not in path.name]
    return [str(path.relative_to(root)) for path in files]


def test_what_is_refused_in_one_line(server: S3Server, large_store: Path, tmp_path: Path) -> None:
    for remote, environment, said in (
        (f"s3://{BUCKET}/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "AWS_ACCESS_KEY_ID"),
        (f"s3://{BUCKET}/x", {"AWS_ACCESS_KEY_ID": "wrong"}, "AWS_ACCESS_KEY_ID"),
        ("s3://not-my-bucket/x", {}, "refused"),
        (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "not reachable"),
        ("s3://", {}, "names no bucket"),
    ):
        for args in (("push", "demo", remote), ("pull", "demo", remote)):
            result = opd(server, *args, root=large_store, environment=environment)
            assert result.returncode == 2 and said in result.stderr and result.stderr.count("\n") == 1, (args, result)
        read = opd(server, "ls", root=remote, environment=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
        assert read.returncode == 2 and read.stderr.count("\n") == 1, read
