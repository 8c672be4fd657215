"""Payloads that betray that they were run: each makes a file, the canary."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path


class _Bomb:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


class Canary:
    """`path` exists once any of the payloads has run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "canary"

    @property
    def code(self) -> str:
        """Python that makes the canary."""
        return f"open({str(self.path)!r}, 'a').close()"

    @property
    def expression(self) -> str:
        """The same as one expression without quotes, for places that evaluate text."""
        name = "+".join(f"chr({ord(letter)})" for letter in str(self.path))
        return f"open({name},chr(97)).close()"

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(_Bomb(self.code))

    def module(self, *classes: str) -> str:
        """A module that makes the canary when it is imported, with these classes."""
        return self.code + "\n" + "".join(f"class {name}: pass\n" for name in classes)

    @property
    def alive(self) -> bool:
        """Nothing has run."""
        return not self.path.exists()

    def proven(self) -> None:
        """Check that the payloads are live: unpickling and importing them makes the canary, which is removed again."""
        for payload in (f"import pickle; pickle.loads({self.pickled!r})", self.module(), f"eval({self.expression!r})"):
            subprocess.run([sys.executable, "-c", payload], check=True)
            assert not self.alive, payload
            self.path.unlink()


PICKLES = (
    "pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "training_args.bin", "optimizer.pt", "scheduler.pt",
    "rng_state.pth", "trainer_state.pkl", "consolidated.00.pth", "model.pt", "adapter_model.bin", "latest",
    "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "tokenizer.pkl", "vocab.pkl",
)  # fmt: skip
MODULES = (
    "modeling_x.py", "configuration_x.py", "tokenization_x.py", "generation_x.py", "custom_generate/generate.py",
    "sitecustomize.py", "conftest.py", "torch.py", "__init__.py",
)  # fmt: skip
AUTO_MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModel": "modeling_x.XModel",
    "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    "AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizer"],
}


def poison(folder: Path, canary: Canary, names: tuple[str, ...] = PICKLES + MODULES, auto_map: bool = True) -> None:
    """Lay payloads of these names beside a checkpoint, and have its configs point at them."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".py"):
            classes = ("XConfig", "XModel", "XForCausalLM", "XTokenizer")
            path.write_text(canary.module(*classes) + "def generate(*a, **k): pass\n")
        else:
            path.write_bytes(canary.pickled)
    if auto_map:
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            edit(folder / name, auto_map=AUTO_MAP, custom_generate="custom_generate/generate.py")


def edit(path: Path, **fields: object) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
