"""The scripted engines, which let slip what stands in OPD_TEST_LEAK, in the way and the place that OPD_TEST_LEAK_HOW names."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings

import scripted_engines

import tasks.trainer.launch
from opdflow.plugin import register_role
from storage.errors import InputError

for role in ("sampler", "scorer", "trainer"):
    register_role(role, f"{__name__}:{role.capitalize()}")

HOW, TEXT = os.environ.get("OPD_TEST_LEAK_HOW", ""), os.environ.get("OPD_TEST_LEAK", "")


def leak() -> None:
    match HOW:
        case "prints":
            print(TEXT, flush=True)
            print("one", TEXT, "two", file=sys.stderr, end="", flush=True)
        case "logs":
            logging.getLogger("a.library").error("it failed: %s", TEXT)
        case "warns":
            warnings.warn(TEXT, stacklevel=1)
        case "raises":
            raise RuntimeError(f"a bug: {TEXT}")
        case "raises-ours":
            raise InputError(f"prompts.jsonl: {TEXT}")
        case "chains":
            try:
                raise KeyError(TEXT)
            except KeyError as error:
                raise RuntimeError("something else") from error
        case "dies":
            print(TEXT, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


class Leaking:
    def handle(self, job, link):
        leak()
        return super().handle(job, link)


class Sampler(scripted_engines.Sampler): ...


class Scorer(scripted_engines.Scorer): ...


class Trainer(Leaking, scripted_engines.Trainer): ...


def launch(*arguments: object) -> object:
    if HOW == "supervisor":
        raise RuntimeError(f"a bug of the supervisor: {TEXT}")
    return launched(*arguments)


launched, tasks.trainer.launch.launch_command = tasks.trainer.launch.launch_command, launch
