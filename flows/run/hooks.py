"""Calls the user's commands after a round and after a failure. They are the user's own: what goes wrong in one is a warning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flows.hooks import Hooks, PrefectBlock
from storage.disk.redact import redact
from storage.runs import Run, RunState


def after_round(hooks: Hooks, run: Run, state: RunState, round: int, root: Path) -> str | None:
    """Calls `on_round`; returns a warning if it failed."""
    if hooks.on_round is None:
        return None
    metrics = next((r.metrics for r in state.rounds if r.round == round), {})
    return _call("on_round", hooks.on_round, hooks.timeout, run, _variables(state, root, round), metrics)


def after_failure(hooks: Hooks, run: Run, state: RunState, root: Path) -> str | None:
    """Calls `on_failure`; returns a warning if it failed itself. The round is the one that the run was at."""
    if hooks.on_failure is None:
        return None
    last = state.last_trained
    number = state.rounds[-1].round if state.rounds else 0
    variables = _variables(state, root, number) | {"OPD_ERROR": state.error or ""}
    return _call("on_failure", hooks.on_failure, hooks.timeout, run, variables, last.metrics if last else {})


def _variables(state: RunState, root: Path, round: int) -> dict[str, str]:
    return {
        "OPD_RUN": state.name,
        "OPD_ROUND": str(round),
        "OPD_STATUS": state.status,
        "OPD_ROOT": str(root.absolute()),
    }


def _call(
    name: str,
    command: Sequence[str] | str | PrefectBlock,
    timeout: float,
    run: Run,
    variables: Mapping[str, str],
    metrics: Mapping[str, float | None],
) -> str | None:
    log = run.log_path("hooks")
    if isinstance(command, PrefectBlock):
        command = [sys.executable, "-P", "-m", "flows.prefect_.notify", command.block]
    try:
        with log.open("ab") as out:
            out.write(f"--- {name} after round {variables['OPD_ROUND']}\n".encode())
            out.flush()
            process = subprocess.Popen(
                command if isinstance(command, str) else list(command),
                shell=isinstance(command, str),
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
            problem = _wait(process, json.dumps(metrics).encode(), timeout)
    except OSError as error:
        problem = str(error)
    return None if problem is None else redact(f"warning: hooks.{name}: {problem}; the run goes on; output: {log}")


def _wait(process: subprocess.Popen[bytes], given: bytes, timeout: float) -> str | None:
    try:
        process.communicate(given, timeout)
    except subprocess.TimeoutExpired:
        return f"ended after {timeout:g} s (hooks.timeout)"
    finally:
        _end(process)
    return None if process.returncode == 0 else f"exit code {process.returncode}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the command's session, also after an interruption."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
