"""Run as a script: optimizer steps in every kind of engine, the second with a finite loss and a gradient that is not.

Prints one JSON line per kind: the step's answers, and whether the bad step left the weights alone."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from tasks.trainer.config import OptimizerSettings
from tasks.trainer.engine import Engine, start
from tasks.trainer.state import full_tensors


class Head(nn.Module):
    head = nn.Identity()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.loss_head = Head()

    def forward(self, spoil: bool, observe: bool) -> torch.Tensor:
        value = self.linear(torch.ones(2, 4, dtype=self.linear.weight.dtype)).float()
        return torch.sqrt(0 * value).sum() if spoil else value.square().sum()  # sqrt has an infinite slope at 0


def main(folder: str) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OPD_WORKER_SOCKET": f"{folder}/s"}
    device = start()
    for stage in (0, 1, 2, 3):
        for dtype in ("float32", "bfloat16"):
            file = Path(folder) / "zero.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
            module = Toy()
            settings = OptimizerSettings(lr=0.1, dtype=dtype)
            engine = Engine(module, dict(module.named_parameters()), settings, str(file), device)
            engine.make_moments(0)
            norms, weights = [], []
            for spoil in (False, True, False):
                engine.accumulate(False, False, last=False)
                loss = engine.accumulate(spoil, False, last=True)
                norms.append(engine.step(0.1))
                weights.append(dict(full_tensors(engine, "master")))
                assert loss == loss and abs(loss) < 1e6
            same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(weights)]
            print("RESULT", json.dumps({"stage": stage, "dtype": dtype, "norms": norms, "same": same}))
            engine.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(*(sys.argv[1:] or [folder]))
