"""A real S3 server on loopback: SeaweedFS, one program with master, volume, filer and S3 gateway (requirements/s3-server.txt)."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PDEATHSIG = 1
WEED = Path(sys.executable).parent / "weed"
BUCKET = "lab"
MAKER, KEY, SECRET = "AKOPDTESTMAKER000001", "AKOPDTESTKEY00000001", "a-secret-of-the-test-server-0001"
"""The maker may make buckets; the key is of a user of one bucket."""


@dataclass(frozen=True)
class S3Server:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment needs, and nothing of the user's own."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }


def free_ports(count: int) -> list[int]:
    """Ports that are free, and whose ports 10,000 above are too: SeaweedFS serves gRPC there."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in range(21_000 + os.getpid() % 2_000, 45_000):
            try:
                for number in (port, port + 10_000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no free ports")


def _ends_with_us() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """The server, with its data and log in `folder`; ended with all its processes."""
    master, volume, filer, s3 = free_ports(4)
    rights = {"maker": ["Admin"], "user": [f"{action}:{BUCKET}" for action in ("Read", "Write", "List")]}
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": rights[name]}
        for name, key in (("maker", MAKER), ("user", KEY))
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    command = [
        str(WEED), "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        "-master.volumeSizeLimitMB=64", "-volume.max=40", "-filer", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}",
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=folder, preexec_fn=_ends_with_us
        )
    try:
        server = S3Server(s3)
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(server.url, timeout=1).close()
                break
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", s3), 1).close()
                break
            time.sleep(0.1)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
