"""The section `hooks` of a config: what is called after a round and after a failure (by flows/run/hooks.py)."""

from __future__ import annotations

from pydantic import Field, field_validator

from storage.identity import RunPolicy


class PrefectBlock(RunPolicy):
    """A notification block of Prefect (Slack, e-mail, PagerDuty, a webhook, ...), at PREFECT_API_URL or in the store's own
    server, where `opd ui` makes one."""

    block: str = Field(
        pattern=r"^[^/\s]+/\S+$", description="TYPE/NAME, as `prefect block ls` lists it: slack-webhook/lab"
    )


class Hooks(RunPolicy):
    """Commands of yours, called on the machine of the run: a list of words, or one line for the shell. They get OPD_RUN,
    OPD_ROUND, OPD_STATUS and OPD_ROOT in the environment and the round's metrics as JSON on standard input. One that fails is a
    warning. Or a notification block of Prefect, which gets the round's line, or the error."""

    on_round: tuple[str, ...] | str | PrefectBlock | None = Field(
        None, description="called after every round in which something was made"
    )
    on_failure: tuple[str, ...] | str | PrefectBlock | None = Field(
        None, description="called when the run fails; OPD_ERROR has the reason. Not when it is stopped"
    )
    timeout: float = Field(60, gt=0, description="seconds after which a command is ended, with all its processes")

    @field_validator("on_round", "on_failure")
    @classmethod
    def _words(cls, value: tuple[str, ...] | str | PrefectBlock | None) -> tuple[str, ...] | str | PrefectBlock | None:
        if value is None or isinstance(value, PrefectBlock):
            return value
        if not (value.strip() if isinstance(value, str) else value and value[0].strip()):
            raise ValueError("it has no command; write a list of words or a line for the shell, or null")
        return value
