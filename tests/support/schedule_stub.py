"""A run without engines, for tests of the schedule alone: `run_rounds` sleeps, counts and holds a real run's lock.

The config is JSON: {"rounds": configured rounds, "seconds": [of round 1, 2, ...], "fail": [rounds that fail once]}."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from storage.errors import ConfigError
from storage.runs import RoundState, Run, RunState


def run_rounds(config_path: str, name: str, root: str, rounds: int, overrides: list[str]) -> RunState:
    """The signature and the promises of `flows.run.runner.run_rounds`."""
    config = json.loads(Path(config_path).read_text())
    if config.get("bad"):
        raise ConfigError("bad: true is not allowed")
    run = Run.create(root, name, config, {"config": Path(config_path).name})
    with run.lock():
        for _ in range(rounds):
            state = run.state
            number = len(state.rounds) + 1
            note(root, event="start", round=number, overrides=overrides)
            if number in config.get("fail", []) and not (marker := Path(root) / f"failed-{number}").exists():
                marker.touch()
                raise ValueError(f"round {number} fails once")
            time.sleep(config["seconds"][number - 1])
            note(root, event="end", round=number)
            state.rounds.append(RoundState(round=number, student_sha256=f"student {number}"))
            state.status = "finished" if number == config["rounds"] else "stopped"
            run.save(state)
            if state.status == "finished":
                break
        return state


def note(root: str, **event: object) -> None:
    with (Path(root) / "events.jsonl").open("a") as file:
        file.write(json.dumps(event | {"time": time.time(), "pid": os.getpid()}) + "\n")


def events(root: Path) -> list[dict]:
    """What the ticks noted, in order."""
    path = root / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
