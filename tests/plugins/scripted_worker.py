"""A plugin that takes the scorer's place and does what a job tells it to: real worker code, faults on demand."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from storage.errors import InputError
from tasks.workers.jobs import register_role

register_role("scorer", f"{__name__}:Scripted")


class Scripted:
    def __init__(self, settings: dict) -> None:
        self.settings = settings
        self.served = 0

    def handle(self, job: dict, progress) -> dict:
        self.served += 1
        match job["op"]:
            case "echo":
                progress(1, 1)
                return {"value": job["value"], "served": self.served, "pid": os.getpid()}
            case "train":
                for step, metrics in enumerate(job["metrics"], 1):
                    progress(step, len(job["metrics"]), metrics)
                    time.sleep(job["pause"])
                return {}
            case "die_once":
                marker = Path(job["marker"])
                if not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return {"value": "second try"}
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuse":
                raise InputError("prompts.jsonl:3: no field `prompt`")
            case "crash":
                raise ZeroDivisionError("a bug")
            case "socket":
                path = Path(tempfile.gettempdir(), str(uuid.uuid4()))  # as vLLM names those of its own processes
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(path))
                return {"folder": str(path.parent)}
            case "grandchild":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                Path(job["pids"]).write_text(f"{os.getpid()} {child.pid}")
                time.sleep(600)
        raise ValueError(job["op"])

    def close(self) -> None: ...
