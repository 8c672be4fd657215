"""The plain rows against TRL's GRPO, SDPO, SDFT and IW-OPD: losses and gradients that TRL made (`tests/data/make_trl_credit.py`).

TRL's names on the left, ours on the right: `grpo` is a mean over all sequences, empty ones included, of their means;
`bnpo` and, on one process, `dapo` divide by the batch's tokens; `dr_grpo` by samples times the longest length allowed;
`delta` caps the ratio, which for A < 0 is the dual clip. Its self-distillation is a mean over all sequences too, while
section 5 divides by tokens, and takes the student's top k of the live logits.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from credit_rows import ROWS, Clip, Reduction, Sample, Toy
from places import DATA

MADE: dict[str, Any] = json.loads((DATA / "trl_credit.json").read_text())
CASES: list[dict[str, Any]] = MADE["cases"]
PER_SEQUENCE = Reduction("sequence", "own", count_empty=True)


def toy() -> Toy:
    def logits(name: str, i: int) -> torch.Tensor:
        return torch.tensor(MADE[name][i], dtype=torch.float64)

    return Toy(
        [
            Sample(
                prompt=i // MADE["group"],
                tokens=MADE["tokens"][i],
                live=logits("live", i).requires_grad_(),
                old=logits("old", i),
                teacher=logits("teacher", i),
                reference=logits("reference", i),
                written=MADE["mask"][i],
                signal=MADE["mask"][i],
                loss=MADE["mask"][i],
                reward=reward,
                has_context=bool(MADE["context"][i]),
            )
            for i, reward in enumerate(MADE["rewards"])
        ]
    )


def grpo_fields(settings: dict[str, Any]) -> dict[str, Any]:
    longest = len(MADE["tokens"][0])
    reductions = {
        "grpo": PER_SEQUENCE,
        "bnpo": Reduction(),
        "dapo": Reduction(),
        "dr_grpo": Reduction("constant", length=longest),
    }
    return {
        "clip": Clip(settings["epsilon_low"], settings["epsilon_high"], settings["delta"]),
        "advantage": "std",
        "eps": 1e-4,
        "kl_ref": settings["beta"],
        "reduction": reductions[settings["loss_type"]],
    }


def sdpo_fields(settings: dict[str, Any]) -> dict[str, Any]:
    return sdft_fields(settings) | {
        "kind": {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}[settings["distillation_alpha"]],
        "outside": "bucket" if settings["distillation_add_tail"] else "renormalize",
    }


def sdft_fields(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "top_k": settings["distillation_topk"],
        "is_clip": settings["distillation_is_clip"],
        "support_at": "live",
        "reduction": PER_SEQUENCE,
    }


def iw_opd_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """With `num_items_in_batch` the sum is divided by it: here by samples times a length."""
    items = settings["num_items_in_batch"]
    by_items = Reduction("constant", length=(items or 0) / len(MADE["tokens"]))
    return {"gain": settings["iw_opd_gamma"], "reduction": by_items if items else Reduction()}


FIELDS = {"grpo": grpo_fields, "sdpo": sdpo_fields, "sdft": sdft_fields, "iw-opd": iw_opd_fields}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case["row"], *map(str, case["settings"].values())]))
def test_the_rows_are_trls(case: dict[str, Any]) -> None:
    batch = toy()
    result = ROWS[case["row"]](batch, **FIELDS[case["row"]](case["settings"]))
    torch.testing.assert_close(result.loss.item(), case["loss"], rtol=1e-10, atol=1e-12)
    wanted = torch.tensor(case["grad"], dtype=torch.float64)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(torch.stack(result.gradients(batch)), wanted, rtol=1e-9, atol=1e-12)


def test_the_clips_and_the_empty_sample_are_at_work() -> None:
    """Ratios on both sides of every clip, a sample without tokens, samples without a context."""
    live, old = (torch.tensor(MADE[name], dtype=torch.float64).log_softmax(-1) for name in ("live", "old"))
    tokens, mask = torch.tensor(MADE["tokens"])[..., None], torch.tensor(MADE["mask"]) == 1
    ratios = (live - old).gather(-1, tokens)[..., 0][mask].exp()
    assert ratios.min() < 0.8 and ratios.max() > 1.4
    assert [0, 0, 0, 0] in MADE["mask"] and 0 in MADE["context"]
