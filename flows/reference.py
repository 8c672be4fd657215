"""The config's reference, written from the schema: names, types, defaults and meanings have one source."""

from __future__ import annotations

import json
from typing import Any

from flows.experiment import Experiment
from flows.study import Study

INTRO = """# Config reference

Written from the schema by `python -m flows.reference > docs/config.md`; a test holds it true. Everything above `runtime` is
identity: it decides what is computed and enters the keys. `runtime` says where and how, `policy` how long: both may change
between two calls of a run. `base: other.yaml` lays a config over another one; `--set a.b=c` overrides a field.
"""

STUDY = """# A study's file

What `opd study` reads; see configs/study.yaml.
"""


def reference() -> str:
    """Markdown: a section per model of the config, a line per field."""
    schema = Experiment.model_json_schema()
    models: dict[str, Any] = schema["$defs"]
    sections = [INTRO, _section("Experiment", schema)]
    sections += [_section(name, model) for name, model in models.items() if name != "Fork" and "properties" in model]
    study = Study.model_json_schema()
    sections += [STUDY, _section("Study", study), *(_section(name, model) for name, model in study["$defs"].items())]
    return "\n".join(sections).rstrip() + "\n"


def _section(name: str, model: dict[str, Any]) -> str:
    about = " ".join((model.get("description") or "").split("\n\n")[0].split())
    lines = [f"## {name}", "", about, "", "| field | type | default | meaning |", "|---|---|---|---|"]
    required = set(model.get("required", ()))
    for field, info in model["properties"].items():
        default = (
            "required"
            if field in required
            else f"`{json.dumps(info['default'])}`"
            if "default" in info
            else "see there"
        )
        if len(default) > 60:
            default = "see there"
        cells = (f"`{field}`", _type(info), default, info.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(info: dict[str, Any]) -> str:
    if "$ref" in info:
        name = info["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in info:
        return f"`{info['const']}`"
    if "enum" in info:
        return " or ".join(f"`{value}`" for value in info["enum"])
    for union in ("anyOf", "oneOf"):
        if union in info:
            return " or ".join(_type(part) for part in info[union])
    kind = info.get("type", "any")
    if kind == "array":
        return f"list of {_type(info['items'])}" if "items" in info else "list"
    return str(kind) + _range(info)


def _range(info: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {info[key]:g}" for key, sign in words.items() if key in info]
    return f" {', '.join(limits)}" if limits else ""


if __name__ == "__main__":
    print(reference(), end="")
