"""The exponential moving average of the trained weights that a teacher of kind `ema` is made of.

It lives beside the float32 masters and is in pieces as they are: every rank averages the elements that it updates, so an update
moves nothing between ranks, and its result depends on no topology. With LoRA the adapters are averaged, not their product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tasks.inputs.teachers import EmaStudent

_AT_ONCE = 2**22
"""Elements of an update's temporary tensors."""


class Ema:
    """The average over `masters`, this rank's float32 tensors; it begins as what they hold."""

    def __init__(self, source: EmaStudent, masters: list[torch.Tensor]) -> None:
        self.source, self._masters = source, masters
        self._own = [master.detach().clone(memory_format=torch.contiguous_format) for master in masters]

    def step_done(self) -> None:
        """Called after every optimizer step."""
        if self.source.per == "step":
            self.update()

    def round_done(self) -> None:
        """Called after the round's last step."""
        if self.source.per == "round":
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay average + (1 - decay) master. Product and sum are rounded apart: a fused operation would round the
        elements at the end of a piece otherwise than those within."""
        decay = self.source.decay
        for own, master in zip(self._own, self._masters, strict=True):
            for mine, live in zip(own.view(-1).split(_AT_ONCE), master.flatten().split(_AT_ONCE), strict=True):
                mine.mul_(decay)
                mine.add_(live * (1 - decay))

    @contextmanager
    def in_masters(self) -> Iterator[None]:
        """In the block the masters hold the average, so that it is read and set by parameter as they are."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for own, master in zip(self._own, self._masters, strict=True):
            held = master.detach().clone()
            master.copy_(own)
            own.copy_(held)
