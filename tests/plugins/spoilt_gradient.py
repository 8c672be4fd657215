"""Optimizer steps in every kind of engine, the second with a finite loss and a gradient that is not."""

from __future__ import annotations

import itertools
import json
import tempfile
from typing import Any

import torch
from torch import nn

from tasks.trainer.config import OptimizerSettings
from tasks.trainer.engine import Engine
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


def steps(device: torch.device) -> list[dict[str, Any]]:
    """Per kind of engine: gradient norms of three steps (None: not finite), and whether steps 2 and 3 left the weights alone."""
    found = []
    for stage in (0, 1, 2, 3):
        for dtype in ("float32", "bfloat16"):
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                file.write(json.dumps({"zero_optimization": {"stage": stage}}))
                file.flush()
                found.append({"stage": stage, "dtype": dtype} | three_steps(device, file.name, dtype))
    return found


def three_steps(device: torch.device, zero: str, dtype: str) -> dict[str, Any]:
    module = Toy()
    settings = OptimizerSettings(lr=0.1, dtype=dtype)
    engine = Engine(module, dict(module.named_parameters()), settings, zero, device)
    engine.make_moments(0)
    norms, weights = [], []
    for spoil in (False, True, False):
        engine.accumulate(False, False, last=False)
        loss = engine.accumulate(spoil, False, last=True)
        norms.append(engine.step(0.1))
        weights.append(dict(full_tensors(engine, "master")))
        assert loss == loss and abs(loss) < 1e6
    engine.close()
    return {"norms": norms, "same": [all(torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(weights)]}
