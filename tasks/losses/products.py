"""Matrix products with a large output head, without gradient.

torch multiplies float32 on a host by MKL, which takes 1.2 to 2 times as long as oneDNN on processors that are not Intel's
(docs/performance.md). oneDNN is part of torch and multiplies 16-bit numbers there anyway."""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 8192
"""Rows of a head from which it is large. Products of smaller ones take little time, and keep the bits of `torch.mm`."""


def logits_of(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """(N, V): hidden_ND @ weight_VD.T."""
    return _by_onednn(hidden_ND, weight_VD) if _onednn(weight_VD) else torch.mm(hidden_ND, weight_VD.t())


def hidden_gradient(gradient_NV: Tensor, weight_VD: Tensor) -> Tensor:
    """(N, D): gradient_NV @ weight_VD."""
    return _by_onednn(gradient_NV, weight_VD.t()) if _onednn(weight_VD) else torch.mm(gradient_NV, weight_VD)


def _onednn(weight_VD: Tensor) -> bool:
    if weight_VD.device.type != "cpu" or weight_VD.dtype != torch.float32 or len(weight_VD) < LARGE:
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _by_onednn(left_NK: Tensor, right_MK: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left_NK, right_MK, None, "none", [], "")
    return found
