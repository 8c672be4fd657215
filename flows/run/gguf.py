"""An exported folder as one GGUF file too (`opd export --gguf`), for llama.cpp and what is built on it: by its own converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from storage.disk.files import TEMPORARY
from storage.errors import InputError, OpdError

CONVERTER = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0")


class Converter:
    """llama.cpp's converter, found on PATH. InputError where it is not there, or has no such type."""

    def __init__(self, type: str) -> None:
        if type not in TYPES:
            raise InputError(f"--gguf {type!r}: no such type; choose one of {', '.join(TYPES)}")
        script = shutil.which(CONVERTER)
        if script is None:
            raise InputError(
                f"--gguf: {CONVERTER} of llama.cpp is not on PATH; put llama.cpp's folder there"
                " (PATH=/path/to/llama.cpp:$PATH), or export without --gguf and convert the folder elsewhere"
            )
        self.type, self._script = type, script

    def convert(self, folder: Path) -> Path:
        """Writes FOLDER/NAME-TYPE.gguf and returns it. OpdError, with the converter's last line, where it fails: of a model or a
        tokenizer that llama.cpp does not know."""
        target = folder / f"{folder.absolute().name}-{self.type}.gguf"
        temporary = folder / f"{TEMPORARY}{target.name}"
        command = [sys.executable, self._script, str(folder), "--outfile", str(temporary), "--outtype", self.type]
        done = subprocess.run(
            command,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0 or not temporary.is_file():
            temporary.unlink(missing_ok=True)
            last = next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
            raise OpdError(
                f"--gguf: {CONVERTER} failed ({last}); the checkpoint in {folder} is complete. All of its output:"
                f" python {self._script} {folder}"
            )
        os.replace(temporary, target)
        return target
