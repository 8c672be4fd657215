"""delta: what is added to the advantage, from the teacher's and the student's probability of the token. Imports no torch."""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from tasks.losses.axes import FullSupport, TopkSupport
from tasks.losses.registry import Kind, Registry
from tasks.losses.token_credit.stored import Stored, Tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


Memory = Mapping[str, "NDArray[np.float64]"]
"""What a choice keeps from step to step; part of the trainer's state. Empty before the first step."""


class Addition(Kind):
    """What is added to the advantage of a token."""

    of_prefix: ClassVar[bool] = False
    """whether it is a function of the prefix alone, not of the sampled token: it then has no expected gradient"""
    contexts: ClassVar[bool] = False
    """whether the teacher needs a context of each sample"""
    remembers: ClassVar[bool] = False
    """whether what it adds depends on earlier steps: `remember`"""

    @property
    def segments(self) -> tuple[int, ...]:
        """Token ids that end a segment, where it has statistics of segments."""
        return ()

    @property
    def judged_segments(self) -> bool:
        """Whether the judge says where segments end."""
        return False

    @property
    def lists(self) -> TopkSupport | FullSupport | None:
        """The support on which it compares both distributions."""
        return None

    @property
    def entropy(self) -> Literal["teacher", "student"] | None:
        """Whose stored entropy it reads."""
        return None

    def remember(self, memory: Memory, stored: Stored) -> tuple[float, Memory]:
        """(the number of this step, which `plan` finds in `stored.remembered`; the memory after it)."""
        raise NotImplementedError(f"{type(self).__name__}: remembers, but lacks `remember`")

    def plan(self, stored: Stored) -> dict[str, Tensor]:
        """Numbers per token [N] of a step that `__call__` reads, by name."""
        return {}

    @abstractmethod
    def __call__(self, tokens: Tokens) -> Tensor | None:
        """delta [N]; null: 0 everywhere."""


ADDITIONS: Registry[Addition] = Registry("addition")
register = ADDITIONS.register


@register
class NoAddition(Addition):
    """Nothing is added."""

    kind: Literal["none"] = "none"
    equation = "delta = 0"
    paper = ""

    def __call__(self, tokens: Tokens) -> Tensor | None:
        return None


for _module in pkgutil.iter_modules(__path__):  # each registers what it holds
    importlib.import_module(f"{__name__}.{_module.name}")
