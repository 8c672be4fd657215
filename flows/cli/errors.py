"""How errors reach the user: an `OpdError` as one block on stderr, any other exception (a bug) with its traceback.

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
    """Ends the process with the exit code of an `OpdError`; other exceptions pass through. Redacts secrets on stderr from now
    on."""
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
    """The message, with all lines but the first indented."""
    first, *rest = (str(error).strip() or type(error).__name__).splitlines()
    return "\n".join([f"error: {first}", *(f"  {line}".rstrip() for line in rest)])
