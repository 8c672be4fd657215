"""DeepSpeed's hostfile before a run: what is read, where ranks go, the runner's command, and every refusal."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_hosts import Hosts, hosts
from pydantic import ValidationError

from storage.errors import ConfigError
from tasks.workers import hosts as relay
from tasks.workers.cluster import HostfileCluster, require
from tasks.workers.hostfile import (
    own_address,
    placed,
    read_hostfile,
    relay_command,
    runner_command,
    runner_environment,
)
from tasks.workers.runtime import RuntimeConfig
from tasks.workers.wire import Hello, new_secret, proof, read_line, send


def cluster(path: Path, text: str | None = None, **fields: object) -> HostfileCluster:
    if text is not None:
        path.write_text(text)
    return HostfileCluster(hostfile=path, **fields)


def runtime(path: Path, **fields: object) -> RuntimeConfig:
    own = {"kind": "hostfile", "hostfile": str(path)} | fields.pop("cluster", {})
    return RuntimeConfig.model_validate({"device": "cpu", "cluster": own} | fields)


# --- the file --------------------------------------------------------------------------------------------------------


def test_ranks_fill_the_slots_in_order(tmp_path):
    own = cluster(
        tmp_path / "hostfile", "# ours\n\nworker-1 slots=2\n  10.0.0.7   slots=4 # eight soon\nidle slots=0\n"
    )
    assert read_hostfile(own.hostfile) == {"worker-1": 2, "10.0.0.7": 4, "idle": 0}
    assert placed(own, 1) == {"worker-1": [0]}
    assert placed(own, 5) == {"worker-1": [0, 1], "10.0.0.7": [0, 1, 2]}
    with pytest.raises(ConfigError, match=r"^runtime\.trainer\.processes: 7 ranks, but .* has 6 slots \(worker-1 2, "):
        placed(own, 7)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a slots=1\nb\n", "line 2: 'b'; write HOST slots=N"),
        ("a slots=two\n", "line 1"),
        ("a slots=2x\n", "line 1"),  # DeepSpeed reads 2
        ("root@a slots=1\n", "line 1"),  # the runner splits lists at @
        ("a[1-3] slots=1\n", "line 1"),  # a list to pdsh
        ("a slots=1\n\na slots=1\n", "line 3: a a second time"),
        ("# none\n", "has no host"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, text, found):
    with pytest.raises(ConfigError, match=r"^runtime\.cluster\.hostfile: ") as error:
        placed(cluster(tmp_path / "hostfile", text), 1)
    assert found in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^runtime\.cluster\.hostfile: .*none: No such file"):
        require(runtime(tmp_path / "none"), tmp_path)
    (tmp_path / "binary").write_bytes(b"a slots=1 # \xff\n")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        read_hostfile(tmp_path / "binary")


LINES = st.lists(
    st.one_of(
        st.sampled_from(["", "#", " # a slots=1", "a slots=1", "a  slots=03 max_slots=4", "b-2.x\tslots=0", "c slots=2x", "d"]),
        st.builds("{}{}slots={}{}".format, st.text("ab.@[\x0b\x85", max_size=3), st.sampled_from([" ", "\t", ""]),
                  st.text("0129٣ ", max_size=3), st.sampled_from(["", " ", "\r", " #"])),
    ),
    max_size=5,
)  # fmt: skip


@settings(deadline=None)  # the first call imports DeepSpeed
@given(LINES)
def test_deepspeed_reads_in_a_file_what_we_do(tmp_path_factory, lines):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path_factory.mktemp("hostfile") / "hostfile"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    try:
        ours = read_hostfile(path)
    except ConfigError:
        return
    assert list(fetch_hostfile(str(path)).items()) == list(ours.items())


def test_deepspeed_places_ranks_as_we_do(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args, parse_inclusion_exclusion

    own = cluster(tmp_path / "hostfile", "b slots=2\na slots=4\nc slots=1\n")
    for ranks in range(1, 8):
        taken = placed(own, ranks)
        words = parse_args(runner_command(own, taken, tmp_path / "order")[3:])
        assert parse_inclusion_exclusion(fetch_hostfile(words.hostfile), words.include, words.exclude) == taken
        assert (words.launcher, words.force_multi, words.module, words.no_local_rank) == ("pdsh", True, True, True)
        assert words.master_addr == "b" and words.user_script == "tasks.workers.on_host"
        assert words.user_args == ["rank", str(tmp_path / "order")]


# --- fields ----------------------------------------------------------------------------------------------------------


def test_fields_that_mean_nothing_with_a_hostfile_are_refused(tmp_path):
    with pytest.raises(ValidationError, match=r"trainer\.devices: with runtime\.cluster: hostfile"):
        runtime(tmp_path / "h", trainer={"devices": [0]})
    with pytest.raises(ValidationError, match="hostfile"):
        RuntimeConfig.model_validate({"device": "cpu", "cluster": {"kind": "hostfile"}})


def test_gpus_of_the_trainer_are_not_looked_for_here(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("tasks.workers.runtime.gpu_count", lambda: 1)
    runtime(tmp_path / "h", device="cuda", trainer={"processes": 16}).require_gpus()
    with pytest.raises(ConfigError, match=r"runtime\.sampler"):
        runtime(tmp_path / "h", device="cuda", sampler={"workers": 2}).require_gpus()


def test_the_address_is_the_one_that_hosts_reach(tmp_path):
    own = cluster(tmp_path / "h")
    assert own_address(own, ["127.0.0.1", "127.0.0.2"]) == "127.0.0.1"
    assert own_address(cluster(tmp_path / "h", address="10.1.2.3"), ["nowhere.invalid"]) == "10.1.2.3"
    with pytest.raises(ConfigError, match=r"^runtime\.cluster\.address: no route to host nowhere\.invalid"):
        own_address(own, ["nowhere.invalid"])


def test_no_command_line_shows_a_secret_of_the_run(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_PASSWORD", "OPD_TEACHER_API_KEY"):
        monkeypatch.setenv(name, "not for others")
    monkeypatch.setenv("OPD_FAULTS", "for ranks")
    own = runtime(tmp_path / "h")
    _, more = relay_command(own.cluster, own.group("trainer"), "cpu", tmp_path / "log", ["-m", "x"], {}, None)
    [text] = more.values()
    assert "for ranks" in text and "not for others" not in text
    kept = runner_environment({**os.environ, "PYTHONHASHSEED": "1"})
    assert not [name for name in kept if name.startswith("MLFLOW") or name == "PYTHONHASHSEED"]


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    with hosts(tmp_path / "hosts", {"127.0.0.1": 1, "127.0.0.2": 2}) as running:
        yield running


def test_what_goes_where_is_told(two: Hosts, tmp_path):
    found = require(runtime(two.file, trainer={"processes": 3}), tmp_path / "store")
    assert found == (
        "ranks of the trainer: 0 on 127.0.0.1, 1 to 2 on 127.0.0.2; all other workers on this machine (127.0.0.1)"
    )
    assert [host for host, _ in sorted(two.asked())] == ["127.0.0.1", "127.0.0.2"]
    assert not (tmp_path / "store").exists() and two.empty()


def test_a_host_that_gets_no_rank_is_not_asked(two: Hosts, tmp_path):
    require(runtime(two.file), tmp_path)
    assert [host for host, _ in two.asked()] == ["127.0.0.1"]


def test_everything_that_is_wrong_on_a_host_is_told_by_field(two: Hosts, tmp_path, monkeypatch):
    with two.file.open("a") as file:
        file.write("127.0.0.3 slots=1\n")  # does not let us in
    monkeypatch.setattr("tasks.workers.hostfile.versions", lambda: {"python": "2.7", "ray": "1"})
    asked = runtime(two.file, device="cuda", trainer={"processes": 4, "deepspeed": str(tmp_path / "none.json")})
    with pytest.raises(ConfigError) as error:
        require(asked, tmp_path)
    lines = str(error.value).splitlines()
    found = [line for line in lines if "host 127.0.0.2" in line]
    assert [line.partition(":")[0] for line in found] == [
        "runtime.cluster",
        "runtime.trainer.deepspeed",
        "runtime.cluster.hostfile",
    ]
    assert "has python 3." in found[0] and "this machine 2.7" in found[0]
    assert "gets 2 ranks and has 0 GPUs" in found[2]
    [shut] = [line for line in lines if "127.0.0.3" in line]
    assert shut.startswith("runtime.cluster: host 127.0.0.3: ssh does not reach it without a password (")
    assert "Permission denied" in shut and "ssh-copy-id 127.0.0.3" in shut


def test_gpus_that_the_launcher_would_not_leave_alone_are_refused(two: Hosts, tmp_path, monkeypatch):
    on_gpus = runtime(two.file, device="cuda", trainer={"processes": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(
        ConfigError, match=r"is this machine, where .* the first 1 GPUs, but CUDA_VISIBLE_DEVICES is 4,5"
    ):
        require(on_gpus, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,5")
    with pytest.raises(ConfigError, match="has 0 GPUs; lower its slots") as error:
        require(on_gpus, tmp_path)
    assert "CUDA_VISIBLE_DEVICES" not in str(error.value)


def test_another_user_on_a_host_is_refused(two: Hosts, tmp_path, monkeypatch):
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    with pytest.raises(
        ConfigError, match=rf"^runtime\.cluster: host 127\.0\.0\.1: ssh logs in as .* of the user {other}"
    ):
        require(runtime(two.file), tmp_path)


def test_a_host_that_does_not_reach_this_machine_is_told(two: Hosts, tmp_path, monkeypatch):
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()

    class Shut:
        def __enter__(self) -> int:
            return port

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("tasks.workers.hostfile._open", lambda address, _: Shut())
    with pytest.raises(ConfigError, match=r"^runtime\.cluster\.address: host 127\.0\.0\.1 does not reach this machine"):
        require(runtime(two.file), tmp_path)


def test_an_address_of_another_machine_is_refused(two: Hosts, tmp_path):
    with pytest.raises(ConfigError, match=r"^runtime\.cluster\.address: 192\.0\.2\.1 is no address of this machine"):
        require(runtime(two.file, cluster={"address": "192.0.2.1"}), tmp_path)


@pytest.mark.parametrize("program", ["pdsh", "ssh"])
def test_a_missing_program_is_named_with_its_package(two: Hosts, tmp_path, monkeypatch, program):
    (two.bin / program).unlink()
    monkeypatch.setenv("PATH", str(two.bin))
    with pytest.raises(ConfigError, match=rf"{program} is not on PATH.*apt-get install .*{program[:3]}"):
        require(runtime(two.file), tmp_path)


def test_a_path_that_no_shell_would_leave_alone_is_refused(two: Hosts, tmp_path):
    with pytest.raises(ConfigError, match=r"^root: .* has characters that DeepSpeed's launcher does not quote"):
        require(runtime(two.file), tmp_path / "my store")


# --- the relay -------------------------------------------------------------------------------------------------------


def rank(port: int, number: int, secret: str, answer: str = "rank") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    challenge = json.loads(read_line(connection, 5))
    send(connection, Hello(proof(secret, answer, challenge), new_secret(), number, 2, "127.0.0.1", "lo", 1))
    return connection


def test_only_ranks_that_know_the_secret_are_taken():
    secret = new_secret()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        opened = []

        def connect() -> None:
            opened.append(socket.create_connection(("127.0.0.1", port)))  # says nothing
            opened.append(rank(port, 0, new_secret()))
            opened.append(rank(port, 0, secret, "relay"))  # an answer of the relay sent back
            opened.append(rank(port, 5, secret))
            for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\n"):
                opened.append(socket.create_connection(("127.0.0.1", port)))
                opened[-1].sendall(junk)
            for refused in opened[1:]:
                refused.settimeout(10)
                with suppress(ConnectionResetError):  # closed before it has read all
                    while refused.recv(1000):
                        pass
            opened.extend(rank(port, number, secret) for number in (1, 0))

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        ranks = relay._gather(listener, secret, 2, lambda: None)
        thread.join()
        assert [found.hello.rank for found in ranks] == [0, 1]
        assert [found.connection.getpeername() for found in ranks] == [
            o.getsockname() for o in (opened[-1], opened[-2])
        ]
        for found in (*(r.connection for r in ranks), *opened):
            found.close()
