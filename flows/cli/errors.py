"""How errors reach the user: what is theirs or the machine's as one block on stderr, what is a bug with its traceback.

Exit codes: 0 done, 1 failed, 2 bad config, input or usage, 75 held by another process, 130 stopped by a signal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flows.run.stopping import terminating
from storage.disk.redact import redact_output
from storage.errors import OpdError

STOPPED = 130


@contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the process with the error's exit code. What is no `OpdError` passes through, traceback and all. From now on
    stderr shows no secrets."""
    redact_output("stderr")
    try:
        with terminating():
            yield
    except OpdError as error:
        print(block(error), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(STOPPED)


def block(error: OpdError) -> str:
    """The message, its further lines indented under the first."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return "\n".join([f"error: {first}", *(f"  {line}".rstrip() for line in rest)])
