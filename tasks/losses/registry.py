"""Choices on an axis that anyone can add to: one registered class each, which is its own configuration.

Config validation, `opd objectives`, the reference pages and the property tests find what is registered by themselves,
also what a plugin registers after a config's class was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import WrapValidator

from storage.identity import Identity


class Kind(Identity):
    """One choice on an axis, named by `kind`. The first sentence of the docstring is what lists show."""

    kind: str
    equation: ClassVar[str]
    paper: ClassVar[str]
    """arXiv id, or empty where it is ours"""
    experimental: ClassVar[bool] = False
    """known from summaries of the paper only, or ours and untried at scale"""

    @property
    def configured(self) -> str:
        """The equation of what the fields choose, where `equation` holds several cases."""
        return self.equation


C = TypeVar("C", bound=Kind)


class Registry(Generic[C]):
    """The classes of one axis, by their `kind`."""

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self.classes: dict[str, type[C]] = {}

    def register(self, cls: type[C]) -> type[C]:
        """Make a class known under its `kind`. TypeError without a default kind, ValueError when the name is taken."""
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise TypeError(f"{cls.__name__}: give `kind` a default, for example kind: Literal['mine'] = 'mine'")
        if kind in self.classes:
            raise ValueError(f"{cls.__name__}: {self.axis} {kind!r} is already {self.classes[kind].__name__}")
        self.classes[kind] = cls
        return cls

    def late(self) -> WrapValidator:
        """Validates a kind that was registered after a config's union was made, by its own class."""
        known = frozenset(self.classes)

        def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
            kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
            if not isinstance(kind, str) or kind in known or kind not in self.classes:
                return handler(value)
            return self.classes[kind].model_validate(value)

        return WrapValidator(validate)
