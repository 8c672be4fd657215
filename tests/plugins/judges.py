"""Functions of a user that judge: good ones, and each way to go wrong."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from process_family import start_family


def longer(completion: str, answer: str | None) -> float:
    return len(completion) / 8


def graded(completion: str, answer: str | None, *, prompt: str, token_ids: list[int], tokens: list[str]) -> dict:
    """All that a function may return, from all that it may read."""
    ends = [1, len(token_ids)] if len(token_ids) > 1 else [1]
    return {
        "reward": len(token_ids) % 2,
        "feedback": f"{prompt!r} expects {answer!r}, found {completion!r} in {len(tokens)} tokens",
        "segments": ends,
        "spans": [(0, 1, "first")],
    }


def parity(completion: str, answer: str | None) -> int:
    """0 or 1, by the digits of the completion; both occur among the completions of the scripted sampler."""
    return sum(map(ord, completion)) % 2


def moody(completion: str, answer: str | None) -> float:
    """No number for some of the completions of the scripted sampler."""
    return float("nan") if parity(completion, answer) and "1" in completion else len(completion) / 4


def struck(completion: str, answer: str | None) -> object:
    """`parity`; but where OPD_TEST_JUDGE has {kind, text}, a completion of that text (null: every one) meets that fault."""
    fault = json.loads(os.environ.get("OPD_TEST_JUDGE") or "{}")
    if fault and fault["text"] in (None, completion):
        return FAULTS[fault["kind"]](completion)
    return parity(completion, answer)


def named(completion: str, answer: str | None) -> object:
    """Does what the completion says: one function for every fault."""
    return FAULTS[completion.partition(" ")[0]](completion)


def _hang(completion: str) -> None:
    time.sleep(600)


def _spin(completion: str) -> None:
    """Hangs in C, and holds the interpreter's lock."""
    sum(range(10**13))


def _stop(completion: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _slain(completion: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _linger(completion: str) -> None:
    """Ends its process, which needs a moment for it, as on a busy machine."""
    atexit.register(time.sleep, 2)
    sys.exit(4)


def _disconnect(completion: str) -> None:
    """Closes what it did not open, as a library that makes a daemon of its process does, and goes on."""
    os.closerange(3, 256)
    time.sleep(600)


def _mute(completion: str) -> float:
    """Closes what it did not open, opens a file in its place, and returns as if nothing had happened."""
    os.closerange(3, 256)
    for _ in range(8):
        os.open(os.devnull, os.O_RDWR)
    return 1.0


def _family(completion: str) -> None:
    """Hangs, and leaves processes behind that no signal to its group ends."""
    start_family(Path(os.environ["OPD_TEST_JUDGE_FOLDER"]), os.getppid())
    time.sleep(600)


def _exit(completion: str) -> None:
    os._exit(3)


def _crash(completion: str) -> None:
    ctypes.string_at(0)


def _print(completion: str) -> float:
    secret = os.environ["JUDGE_API_KEY"]
    print("printed", secret, flush=True)
    print("to stderr", secret, file=sys.stderr)
    os.write(1, f"by the system {secret}\n".encode())
    return 1.0


def _halves(completion: str) -> float:
    """Lines in which a secret stands where a reader may cut them."""
    secret = os.environ["JUDGE_API_KEY"]
    os.write(1, f"{'x' * (65536 - 16)}{secret}\nbetween\n{secret[:16]}".encode())
    return 1.0


def _raise(completion: str) -> None:
    raise ValueError(f"no score, key {os.environ['JUDGE_API_KEY']}\nsecond line")


FAULTS = {
    "good": lambda text: 1,
    "true": lambda text: True,
    "hang": _hang,
    "spin": _spin,
    "stop": _stop,
    "slain": _slain,
    "linger": _linger,
    "disconnect": _disconnect,
    "mute": _mute,
    "family": _family,
    "exit": _exit,
    "crash": _crash,
    "print": _print,
    "halves": _halves,
    "raise": _raise,
    "quit": lambda text: sys.exit("enough"),
    "nan": lambda text: float("nan"),
    "inf": lambda text: {"reward": float("inf")},
    "none": lambda text: None,
    "word": lambda text: "good",
    "key": lambda text: {"reward": 1, "score": 2},
    "empty": lambda text: {},
    "feedback": lambda text: {"reward": 1, "feedback": 5},
    "span": lambda text: {"reward": 1, "spans": [(0, 99, "error")]},
    "backwards": lambda text: {"reward": 1, "spans": [(1, 1, "error")]},
    "segment": lambda text: {"reward": 1, "segments": [1, 99]},
    "unordered": lambda text: {"reward": 1, "segments": [2, 2]},
    "surrogate": lambda text: {"reward": 1, "feedback": "\ud800"},
    "leak": lambda text: {"reward": 0.5, "feedback": f"see {os.environ['JUDGE_API_KEY']}"},
}


def one_argument(completion: str) -> bool:
    return True


def needs_more(completion: str, answer: str | None, rubric: str) -> bool:
    return True
