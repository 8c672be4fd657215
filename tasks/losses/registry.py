"""Registries of the axes of an objective that anyone can add to: one class per choice, which is its own configuration.

Config validation, `opd objectives`, the reference pages and the property tests read the registries, so they find what a
plugin registers as well, also after the classes of the config were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Generic, TypeVar, Union, cast

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, SerializeAsAny
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

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


C = TypeVar("C", bound=BaseModel)


def require_methods(cls: type) -> None:
    """TypeError, naming the class, for one that lacks an abstract method of its axis."""
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise TypeError(f"{cls.__name__}: it lacks the method{'s' if len(missing) > 1 else ''} {', '.join(missing)}")


class Registry(Generic[C]):
    """The classes of one axis, by their `kind`."""

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self.classes: dict[str, type[C]] = {}

    def register(self, cls: type[C]) -> type[C]:
        """Add a class under its `kind`. TypeError if `kind` has no default or a method is missing, ValueError if the name is
        taken."""
        require_methods(cls)
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
        known: Any = union[tuple(self.classes.values())]
        if len(self.classes) > 1:
            known = annotated[known, Field(discriminator="kind")]
        return annotated[known, SerializeAsAny(), _Open(self, names)]


class _Open:
    """Lets a union that was made once follow its registry, in validation and in the JSON schema."""

    def __init__(self, registry: Registry[Any], names: bool) -> None:
        self.registry, self.names = registry, names
        self.known = frozenset(registry.classes)

    @property
    def models(self) -> list[type[BaseModel]]:
        """The classes that are accepted now; errors name their fields."""
        return list(self.registry.classes.values())

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        union = handler(source)
        schema = core_schema.no_info_wrap_validator_function(self._validate, union)
        if self.names:
            schema["serialization"] = core_schema.wrap_serializer_function_ser_schema(_by_name, schema=union)
        return schema

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        classes = self.registry.classes
        later = [cls.__pydantic_core_schema__ for kind, cls in classes.items() if kind not in self.known]
        names: list[CoreSchema] = []
        if self.names:
            optional = (k for k, c in classes.items() if not any(f.is_required() for f in c.model_fields.values()))
            names = [core_schema.literal_schema(list(optional))]
        if not names and not later:
            return handler(schema)
        return handler(core_schema.union_schema([*names, cast(Any, schema)["schema"], *later]))

    def _validate(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        if self.names and isinstance(value, str):
            value = {"kind": value}
        kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
        if not isinstance(kind, str) or kind in self.known:
            return handler(value)
        if kind not in self.registry.classes:
            names = ", ".join(f"'{name}'" for name in self.registry.classes)
            where = {"discriminator": "'kind'", "tag": kind, "expected_tags": names}
            raise PydanticKnownError("union_tag_invalid", where)
        return self.registry.classes[kind].model_validate(value)


def _by_name(value: Any, handler: Callable[[Any], Any]) -> Any:
    written = handler(value)
    return written["kind"] if isinstance(written, dict) and written.keys() == {"kind"} else written
