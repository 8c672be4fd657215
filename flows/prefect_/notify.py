"""A hook that is a notification block of Prefect: `python -m flows.prefect_.notify TYPE/NAME`, called as the user's commands are
(flows/run/hooks.py), in a process of its own, so that a block that hangs or fails costs `hooks.timeout` and a warning."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.hooks import Hooks, PrefectBlock
from flows.prefect_.session import asking, first_line, prefect_session
from flows.run.progress import round_line
from storage.disk.redact import redact
from storage.errors import ConfigError, OpdError
from storage.runs import RoundState

if TYPE_CHECKING:
    from prefect.blocks.abstract import NotificationBlock


def require_blocks(hooks: Hooks) -> None:
    """Within a session. ConfigError where a hook names a block that the server does not have, or one that sends nothing."""
    for name in ("on_round", "on_failure"):
        if isinstance(hook := getattr(hooks, name), PrefectBlock):
            try:
                _load(hook.block)
            except ConfigError as error:
                raise ConfigError(f"hooks.{name}.block: {error}") from None


def message(variables: Mapping[str, str], metrics: Mapping[str, float | None]) -> tuple[str, str]:
    """Subject and body."""
    run, number = variables["OPD_RUN"], int(variables["OPD_ROUND"])
    if "OPD_ERROR" in variables:
        return f"{run} failed in round {number}", variables["OPD_ERROR"]
    return f"{run}: round {number} is done", round_line(RoundState(round=number, metrics=dict(metrics)))


def _load(name: str) -> NotificationBlock:
    import prefect.blocks.notifications  # noqa: F401  (registers the types that come with Prefect)
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    with asking(f"the block {name}"):
        try:
            block = Block.load(name)
        except ValueError:  # what Prefect raises for a type or a name that is not there
            raise ConfigError(
                f"the Prefect server has no block {name!r}; `prefect block ls` lists those that it has, `opd ui` shows the"
                " store's own server, where Blocks makes one"
            ) from None
    if not isinstance(block, NotificationBlock):
        raise ConfigError(f"{name!r} is a block of another kind; choose one that notifies, such as slack-webhook/NAME")
    return block


def main(name: str) -> None:
    subject, body = message(os.environ, json.load(sys.stdin))
    try:
        with prefect_session(Path(os.environ["OPD_ROOT"]), required=True):
            cast(Any, _load(name)).notify(body, subject)  # typed as a coroutine; called from no event loop it is none
    except Exception as error:  # of the block's own: its address may have a key
        sys.exit(redact(str(error) if isinstance(error, OpdError) else f"{name}: {first_line(error)}"))


if __name__ == "__main__":
    main(sys.argv[1])
