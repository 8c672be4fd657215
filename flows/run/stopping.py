"""Signals: Ctrl-C, SIGTERM and a closed terminal each end a command in order, once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 10.0
"""Ignore repeated signals for this many seconds, so that shutdown can clean up."""

_asked = -PATIENCE


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler: raises KeyboardInterrupt, unless a shutdown is in progress."""
    global _asked
    now = time.monotonic()
    if now - _asked >= PATIENCE:
        _asked = now
        raise KeyboardInterrupt


@contextmanager
def terminating() -> Iterator[None]:
    """In the block SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that children are stopped and the state is saved.

    SIGINT and SIGHUP are left alone where another handler is set or they are ignored (nohup, a background job). Has no effect
    outside the main thread, where the embedding program handles signals."""
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
