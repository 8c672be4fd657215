"""Reads configs: YAML, bases, `--set` overrides, short forms, paths, validation, and errors that name the field and the nearest
valid one."""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from storage.disk.files import scheme
from storage.disk.redact import secrets_in
from storage.disk.yaml_text import WrittenFloat, WrittenInt, load, plain
from storage.errors import ConfigError, did_you_mean
from storage.text import counted

Model = TypeVar("Model", bound=BaseModel)

CHECKOUT = Path(__file__).resolve().parent.parent
CONFIGS = next(
    (folder for folder in (CHECKOUT / "configs", CHECKOUT / "opdflow" / "configs") if folder.is_dir()),
    CHECKOUT / "configs",
)
"""The configs and recipes of this program: beside the packages in a checkout, inside `opdflow` where it is installed."""
RECIPE = "recipe:"
"""Begins the name of a recipe where a config's path is expected."""
HUB = "a model of the Hub is {kind: hub, repo: OWNER/NAME, revision: COMMIT}, anything else: hf download OWNER/NAME"
DISCRIMINATORS = ("kind", "estimator")
"""Keys that choose a variant: an override that changes one replaces the whole mapping of the base."""
_KEY = re.compile(r'"([^"]+)"|([^."=]+)')
_ELSEWHERE = {
    "clip_grad": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "learning_rate": "lr",
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "max_tokens": "max_completion_length",
    "n": "num_generations",
    "num_train_epochs": "epochs_per_round",
    "per_device_train_batch_size": "samples_per_step",
    "train_batch_size": "samples_per_step",
}
"""What TRL, verl, transformers and vLLM call a field -> its name here; for the message about an unknown field."""
_OVERRIDE = re.compile(rf"\s*(?P<path>(?:{_KEY.pattern})(?:\.(?:{_KEY.pattern}))*)=(?P<value>.*)", re.DOTALL)


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """(file, its mapping) of a config and of its chain of `base:` files (relative to the file), the outermost base first."""
    path = shipped(path).resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base` leads back to this file; remove the cycle")
    data = read_yaml(path)
    base = data.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of a config, found {plain(base)!r}")
    if base is None:
        return [(path, data)]
    below = Path(base) if base.startswith(RECIPE) else path.parent / base
    return [*read_layers(below, (*seen, path)), (path, data)]


def shipped(path: Path) -> Path:
    """The path, or for a `configs/...` that is not there the file of that name that is installed with this program;
    `recipe:NAME` is the recipe of that name. ConfigError for a name that no recipe has."""
    if str(path).startswith(RECIPE):
        name = str(path).removeprefix(RECIPE)
        recipes = {file.stem: file for file in sorted((CONFIGS / "recipes").glob("*.yaml"))}
        if name not in recipes:
            hint = did_you_mean(name, list(recipes))
            raise ConfigError(
                f"{path}: no recipe is named {name!r}{f'; {hint}' if hint else ''}\nrecipes: {', '.join(recipes)}"
            )
        return recipes[name]
    if path.exists() or path.is_absolute() or path.parts[:1] != ("configs",):
        return path
    installed = CONFIGS.joinpath(*path.parts[1:])
    return installed if installed.exists() else path


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (UTF-8), with numbers that remember their text. ConfigError if there is none, or a key
    occurs twice."""
    try:
        data = load(path.read_bytes())
    except FileNotFoundError:
        beside = [near.name for near in path.absolute().parent.glob("*.y*ml")]
        hint = did_you_mean(path.name, beside, f"here are {', '.join(sorted(beside)[:10])}" if beside else "")
        raise ConfigError(f"{path}: no such config file{'; ' + hint if hint else ''}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a config file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}: line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    """`a.b=c` as a nested mapping; a name that has dots of its own stands in quotes (`teachers."v1.5".source=c`). The value is
    read as YAML, numbers remember their text."""
    written = _OVERRIDE.match(text)
    if written is None:
        raise ConfigError(f"--set {text!r}: expected FIELD.FIELD=VALUE, for example --set train.lr=1e-4")
    keys = [quoted or bare for quoted, bare in _KEY.findall(written["path"])]
    try:
        parsed = load(written["value"])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {text!r}: the value is not readable as YAML: {error}") from None
    found: dict[str, Any] = {keys[-1]: parsed}
    for key in reversed(keys[:-1]):
        found = {key: found}
    return found


def validate(model: type[Model], data: dict[str, Any], where: str) -> Model:
    """The validated model, or ConfigError listing every bad field with what was found and what is allowed."""
    refuse_secrets(data, where)
    if found := [f"{field}: {what}" for field, what in _unwritable(data)]:
        raise ConfigError(refusal(where, found))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [line for e in error.errors(include_url=False) for line in _explained(model, dict(e))]
        raise ConfigError(refusal(where, lines)) from None


def refusal(where: str, problems: Sequence[str]) -> str:
    """A message with one problem of a config per line."""
    return "\n  ".join([f"{where}: {counted(len(problems), 'problem')} in the config", *problems])


def refuse_secrets(data: dict[str, Any], where: str) -> None:
    """ConfigError, without repeating it, for a config that contains a secret: configs are stored with every run."""
    if found := [f"{field}: {what}" for field, what in secrets_in(data)]:
        raise ConfigError(
            f"{where}: {counted(len(found), 'secret')} in the config, which would be stored with every run\n  "
            + "\n  ".join(found)
            + "\n  remove it and use the environment instead: HF_TOKEN (or `hf auth login`) for the Hub,"
            " PREFECT_API_KEY for Prefect, a variable that your plugin reads for anything else"
        )


def _unwritable(value: Any, where: str = "") -> typing.Iterator[tuple[str, str]]:
    """(field, what is wrong) of every number that is not finite and every text that UTF-8 cannot hold: no file can keep these."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _unwritable(item, f"{where}.{name}" if where else str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _unwritable(item, f"{where}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield where, f"{value} is not a finite number"
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            yield where, f"character {error.start} is U+{ord(value[error.start]):04X}, which is not valid Unicode text"


def _explained(model: type[BaseModel], error: dict[str, Any]) -> list[str]:
    """What is wrong, a line each: fields that do not fit together are checked at once, and each line names them itself."""
    if error["type"] == "value_error" and not error["loc"]:
        return str(error["msg"].removeprefix("Value error, ")).split("\n")
    return [_explain(model, error)]


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    location = tuple(error["loc"])
    unknown = error["type"] == "extra_forbidden"
    tags = _walk(model, location[:-1] if unknown else location)[1]
    written = [str(part) for place, part in enumerate(location) if isinstance(part, int) or place not in tags]
    field = ".".join(written) or "(whole config)"
    found = error.get("input")
    if unknown:
        known = _fields_at(model, location[:-1])
        meant = _ELSEWHERE.get(str(location[-1]), location[-1])
        inside = [f"{name}.{meant}" for name in known if meant in _fields_at(model, (*location[:-1], name))]
        otherwise = f"known here: {', '.join(sorted(known))}"
        if inside:
            section = field.rpartition(".")[0]
            hint = f"did you mean {' or '.join(f'{section}.{name}'.strip('.') for name in inside)}?"
        else:
            hint = did_you_mean(str(meant), known, otherwise)
        return f"{field}: unknown field; {hint}"
    if error["type"] == "missing":
        hint = ""
        if location[-2:] == ("full", "k"):
            hint = "; the smaller vocab_size in the config.json of student and teacher (filled in where both can be read here)"
        return f"{field}: required, but missing{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        allowed = [tag.strip(" '") for tag in str(error["ctx"]["expected_tags"]).split(",")]
        message = f"{error['ctx']['tag']!r} is not one of {', '.join(allowed)}"
        if hint := did_you_mean(str(error["ctx"]["tag"]), allowed):
            message += f"; {hint}"
        return f"{field}.{str(error['ctx']['discriminator']).strip(chr(39))}: {message}"
    if error["type"] in ("model_attributes_type", "model_type", "union_tag_not_found"):
        return f"{field}: {_expected(model, location, found)}"
    shown = repr(found)
    if isinstance(found, dict | BaseModel) or len(shown) > 60:
        return f"{field}: {message}"
    return f"{field}: {message} (found {shown})"


def _expected(model: type[BaseModel], location: tuple[str | int, ...], found: Any) -> str:
    """What a section of the config may be, for one that is neither a mapping nor a short form."""
    variants = _walk(model, location)[0]
    kinds = [kind for variant in variants for kind in _kinds(variant)[1]]
    name = next((_kinds(variant)[0] for variant in variants if _kinds(variant)[1]), "kind")
    short = "" if not any(_takes_path(variant) for variant in variants) else ", or a path"
    if isinstance(found, dict):
        return f"{name!r} is missing; one of {', '.join(kinds)}" if kinds else "expected other fields"
    if isinstance(found, str) and kinds:
        return f"{found!r} is not one of {', '.join(kinds)}{short}; {did_you_mean(found, kinds, 'or give a mapping of fields')}"
    known = f"{name}: one of {', '.join(kinds)}" if kinds else ", ".join(n for v in variants for n in v.model_fields)
    return f"expected a mapping of fields ({known}){short}, found {plain(found)!r}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation allows: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return _models(annotation.__value__)
    if typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType, list, tuple, dict):
        return [m for part in typing.get_args(annotation) for m in _models(part)]
    return []


def _field_models(info: FieldInfo) -> list[type[BaseModel]]:
    """The models that a field may hold, those of a registry included."""
    registered = [m for extra in info.metadata for m in [*_models(extra), *getattr(extra, "models", [])]]
    return list(dict.fromkeys([*_models(info.annotation), *registered]))


def _kinds(model: type[BaseModel]) -> tuple[str, tuple[Any, ...]]:
    """A variant's discriminator and the values that choose it."""
    for name in DISCRIMINATORS:
        if name in model.model_fields:
            info = model.model_fields[name]
            literal = typing.get_args(info.annotation) if typing.get_origin(info.annotation) is Literal else ()
            return name, literal or ((info.default,) if isinstance(info.default, str) else ())
    return "kind", ()


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, info in model.model_fields.items() if info.is_required()]


def _takes_path(model: type[BaseModel]) -> bool:
    """Whether a path alone describes this variant: `path` is its only required field."""
    return _required(model) == ["path"] and Path in _scalars(model.model_fields["path"].annotation)


def _scalars(annotation: Any) -> set[Any]:
    """The plain types that an annotation allows."""
    origin = typing.get_origin(annotation)
    if origin in (Annotated, typing.Union, types.UnionType):
        args = typing.get_args(annotation)
        return {kind for part in (args[:1] if origin is Annotated else args) for kind in _scalars(part)}
    if origin is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {annotation} if isinstance(annotation, type) and not issubclass(annotation, BaseModel) else set()


class Settled:
    """One file's mapping, or one override, in its long form: short forms written out, paths absolute (relative ones start at
    `folder`), numbers as text where the field is text. `where` names the file in errors."""

    def __init__(self, folder: Path, where: str, keep_untyped: bool = False) -> None:
        """`keep_untyped`: numbers of fields without a type keep their text, for a later call that knows the type."""
        self.folder, self.where, self.keep_untyped = folder.absolute(), where, keep_untyped

    def fields(self, data: Any, models: list[type[BaseModel]], place: str = "") -> Any:
        """A mapping of fields, or the short form of one: the name of a kind, a path, or the value of the only required field."""
        if isinstance(data, (str, WrittenInt, WrittenFloat)):
            long = self._long(data if isinstance(data, str) else data.text, models)
            return plain(data) if long is None else self.fields(long, models, place)
        if not isinstance(data, dict):
            return plain(data)
        chosen = models
        for name in DISCRIMINATORS:
            if isinstance(data.get(name), str):
                chosen = [m for m in models if data[name] in _kinds(m)[1]] or models
        found = {}
        for name, value in data.items():
            infos = [model.model_fields[name] for model in chosen if name in model.model_fields]
            own = f"{place}.{name}" if place else str(name)
            found[name] = self._field(value, infos, own) if infos else plain(value)
        return found

    def _field(self, value: Any, infos: list[FieldInfo], place: str) -> Any:
        models = [model for info in infos for model in _field_models(info)]
        return self._value(value, [info.annotation for info in infos], models, place)

    def _value(self, value: Any, annotations: list[Any], models: list[type[BaseModel]], place: str) -> Any:
        if Any in annotations:
            return value if self.keep_untyped else plain(value)
        if isinstance(value, dict):
            of_mapping = _arguments(annotations, dict)
            if not of_mapping:
                return self.fields(value, models, place)
            items = [args[1] for args in of_mapping if len(args) == 2]
            return {k: self._value(v, items, _models_of(items), f"{place}.{k}") for k, v in value.items()}
        if isinstance(value, list):
            items = [args[0] for origin in (list, tuple) for args in _arguments(annotations, origin) if args]
            return [self._value(v, items, _models_of(items), f"{place}.{i}") for i, v in enumerate(value)]
        if not isinstance(value, (str, WrittenInt, WrittenFloat)):
            return value
        scalars = {kind for annotation in annotations for kind in _scalars(annotation)}
        text = value if isinstance(value, str) else value.text
        if Path in scalars:
            return self._path(text, place)
        if str in scalars and (isinstance(value, str) or not scalars & {int, float}):
            return text
        return self.fields(value, models, place) if models else plain(value)

    def _long(self, text: str, models: list[type[BaseModel]]) -> dict[str, Any] | None:
        for model in models:
            name, kinds = _kinds(model)
            if text in kinds:
                return {name: text}
        for model in models:
            if _takes_path(model):
                name, kinds = _kinds(model)
                return {**({name: kinds[0]} if kinds else {}), "path": text}
        if len(models) == 1 and len(_required(models[0])) == 1 and not _kinds(models[0])[1]:
            return {_required(models[0])[0]: text}
        return None

    def _path(self, text: str, place: str) -> str:
        """A path of this file, absolute. ConfigError for one that was written relative to the working directory, and for one
        that exists in both places."""
        path = Path(text).expanduser()
        if found := scheme(path):
            instead = {"hub:": HUB, "hf:": HUB}.get(found, "download it first")
            raise ConfigError(
                f"{self.where}: {place}: expected a path on this machine, found {text!r} with {found}; {instead} (a name with a"
                " colon: as an absolute path)"
            )
        here, there = (Path(os.path.normpath(folder / path)) for folder in (self.folder, Path.cwd()))
        if here == there or not there.exists() or (here.exists() and here.samefile(there)):
            return str(here)
        if here.exists():
            raise ConfigError(
                f"{self.where}: {place}: {text!r} is {here}, because paths in a file are relative to the file, but {there} exists"
                " too; write the absolute path of the one that is meant"
            )
        raise ConfigError(
            f"{self.where}: {place}: {text!r} exists in the working directory, but paths in a file are relative to the file"
            f" ({self.folder}); write {os.path.relpath(there, self.folder)}, or give the path with --set {place}={text}"
        )


def _arguments(annotations: list[Any], origin: type) -> list[tuple[Any, ...]]:
    """The arguments of every `origin[...]` in the annotations and in their unions."""
    found = []
    for annotation in annotations:
        kind = typing.get_origin(annotation)
        if kind is origin:
            found.append(typing.get_args(annotation))
        elif kind in (Annotated, typing.Union, types.UnionType):
            args = typing.get_args(annotation)
            found += _arguments(list(args[:1] if kind is Annotated else args), origin)
    return found


def _models_of(annotations: list[Any]) -> list[type[BaseModel]]:
    return [model for annotation in annotations for model in _models(annotation)]


def _step(candidates: list[type[BaseModel]], part: str | int) -> list[type[BaseModel]] | None:
    """The models one level down; None if `part` is not a field of any (but a union's tag, or an index)."""
    for candidate in candidates:
        info: FieldInfo | None = candidate.model_fields.get(str(part))
        if info is not None:
            return _field_models(info)
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


def _walk(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[type[BaseModel]], list[int]]:
    """The models at a location, and the places in it that name a variant, not a field."""
    candidates, tags = [model], list[int]()
    named = False
    for place, part in enumerate(location):
        if named:  # a key chosen by the user, in a mapping of models
            named = False
            continue
        below = _step(candidates, part)
        tagged = _tagged(candidates, part)
        if below is None or len(tagged) < len(candidates):  # a kind may have the name of one of its fields
            tags.append(place)
            candidates = tagged
        else:
            named = any(_is_mapping(c.model_fields[str(part)].annotation) for c in candidates if part in c.model_fields)
            candidates = below
    return candidates, tags


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    candidates, _ = _walk(model, location)
    return [name for candidate in candidates for name in candidate.model_fields]
