"""A scripted run (`scripted_run`) through the real command line, with workers that leave families behind, and ways to stop it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import forked
import psutil
from scripted_run import EXPERIMENT, MARK, NAME, Trial, find_engines

from storage.disk import failpoints
from storage.runs import Run

LIMIT = 10.0
"""Seconds until nothing is alive: the promise."""
PATIENCE = 120.0


def _opd(arguments: list[str], environment: dict[str, str]) -> None:
    """What the console script `opd` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    find_engines()
    failpoints.arm()
    sys.argv = ["opd", *arguments]
    from flows.cli.app import main

    main()


class StoppedRun(Trial):
    """A run whose worker of `role` hangs over a family, once it is started."""

    def write(self, role: str | None) -> None:
        """The config; with a role, its next worker starts a family and hangs."""
        experiment = EXPERIMENT | {"plugins": ["scripted_family"], "policy": {"rounds": self.rounds}}
        (self.folder / "config.yaml").write_text(json.dumps(experiment))
        if role is not None:
            (self.root / "family").write_text(role)

    def opd(self, *arguments: str, **environment: str) -> Any:
        """A process of the command line."""
        environment |= {MARK: str(self.folder), "TMPDIR": str(self.temporary), "TERM": "dumb"}
        command = [*arguments, "--root", str(self.root)]
        return forked.start(_opd, command, environment, output=self.folder / "output")

    def begin(self, *more: str, prefect: bool = False, **environment: str) -> Any:
        more = more if prefect else (*more, "--no-prefect")
        return self.opd("run", str(self.folder / "config.yaml"), "--name", NAME, *more, **environment)

    def family(self, process: Any) -> list[int]:
        """The pids of the worker and of its family, once they are all there."""
        ready = self.root / "family-ready"
        deadline = time.monotonic() + PATIENCE
        while not ready.exists():
            assert process.is_alive(), self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        pids = [int(pid) for pid in ready.read_text().split()]
        assert len(pids) == 7 and all(map(psutil.pid_exists, pids))
        for name in ("family", "family-ready"):
            (self.root / name).unlink()
        return pids

    def ended(self, process: Any) -> int:
        """The exit code. Nothing that belongs to the trial is alive in time, no lock is held, no temporary file is left."""
        started = time.monotonic()
        process.join(LIMIT)
        assert process.exitcode is not None, f"still there after {LIMIT} s\n{self.output}"
        left = self.orphans(LIMIT - (time.monotonic() - started))
        assert left == [], left
        assert Run.open(self.root, NAME).holder() is None
        assert list(self.temporary.rglob("*")) == []
        return int(process.exitcode)

    def resumed(self) -> dict[str, Any]:
        """What the run ends with, after `opd resume`."""
        process = self.opd("resume", NAME, "--no-prefect")
        process.join(PATIENCE)
        assert process.exitcode == 0, self.output
        assert self.leftovers() == []
        return self.result()


Stop = Callable[[StoppedRun, Any, list[int]], None]
"""Stops a run, given its process and the pids of the worker and of its family."""


def by(*numbers: int) -> Stop:
    """Signals to the main process, one shortly after the other."""

    def stop(run: StoppedRun, process: Any, family: list[int]) -> None:
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
            time.sleep(0.05)

    return stop


def by_command(run: StoppedRun, process: Any, family: list[int]) -> None:
    command = run.opd("stop", NAME, "--wait", str(LIMIT))
    command.join(PATIENCE)
    assert command.exitcode == 0, run.output


def by_killing_its_worker(run: StoppedRun, process: Any, family: list[int]) -> None:
    os.kill(family[0], signal.SIGKILL)


def by_killing_its_guard(run: StoppedRun, process: Any, family: list[int]) -> None:
    psutil.Process(family[0]).parent().kill()


def by_waiting(run: StoppedRun, process: Any, family: list[int]) -> None:
    """A time limit does it."""


STOPS: dict[str, tuple[Stop, int | None, str, tuple[str, ...]]] = {
    "SIGINT": (by(signal.SIGINT), 130, "stopped", ()),
    "SIGTERM": (by(signal.SIGTERM), 130, "stopped", ()),
    "SIGHUP": (by(signal.SIGHUP), 130, "stopped", ()),
    "SIGINT-twice": (by(signal.SIGINT, signal.SIGINT), 130, "stopped", ()),
    "SIGTERM-SIGINT": (by(signal.SIGTERM, signal.SIGINT), 130, "stopped", ()),
    "opd-stop": (by_command, 130, "stopped", ()),
    "SIGKILL": (by(signal.SIGKILL), -signal.SIGKILL, "running", ()),
    "SIGTERM-SIGKILL": (by(signal.SIGTERM, signal.SIGKILL), None, "", ()),
    "stage-timeout": (by_waiting, 1, "failed", ("--set", "runtime.stage_timeout=1.5", "--set", "runtime.retries=0")),
    "stall-timeout": (by_waiting, 1, "failed", ("--set", "runtime.stall_timeout=1.5", "--set", "runtime.retries=0")),
    "guard-killed": (by_killing_its_guard, 1, "failed", ("--set", "runtime.retries=0")),
    "worker-killed": (by_killing_its_worker, 1, "failed", ("--set", "runtime.retries=0")),
}
"""Name -> (how, exit code (None: stopped or killed, whichever was first), the state that the run says it is in ("": any),
further arguments)."""


def one_stop(run: StoppedRun, role: str, how: str, prefect: bool = False) -> None:
    """Starts the run, stops it and looks what is left."""
    stop, code, status, more = STOPS[how]
    run.write(role)
    process = run.begin(*more, prefect=prefect)
    stop(run, process, run.family(process))
    ended = run.ended(process)
    assert ended == code or (code is None and ended in (130, -signal.SIGKILL)), run.output
    state = Run.open(run.root, NAME).state
    assert status in ("", state.status)
    if status == "stopped":
        assert "opd resume" in run.output and run.leftovers() == []
    if status == "failed":
        assert f"{role} worker" in run.output and "opd resume" in run.output
        assert "last lines of" in run.output or "this attempt wrote nothing to" in run.output
        assert run.leftovers() == []
