"""Identity of results: typed configs, canonical JSON, artifact keys and seeds.

A config has three parts, distinguished by type. `Identity` changes the result and is hashed. `Runtime` sets where and how
it runs and is only recorded. `RunPolicy` sets how long to run and what to keep. `canonical_json` accepts `Identity` only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

KEY_LENGTH = 16
_OMIT_AT = "x-opd-omit-at"
_BY_KIND = "x-opd-by-kind"
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


class Identity(BaseModel):
    """A config that changes the result. Frozen, hashed; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Runtime(BaseModel):
    """A config of where and how to run (devices, memory, paths, processes). Recorded, never hashed."""

    model_config = ConfigDict(extra="forbid")


class RunPolicy(BaseModel):
    """A config that may change between two calls of one run (rounds, stop rules, retention). Never hashed."""

    model_config = ConfigDict(extra="forbid")


def omit_at(*values: object) -> dict[str, Any]:
    """For `Field(json_schema_extra=omit_at(v))`: at value `v` (or any of several) the field is left out of the canonical JSON.

    A field added after a release declares the value that old versions implied, so that old keys stay the same."""
    return {_OMIT_AT: [_canonical(value, "omit_at") for value in values]}


def by_kind() -> dict[str, Any]:
    """For `Field(json_schema_extra=by_kind())`: a model of which only `kind` would be written is that string in the
    canonical JSON. For a field that was a string in a release and holds a model since, so that old keys stay the same."""
    return {_BY_KIND: True}


def digest_of(value: object) -> str:
    """SHA-256 of a value's canonical JSON, as hex. Raises as `canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def canonical_json(value: object) -> str:
    """One JSON text per value: sorted keys, no spaces, ASCII, floats by shortest repr, -0.0 as 0.0.

    Takes `Identity` models, dicts with string keys, lists, tuples, str, int, float, bool, None, Enum members (as their
    value) and paths (POSIX form).
    Raises TypeError for anything else (other pydantic models too) and ValueError for NaN and infinities."""
    return _encode(_canonical(value, "value"))


def artifact_key(stage: str, version: int, identity: object, inputs: Mapping[str, str]) -> str:
    """The key of an artifact: 16 hex digits of sha256 over stage, its version, identity and input contents."""
    text = canonical_json({"stage": stage, "version": version, "identity": identity, "inputs": dict(inputs)})
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:KEY_LENGTH]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**31 - 1) from its parts, e.g. (run seed, round, prompt id, sample index). Never changes."""
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"derive_seed: part {part!r} is {type(part).__name__}; only int and str are stable")
    # a round's permutation draws one per prompt: plain parts need no walk
    plain = [part if type(part) in (int, str) else _canonical(part, "part") for part in parts]
    digest = hashlib.sha256(_encode(plain).encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1)


def _canonical(value: object, where: str) -> Any:
    if isinstance(value, Enum):
        return _canonical(value.value, where)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"canonical_json: {where} is {value}; NaN and infinities have no identity")
        return float(value) + 0.0  # -0.0 + 0.0 == 0.0
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, BaseModel):
        return _canonical_model(value, where)
    if isinstance(value, dict):
        for name in value:
            if isinstance(name, Enum) or not isinstance(name, str):
                raise TypeError(f"canonical_json: {where} has the key {name!r} ({type(name).__name__}); keys are str")
        return {name: _canonical(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(f"canonical_json: {where} is a {kind}, which has no canonical JSON")


def _canonical_model(model: BaseModel, where: str) -> dict[str, Any]:
    if not isinstance(model, Identity):
        raise TypeError(
            f"canonical_json: {where} is a {type(model).__qualname__}, not an Identity: runtime and run policy are"
            " never hashed"
        )
    result = {}
    for name, field in type(model).model_fields.items():
        item = _canonical(getattr(model, name), f"{where}.{name}")
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get(_BY_KIND) and isinstance(item, dict) and item.keys() == {"kind"}:
            item = item["kind"]
        if not _omitted(field, item):
            result[name] = item
    return result


def _omitted(field: FieldInfo, item: object) -> bool:
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or _OMIT_AT not in extra:
        return False
    omitted: Any = extra[_OMIT_AT]
    return any(isinstance(item, bool) == isinstance(value, bool) and bool(item == value) for value in omitted)
