"""A PostgreSQL server of the test's own: its files in a folder for temporary files, no service of the system."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PASSWORD = "p%2Fw 1"
"""With characters that a URL has to quote."""
SECONDS = 60.0


def programs() -> Path:
    """The folder of `initdb` and `postgres`: Debian has one per version, on no PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    elsewhere = shutil.which("initdb")
    assert found or elsewhere, "no PostgreSQL is installed: apt-get install postgresql"
    return found[-1].parent if found else Path(str(elsewhere)).resolve().parent


@contextmanager
def postgres() -> Iterator[tuple[int, str]]:
    """(port on 127.0.0.1, name of the superuser and of its database); the password is `PASSWORD`."""
    folder = Path(tempfile.mkdtemp(prefix="opd-postgres-"))  # pytest's folders are closed to other users
    as_user: dict[str, Any] = {"cwd": folder}
    try:
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            user = pwd.getpwnam("postgres")  # which its package makes
            os.chown(folder, user.pw_uid, user.pw_gid)
            as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        data = folder / "data"
        initdb = [programs() / "initdb", "-D", data, "-U", "opd", "--auth=scram-sha-256", f"--pwfile={secret}"]
        made = subprocess.run([*initdb, "-E", "UTF8", "--no-sync"], capture_output=True, text=True, **as_user)
        assert made.returncode == 0, made.stdout + made.stderr
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        command = [programs() / "postgres", "-D", data, "-p", str(port)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, **as_user)
        try:
            deadline = time.monotonic() + SECONDS
            while not _answers(port):
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            yield port, "opd"
        finally:
            server.send_signal(signal.SIGINT)  # its fast shutdown
            try:
                server.wait(SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
