"""A scheduled run that is cancelled in Prefect while a worker hangs over its family (`stopping`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from opd_cli import OPD
from places import CHECKOUT, PLUGINS
from scripted_run import MARK, NAME, prepare_root
from shared_prefect import ask, eventually
from stopping import LIMIT, PATIENCE, StoppedRun

from storage.runs import Run


def cancel_a_tick(folder: Path, api_url: str, role: str) -> StoppedRun:
    """Serves a schedule, cancels its first tick by the API as a user does, ends the schedule; returns the run."""
    run = StoppedRun.of(prepare_root(folder / "template" / "store"), folder / "run")
    run.write(role)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "OPD_"))}
    environment |= {"PREFECT_API_URL": api_url, "PYTHONPATH": f"{CHECKOUT}:{PLUGINS}"}
    environment |= {MARK: str(run.folder), "TMPDIR": str(run.temporary)}
    config = run.folder / "config.yaml"
    command = [OPD, "schedule", config, "--name", NAME, "--every", "1h", "--rounds", "2", "--root", run.root]
    with (run.folder / "output").open("ab") as output:
        schedule = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output)
    try:
        eventually(lambda: (run.root / "family-ready").exists() or schedule.poll() is not None)
        assert schedule.poll() is None, run.output
        family = [int(pid) for pid in (run.root / "family-ready").read_text().split()]
        holder = Run.open(run.root, NAME).holder_info()
        assert holder is not None and len(family) == 7
        for name in ("family", "family-ready"):
            (run.root / name).unlink()
        (tick,) = [found for found in ask(api_url, "flow_runs/filter", {"limit": 200}) if is_tick(found)]
        ask(api_url, f"flow_runs/{tick['id']}/set_state", {"state": {"type": "CANCELLING"}})
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (*family, holder.pid)), LIMIT)
        opened = Run.open(run.root, NAME)
        assert opened.holder() is None and opened.state.status == "stopped"
        eventually(lambda: not any(run.temporary.glob(".tmp-*")), LIMIT)
        state = lambda: next(x for x in ask(api_url, "flow_runs/filter", {"limit": 200}) if x["id"] == tick["id"])  # noqa: E731
        eventually(lambda: state()["state_type"] == "CANCELLED")
        assert schedule.poll() is None, run.output  # the next tick will go on
        schedule.send_signal(signal.SIGTERM)
        assert schedule.wait(PATIENCE) == 130, run.output
        assert run.orphans(LIMIT) == []
        with contextlib.suppress(FileNotFoundError):
            (
                run.temporary / "runner_storage"
            ).rmdir()  # Prefect's own, shared by its runners; nothing may be left in it
    finally:
        schedule.kill()
        schedule.wait()
    return run


def is_tick(flow_run: dict[str, Any]) -> bool:
    return flow_run["state_type"] == "RUNNING" and flow_run["name"] == f"{NAME} tick"
