"""Writes trl_credit.json, next to this file: losses and gradients of TRL's GRPO, SDPO, SDFT and IW-OPD, made by TRL itself.

TRL is no dependency of the project; in its environment:

    pip install --no-deps --target trl-1.16.0 trl==1.16.0
    TRL_EXPERIMENTAL_SILENCE=1 PYTHONPATH=trl-1.16.0 python tests/data/make_trl_credit.py

Seed 0, float64. The trainers' loss methods run on given logits, with a stand-in for the trainer that has the attributes
they read. TRL computes advantages from rewards inside generation, so they are computed here as its documentation has it:
(r - mean) / (std + 1e-4) over a group, std with ddof 1. Each case names the method's settings and has the scalar that it
returned with its gradient with respect to the live logits. The last sample's mask is empty.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdft.sdft_trainer import SDFTTrainer
from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

VERSION = "1.16.0"
GROUP, BATCH, LENGTH, VOCABULARY = 3, 6, 4, 5
REWARDS = [1.0, 0.0, 0.25, 0.0, 1.0, 1.0]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
CONTEXT = [0, 1, 1, 1, 0, 1]

GRPO: list[dict[str, Any]] = [
    {"loss_type": kind, "epsilon_low": 0.2, "epsilon_high": high, "delta": delta, "beta": beta}
    for kind in ("grpo", "bnpo", "dr_grpo", "dapo")
    for high, delta, beta in ((0.2, None, 0.0), (0.28, 1.4, 0.04))
]
SELF: list[dict[str, Any]] = [
    {"distillation_mode": "topk_logits", "distillation_topk": 3, "distillation_add_tail": tail, **rest}
    for tail in (True, False)
    for rest in (
        {"distillation_alpha": 0.5, "distillation_is_clip": 1.1},
        {"distillation_alpha": 0.5, "distillation_is_clip": None},
        {"distillation_alpha": 1.0, "distillation_is_clip": 1.1},
        {"distillation_alpha": 0.0, "distillation_is_clip": None},
    )
]
SDFT = [case for case in SELF if not case["distillation_add_tail"] and case["distillation_alpha"] == 0.5]
IW_OPD: list[dict[str, Any]] = [
    {"iw_opd_gamma": 0.5, "num_items_in_batch": None},
    {"iw_opd_gamma": 0.8, "num_items_in_batch": 7},
]


def numbers() -> dict[str, Tensor]:
    """What all cases share; ratios p / p_old reach beyond the clips."""
    torch.manual_seed(0)
    shape = (BATCH, LENGTH, VOCABULARY)
    old = 1.5 * torch.randn(shape, dtype=torch.float64)
    live, teacher, reference = (old + scale * torch.randn(shape, dtype=torch.float64) for scale in (0.5, 1.0, 0.4))
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    return {"live": live, "old": old, "teacher": teacher, "reference": reference, "tokens": tokens}


def taken(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def group_advantages() -> Tensor:
    grouped = torch.tensor(REWARDS, dtype=torch.float64).view(-1, GROUP)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1)


ALONE = SimpleNamespace(
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    num_processes=1,
    sync_gradients=True,
)


def stand_in(**attributes: Any) -> Any:
    """One process, one step per batch, no logging."""
    return SimpleNamespace(
        accelerator=ALONE,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _metrics={"train": defaultdict(list)},
        _log_self_distillation_metric=lambda mode, value: None,
        **attributes,
    )


def grpo(given: dict[str, Tensor], live: Tensor, settings: dict[str, Any]) -> Tensor:
    tokens, mask = given["tokens"], torch.tensor(MASK)
    logs = live.log_softmax(-1)

    def student(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor, None]:
        return taken(live, tokens), -(logs.exp() * logs).sum(-1).detach(), None

    trainer = stand_in(
        **{key: value for key, value in settings.items() if key != "delta"},
        args=SimpleNamespace(delta=settings["delta"], use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=student,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        max_completion_length=LENGTH,
    )
    inputs = {
        "prompt_ids": torch.zeros(BATCH, 1, dtype=torch.long),
        "prompt_mask": torch.ones(BATCH, 1, dtype=torch.long),
        "completion_ids": tokens,
        "completion_mask": mask,
        "advantages": group_advantages(),
        "old_per_token_logps": taken(given["old"], tokens),
        "ref_per_token_logps": taken(given["reference"], tokens),
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def self_distilled(trainer_class: Any) -> Any:
    def loss(given: dict[str, Tensor], live: Tensor, settings: dict[str, Any]) -> Tensor:
        trainer = stand_in(args=SimpleNamespace(**settings))
        mask = torch.tensor(MASK)
        logits = SimpleNamespace(
            completion_ids=given["tokens"],
            loss_mask=mask * torch.tensor(CONTEXT)[:, None],
            student_logits=live,
            teacher_logits=given["teacher"],
        )
        inputs = {"old_per_token_logps": taken(given["old"], given["tokens"])}
        return trainer_class._compute_self_distillation_loss(trainer, trainer.model, inputs, logits)

    return loss


def iw_opd(given: dict[str, Tensor], live: Tensor, settings: dict[str, Any]) -> Tensor:
    trainer = stand_in(temperature=1.0, iw_opd_gamma=settings["iw_opd_gamma"], iw_opd_epsilon=1e-8)
    tokens = given["tokens"]
    return IWOPDTrainer._compute_iw_opd_loss(
        trainer,
        student_logits=live,
        completion_tokens=tokens,
        labels=torch.where(torch.tensor(MASK) == 1, tokens, -100),
        teacher_actual_logprobs=taken(given["teacher"], tokens),
        rollout_logprobs=taken(given["old"], tokens),
        num_items_in_batch=settings["num_items_in_batch"],
    )


def main() -> None:
    """Makes all cases and writes the file."""
    assert trl.__version__ == VERSION, f"trl {trl.__version__}; the file is made with {VERSION}"
    given = numbers()
    makers = {
        "grpo": (grpo, GRPO),
        "sdpo": (self_distilled(SDPOTrainer), SELF),
        "sdft": (self_distilled(SDFTTrainer), SDFT),
        "iw-opd": (iw_opd, IW_OPD),
    }
    cases = []
    for row, (maker, variants) in makers.items():
        for settings in variants:
            live = given["live"].clone().requires_grad_()
            loss = maker(given, live, settings)
            (grad,) = torch.autograd.grad(loss, live)
            cases.append({"row": row, "settings": settings, "loss": loss.item(), "grad": grad.tolist()})
    made = {
        "trl": VERSION,
        "group": GROUP,
        "rewards": REWARDS,
        "mask": MASK,
        "context": CONTEXT,
        **{name: value.tolist() for name, value in given.items()},
        "cases": cases,
    }
    Path(__file__).with_name("trl_credit.json").write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
