"""Reads configs: YAML, bases, `--set` overrides, validation, and errors that name the field and the nearest valid one."""

from __future__ import annotations

import functools
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from storage.disk.redact import secrets_in
from storage.errors import ConfigError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)

DISCRIMINATORS = ("kind", "estimator")
"""Keys that choose a variant: an override that changes one replaces the whole mapping of the base."""


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, as YAML 1.2 does. YAML 1.1 wants a dot and a signed exponent (`1.0e-4`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(path: Path) -> dict[str, Any]:
    """The file's mapping, merged over its `base:` (a path relative to the file), if it has one."""
    return functools.reduce(merge, read_layers(path))


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The mappings of a file and of its chain of `base:` files, the outermost base first."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base` leads back to this file; remove the cycle")
    data = read_yaml(path)
    base = data.pop("base", None)
    return [*(read_layers(path.parent / base, (*seen, path)) if base else []), data]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. ConfigError if there is none."""
    try:
        data = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(data).__name__}")
    return data


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` merged over `base`, mapping by mapping; a changed discriminator replaces the whole mapping."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _variant_changed(old, value):
            value = merge(old, value)
        merged[key] = value
    return merged


def _variant_changed(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(key in new and new[key] != old.get(key) for key in DISCRIMINATORS)


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=c` as a nested mapping; the value is read as YAML."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text!r}: expected FIELD.FIELD=VALUE, for example --set train.lr=1e-4")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not readable as YAML: {error}") from None
    found: dict[str, Any] = {keys[-1]: parsed}
    for key in reversed(keys[:-1]):
        found = {key: found}
    return found


def validate(model: type[Model], data: dict[str, Any], where: str) -> Model:
    """The validated model, or ConfigError listing every bad field with what was found and what is allowed."""
    refuse_secrets(data, where)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, dict(e)) for e in error.errors(include_url=False)]
        raise ConfigError(f"{where}: {len(lines)} problem(s) in the config\n  " + "\n  ".join(lines)) from None


def refuse_secrets(data: dict[str, Any], where: str) -> None:
    """ConfigError, without repeating it, for a config that contains a secret: configs are stored with every run."""
    if found := [f"{field}: {what}" for field, what in secrets_in(data)]:
        raise ConfigError(
            f"{where}: {len(found)} secret(s) in the config, which would be stored with every run\n  "
            + "\n  ".join(found)
            + "\n  remove it and use the environment instead: HF_TOKEN (or `hf auth login`) for the Hub,"
            " PREFECT_API_KEY for Prefect, a variable that your plugin reads for anything else"
        )


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    location = tuple(error["loc"])
    unknown = error["type"] == "extra_forbidden"
    tags = _walk(model, location[:-1] if unknown else location)[1]
    field = ".".join(str(part) for part in location if part not in tags) or "(whole config)"
    found = error.get("input")
    if unknown:
        known = _fields_at(model, location[:-1])
        hint = did_you_mean(str(location[-1]), known, f"known here: {', '.join(sorted(known))}")
        return f"{field}: unknown field; {hint}"
    if error["type"] == "missing":
        return f"{field}: required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        allowed = [tag.strip(" '") for tag in str(error["ctx"]["expected_tags"]).split(",")]
        message = f"{error['ctx']['tag']!r} is not one of {', '.join(allowed)}"
        if hint := did_you_mean(str(error["ctx"]["tag"]), allowed):
            message += f"; {hint}"
        return f"{field}.{str(error['ctx']['discriminator']).strip(chr(39))}: {message}"
    shown = repr(found)
    if isinstance(found, dict | BaseModel) or len(shown) > 60:
        return f"{field}: {message}"
    return f"{field}: {message} (found {shown})"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation allows: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return _models(annotation.__value__)
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, list, tuple, dict):
        return [m for part in typing.get_args(annotation) for m in _models(part)]
    return []


def _step(candidates: list[type[BaseModel]], part: str | int) -> list[type[BaseModel]] | None:
    """The models one level down; None if `part` is not a field of any (but a union's tag, or an index)."""
    for candidate in candidates:
        info: FieldInfo | None = candidate.model_fields.get(str(part))
        if info is not None:
            more = [m for extra in info.metadata for m in _models(extra) + getattr(extra, "models", [])]
            return _models(info.annotation) + more
    return None


def _tagged(candidates: list[type[BaseModel]], tag: str | int) -> list[type[BaseModel]]:
    """The variants whose discriminator has the value `tag`; all of them when none has."""
    chosen = []
    for candidate in candidates:
        for name in DISCRIMINATORS:
            info = candidate.model_fields.get(name)
            if info is not None and tag in typing.get_args(info.annotation):
                chosen.append(candidate)
    return chosen or candidates


def _walk(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[type[BaseModel]], list[str | int]]:
    candidates, tags = [model], []
    named = False
    for part in location:
        if named:  # a key chosen by the user, in a mapping of models
            named = False
            continue
        below = _step(candidates, part)
        if below is None:
            tags.append(part)
            candidates = _tagged(candidates, part)
        else:
            named = any(_is_mapping(c.model_fields[str(part)].annotation) for c in candidates if part in c.model_fields)
            candidates = below
    return candidates, tags


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    candidates, _ = _walk(model, location)
    return [name for candidate in candidates for name in candidate.model_fields]
