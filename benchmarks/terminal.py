"""Pictures of a terminal: calls commands in a pseudo-terminal of a given width and writes what they print as an SVG.

python benchmarks/terminal.py OUT.svg COLUMNS ROOT COMMAND...     each COMMAND is one argument, without `opd`: "status demo"
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import sys
import termios
from contextlib import suppress
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

ROWS = 50
PLAIN = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""rich's form without fonts from the network."""


def printed(arguments: list[str], columns: int, root: Path) -> str:
    """What `opd` prints in a terminal of this width, with its escape sequences."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "OPD_ROOT": str(root)}
        program = str(Path(sys.executable).parent / "opd")
        os.execve(program, [program, *arguments], environment)
    text = b""
    with suppress(OSError):  # the end of a pseudo-terminal
        while data := os.read(terminal, 65536):
            text += data
    os.waitpid(child, 0)
    os.close(terminal)
    return text.decode(errors="replace").replace("\r\n", "\n")


def picture(commands: list[str], columns: int, root: Path, title: str = "opd") -> str:
    """The commands and what they print, as an SVG."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    for number, command in enumerate(commands):
        if number:
            console.print()
        console.print(Text(f"$ opd {command}", style="bold"))
        console.print(Text.from_ansi(printed(shlex.split(command), columns, root).rstrip("\n")))
    return console.export_svg(title=title, code_format=PLAIN)


if __name__ == "__main__":
    out, columns, root, *commands = sys.argv[1:]
    Path(out).write_text(picture(commands, int(columns), Path(root).resolve()))
