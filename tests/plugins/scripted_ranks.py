"""A plugin that takes the trainer's place: ranks that do what a job tells them, without an engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripted_jobs import ScriptedAnswer, ScriptedJob

from opdflow.plugin import register_role

register_role("trainer", f"{__name__}:Ranks")


class Ranks:
    def __init__(self, settings: dict) -> None:
        self.rank = int(os.environ["RANK"])

    def handle(self, job: ScriptedJob, link) -> ScriptedAnswer:
        place = Path(job.path, f"rank-{self.rank}")
        match job.do:
            case "tell":
                place.write_text(json.dumps(dict(os.environ)))
            case "die_once":  # rank 1, while the other waits for it as in a collective call
                if not place.exists():
                    place.touch()
                    if self.rank == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(600)
            case "hang":  # the last rank as in a library's call that lets nothing else of the process run
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
                place.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
                place.with_suffix(".new").rename(place)
                if self.rank == int(os.environ["WORLD_SIZE"]) - 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)
        return ScriptedAnswer(job.value, pid=os.getpid())

    def close(self) -> None: ...
