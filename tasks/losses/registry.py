"""Registries of the axes of an objective that anyone can add to: one class per choice, which is its own configuration.

Config validation, `opd objectives`, the reference pages and the property tests read the registries, so they find what a
plugin registers as well, also after the classes of the config were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Generic, TypeVar, Union

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, SerializeAsAny
from pydantic_core import CoreSchema, core_schema

from storage.identity import Identity


class Kind(Identity):
    """One choice on an axis, named by `kind`. Lists show the first sentence of its docstring."""

    kind: str
    equation: ClassVar[str]
    paper: ClassVar[str]
    """arXiv id; empty if the choice is ours"""
    experimental: ClassVar[bool] = False
    """known only from summaries of the paper, or ours and untried at scale"""

    @property
    def configured(self) -> str:
        """The equation for the values of the fields, where `equation` holds several cases."""
        return self.equation


C = TypeVar("C", bound=Kind)


class Registry(Generic[C]):
    """The classes of one axis, by their `kind`."""

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self.classes: dict[str, type[C]] = {}

    def register(self, cls: type[C]) -> type[C]:
        """Add a class under its `kind`. TypeError if `kind` has no default, ValueError if the name is taken."""
        kind = cls.model_fields["kind"].default
        if not isinstance(kind, str):
            raise TypeError(f"{cls.__name__}: give `kind` a default, for example kind: Literal['mine'] = 'mine'")
        if kind in self.classes:
            raise ValueError(f"{cls.__name__}: {self.axis} {kind!r} is already {self.classes[kind].__name__}")
        self.classes[kind] = cls
        return cls

    def annotation(self, *, names: bool = False) -> Any:
        """The type of a config field that holds one of these classes, told apart by `kind`.

        Classes that are registered later are accepted too. With `names`, a string stands for `{kind: string}`, and a
        value of which nothing but `kind` would be written is written as that string."""
        annotated: Any = Annotated  # the classes are not known to a type checker
        union: Any = Union
        known = annotated[union[tuple(self.classes.values())], Field(discriminator="kind")]
        return annotated[known, SerializeAsAny(), _Open(self, names)]


class _Open:
    """Lets a union that was made once follow its registry, in validation and in the JSON schema."""

    def __init__(self, registry: Registry[Any], names: bool) -> None:
        self.registry, self.names = registry, names
        self.known = frozenset(registry.classes)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        union = handler(source)
        schema = core_schema.no_info_wrap_validator_function(self._validate, union)
        if self.names:
            schema["serialization"] = core_schema.wrap_serializer_function_ser_schema(_by_name, schema=union)
        return schema

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        classes = self.registry.classes
        shown = [handler(schema)]
        shown += [handler(cls.__pydantic_core_schema__) for kind, cls in classes.items() if kind not in self.known]
        if self.names:
            alone = [k for k, cls in classes.items() if not any(f.is_required() for f in cls.model_fields.values())]
            shown.insert(0, {"enum": alone})
        return {"anyOf": shown} if len(shown) > 1 else shown[0]

    def _validate(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        if self.names and isinstance(value, str):
            value = {"kind": value}
        kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
        if not isinstance(kind, str) or kind in self.known or kind not in self.registry.classes:
            return handler(value)
        return self.registry.classes[kind].model_validate(value)


def _by_name(value: Any, handler: Callable[[Any], Any]) -> Any:
    written = handler(value)
    return written["kind"] if isinstance(written, dict) and written.keys() == {"kind"} else written
