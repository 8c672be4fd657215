"""The last state of a flow run that worked on a run, by what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.prefect_.failure import failure
from flows.run.pace import configured_rounds, estimate, round_seconds
from storage.errors import OpdError, RunBusy
from storage.runs import Run, RunState

FINISHED, REFUSED, SKIPPED = "Finished", "Refused", "Skipped"
"""Names of a last state: nothing is left to do; trying again cannot cure it; another process is at the run."""


def outcome(
    work: Callable[[], RunState], name: str, root: Path, *, who: str, again: str, over: str, done: str = ""
) -> Any:
    """The Prefect state that says, by name and message, what came of `work` on the run `name`. KeyboardInterrupt and SystemExit
    pass through.

    `who` begins the message of a failure (a tick, say); `again`, `over`: what follows an error that another attempt may cure,
    and one that it cannot; `done`: what follows where all rounds are done."""
    from prefect.states import Completed, Failed

    started = time.monotonic()
    try:
        state = work()
    except RunBusy as error:
        return Completed(name=SKIPPED, message=f"{who} skipped: {error}")
    except Exception as error:
        final = isinstance(error, OpdError) and error.exit_code == 2
        text, todo = failure(error, name, root).message(), over if final else again
        return Failed(name=REFUSED if final else None, message=f"{who} failed: {text} ({todo}; opd logs {name})")
    at = f"at round {state.rounds_done} after {time.monotonic() - started:.0f} s"
    if state.status == "finished":
        return Completed(name=FINISHED, message=f"{at}; {state.ended or 'all configured rounds are done'}{done}")
    return Completed(message=at + _left(state, name, root))


def _left(state: RunState, name: str, root: Path) -> str:
    """What is left of the run, where its rounds so far tell how long it takes."""
    goal = configured_rounds(Run.open(root, name))
    left = None if goal is None else estimate(goal - state.rounds_done, round_seconds(state.rounds))
    return f" of {goal}; left: {left}" if left else ""
