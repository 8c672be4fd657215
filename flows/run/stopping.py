"""Being told to stop: Ctrl-C, SIGTERM and a closed terminal all end a command in order, once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 10.0
"""Seconds in which a further signal changes nothing: what ends already would only leave something behind."""

_asked = -PATIENCE


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler: KeyboardInterrupt, unless one is under way."""
    global _asked
    now = time.monotonic()
    if now - _asked >= PATIENCE:
        _asked = now
        raise KeyboardInterrupt


@contextmanager
def terminating() -> Iterator[None]:
    """In the block SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt: children are stopped, the state says so, what is
    committed stays. SIGINT and SIGHUP stay as they are where someone else handles or ignores them (nohup, a background
    job). Without effect outside the main thread: whoever runs us handles signals."""
    mine = {signal.SIGTERM: None, signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in mine}
    try:
        for number, default in mine.items():
            if default is None or before[number] == default:
                signal.signal(number, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
