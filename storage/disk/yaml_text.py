"""YAML as this program reads and writes it: UTF-8, no key twice, numbers as in YAML 1.2 with the text they were written as.

`1e-4` is a number (YAML 1.1 wants `1.0e-4`), `010` is ten and `1:30` is text (YAML 1.1: eight, and ninety), a date is text.
A number remembers its text, so that a field of text gets what the file says: a revision 12e45678 is no infinity."""

from __future__ import annotations

import re
from typing import Any

import yaml

_CHANGED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)


class WrittenInt(int):
    """An integer of a YAML file, with its text."""

    text: str


class WrittenFloat(float):
    """A floating-point number of a YAML file, with its text."""

    text: str


class Loader(yaml.SafeLoader):
    """Safe, refuses a key that occurs twice in a mapping, and constructs `WrittenInt` and `WrittenFloat`."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:  # before merge keys (<<) are resolved: what they bring may be set again
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise yaml.YAMLError(
                        f"the key {key.value!r} occurs twice, in line {lines[name]} and line {line}; remove one of them"
                    )
                lines[name] = line
        return node

    def written_int(self, node: Any) -> WrittenInt:
        text = self.construct_scalar(node).replace("_", "")
        digits = text.lstrip("+-")
        value = WrittenInt(text, {"0b": 2, "0x": 16}.get(digits[:2], 10))
        value.text = node.value
        return value

    def written_float(self, node: Any) -> WrittenFloat:
        text = self.construct_scalar(node).replace("_", "").lower()
        value = WrittenFloat(text.replace(".inf", "inf").replace(".nan", "nan"))
        value.text = node.value
        return value


class Dumper(yaml.SafeDumper):
    """Safe, and quotes text that `Loader` would read as a number."""


for _class in (Loader, Dumper):
    if _class is Loader:
        _class.yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in known if tag not in _CHANGED]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
    _class.add_implicit_resolver(_CHANGED[1], _FLOAT, list("-+.0123456789"))
    _class.add_implicit_resolver(_CHANGED[0], _INT, list("-+0123456789"))
Loader.add_constructor(_CHANGED[0], Loader.written_int)
Loader.add_constructor(_CHANGED[1], Loader.written_float)


def load(data: bytes | str) -> Any:
    """The value of a YAML document. Bytes are UTF-8, with or without BOM. Raises yaml.YAMLError, also for a key that occurs
    twice, and UnicodeDecodeError."""
    value = yaml.load(data.decode("utf-8-sig") if isinstance(data, bytes) else data, Loader)
    _refuse_cycles(value, ())
    return value


def _refuse_cycles(value: Any, above: tuple[int, ...]) -> None:
    if isinstance(value, (dict, list)):
        if id(value) in above:
            raise yaml.YAMLError("an anchor contains an alias of itself, which would have no end; remove the alias")
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_cycles(item, (*above, id(value)))


def dump(value: Any) -> str:
    """The value as YAML that `load` reads back."""
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))


def plain(value: Any) -> Any:
    """The value with ordinary numbers in place of those that remember their text."""
    if isinstance(value, WrittenInt):
        return int(value)
    if isinstance(value, WrittenFloat):
        return float(value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value
