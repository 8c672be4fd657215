"""YAML in, validated model out: bases, `--set` overrides, and errors that name the field and the nearest good one."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from storage.disk.redact import secrets_in
from storage.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

DISCRIMINATORS = ("kind", "estimator")
"""Keys that choose a variant: when an override changes one, the base's fields of the other variant do not linger."""


def read_config(path: Path) -> dict[str, Any]:
    """The file's mapping, laid over its `base:` (a path relative to the file), if it names one."""
    return functools.reduce(merge, read_layers(path))


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The mappings of a file and of those it stands on by `base:`, the outermost base first."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base` leads back to this file; remove the cycle")
    data = read_yaml(path)
    base = data.pop("base", None)
    return [*(read_layers(path.parent / base, (*seen, path)) if base else []), data]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a file holds. ConfigError if there is none."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, found {type(data).__name__}")
    return data


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; a changed discriminator replaces its mapping whole."""
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
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not readable as YAML: {error}") from None
    if isinstance(parsed, str):
        try:  # YAML 1.1 reads 1e-4 as a string
            parsed = float(parsed)
        except ValueError:
            pass
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed  # type: ignore[no-any-return]


def validate(model: type[Model], data: dict[str, Any], where: str) -> Model:
    """The validated model, or ConfigError listing every bad field with what was found and what is allowed."""
    refuse_secrets(data, where)
    try:
        return model.model_validate(_numbers(data))
    except ValidationError as error:
        lines = [_explain(model, dict(e)) for e in error.errors(include_url=False)]
        raise ConfigError(f"{where}: {len(lines)} problem(s) in the config\n  " + "\n  ".join(lines)) from None


def refuse_secrets(data: dict[str, Any], where: str) -> None:
    """Configs are kept with every run, so one that holds a secret is refused (ConfigError), without repeating it."""
    if found := [f"{field}: {what}" for field, what in secrets_in(data)]:
        raise ConfigError(
            f"{where}: {len(found)} secret(s) in the config, which would be stored with every run\n  "
            + "\n  ".join(found)
            + "\n  take it out and leave it to the environment: HF_TOKEN (or `hf auth login`) for the Hub,"
            " PREFECT_API_KEY for Prefect, a variable that your plugin reads for anything else"
        )


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; a config that says `lr: 1e-4` means the number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    location = tuple(error["loc"])
    unknown = error["type"] == "extra_forbidden"
    tags = _walk(model, location[:-1] if unknown else location)[1]
    field = ".".join(str(part) for part in location if part not in tags) or "(whole config)"
    found = error.get("input")
    if unknown:
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{field}: unknown field; {hint}"
    if error["type"] == "missing":
        return f"{field}: required, but missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        allowed = [tag.strip(" '") for tag in str(error["ctx"]["expected_tags"]).split(",")]
        near = difflib.get_close_matches(str(error["ctx"]["tag"]), allowed, n=1, cutoff=0.5)
        message = f"{error['ctx']['tag']!r} is not one of {', '.join(allowed)}"
        message += f"; did you mean {near[0]!r}?" if near else ""
        return f"{field}.{str(error['ctx']['discriminator']).strip(chr(39))}: {message}"
    shown = repr(found)
    if isinstance(found, dict | BaseModel) or len(shown) > 60:
        return f"{field}: {message}"
    return f"{field}: {message} (found {shown})"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation admits: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return _models(annotation.__value__)
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, list, tuple, dict):
        return [m for part in typing.get_args(annotation) for m in _models(part)]
    return []


def _step(candidates: list[type[BaseModel]], part: str | int) -> list[type[BaseModel]] | None:
    """The models one level down; null when `part` is no field of any (a union's tag, or an index)."""
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
        if named:  # a name that the user chose, in a mapping of models
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
