"""Writes trl_jsd.json, next to this file: values and gradients of TRL's generalised JSD loss, made by TRL itself.

TRL is no dependency of the project; in its environment:

    pip install --no-deps --target trl-1.16.0 trl==1.16.0
    TRL_EXPERIMENTAL_SILENCE=1 PYTHONPATH=trl-1.16.0 python tests/data/make_trl_jsd.py

Seed 0, float64. Each case names the arguments of `GKDTrainer.generalized_jsd_loss` and has the scalar that it returned
with its gradient with respect to the student's logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import trl
from trl.experimental.gkd.gkd_trainer import GKDTrainer

VERSION = "1.16.0"
BATCH, LENGTH, VOCABULARY = 2, 4, 11
BETAS = (0.0, 0.1, 0.5, 1.0)
IGNORED = [[0, 0, -100, 0], [-100, 0, 0, -100]]
VARIANTS: list[dict[str, Any]] = [
    {"labels": IGNORED, "reduction": "batchmean"},
    {"labels": IGNORED, "reduction": "batchmean", "temperature": 2.0},
    {"labels": IGNORED, "num_items_in_batch": 7},
    {"labels": None, "reduction": "batchmean"},
]


def case(student: torch.Tensor, teacher: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """One call of TRL's function."""
    live = student.clone().requires_grad_()
    labels = arguments["labels"]
    given = arguments | {"labels": None if labels is None else torch.tensor(labels)}
    loss = GKDTrainer.generalized_jsd_loss(live, teacher, **given)
    (grad,) = torch.autograd.grad(loss, live)
    return {"arguments": arguments, "loss": loss.item(), "grad": grad.tolist()}


def main() -> None:
    """Makes all cases and writes the file."""
    assert trl.__version__ == VERSION, f"trl {trl.__version__}; the file is made with {VERSION}"
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(BATCH, LENGTH, VOCABULARY, dtype=torch.float64) for _ in range(2))
    cases = [case(student, teacher, {"beta": beta} | variant) for beta in BETAS for variant in VARIANTS]
    made = {"trl": VERSION, "student_logits": student.tolist(), "teacher_logits": teacher.tolist(), "cases": cases}
    Path(__file__).with_name("trl_jsd.json").write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
